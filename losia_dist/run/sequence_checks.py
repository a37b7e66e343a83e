"""What batches and losses must be where ranks share each sequence (DeepSpeed's Ulysses): looked at before anything is sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError, some
from losia_dist.run.parts import RunParts
from losia_dist.sharding.sequence_parallel import SequenceRanks
from losia_dist.subnet.listed_experts import is_listed
from losia_dist.subnet.site import Site

_FIX = "losia_dist.split_sequence(batch, ...) makes all of a rank's part of a batch."
_LOSS = "losia_dist.sequence_loss(loss, shift_labels, group) makes such a loss."
_NEAR_THE_LOSS = 64  # nodes of the graph among which a loss is gathered over ranks
_GATHERS = ("AllGather", "AllReduce", "SequenceSum")


def refuse_layers(sites: list[Site], config: LoSiAConfig, sequence: SequenceRanks) -> None:
    """Look at a model for long sequences, before training. No communication; the same on every rank.

    Raises:
        UnsupportedError: weights that FSDP2 cut over ranks of context parallelism; tiles under another engine than DeepSpeed;
            where ranks share sequences, experts that are modules of their own, or that are located before training.
    """
    meshes: list[Any] = [site.weight.device_mesh for site in sites if hasattr(site.weight, "device_mesh")]
    names = sorted({name for mesh in meshes for name in mesh.mesh_dim_names or () if "cp" in name.split("_")})
    if names:
        raise UnsupportedError(
            f"weights are sharded over {names[0]!r}, ranks of context parallelism (cp_size): each would localize by its own "
            "part of every sequence. For long sequences train with DeepSpeed's sequence parallelism (sp_size)."
        )
    tiled = [site.name for site in sites if site.is_tiled]
    if tiled and sequence.engine is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError(
            f"{some(tiled, 1)} is computed in tiles (use_tiled_mlp), each with a backward pass of its own: DDP and FSDP2 would "
            "reduce its gradient after every one, DeepSpeed alone waits for the last. Train with DeepSpeed, or leave the tiles "
            "out."
        )
    if sequence.size == 1 or config.located is None:
        return
    listed = [site.name for site in sites if is_listed(site.name)]
    if listed:
        raise UnsupportedError(
            f"{some(listed, 1)} is an expert that is a module of its own: a rank without a token for it forms no full "
            "gradient, and the others of its sequence would wait. Draw subnets (selection: random), or leave the experts out "
            "of target_modules."
        )
    experts = [site.name for site in sites if site.experts is not None]
    if experts and config.needs_calibration:
        raise UnsupportedError(
            f"start='importance' with sequence parallelism: the experts of {some(experts, 1)} are measured one by one, by "
            "those ranks alone whose tokens reach them. Leave it out."
        )


class SequenceChecks:
    """Looks at every batch that is trained on, and at the first losses. Made and removed by all ranks.

    - Every forward: `position_ids` are there, of the whole sequence, and labels are those of `shift_labels`. Each rank looks
      by itself, before it sends anything.
    - The first forward: ranks that share a sequence hold parts of one length.
    - The first backward with a finite loss: the loss is that of the whole sequence, the same on all ranks that share it, and
      comes from a sum or a gathering over ranks that gradients go back through.

    Args:
        parts: of the run. engine: the DeepSpeed engine.
    """

    def __init__(self, parts: RunParts, engine: Any) -> None:
        self._parts, self._engine = parts, engine
        self._shapes_are_known = self._loss_is_known = False
        self._handle = engine.module.register_forward_pre_hook(self._look_at_batch, with_kwargs=True, prepend=True)
        self._backward = engine.backward

        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            self._look_at_loss(loss)
            return self._backward(loss, *args, **kwargs)

        engine.backward = backward

    def remove(self) -> None:
        """Leave the engine as it was found."""
        self._handle.remove()
        self._engine.backward = self._backward

    def _look_at_batch(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        size = self._parts.sequence.world_size
        if kwargs.get("position_ids") is None:
            raise ConfigError(
                f"the batch has no position_ids, and {size} ranks share each sequence: the model would number every rank's "
                f"part from 0, which reads as another sequence. Pass position_ids of the whole sequence by name. {_FIX}"
            )
        if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
            raise ConfigError(
                f"labels were passed without shift_labels, and {size} ranks share each sequence: the last token of a rank's "
                f"part would have no target, as the next one lies on another rank. Pass shift_labels. {_FIX}"
            )
        if not self._shapes_are_known:
            self._compare_shapes(kwargs["position_ids"])
            self._shapes_are_known = True

    def _compare_shapes(self, position_ids: Tensor) -> None:
        device = self._parts.sites[0].row_index.device
        mine = torch.tensor([*position_ids.shape][-2:], device=device)
        by_rank = self._parts.sequence.stack(mine).tolist()
        differ = torch.tensor([len({tuple(shape) for shape in by_rank})], device=device)
        if self._parts.collectives.largest(differ).item() > 1:
            raise ConfigError(
                f"ranks that share a sequence hold parts of unlike shapes (in this group {by_rank}): each must hold as many "
                f"tokens of the same examples. {_FIX}"
            )

    def _look_at_loss(self, loss: Any) -> None:
        if self._loss_is_known or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        device = self._parts.sites[0].row_index.device
        mine = loss.detach().to(device, torch.float64).reshape(1)
        values = self._parts.sequence.stack(mine).flatten()
        finite = torch.isfinite(values)
        apart = not torch.allclose(values, values[:1].expand_as(values), rtol=1e-4, atol=0, equal_nan=True)
        found = torch.tensor([apart, not _is_gathered(loss), bool(finite.any())], device=device).to(torch.int32)
        apart_anywhere, alone, any_finite = self._parts.collectives.largest(found).tolist()
        size = self._parts.sequence.world_size
        if apart_anywhere:
            raise ConfigError(
                f"the loss differs between the {size} ranks that share a sequence (in this group {values.tolist()}): each "
                "has its own part's mean, which is not the gradient of the sequence's loss. Sum the parts' losses over the "
                f"group, and divide by all of its target tokens. {_LOSS}"
            )
        if alone:
            raise ConfigError(
                f"the loss is the same on the {size} ranks that share a sequence, but no gradient goes back through what "
                f"summed it over them: gradients would be {size} times too small. {_LOSS}"
            )
        self._loss_is_known = bool(any_finite)


def _is_gathered(loss: Tensor) -> bool:
    """Whether near the loss, above the model, something was summed or gathered over ranks."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting and len(seen) < _NEAR_THE_LOSS:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        if any(name in type(node).__name__ for name in _GATHERS):
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False
