"""What a plan knows of a decoder model: `ModelShape`, by formulas for dense ones. No weights are touched.

Dimensions: H hidden size, I intermediate size of the gated MLP, A = heads x head size, K = key-value heads x head size.
"""

from __future__ import annotations

from dataclasses import dataclass
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
