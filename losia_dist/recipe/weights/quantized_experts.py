"""`from_pretrained` that quantizes the experts of a mixture too, each weight as soon as it is read.

Transformers leaves fused experts, most of a mixture, as they are where it quantizes by bitsandbytes. It takes quantizers of
others by name: this one quantizes as its own does, and experts beside.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.subnet.expert_weights import weights_of
from losia_dist.subnet.four_bits import quantize_4bit

_METHOD = "losia_bitsandbytes_4bit"


def four_bit_settings(form: str, compute_dtype: torch.dtype, *, keeps_codes: bool = True) -> Any:
    """A `quantization_config` for `from_pretrained`: linear layers of the body and fused experts in "nf4" or "fp4", with
    quantized scales. bitsandbytes is installed.

    The whole of one weight is in memory before it is quantized, and on the GPU, if there is one: the experts of one layer.

    Args:
        keeps_codes: if not, each weight's codes go as soon as they are made, and its scales stay: the parameter is on the meta
            device, and gets its codes from another rank.
    """
    made = _config_class()(
        load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype
    )
    made.keeps_codes = keeps_codes
    return made


@cache
def _config_class() -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer

    class FourBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
        """`BitsAndBytesConfig` under a name of its own."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.quant_method = _METHOD

    register_quantizer(_METHOD)(_quantizer_class())
    register_quantization_config(_METHOD)(FourBitConfig)
    return FourBitConfig


def _quantizer_class() -> Any:
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

    class Quantize(Bnb4bitQuantize):  # type: ignore[misc]
        """One weight, which comes whole in a floating dtype, and goes in codes to where it was to be."""

        def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
            made = {}
            for name, value in input_dict.items():
                whole: Tensor = value[0] if isinstance(value, list) else value
                home, computes = whole.device, _computing_device(whole)
                module, parameter = get_module_from_name(model, name)
                is_kept = self.hf_quantizer.quantization_config.keeps_codes
                if not _holds_experts(module, parameter):
                    one: Any = super().convert({name: whole.to(computes)}, model=model, **kwargs)[name]
                    made[name] = one.to(home) if is_kept else _held(one.data, one.quant_state, home, is_kept)
                else:
                    made[name] = _held(*self._experts(whole.to(computes)), home, is_kept)
            return made

        def _experts(self, whole: Tensor) -> tuple[Tensor, Any]:
            settings = self.hf_quantizer.quantization_config
            return quantize_4bit(
                whole,
                settings.bnb_4bit_quant_type,
                double=settings.bnb_4bit_use_double_quant,
                storage=settings.bnb_4bit_quant_storage,
            )

    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        """Transformers' own for bitsandbytes in 4 bits, with experts."""

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            if super().param_needs_quantization(model, param_name, **kwargs):
                return True
            module, parameter = get_module_from_name(model, param_name)
            path = param_name.rpartition(".")[0]
            return _holds_experts(module, parameter) and should_convert_module(path, self.modules_to_not_convert)

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

    return Quantizer


def _held(codes: Tensor, state: Any, home: torch.device, is_kept: bool) -> Any:
    """A parameter of codes, or of none; its scales are at home."""
    state.to(home)
    held: Any = nn.Parameter(codes.to(home if is_kept else "meta"), requires_grad=False)
    held.quant_state = state
    return held


def _holds_experts(module: Any, parameter: str) -> bool:
    """Whether a parameter holds experts in a dimension of their own."""
    return any(name == parameter and holder is module and not layout.stacked for holder, name, layout in weights_of(module))


def _computing_device(tensor: Tensor) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else tensor.device
