"""ZeRO-3 partitions of a model that has no values yet, so that each rank can read its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import deepspeed
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

Key = TypeVar("Key")


class _WithoutValues(Init):
    """deepspeed.zero.Init that does not send rank 0's values to the others: there are none yet."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def partition_without_values(settings: dict[str, Any], made: Iterable[Key], tensor_at: Callable[[Key], Any]) -> list[Key]:
    """Partition parameters one by one, as soon as each has its memory. Called by all ranks; no values are sent.

    Args:
        settings: the DeepSpeed configuration, stage 3.
        made: gives a place when the tensor there has its memory.
        tensor_at: that tensor; buffers are left whole.

    Returns:
        all places.
    """
    deepspeed.init_distributed()  # its configuration counts the ranks by it
    zero, places = None, []
    for place in made:
        tensor = tensor_at(place)
        if isinstance(tensor, nn.Parameter):
            if zero is None:
                zero = _WithoutValues(module=nn.ParameterList([tensor]), config_dict_or_path=copy.deepcopy(settings))
            else:
                zero._convert_to_zero_parameters([tensor])
        places.append(place)
    return places
