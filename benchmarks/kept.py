"""Bytes that wait for backward, counted where autograd saves them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class KeptStorages:
    """Storages of saved tensors, each once, as long as something holds them.

    own: tensors that are there anyway (parameters, buffers), which do not count.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        # A number is not given to another storage while its reference is held: an address would be, once the memory is free.
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: Tensor) -> None:
        """Note a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    @property
    def nbytes(self) -> int:
        """Of those that are still held."""
        return sum(nbytes for storage, nbytes in self._found.values() if not storage.expired())
