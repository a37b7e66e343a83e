"""What a plan knows of a decoder model: sizes from its configuration, and its layers as Transformers builds them.

No weights are touched: models are built on the meta device. Dimensions: H hidden size, A = heads x head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

from torch.nn import functional

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.subnet.expert_weights import is_of
from losia_dist.subnet.listed_experts import is_listed
from losia_dist.subnet.targets import find_targets

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
    """A decoder model, dense or a mixture of experts of any family that can be converted.

    name: as it was asked for. family: Transformers' model type. intermediate: of dense layers. head_size: elements of one
    attention head. context: positions it was trained for. tied: the output layer shares the embedding's weight. settings: the
    Transformers configuration it was read from; None for a dense built-in shape. source: path or hub name for the launch
    command, or None.
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

    @property
    def attended(self) -> int:
        """A: elements of all attention heads of one token. DeepSeek's queries and values differ: the mean of both."""
        values = getattr(self.settings, "v_head_dim", None)
        return self.heads * (self.head_size if values is None else (self.settings.qk_head_dim + values) // 2)

    @cached_property
    def measured(self) -> dict[Any, Any]:
        """What was measured of its layers' activations, by the way they are used."""
        return {}

    @cached_property
    def kinds(self) -> list[tuple[int, Layer]]:
        """Decoder layers in the model's order: runs of equal ones, and how many each has.

        Raises:
            ConfigError: what Transformers does not build, or this package cannot convert.
        """
        model = self.build()
        layers = decoder_of(model).layers
        held: list[list[Weight]] = [[] for _ in layers]
        of_module = {id(module): place for place, layer in enumerate(layers) for module in layer.modules()}
        try:
            targets = find_targets(model, LoSiAConfig(selection="random"))
        except LoSiAError as error:
            raise self.unplannable(str(error).split(". ")[0]) from error
        for target in targets:
            if target.layout.experts is None and is_listed(target.name):
                raise self.unplannable(f"its experts are modules of their own ({target.name!r}), not in one weight")
            experts, name = target.layout.count, target.weight_name.removeprefix(f"{target.group_name}.")
            taken = self._experts_per_token if experts > 1 else 1
            if is_of(target.owner, "llama4", "Llama4TextExperts"):
                taken = experts  # all tokens go through all of them, scaled
            sizes = target.layout.matrix_shape(tuple(target.weight.shape))
            held[of_module[id(target.module)]].append(Weight(*sizes, experts, taken, name))
        found = [
            Layer(tuple(weights), sum(p.numel() for p in layer.parameters()))
            for weights, layer in zip(held, layers, strict=True)
        ]
        return [(len(list(run)), layer) for layer, run in groupby(found)]

    @property
    def fullest(self) -> Layer:
        """The decoder layer with most parameters."""
        return max((layer for _, layer in self.kinds), key=lambda layer: layer.parameters)

    @property
    def has_experts(self) -> bool:
        return any(weight.experts > 1 for weight in self.fullest.weights)

    @property
    def narrowest(self) -> int:
        """The smallest side of the decoder layers' weight matrices."""
        return min(min(weight.m, weight.n) for _, layer in self.kinds for weight in layer.weights)

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, output layer (once if tied), last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return sum(count * layer.parameters for count, layer in self.kinds) + self.outer_parameters

    @property
    def active_weights(self) -> float:
        """Elements of all decoder layers' weight matrices that one token is multiplied with."""
        return sum(count * w.taken * w.m * w.n for count, layer in self.kinds for w in layer.weights)

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
        wide = getattr(self.settings, "v_head_dim", None) not in (None, getattr(self.settings, "qk_head_dim", None))
        return _padded_attention() if wide else "sdpa"

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

    def unplannable(self, why: Any) -> ConfigError:
        """To be raised."""
        return ConfigError(
            f"--model {self.name} ({self.family}) cannot be planned: {why}. Take the built-in shape that is nearest to it."
        )

    @property
    def _experts_per_token(self) -> int:
        values = _values(self.settings)
        names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "top_k")
        for count in map(values.get, names):
            if isinstance(count, int) and count > 0:
                return count
        raise ConfigError(
            f"--model {self.name}: its configuration does not say how many experts a token takes; add num_experts_per_tok to "
            "its config.json to plan it."
        )


def _values(settings: Any) -> dict[str, Any]:
    values = settings.to_dict()
    return values | (values.get("ffn_config") or {})  # DBRX's experts


def says_experts(settings: Any) -> bool:
    """Whether a configuration speaks of several experts."""
    return any("expert" in name and type(value) is int and value > 1 for name, value in _values(settings).items())


def decoder_of(model: Any) -> Any:
    """The module of a causal language model that holds its decoder layers, as `layers`."""
    return next(module for module in model.get_decoder().modules() if hasattr(module, "layers"))


@cache
def _padded_attention() -> str:
    """Name of an attention for values narrower than queries (DeepSeek).

    torch's CPU kernel takes no such values and would form all scores, which kernels of GPUs never do.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> tuple[Any, None]:
        padded = functional.pad(value, (0, query.shape[-1] - value.shape[-1]))
        found, _ = sdpa_attention_forward(module, query, key, padded, *args, **options)
        return found[..., : value.shape[-1]], None

    ALL_ATTENTION_FUNCTIONS.register("losia_padded", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("losia_padded", sdpa_mask)
    return "losia_padded"
