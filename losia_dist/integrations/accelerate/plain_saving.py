"""Accelerate's own saving and loading, which knows no subnets: refused for a model that has them.

It would write frozen weights without their subnets' present values, under names that no plain model has, and without the
conductor's state: a file that looks right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.convert import find_sites

_STATE = (
    "call losia_dist.carry_state(accelerator, losia) once, after which it works, or use "
    "losia_dist.save_checkpoint and load_checkpoint"
)
_MODEL = "use losia_dist.export_model(losia, directory)"
_INSTEAD = {"save_state": _STATE, "load_state": _STATE, "save_model": _MODEL, "get_state_dict": _MODEL}
_MARK = "__losia_refuses__"


def refuse_plain_saving() -> None:
    """From here on these methods of `accelerate.Accelerator` raise UnsupportedError for a model with subnets.

    Called where a conductor is made (`run/when_made.py`); there is nothing to do where Accelerate is not loaded.
    """
    accelerator = getattr(sys.modules.get("accelerate"), "Accelerator", None)
    for name, instead in _INSTEAD.items() if accelerator is not None else ():
        method = getattr(accelerator, name)
        if not hasattr(method, _MARK):
            setattr(accelerator, name, _refusing(name, method, instead))


def _refusing(name: str, method: Callable[..., Any], instead: str) -> Callable[..., Any]:
    takes_model = instead is _MODEL

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [*args[:1], *([kwargs["model"]] if "model" in kwargs else [])] if takes_model else self._models
        if any(find_sites(model) for model in models):
            raise UnsupportedError(
                f"accelerator.{name} does not know LoSiA's subnets, and would leave out what they learned: {instead}."
            )
        return method(self, *args, **kwargs)

    setattr(call, _MARK, True)
    return call
