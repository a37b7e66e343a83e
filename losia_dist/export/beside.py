"""What belongs beside a model's weights: everything of its directory that is not weights, training state or of no use to it.

Transformers and a model's own code read files of many names (vocabularies, templates, processors, modules), and new ones with
every release. So what is left behind is named here, and not what is taken.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

LARGEST = 256 << 20  # bytes; the largest vocabularies have some 40 MB
TEMPLATES = "additional_chat_templates"  # named chat templates, as Transformers keeps them

# Weights in any format, and what is unpickled: none of it is this model's any more. `.model` is SentencePiece's.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".tflite", ".ot", ".npz", ".npy", ".pkl", ".pickle", ".distcp", ".nemo", ".engine", ".mlmodel", ".index.json"),
)
# Data, pictures, archives and logs that people keep beside a model.
_UNRELATED = (
    *(".parquet", ".arrow", ".jsonl", ".csv", ".tsv", ".db", ".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".pyc"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".pdf", ".html", ".ipynb"),
    *(".lock", ".tmp", ".log"),
)
_NAMES = {
    *("config.json", "generation_config.json"),  # the export writes its own
    *("README.md", "modelcard.json"),  # they speak of the weights that were there before
    *("adapter_config.json", "params.json"),  # of weights in other forms
    *("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),  # exports are not
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "zero_to_fp32.py", "latest"),
    *("checkpoint-is-incomplete.txt", "losia_config.json", "losia_run.json", "losia_memory.json", "summary.json"),
}


def copy_beside(base_model: str | Path, directory: Path) -> None:
    """Copy what a model needs besides weights and configuration: tokenizer, processors, templates and code of its own.

    Of directories inside, those that hold a processor's part (a `..._config.json`, and neither weights nor a model of its
    own), named chat templates, and `.py` files. Files larger than `LARGEST` are left out with a warning.
    """
    base = Path(base_model)
    _copy(base, directory, _files(base))
    has_code = any(path.suffix == ".py" for path in base.iterdir())
    for inner in _directories(base):
        _copy_inner(inner, directory / inner.name, has_code)


def _copy_inner(source: Path, target: Path, has_code: bool) -> None:
    names = {path.name for path in source.iterdir() if path.is_file()}
    is_part = any(name.endswith("_config.json") for name in names) and "config.json" not in names
    if source.name == TEMPLATES or (is_part and not any(_is_weights(name) for name in names)):
        _copy(source, target, _files(source))
        return
    code = [path for path in _files(source) if path.suffix == ".py"]
    if has_code and code:
        _copy(source, target, code)
        for inner in _directories(source):
            _copy_inner(inner, target / inner.name, has_code)


def _files(directory: Path) -> list[Path]:
    """Those that belong to a model. What links lead to is taken: the hub's cache consists of links."""
    return [path for path in sorted(directory.iterdir()) if path.is_file() and _belongs(path.name)]


def _directories(directory: Path) -> list[Path]:
    return [
        path for path in sorted(directory.iterdir()) if path.is_dir() and not path.is_symlink() and path.name[0] not in "._"
    ]


def _belongs(name: str) -> bool:
    lower = name.lower()
    return not (
        name.startswith(".") or name in _NAMES or _is_weights(name) or lower.endswith(_UNRELATED) or ".tfevents." in lower
    )


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS)


def _copy(source: Path, target: Path, paths: list[Path]) -> None:
    for path in paths:
        size = path.stat().st_size
        if size > LARGEST:
            warnings.warn(
                f"{path} ({size:,} bytes) was not copied beside the exported model, being larger than any vocabulary: copy it "
                "yourself if the model reads it.",
                stacklevel=2,
            )
            continue
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)
