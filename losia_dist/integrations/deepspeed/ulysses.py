"""DeepSpeed's Ulysses for one model: ranks that share each sequence exchange heads for tokens around every attention.

Between attentions a rank has L / size tokens of all heads; in attention it has all L tokens of 1 / size of the heads. DeepSpeed
registers this for every model of the process under one batch size; here it is for one model alone, and for any batch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losia_dist.errors import ConfigError, UnsupportedError

_SHARED: weakref.WeakKeyDictionary[nn.Module, SharedAttention] = weakref.WeakKeyDictionary()
_CORE = "__losia_core__"


def check_model(model: Any, size: int) -> None:
    """Whether `size` ranks can share this model's sequences. No communication; the same on every rank.

    Raises:
        ConfigError: heads that `size` does not divide.
        UnsupportedError: a kind of attention, or of layer, that sees tokens elsewhere than through Transformers' attention
            functions, or that needs a mask.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"sequence parallelism over {size} ranks: {name} computes attention by itself, where DeepSpeed's Ulysses does not "
            "reach. Use a model class of Transformers 5."
        )
    config = config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (groups % size and size % groups):
        raise ConfigError(
            f"sequence parallelism over {size} ranks: each computes with equally many heads, and {name} has {heads} of queries "
            f"and {groups} of keys. Choose a number of ranks that divides both, or that the keys' number divides."
        )
    implementation = str(config._attn_implementation)
    if implementation != "sdpa" and "flash" not in implementation:
        raise UnsupportedError(
            f"sequence parallelism with attn_implementation={implementation!r}: it needs a mask of all tokens by all tokens, "
            "which no rank has. Load the model with attn_implementation='sdpa' or 'flash_attention_2'."
        )
    kinds = set(getattr(config, "layer_types", None) or [])
    recurrent = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if recurrent:
        raise UnsupportedError(
            f"sequence parallelism: {name} has layers that carry state along the sequence ({', '.join(recurrent)}), which "
            "would begin anew on every rank. Train it without."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windowed = any("full" not in kind for kind in kinds) if kinds else window is not None
    if windowed:
        raise UnsupportedError(
            f"sequence parallelism: attention of {name} reaches over a window of {window} tokens, which the mask says that "
            "Ulysses leaves out. Use a model with full attention, or set the window to None in its configuration."
        )


def share_sequences(model: Any, size: int, mpu: Any = None) -> Any:
    """Let `size` neighbouring ranks compute each sequence of a model together; returns what deepspeed.initialize takes as mpu.

    Called by all ranks. Nothing is registered anew where DeepSpeed's own registration of the process is there.

    Args:
        mpu: of DeepSpeed or like it, whose groups are taken; None: they are made.

    Raises:
        ConfigError, UnsupportedError: as `check_model`; a number of ranks that size does not divide.
    """
    world_size = dist.get_world_size()
    if size < 2 or world_size % size:
        raise ConfigError(
            f"sequence_parallel_size={size}: the {world_size} ranks are cut into groups of that size; give a divisor of their "
            "number above 1, or leave it out."
        )
    check_model(model, size)
    mpu = _groups(size) if mpu is None else mpu
    if not registered_by_deepspeed(model):
        config = model.config.get_text_config()
        shared = SharedAttention(config, mpu.get_sequence_parallel_group())
        _dispatch(config._attn_implementation)
        for module in model.modules():
            _SHARED[module] = shared
    return mpu


def registered_by_deepspeed(model: Any) -> bool:
    """Whether DeepSpeed's `register_with_transformers` has put Ulysses in the place of this model's attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = model.config.get_text_config()._attn_implementation
    registered = getattr(ALL_ATTENTION_FUNCTIONS, "get", dict(ALL_ATTENTION_FUNCTIONS).get)(implementation)
    return "uattn_wrapper" in getattr(registered, "__qualname__", "")


def forget_sequences() -> None:
    """Let DeepSpeed make an engine without sequence parallelism in a process that has had one with it."""
    from deepspeed.utils import groups

    if hasattr(groups.mpu, "get_sequence_parallel_group"):
        groups.mpu = None


def keep_records_apart(model: nn.Module, are_packed: bool) -> None:
    """Say whether rows of batches hold several records, before the first of them is seen."""
    for module in model.modules():
        if module in _SHARED:
            _SHARED[module].keeps_records = are_packed


@contextlib.contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """In here each rank computes sequences of its own, as for generating: without any exchange."""
    held = {_SHARED[module] for module in model.modules() if module in _SHARED}
    for shared in held:
        shared.is_on = False
    try:
        yield
    finally:
        for shared in held:
            shared.is_on = True


class SharedAttention:
    """Attention of one model whose sequences several ranks share.

    Attributes:
        is_on: off while a rank computes sequences of its own.
        keeps_records: positions restart inside a row, so that packed records must not see each other. Flash attention tells
            by position_ids; for sdpa a mask is made, of L x L truth values a row. Found at the first batch where it is None.
    """

    def __init__(self, config: Any, group: dist.ProcessGroup) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self.is_on, self.keeps_records = True, None  # type: bool, bool | None
        self._group = group
        heads = config.num_attention_heads
        self._ulysses: Any = UlyssesSPAttentionHF(
            attn=self._attend,
            batch_size=1,  # set anew at every call
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=getattr(config, "num_key_value_heads", None) or heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=group,
            seq_length_is_variable=True,
        )
        self._ulysses.core_attn_implementation = config._attn_implementation
        self._needs_mask = config._attn_implementation == "sdpa"
        self._core: Callable[..., Any] | None = None

    def __call__(
        self, core: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """As an attention function of Transformers, [B, heads, L / size, d] each; the mask of this rank's part is left out."""
        ulysses, groups = self._ulysses, getattr(module, "num_key_value_groups", None)
        if self.keeps_records is None:
            self.keeps_records = self._records_are_packed(kwargs["position_ids"])
        ulysses.batch_size, self._core = query.shape[0], core
        for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
            shape = getattr(ulysses, name)
            setattr(ulysses, name, torch.Size([shape[0], query.shape[0], *shape[2:]]))
        try:
            return ulysses(module, query, key, value, None, *args[1:], **kwargs)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups  # DeepSpeed sets it where it repeats heads of keys

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        """Attention over whole sequences, of this rank's heads."""
        assert self._core is not None
        if self.keeps_records and self._needs_mask:
            record = (kwargs["position_ids"] == 0).cumsum(1)
            length = query.shape[2]
            mask = (record[:, :, None] == record[:, None, :]).tril_()[:, None]
            assert mask.shape[-2:] == (length, length)
        return self._core(module, query, key, value, mask, *args, **kwargs)

    def _records_are_packed(self, position_ids: Tensor) -> bool:
        """Whether positions restart in some row, on any rank of any group. Called once, by all ranks; waits for the device."""
        everyone = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, position_ids.contiguous(), group=self._group)
        whole = torch.cat(everyone, dim=1)
        return bool((whole[:, 1:] <= whole[:, :-1]).any())


def _dispatch(implementation: str) -> None:
    """Let attention of modules that share sequences go through Ulysses, and that of all others be what it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = ALL_ATTENTION_FUNCTIONS[implementation]
    if hasattr(core, _CORE):
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        shared = _SHARED.get(module)
        if shared is None or not shared.is_on:
            return core(module, query, key, value, attention_mask, *args, **kwargs)
        return shared(core, module, query, key, value, attention_mask, *args, **kwargs)

    setattr(attention, _CORE, core)
    ALL_ATTENTION_FUNCTIONS[implementation] = attention


def _groups(size: int) -> Any:
    """DeepSpeed's own groups of the process, made if there are none, or others."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    deepspeed.init_distributed()  # its own layer over a process group that is there already
    with contextlib.suppress(ValueError):  # an engine that was destroyed took its groups with it
        if mpu._SEQUENCE_PARALLEL_GROUP is not None and mpu.get_sequence_parallel_world_size() == size:
            dist.get_rank(mpu.get_sequence_parallel_group())
            return mpu
    mpu._release_sequence_parallel_groups()
    mpu.initialize_sequence_parallel(size)
    return mpu
