"""Models with quantized layers and experts, and the plain models that their codes stand for, by the quantizers' libraries."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor, nn


def quantize(model: nn.Module, form: str) -> nn.Module:
    """Quantize every linear layer of the decoder, in place. form: "nf4", "fp4", "int8" or "fp8"; behind a colon the storage.

    "nf4:bfloat16:double" quantizes the scales too, "nf4:experts" the experts in fused weights.
    """
    kind, *rest = form.split(":")
    storage = next((getattr(torch, one) for one in rest if one not in ("double", "experts")), torch.uint8)
    for name, linear in list(_linears(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _quantized(linear, kind, storage, double="double" in rest))
    if "experts" in rest:
        for name, module in list(_experts(model)):
            _quantize_experts(model, name, module, kind, storage, double="double" in rest)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A model that `quantize` made, with ordinary linear layers of the values that its codes stand for."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ not in ("Linear4bit", "Linear8bitLt", "FP8Linear"):
            continue
        values = _values(layer)
        plain = nn.Linear(values.shape[1], values.shape[0], bias=layer.bias is not None)
        plain.weight.data = values.float().clone()
        if layer.bias is not None:
            plain.bias.data = layer.bias.data.float().clone()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    for name, module in list(_experts(model)):
        for parameter in ("gate_up_proj", "down_proj"):
            _dequantize_experts(model, name, module, parameter)
    return model


def _experts(model: nn.Module) -> list[tuple[str, Any]]:
    """Modules of experts with a gate, quantized or not."""
    found = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
    return [(name, module) for name, module in found if hasattr(module, "_apply_gate")]


def _quantize_experts(model: Any, name: str, module: Any, kind: str, storage: torch.dtype, *, double: bool) -> None:
    import bitsandbytes as bnb
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if kind == "fp8":
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fp8_experts(module, model.config))
        return
    settings = {"quant_type": kind, "compress_statistics": double}
    for parameter in ("gate_up_proj", "down_proj"):
        if storage == torch.uint8:  # as users do it
            replace_parameter_4bit(module, parameter, **settings)
            continue
        values = getattr(module, parameter).data
        made = bnb.nn.Params4bit(values, requires_grad=False, quant_storage=storage, **settings).to("cpu")
        module._parameters[parameter] = made


def fp8_experts(module: Any, config: Any) -> Any:
    """Transformers' experts in FP8 with a scale for each block of 6 x 8."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    block = (6, 8)
    made = FP8Experts(config, block_size=block)
    for parameter in ("gate_up_proj", "down_proj"):
        values = getattr(module, parameter).data
        E, m, n = values.shape
        padded = nn.functional.pad(values, (0, -n % block[1]))
        blocks = padded.view(E, m // block[0], block[0], -1, block[1])
        scale = blocks.abs().amax((2, 4)) / 448
        codes = (blocks / scale[:, :, None, :, None]).reshape(E, m, -1)[..., :n]
        made._parameters[parameter] = nn.Parameter(codes.to(torch.float8_e4m3fn), requires_grad=False)
        made._parameters[f"{parameter}_scale_inv"] = nn.Parameter(scale, requires_grad=False)
    return made


def save_in_fp8(model: Any, directory: Any) -> None:
    """Write a model that `quantize` made in "fp8" as its makers publish one: codes and scales, a matrix for each expert."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if ".experts." in name]:
        fused, (path, _, leaf) = state.pop(name), name.rpartition(".")
        suffix = "weight_scale_inv" if leaf.endswith("_scale_inv") else "weight"
        for number, matrix in enumerate(fused):
            parts = (
                {"gate_proj": matrix.chunk(2)[0], "up_proj": matrix.chunk(2)[1]} if "gate" in leaf else {"down_proj": matrix}
            )
            state |= {f"{path}.{number}.{part}.{suffix}": one.contiguous() for part, one in parts.items()}
    model.config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}
    path.write_text(json.dumps(config))


def _dequantize_experts(model: nn.Module, name: str, module: Any, parameter: str) -> None:
    from torch.nn.utils import parametrize

    if parametrize.is_parametrized(module, parameter):
        held = module.parametrizations[parameter]
        values = _four_bits(held.original.data, held[0].quant_state)
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
    elif hasattr(module._parameters[parameter], "quant_state"):
        values = _four_bits(module._parameters[parameter].data, module._parameters[parameter].quant_state)
    elif type(module).__name__ == "FP8Experts":
        _dequantize_fp8(model, name, module)
        return
    else:
        return
    module._parameters[parameter] = nn.Parameter(values.float().clone())


def _dequantize_fp8(model: Any, name: str, module: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    plain = Qwen3MoeExperts(model.config)
    for parameter in ("gate_up_proj", "down_proj"):
        values, scale = getattr(module, parameter).data.float(), getattr(module, f"{parameter}_scale_inv").data
        for e, i, j in itertools.product(*(range(size) for size in scale.shape)):
            values[e, i * 6 : (i + 1) * 6, j * 8 : (j + 1) * 8] *= scale[e, i, j]
        plain._parameters[parameter] = nn.Parameter(values)
    setattr(model.get_submodule(parent), leaf, plain)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and ".layers." in name]


def _quantized(linear: nn.Linear, kind: str, storage: torch.dtype, *, double: bool) -> nn.Module:
    import bitsandbytes as bnb

    m, n = linear.weight.shape
    has_bias = linear.bias is not None
    if kind in ("nf4", "fp4"):
        made: Any = bnb.nn.Linear4bit(
            n, m, bias=has_bias, quant_type=kind, quant_storage=storage, compute_dtype=torch.float32, compress_statistics=double
        )
        settings = {"quant_type": kind, "quant_storage": storage, "compress_statistics": double}
        made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, module=made, **settings).to("cpu")
    elif kind == "int8":
        made = bnb.nn.Linear8bitLt(n, m, bias=has_bias, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        made = fp8_linear(linear)
    if has_bias:
        made.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return made


def fp8_linear(linear: nn.Linear) -> Any:
    """Transformers' linear layer of FP8 with a scale for each block of 16 x 8."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    (m, n), block = linear.weight.shape, (16, 8)
    made: Any = FP8Linear(n, m, block_size=block, has_bias=linear.bias is not None)
    scale = torch.zeros(-(-m // block[0]), -(-n // block[1]))
    codes = torch.empty(m, n)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = linear.weight.data[part].abs().max() / 448
            codes[part] = linear.weight.data[part] / scale[i, j]
    made.weight = nn.Parameter(codes.to(torch.float8_e4m3fn), requires_grad=False)
    made.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return made


def _four_bits(stored: Tensor, state: Any) -> Tensor:
    """By hand: in rows that are no multiple of the block bitsandbytes' CPU kernel takes wrong scales."""
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    halves = stored.reshape(-1).view(torch.uint8).long()
    codes = torch.stack((halves >> 4, halves & 15), 1).view(-1)
    codes = codes[: state.shape.numel()]
    values = state.code[codes] * scales[torch.arange(codes.numel()) // state.blocksize]
    return values.view(state.shape)


def _values(layer: Any) -> Tensor:
    if type(layer).__name__ == "Linear4bit":
        return _four_bits(layer.weight.data, layer.weight.quant_state)
    if type(layer).__name__ == "Linear8bitLt":
        return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    rows, columns = layer.block_size
    values = layer.weight.data.float()
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            values[i, j] *= layer.weight_scale_inv.data[i // rows, j // columns]
    return values
