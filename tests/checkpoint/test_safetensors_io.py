"""The one codec: what it writes the library reads, what the library writes it reads, and damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from losia_dist.checkpoint import atomic_files
from losia_dist.checkpoint.safetensors_io import DTYPES, read_header
from losia_dist.recipe.weights.stored import StoredFile

TENSORS = {
    "byte": torch.tensor([True, False, True]),
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def test_what_is_written_the_library_reads(tmp_path):
    tensors = TENSORS | {name: torch.zeros(3).to(dtype) for name, dtype in DTYPES.items()}
    record = atomic_files.write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name].float(), t.float()) for name, t in tensors.items())
    size, _, places = read_header(tmp_path / "file")
    assert size == record.size == (tmp_path / "file").stat().st_size and places.keys() == tensors.keys()


def test_what_the_library_writes_is_read_where_it_lies(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})
    stored = StoredFile(tmp_path / "file")
    assert {name: tensor.dtype for name, tensor in stored.tensors.items()} == {n: t.dtype for n, t in TENSORS.items()}
    assert all(torch.equal(stored.tensors[name].read(), tensor) for name, tensor in TENSORS.items())
    middle = torch.empty(5)
    stored.tensors["matrix"].read_into(middle, 3)
    assert middle.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "has 0 bytes of at least 8: it is truncated or damaged"),
        (lambda data: data[:40], "has 40 bytes of at least"),
        (lambda data: data[:-1], "it is truncated or damaged"),
        (lambda data: data + b"x", "is not a safetensors file, or is damaged"),
        (lambda data: data.replace(b"[3,4]", b"[3,5]"), "is not a safetensors file, or is damaged"),
        (lambda data: data[:8] + b"}" + data[9:], "is not a safetensors file, or is damaged"),
    ],
)
def test_damage_is_named(tmp_path, damage, said):
    save_file(TENSORS, tmp_path / "file")
    (tmp_path / "file").write_bytes(damage((tmp_path / "file").read_bytes()))
    with pytest.raises(ValueError, match=said):
        read_header(tmp_path / "file")
