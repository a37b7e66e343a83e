"""Sizes of mixtures of experts, taken from the model that Transformers builds on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.tools.plan.model_shape import SETTINGS, Layer, ModelShape, Weight


@dataclass(frozen=True)
class MixtureShape(ModelShape):
    """A mixture of experts of any family that can be converted. intermediate: of its dense layers, where it has such."""

    @property
    def attended(self) -> int:
        """Mean of what one token has in all heads of queries and of values (DeepSeek's differ): what attention multiplies."""
        values = getattr(self.settings, "v_head_dim", None)
        return super().attended if values is None else self.heads * (self.settings.qk_head_dim + values) // 2

    @property
    def attention(self) -> str:
        settings = self.settings
        wide = getattr(settings, "v_head_dim", None) not in (None, getattr(settings, "qk_head_dim", None))
        return _padded_attention() if wide else super().attention

    def linears(self) -> dict[str, tuple[int, int]]:
        return {weight.name: (weight.m, weight.n) for weight in self.fullest.weights}

    @property
    def layer_parameters(self) -> int:
        return self.fullest.parameters

    @cached_property
    def measured(self) -> dict[Any, Any]:
        """What was measured of its layers' activations, by the way they are used."""
        return {}

    def kinds(self) -> list[tuple[int, Layer]]:
        return self._kinds

    @cached_property
    def _kinds(self) -> list[tuple[int, Layer]]:
        # Here, as torch takes seconds to import and dense models need none of it.
        from losia_dist.subnet.expert_weights import is_of
        from losia_dist.subnet.listed_experts import is_listed
        from losia_dist.subnet.targets import find_targets

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
    from torch.nn import functional
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


# name: model type, layers, H, I, heads, key-value heads, head size, vocabulary, context; what else differs from Transformers'
# defaults of the type. From the published files.
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


@cache
def built_in_mixture(name: str) -> MixtureShape:
    """The shape of one of MIXTURES."""
    from transformers import AutoConfig

    family, *sizes, more = MIXTURES[name]
    named = dict(zip(SETTINGS, sizes, strict=True))
    settings = AutoConfig.for_model(family, **{SETTINGS[field]: size for field, size in named.items()}, **more)
    return MixtureShape(name, family, **named, tied=False, settings=settings)
