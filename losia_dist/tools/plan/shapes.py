"""Sizes of decoder models: built in, or read from a Transformers configuration. No weights are touched.

Dense models by formulas; mixtures of experts as Transformers builds them (`tools.plan.mixtures`).

Dimensions: H hidden size, I intermediate size of the gated MLP, A = heads x head size, K = key-value heads x head size.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from losia_dist.errors import ConfigError

# Transformers' model types whose decoder layer is attention with q, k, v, o and an MLP with gate, up, down.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SETTINGS = {  # ModelShape's fields in a Transformers configuration
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}


class Weight(NamedTuple):
    """Matrices [m, n] (outputs first) of `experts` in one weight, of which a token takes `taken`: 1 and 1 of a linear layer.

    Of a part of the experts a token takes `taken` in the mean.
    """

    m: int
    n: int
    experts: int = 1
    taken: float = 1
    name: str = ""

    @property
    def elements(self) -> int:
        return self.experts * self.m * self.n


class Layer(NamedTuple):
    """weights: those of a decoder layer that can hold subnets, in the model's order. parameters: all of the layer."""

    weights: tuple[Weight, ...]
    parameters: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder model; this class is of the dense ones.

    name: as it was asked for. family: one of FAMILIES. head_size: elements of one attention head. context: positions it was
    trained for. tied: the output layer shares the embedding's weight. settings: the Transformers configuration it was read
    from; None for a built-in shape. source: path or hub name for the launch command, or None.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    tied: bool
    settings: Any = None
    source: str | None = None

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer by name: (m, n), outputs first."""
        hidden, inner, attended, keys = self.hidden, self.intermediate, self.attended, self.kv_heads * self.head_size
        return {
            "q_proj": (attended, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, attended),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def attended(self) -> int:
        """A: elements of all attention heads of one token."""
        return self.heads * self.head_size

    def kinds(self) -> list[tuple[int, Layer]]:
        """Decoder layers in the model's order: runs of equal ones, and how many each has."""
        return [
            (
                self.layers,
                Layer(tuple(Weight(*size, name=name) for name, size in self.linears().items()), self.layer_parameters),
            )
        ]

    @property
    def fullest(self) -> Layer:
        """The decoder layer with most parameters."""
        return max((layer for _, layer in self.kinds()), key=lambda layer: layer.parameters)

    @property
    def has_experts(self) -> bool:
        return any(weight.experts > 1 for weight in self.fullest.weights)

    @property
    def narrowest(self) -> int:
        """The smallest side of the decoder layers' weight matrices."""
        return min(min(weight.m, weight.n) for _, layer in self.kinds() for weight in layer.weights)

    @property
    def layer_extras(self) -> int:
        """Parameters of a decoder layer outside its weight matrices: norms, and the biases of Qwen2."""
        norms = 2 * self.hidden + (2 * self.head_size if self.family == "qwen3" else 0)
        return norms + (self.attended + 2 * self.kv_heads * self.head_size if self.family == "qwen2" else 0)

    @property
    def layer_weights(self) -> int:
        """Elements of a decoder layer's weight matrices."""
        return sum(m * n for m, n in self.linears().values())

    @property
    def layer_parameters(self) -> int:
        return self.layer_weights + self.layer_extras

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, output layer (once if tied), last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return sum(count * layer.parameters for count, layer in self.kinds()) + self.outer_parameters

    @property
    def active_weights(self) -> float:
        """Elements of all decoder layers' weight matrices that one token is multiplied with."""
        return sum(count * w.taken * w.m * w.n for count, layer in self.kinds() for w in layer.weights)

    def configuration(self) -> Any:
        """A Transformers configuration of this shape (a new one)."""
        from transformers import AutoConfig

        if self.settings is not None:
            values = self.settings.to_dict()
            full = getattr(self.settings, SETTINGS["layers"])
            if self.layers != full:  # and lists that have a value for each layer
                lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == full}
                values |= {SETTINGS["layers"]: self.layers, **{key: value[: self.layers] for key, value in lists.items()}}
            return type(self.settings).from_dict(values)
        sizes: dict[str, Any] = {name: getattr(self, field) for field, name in SETTINGS.items()}
        if self.family == "qwen2":  # whose heads always share the hidden size
            del sizes["head_dim"]
        if self.family == "mistral":
            sizes["sliding_window"] = None
        return AutoConfig.for_model(self.family, **sizes, tie_word_embeddings=self.tied)

    @property
    def attention(self) -> str:
        """The attention it is built with, where it has such."""
        return "sdpa"

    def build(self) -> Any:
        """The model in bf16 on the meta device. Raises: ConfigError: Transformers builds no such model."""
        import torch
        from transformers import AutoModelForCausalLM

        settings = self.configuration()
        try:
            with torch.device("meta"):
                try:
                    return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, attn_implementation=self.attention)
                except ValueError:  # has no such attention
                    return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, attn_implementation="eager")
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"--model {self.name}: Transformers builds no causal language model of type {self.family!r} from its "
                f"configuration ({str(error).splitlines()[0]}). Take the built-in shape that is nearest to it."
            ) from error


# name: family, layers, H, I, heads, key-value heads, head size, vocabulary, context, tied. From the published files.
_BUILT_IN = {
    "llama-2-7b": ("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096, False),
    "llama-2-13b": ("llama", 40, 5120, 13824, 40, 40, 128, 32000, 4096, False),
    "llama-2-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 32000, 4096, False),
    "llama-3-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, False),
    "llama-3-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, 8192, False),
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, False),
    "llama-3.1-70b": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072, False),
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


def find_shape(name: str) -> ModelShape:
    """A built-in shape by name, the shape of a local model directory (or its config.json), or of a model on the hub.

    Raises:
        ConfigError: no such model, or one that the plan does not cover.
    """
    from losia_dist.tools.plan.mixtures import MIXTURES, built_in_mixture

    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    if name.lower() in MIXTURES:
        return built_in_mixture(name.lower())
    path = Path(name)
    if path.exists() or "/" in name:
        return shape_of(_read(name, path), name)
    nearest = difflib.get_close_matches(name.lower(), [*BUILT_IN, *MIXTURES], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"built in: {', '.join([*BUILT_IN, *MIXTURES])}."
    raise ConfigError(
        f"--model {name}: no built-in shape, no directory and no hub name (owner/name) is called so; {hint} A directory with a "
        "config.json works too."
    )


def shape_of(settings: Any, name: str) -> ModelShape:
    """The shape in a Transformers configuration of one of FAMILIES, or of a mixture of experts.

    Raises:
        ConfigError: another architecture, sizes that are missing, or experts that cannot hold subnets.
    """
    from losia_dist.tools.plan.mixtures import MixtureShape, says_experts

    family, kind = getattr(settings, "model_type", None), ModelShape
    if family not in FAMILIES:
        settings = settings.get_text_config()
        if not says_experts(settings):
            raise ConfigError(
                f"--model {name} is a {family!r} model; plans cover the dense decoders {', '.join(FAMILIES)}, and mixtures of "
                "experts. Take the built-in shape that is nearest to it."
            )
        family, kind = settings.model_type, MixtureShape
    sizes: dict[str, Any] = {field: getattr(settings, name, None) for field, name in SETTINGS.items()}
    if kind is not ModelShape:
        sizes["intermediate"] = sizes["intermediate"] or 1  # of dense layers, where there are such
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    sizes["head_size"] = sizes["head_size"] or settings.hidden_size // settings.num_attention_heads
    for option, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"--model {name}: its configuration says {option}: {size!r}; a whole number above 0 is needed.")
    tied = bool(getattr(settings, "tie_word_embeddings", False))
    shape = kind(name, family, **sizes, tied=tied, settings=settings, source=name)
    shape.kinds()  # what Transformers or this package cannot build is refused here
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
