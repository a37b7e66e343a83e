"""The Triton kernels against plain torch: in Triton's interpreter on the CPU, and on a GPU where there is one."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from losia_dist.errors import ConfigError
from losia_dist.kernels import switch
from losia_dist.subnet import blocks

CASES = {
    "plain": {},
    "single": {"m": 1, "n": 1, "r": 1, "c": 1},
    "ragged": {"m": 301, "n": 517, "r": 37, "c": 129},
    "all rows": {"rows": False, "r": 40},
    "all columns": {"columns": False, "c": 53},
    "all": {"rows": False, "columns": False, "r": 40, "c": 53},
    "transposed": {"transposed": True},
    "transposed, all rows": {"transposed": True, "rows": False, "r": 40},
    "wide": {"m": 3, "n": 700, "r": 2, "c": 600},
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def places(total, count, there=True):
    return torch.randperm(total)[:count].sort().values.to(DEVICE) if there else None


def written(write, weight_dtype, subnet_dtype, m=40, n=53, r=7, c=11, rows=True, columns=True, transposed=False):
    torch.manual_seed(1)
    weight = torch.randn(*((n, m) if transposed else (m, n)), device=DEVICE).to(weight_dtype)
    subnet = torch.randn(r, c, device=DEVICE)
    if switch.is_interpreted():  # its cast to bf16 cuts off where a GPU rounds to nearest: give it nothing to round
        subnet = subnet.to(weight_dtype)
    subnet = subnet.to(subnet_dtype).requires_grad_()
    write(weight.t() if transposed else weight, subnet, places(m, r, rows), places(n, c, columns))
    return weight


def gradient(compute, dtype, t=45, r=7, m=40, c=11, rows=True, strided=False):
    torch.manual_seed(2)
    grad_y = torch.randn(t, 2 * m if strided else m, device=DEVICE).to(dtype)
    grad_y = grad_y[:, ::2] if strided else grad_y
    kept = torch.randn(c, t, device=DEVICE).to(dtype).t() if strided else torch.randn(t, c, device=DEVICE).to(dtype)
    return compute(grad_y, kept, places(m, r) if rows else None)


def compare_writes():
    from losia_dist.kernels.write import write_subnet

    for name, case in CASES.items():
        for dtypes in DTYPES:
            ours, expected = written(write_subnet, *dtypes, **case), written(blocks.write_subnet, *dtypes, **case)
            assert torch.equal(ours, expected), (name, dtypes)
    torch.manual_seed(1)
    weight = torch.zeros(4, 4, device=DEVICE)
    before = weight._version
    write_subnet(weight, torch.ones(2, 2, device=DEVICE), places(4, 2), places(4, 2))
    assert weight.sum() == 4 and weight._version == before  # autograd sees nothing


def compare_gradients():
    from losia_dist.kernels.gradient import subnet_gradient

    def exact(grad_y, kept, rows):
        return blocks.subnet_gradient(grad_y.double(), kept.double(), rows)

    shapes = [{}, {"t": 1, "r": 1, "c": 1}, {"t": 700, "r": 33, "c": 70}, {"rows": False}, {"strided": True}, {"t": 513}]
    for shape in shapes:
        for dtype, out in DTYPES:
            ours, expected = gradient(partial(subnet_gradient, dtype=out), dtype, **shape), gradient(exact, dtype, **shape)
            assert ours.dtype == out and ours.shape == expected.shape
            tolerance = 2**-8 if out == torch.bfloat16 else 1e-5  # bf16: rounded once, at the end
            assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), (shape, dtype, out)
    assert gradient(subnet_gradient, torch.bfloat16).dtype == torch.bfloat16
    none = subnet_gradient(torch.ones(0, 4, device=DEVICE), torch.ones(0, 3, device=DEVICE), None)
    assert torch.equal(none, torch.zeros(4, 3, device=DEVICE))


def compare_in_a_compiled_function():
    """As the subnet linear calls them: inside an operator that torch.compile does not look into."""
    from losia_dist.kernels.gradient import subnet_gradient

    @torch.library.custom_op("losia_test::gradient", mutates_args=())
    def operator(grad_y: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return subnet_gradient(grad_y, kept, None)

    @operator.register_fake
    def _(grad_y, kept):
        return grad_y.new_empty(grad_y.shape[1], kept.shape[1])

    grad_y, kept = torch.randn(20, 6, device=DEVICE), torch.randn(20, 5, device=DEVICE)
    compiled = torch.compile(lambda *args: operator(*args) * 2, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(grad_y, kept), 2 * grad_y.t() @ kept, atol=1e-4)


@pytest.mark.skipif(not switch.has_triton(), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the same, compiled")
@pytest.mark.parametrize("comparison", ["compare_writes", "compare_gradients", "compare_in_a_compiled_function"])
def test_kernels_equal_torch_in_the_interpreter(comparison):
    """In a process of its own: Triton decides at import whether it interprets."""
    code = f"from tests.unit import test_kernels; test_kernels.{comparison}()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("comparison", [compare_writes, compare_gradients, compare_in_a_compiled_function])
def test_kernels_equal_torch_on_a_gpu(comparison):
    pytest.importorskip("triton")
    comparison()


@pytest.mark.gpu
def test_a_weight_of_more_than_2_to_the_31_elements_is_written_on_a_gpu():
    pytest.importorskip("triton")
    from losia_dist.kernels.write import write_subnet

    rows, columns = 2**18 + 8, 2**13
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    at = torch.tensor([0, rows - 1], device="cuda")
    write_subnet(weight, torch.ones(2, columns, device="cuda"), at, None)
    assert weight[-1].sum() == weight[0].sum() == columns and weight[1:-1].count_nonzero() == 0


def test_by_default_torch_does_everything(monkeypatch):
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    assert not any(switch.is_on(name, torch.zeros(1)) for name in switch.NAMES)


def test_auto_leaves_tensors_on_the_cpu_to_torch(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "auto")
    switch.check_kernels()
    assert not switch.is_on("write", torch.zeros(1))


def test_a_kernel_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(switch, "has_triton", lambda: True)
    with switch.use_kernels("gradient"):
        assert not switch.is_on("write", torch.zeros(1))
        with pytest.raises(ConfigError, match="'gradient' runs on GPUs, and a tensor is on cpu"):
            switch.is_on("gradient", torch.zeros(1))
    assert switch.kernel_choice() == "none"
    monkeypatch.setattr(switch, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="these kernels need Triton"), switch.use_kernels("write,gradient"):
        pass
    monkeypatch.setenv(switch.VARIABLE, "write,speed")
    with pytest.raises(ConfigError, match="'speed' is no kernel. Give none, auto, or a list of write, gradient"):
        switch.check_kernels()
