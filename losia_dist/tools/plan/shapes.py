"""Shapes of decoder models: built in, or read from a Transformers configuration. No weights are touched."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from losia_dist.errors import ConfigError
from losia_dist.tools.plan.model_shape import SETTINGS, ModelShape, says_experts

# Transformers' model types of dense decoders that are planned: attention with q, k, v, o and an MLP with gate, up, down.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# name: family, layers, H, I, heads, key-value heads, head size, vocabulary, context, tied. From the published files.
_BUILT_IN = {
    "llama-2-7b": ("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096, False),
    "llama-2-13b": ("llama", 40, 5120, 13824, 40, 40, 128, 32000, 4096, False),
    "llama-2-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 32000, 4096, False),
    "llama-3-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, False),
    "llama-3-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, 8192, False),
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, False),
    "llama-3.1-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072, False),
    "llama-3.3-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072, False),
    "llama-3.1-405b": ("llama", 126, 16384, 53248, 128, 8, 128, 128256, 131072, False),
    "llama-3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, True),
    "llama-3.2-3b": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072, True),
    "mistral-7b": ("mistral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, False),
    "mistral-nemo-12b": ("mistral", 40, 5120, 14336, 32, 8, 128, 131072, 131072, False),
    "mistral-small-24b": ("mistral", 40, 5120, 32768, 32, 8, 128, 131072, 32768, False),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, True),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 32768, True),
    "qwen2.5-3b": ("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, 32768, True),
    "qwen2.5-7b": ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, False),
    "qwen2.5-14b": ("qwen2", 48, 5120, 13824, 40, 8, 128, 152064, 32768, False),
    "qwen2.5-32b": ("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, False),
    "qwen2.5-72b": ("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, 32768, False),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, True),
    "qwen3-1.7b": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960, True),
    "qwen3-4b": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 40960, True),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, False),
    "qwen3-14b": ("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, 40960, False),
    "qwen3-32b": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, 40960, False),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, True),
}
BUILT_IN = {name: ModelShape(name, *sizes) for name, sizes in _BUILT_IN.items()}
# Mixtures of experts: the same, and instead of "tied" what else differs from Transformers' defaults of the type.
MIXTURES: dict[str, tuple[Any, ...]] = {
    "qwen3-30b-a3b": ("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, 40960, {"moe_intermediate_size": 768}),
    "qwen3-235b-a22b": ("qwen3_moe", 94, 4096, 12288, 64, 4, 128, 151936, 40960, {"moe_intermediate_size": 1536}),
    "gpt-oss-20b": ("gpt_oss", 24, 2880, 2880, 64, 8, 64, 201088, 131072, {"num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", 36, 2880, 2880, 64, 8, 64, 201088, 131072, {"num_local_experts": 128}),
    "deepseek-v3": ("deepseek_v3", 61, 7168, 18432, 128, 128, 64, 129280, 163840, {"qk_rope_head_dim": 64}),
    "mixtral-8x7b": ("mixtral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, {}),
    "mixtral-8x22b": ("mixtral", 56, 6144, 16384, 48, 8, 128, 32768, 65536, {}),
    "glm-4.5-air": ("glm4_moe", 46, 4096, 10944, 96, 8, 128, 151552, 131072, {"attention_bias": True}),
}


def find_shape(name: str) -> ModelShape:
    """A built-in shape by name, the shape of a local model directory (or its config.json), or of a model on the hub.

    Raises:
        ConfigError: no such model, or one that the plan does not cover.
    """
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    if name.lower() in MIXTURES:
        return _mixture(name.lower())
    path = Path(name)
    if path.exists() or "/" in name:
        return shape_of(_read(name, path), name)
    nearest = difflib.get_close_matches(name.lower(), [*BUILT_IN, *MIXTURES], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"built in: {', '.join([*BUILT_IN, *MIXTURES])}."
    raise ConfigError(
        f"--model {name}: no built-in shape, no directory and no hub name (owner/name) is called so; {hint} A directory with a "
        "config.json works too."
    )


@cache
def _mixture(name: str) -> ModelShape:
    """The shape of one of MIXTURES."""
    from transformers import AutoConfig

    family, *sizes, more = MIXTURES[name]
    named = dict(zip(SETTINGS, sizes, strict=True))
    settings = AutoConfig.for_model(family, **{SETTINGS[field]: size for field, size in named.items()}, **more)
    return ModelShape(name, family, **named, tied=False, settings=settings)


def shape_of(settings: Any, name: str) -> ModelShape:
    """The shape in a Transformers configuration of one of FAMILIES, or of a mixture of experts.

    Raises:
        ConfigError: another architecture, sizes that are missing, or experts that cannot hold subnets.
    """
    family = getattr(settings, "model_type", None)
    if family not in FAMILIES:
        settings = settings.get_text_config()
        if not says_experts(settings):
            raise ConfigError(
                f"--model {name} is a {family!r} model; plans cover the dense decoders {', '.join(FAMILIES)}, and mixtures of "
                "experts. Take the built-in shape that is nearest to it."
            )
        family = settings.model_type
    sizes: dict[str, Any] = {field: getattr(settings, name, None) for field, name in SETTINGS.items()}
    if family not in FAMILIES:
        sizes["intermediate"] = sizes["intermediate"] or 1  # of dense layers, where there are such
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_size"] = sizes["head_size"] or settings.hidden_size // settings.num_attention_heads
    for option, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"--model {name}: its configuration says {option}: {size!r}; a whole number above 0 is needed.")
    tied = bool(getattr(settings, "tie_word_embeddings", False))
    shape = ModelShape(name, family, **sizes, tied=tied, settings=settings, source=name)
    _ = shape.kinds  # what Transformers or this package cannot build is refused here
    return shape


def _read(name: str, path: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"--model {name}: the directory has no config.json; give a model's directory.")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"--model {name}: its configuration could not be read ({str(error).splitlines()[0]}). Without a network take a "
            f"local directory or a built-in shape: {', '.join(BUILT_IN)}."
        ) from error
