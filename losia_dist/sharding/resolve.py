"""One look at the model and the optimizer picks the pair of access objects."""

from __future__ import annotations

import os
import sys
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from losia_dist.errors import ConfigError, UnsupportedError, some
from losia_dist.sharding.interface import ParameterAccess, StateAccess
from losia_dist.sharding.packed_access import PackedAccess
from losia_dist.sharding.torch_state import TorchState
from losia_dist.sharding.whole import WholeParameters
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.groups import GROUP_KEY
from losia_dist.subnet.packed import packed_weights


def resolve_parameters(model: nn.Module) -> ParameterAccess:
    """Access to the weights of a model: whole, partitioned by ZeRO-3, or sharded by FSDP2.

    Raises:
        UnsupportedError: the model is sharded in a way that LoSiA cannot reach, or not sharded though that was asked for.
    """
    access = _engine_access(model)
    if not packed_weights(model):
        return access
    packed = PackedAccess(model, access)
    packed.share_overlays()
    return packed


def _engine_access(model: nn.Module) -> ParameterAccess:
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        from losia_dist.sharding.zero3 import Zero3Parameters

        return Zero3Parameters(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedError(
            "the model is wrapped by FSDP1, whose flat parameters need one dtype and reduce full-size gradients. Use FSDP2: "
            "torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in Accelerate's configuration."
        )
    if is_fully_sharded(model):
        from losia_dist.sharding.fully_shard import FullyShardParameters

        return FullyShardParameters(model)
    if any(type(p).__name__ == "DTensor" for p in parameters):
        raise UnsupportedError("the model is cut by a tensor-parallel plan, which LoSiA does not support; use FSDP2 or ZeRO-3.")
    return WholeParameters()


def resolve_state(model: nn.Module, optimizer: Any) -> StateAccess:
    """Access to the state of the optimizer that trains the model's subnets. From here on Accelerate's own saving is refused.

    Raises:
        ConfigError: the optimizer does not hold the subnets, or not in one group per decoder layer.
        UnsupportedError: a wrapper that this version cannot reach into, or a DeepSpeed engine with a setting that the support
            matrix refuses.
    """
    kind = type(optimizer).__name__
    if sys.modules.get("deepspeed") is not None:
        from losia_dist.sharding.handed_over import refuse_engine_settings

        refuse_engine_settings(model, optimizer)
    if "deepspeed" in sys.modules and type(optimizer).__module__.startswith("deepspeed.runtime"):
        state = _deepspeed_state(model, optimizer, kind)
    elif type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):  # torch's or DeepSpeed's
        return resolve_state(model, optimizer.optimizer)
    elif isinstance(optimizer, Optimizer):
        _refuse_optimizer_inside(optimizer)
        if is_fully_sharded(model):
            from losia_dist.sharding.fully_shard import FullyShardState

            state = FullyShardState(optimizer)
        else:
            state = TorchState(optimizer)
    else:
        raise UnsupportedError(f"{kind} is not an optimizer that LoSiA can reach into; pass a torch.optim.Optimizer.")
    _check_groups(model, state.optimizer, own_parameters=state.optimizer is optimizer)
    return state


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to some part of the model."""
    from torch.distributed.fsdp import FSDPModule  # not loaded where nothing is distributed

    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_asked_sharding(model: nn.Module, world_size: int) -> None:
    """Sharding that Accelerate's launcher was asked for must be there: on a CPU it drops FSDP without a word.

    Raises:
        UnsupportedError: FSDP was asked for (ACCELERATE_USE_FSDP) and the model is whole, or only one rank came.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true", "yes"):
        return
    if not is_fully_sharded(model) or world_size == 1:
        got = "the model is not sharded" if world_size > 1 else "this process runs alone, without other ranks"
        raise UnsupportedError(
            f"FSDP was asked for (ACCELERATE_USE_FSDP is set), but {got}: Accelerate drops FSDP on a CPU without a word. "
            "Start on GPUs, shard with torch.distributed.fsdp.fully_shard yourself, or take FSDP out of the configuration."
        )


def _refuse_optimizer_inside(optimizer: Optimizer) -> None:
    """Lookahead and its like keep copies of parameters, in which old values would come back into subnets that have moved."""
    inner = next((entry for entry in vars(optimizer).values() if isinstance(entry, Optimizer)), None)
    if inner is not None:
        raise UnsupportedError(
            f"{type(optimizer).__name__} steps through another optimizer, {type(inner).__name__}, and what it keeps of a "
            "parameter besides cannot be cleared when a subnet moves: pass that one alone, or LoSiAAdamW."
        )


def _deepspeed_state(model: nn.Module, optimizer: Any, kind: str) -> StateAccess:
    from losia_dist.sharding.leaf_modules import refuse_listed_in_buckets
    from losia_dist.sharding.zero_state import Zero3State, ZeroState

    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        if getattr(optimizer, "partition_gradients", False):
            refuse_listed_in_buckets(model)
        return ZeroState(optimizer)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return Zero3State(optimizer)
    if kind == "FP16_UnfusedOptimizer":  # stage 0 in bf16
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        return TorchState(optimizer.optimizer, masters=dict(pairs))
    raise UnsupportedError(f"DeepSpeed's {kind} is not supported; use ZeRO stage 1, 2 or 3, or LoSiAAdamW at stage 0.")


def _check_groups(model: nn.Module, optimizer: Optimizer, own_parameters: bool) -> None:
    wanted = {site.group_name for site in find_sites(model)}
    found = [group.get(GROUP_KEY, "") for group in optimizer.param_groups]
    missing = sorted(wanted - set(found))
    if missing:
        raise ConfigError(
            f"the optimizer has no parameter group for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: LoSiA "
            "clears and rewarms each decoder layer by itself. Build it with losia_parameter_groups(model, lr=...)."
        )
    if own_parameters:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [site.name for site in find_sites(model) if id(site.subnet) not in held]
        if lost:
            raise ConfigError(
                f"the optimizer does not hold the subnets of this model ({some(lost, 1)}): it was built from another model, or "
                "before the engine replaced the parameters. Build it after wrapping."
            )
