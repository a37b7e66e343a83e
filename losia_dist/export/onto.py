"""What training changed in a quantized base, on top of the original weights: access for exporting from a live run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from losia_dist.checkpoint.tensor_names import plain_name, unwrap
from losia_dist.errors import CheckpointError, ConfigError
from losia_dist.export.model_directory import ModelDirectory
from losia_dist.sharding.packed_access import PackedAccess
from losia_dist.subnet.packed import packed_modules


class OntoOriginal(PackedAccess):
    """`read_whole` of a quantized weight gives the original's with the change; everything else is as in the run.

    Args:
        model: the run's. access: to its parameters. original: directory of the model that was quantized.

    Raises:
        ConfigError: the base is not quantized, what it was is lost, or no directory was given.
        CheckpointError: the directory lacks a weight, or has one of another shape.
    """

    def __init__(self, model: Any, access: Any, original: str | Path | None) -> None:
        if not isinstance(access, PackedAccess):
            raise ConfigError("onto=True, but the base of this run is not quantized: leave it out.")
        if original is None:
            raise ConfigError("onto=True needs base_model, the directory of the model that was quantized.")
        plain: nn.Module = unwrap(model)
        super().__init__(plain, access.engine)
        if any(module.packed.overlay is None and module.packed.moves for module in packed_modules(plain).values()):
            raise ConfigError(
                "onto=True with retired='stochastic': what subnets left was rounded into the codes, whose first values this "
                "run no longer has. Save a checkpoint, and export that."
            )
        self._access, self._original = access, ModelDirectory(original)
        self._names = {id(module): f"{plain_name(name)}.weight" for name, module in packed_modules(plain).items()}
        for module in packed_modules(plain).values():
            name = self._names[id(module)]
            if name not in self._original or tuple(self._original.tensor(name).shape) != module.packed.shape:
                raise CheckpointError(
                    f"{original} has no weight {name!r} of {list(module.packed.shape)}: give the directory of the original."
                )

    def read_whole(self, parameter: Tensor) -> Tensor:
        module = self._module(parameter)
        if module is None:
            return super().read_whole(parameter)
        change = self._access.read_change(parameter)
        original = self._original.tensor(self._names[id(module)]).to(change.device, change.dtype)
        return (original + change).to(self.dtype(parameter))
