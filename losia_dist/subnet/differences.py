"""What subnets left in one quantized weight, in order: whole on every rank, or each rank an equal part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_ALIGNED = 8  # bytes: every tensor of a part begins where its dtype may


class Left(NamedTuple):
    """What one subnet left: differences [r, c] to what was there before it, as codes and scales; of experts [X, r, c].

    rows int64 [r] or [X, r] and columns int64 [c] or [X, c]; None: all of them. experts: int64 [X], their numbers; None: all,
    or there are none.
    """

    rows: Tensor | None
    columns: Tensor | None
    codes: Tensor
    scales: Tensor
    experts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def to(self, device: torch.device) -> Left:
        """The same on another device."""
        rows, columns, experts = (
            index if index is None else index.to(device) for index in (self.rows, self.columns, self.experts)
        )
        return Left(rows, columns, self.codes.to(device), self.scales.to(device), experts)


class Shares(Protocol):
    """Ranks that keep equal parts of bytes which all of them need whole."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Which one this is."""
        ...

    def gather(self, part: Tensor) -> Tensor:
        """All parts, uint8 [k] -> [count, k], on the part's device. Called by all of them; the host does not wait for it."""
        ...


class _Form(NamedTuple):
    """How one `Left` lies in bytes: its tensors behind each other, the widest numbers first. size: bytes of a rank's part."""

    tensors: list[tuple[str, torch.dtype, torch.Size]]
    nbytes: int
    size: int


class Differences:
    """Differences to a weight, in the order in which subnets left them.

    Where ranks share the weight (`share`) each keeps an equal part of every difference, in one buffer of bytes, and all parts
    of a weight are gathered at once whenever they are read. Then every method is called by all of these ranks, in one order;
    properties and `len` are asked by any.
    """

    def __init__(self) -> None:
        self._whole: list[Left] = []
        self._shares: Shares | None = None
        self._part: Tensor | None = None  # uint8: this rank's parts of all of `_forms`
        self._forms: list[_Form] = []

    def __len__(self) -> int:
        return len(self._whole if self._shares is None else self._forms)

    @property
    def is_shared(self) -> bool:
        """Whether reading communicates."""
        return self._shares is not None and len(self._forms) > 0

    @property
    def shares(self) -> Shares | None:
        """The ranks that keep parts; None: each keeps all."""
        return self._shares

    @property
    def nbytes(self) -> int:
        """What they take on this rank, in bytes."""
        if self._shares is None:
            return self.whole_bytes
        return 0 if self._part is None else self._part.nbytes

    @property
    def whole_bytes(self) -> int:
        """What they take in all, in bytes: the same on every rank, however they are kept."""
        return sum(one.nbytes for one in (self._whole if self._shares is None else self._forms))

    def share(self, shares: Shares | None) -> None:
        """Let each of these ranks keep a part from now on; None: each keeps all."""
        if shares != self._shares:
            there = list(self.read())
            self._shares = shares
            self.write(there)

    def read(self) -> Iterator[Left]:
        """All of them whole, one at a time, in their order. It communicates here, and not while it is iterated over."""
        if self._shares is None:
            return iter(self._whole)
        if self._part is None:
            return iter(())
        return self._cut_out(self._shares.gather(self._part))

    def write(self, lefts: Iterable[Left]) -> None:
        """Keep these instead. lefts: equal on every rank; their device is where parts are kept."""
        self._whole, self._forms, self._part = [], [], None
        if self._shares is None:
            self._whole = list(lefts)
            return
        parts = [self._part_of(one, self._shares) for one in lefts]
        self._part = torch.cat(parts) if parts else None

    def append(self, left: Left) -> None:
        """Keep one more. left: equal on every rank."""
        if self._shares is None:
            self._whole.append(left)
            return
        part = self._part_of(left, self._shares)
        self._part = part if self._part is None else torch.cat((self._part, part))

    def _part_of(self, left: Left, shares: Shares) -> Tensor:
        """This rank's part of one, uint8; notes its form."""
        there = [(name, tensor.contiguous()) for name, tensor in left._asdict().items() if tensor is not None]
        there.sort(key=lambda one: -one[1].element_size())
        size = -(-left.nbytes // (shares.count * _ALIGNED)) * _ALIGNED
        self._forms.append(_Form([(name, tensor.dtype, tensor.shape) for name, tensor in there], left.nbytes, size))
        part = torch.zeros(size, dtype=torch.uint8, device=left.codes.device)
        start, stop, place = shares.rank * size, (shares.rank + 1) * size, 0
        for _, tensor in there:
            mine = tensor.view(-1).view(torch.uint8)[max(0, start - place) : max(0, stop - place)]
            part[max(0, place - start) :][: mine.numel()].copy_(mine)
            place += tensor.nbytes
        return part

    def _cut_out(self, gathered: Tensor) -> Iterator[Left]:
        """gathered: uint8 [ranks, bytes of a rank]."""
        start = 0
        for form in self._forms:
            stored = gathered[:, start : start + form.size].reshape(-1)
            start, place = start + form.size, 0
            found: dict[str, Tensor | None] = {"rows": None, "columns": None}
            for name, dtype, shape in form.tensors:
                nbytes = math.prod(shape) * dtype.itemsize
                found[name] = stored[place : place + nbytes].view(dtype).view(shape)
                place += nbytes
            yield Left(**found)  # type: ignore[arg-type]  # codes and scales are always there
