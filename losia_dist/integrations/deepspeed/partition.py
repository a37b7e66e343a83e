"""ZeRO-3 partitions of a model that has no values yet, so that each rank can read its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import deepspeed
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn


class _WithoutValues(Init):
    """deepspeed.zero.Init that does not send rank 0's values to the others: there are none yet."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def partition_without_values(settings: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
    """Partition parameters one by one, as soon as each has its memory. Called by all ranks; no values are sent.

    Args:
        settings: the DeepSpeed configuration, stage 3.
        parameters: gives each when it has its memory.
    """
    deepspeed.init_distributed()  # its configuration counts the ranks by it
    zero = None
    for parameter in parameters:
        if zero is None:
            zero = _WithoutValues(module=nn.ParameterList([parameter]), config_dict_or_path=copy.deepcopy(settings))
        else:
            zero._convert_to_zero_parameters([parameter])
