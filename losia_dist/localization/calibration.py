"""All first subnets at once, located from a few batches before training: no score of any layer is ever kept.

The score is the mean of the importance I over the calibration micro-batches of all ranks, each with its own gradient. Sums of
it along rows and columns add up over micro-batches and ranks, so that every pass over the batches answers one query of every
layer's search (`losia_dist.localization.search`): m + n numbers a layer (or expert) are kept and communicated, and no gradient
is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from losia_dist.errors import ConfigError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.importance import importance_
from losia_dist.localization.search import Choice, Query, Search, Sums
from losia_dist.localization.sharded_choice import mask_of, masked_column_sums
from losia_dist.subnet.blocks import take_last
from losia_dist.subnet.site import Site


class ImportanceSums:
    """The sums that a query asks for of one layer, over the micro-batches of a pass: a sink of full gradients.

    Args:
        shape: (m, n) of a whole matrix. count: X matrices, each of which comes by itself; 1 for a linear layer.
        kind: of importance, as in `LoSiAConfig.importance`.
        parts: gradients that make up one micro-batch's: 2 where the embedding shares the weight.
        sequence: over the ranks that share each sequence; a gradient is the mean over them, of which each takes its rows.
    """

    one_at_a_time = True  # experts: so that one's full gradient is all there is

    def __init__(
        self,
        query: Query,
        shape: tuple[int, int],
        *,
        kind: str,
        device: torch.device,
        parts: int = 1,
        count: int = 1,
        sequence: RowCollectives | None = None,
    ) -> None:
        self.sequence = sequence or RowCollectives(None)
        self.query, self.kind, self.parts = query, kind, parts
        self.masks = [None if rows is None else _masks(rows, shape[0]) for rows in query.within_rows]
        self.rows = torch.zeros(len(query.within_columns), count, shape[0], dtype=torch.float64, device=device)
        self.columns = torch.zeros(len(query.within_rows), count, shape[1], dtype=torch.float64, device=device)
        self.reached = torch.zeros((), dtype=torch.int64, device=device)  # backward passes, or gradients, that came
        self._earlier: list[tuple[Tensor, Tensor]] = []

    def note_call(self) -> None:
        """A backward came by, whether or not a token reached any of the experts."""
        self.reached += 1

    @torch.no_grad()
    def __call__(self, gradient: Tensor, weight: Tensor, place: int = 0) -> None:
        """Called in backward with a full gradient [m, n], which is used up, and the whole matrix, which is the `place`-th."""
        if len(self._earlier) + 1 < self.parts:
            self._earlier.append((gradient, weight.detach().clone()))  # the engine may let the weight go before the rest comes
            return
        for other, kept in self._earlier:
            gradient, weight = gradient + other, kept
        self._earlier = []
        self.note_call()
        first, stop = self.sequence.rows_of(gradient.shape[0])
        gradient = self.sequence.reduce_scatter_rows(gradient).wait()
        # A band of rows at a time: the fp32 copy of a bf16 gradient stays small.
        band = max(1, (1 << 24) // gradient.shape[1])
        for start in range(first, stop, band):
            part = slice(start, min(start + band, stop))
            mine = gradient[start - first : part.stop - first].to(torch.float32)
            self._add(place, part, importance_(mine, weight[part], self.kind))

    def _add(self, place: int, part: slice, importance: Tensor) -> None:
        if any(columns is None for columns in self.query.within_columns):
            every_column = importance.sum(1, dtype=torch.float64)
        if any(rows is None for rows in self.query.within_rows):
            every_row = importance.sum(0, dtype=torch.float64)
        for total, columns in zip(self.rows[:, place], self.query.within_columns, strict=True):
            own = columns if columns is None or columns.dim() == 1 else columns[place]
            total[part] += every_column if own is None else take_last(importance, own).sum(1, dtype=torch.float64)
        for total, mask in zip(self.columns[:, place], self.masks, strict=True):
            total += every_row if mask is None else masked_column_sums(importance, mask[place][part])

    def sums(self, flat: Tensor, each: tuple[int, ...]) -> Sums:
        """Such sums, laid out in one vector, as a search takes them. each: () of a linear layer, (X,) of experts."""
        rows, columns = flat.split([self.rows.numel(), self.columns.numel()])
        shaped = (t.view(s.shape[0], *each, s.shape[-1]) for t, s in ((rows, self.rows), (columns, self.columns)))
        return Sums(*(list(one) for one in shaped))


def _masks(rows: Tensor, size: int) -> list[Tensor]:
    return [mask_of(own, size) for own in rows.view(-1, rows.shape[-1])]


@dataclass
class SearchOfLayers:
    """The search of a layer, or of layers that share columns, and where it stands.

    parts: of each layer, as `ImportanceSums` takes it. queries: one a layer; none: the search has ended. results: likewise.
    """

    sites: list[Site]
    search: Search
    parts: list[int]
    queries: list[Query] = field(default_factory=list)
    results: list[Choice] = field(default_factory=list)


@torch.no_grad()
def locate(
    searches: list[SearchOfLayers],
    run_pass: Callable[[], None],
    collectives: RowCollectives,
    *,
    kind: str,
    sequence: RowCollectives | None = None,
) -> int:
    """Run every search to its end; called by all ranks, with equal choices on each. Returns how many passes it took.

    Args:
        searches: in the same order on every rank.
        run_pass: runs forward and backward over this rank's micro-batches once.
        kind: of importance.
        sequence: over the ranks that share each sequence with this one.

    Raises:
        ConfigError: a layer that no gradient reached in a pass, on any rank. Same on every rank.
    """
    for one in searches:
        one.queries = next(one.search)
    passes = 0
    while open_searches := [one for one in searches if one.queries]:
        sinks: dict[Site, ImportanceSums] = {}
        for one in open_searches:
            for site, query, parts in zip(one.sites, one.queries, one.parts, strict=True):
                sinks[site] = site.gradient_sink = ImportanceSums(
                    query,
                    site.shape,
                    kind=kind,
                    device=site.row_index.device,
                    parts=parts,
                    count=site.layout.count,
                    sequence=sequence,
                )
        try:
            run_pass()
        finally:
            for site in sinks:
                site.gradient_sink = None
        passes += 1
        reached = collectives.sum_columns(torch.stack([sink.reached for sink in sinks.values()]))
        for one in open_searches:
            _answer(one, [sinks[site] for site in one.sites], collectives)
        idle = [site.name for site, count in zip(sinks, reached.tolist(), strict=True) if count == 0]
        if idle:
            raise ConfigError(
                f"no calibration batch gave {', '.join(idle[:5])} a gradient: the forward pass never calls the layer (leave it "
                "out of target_modules), or no batch holds a label."
            )
    return passes


def _answer(one: SearchOfLayers, sinks: list[ImportanceSums], collectives: RowCollectives) -> None:
    """Give a search its sums over all ranks; take its next queries or its choices."""
    found: list[Sums] = []
    for site, sink in zip(one.sites, sinks, strict=True):
        flat = collectives.sum_columns(torch.cat([sink.rows.reshape(-1), sink.columns.reshape(-1)]))
        found.append(sink.sums(flat, tuple(site.row_index.shape[:-1])))
    try:
        one.queries = one.search.send(found)
    except StopIteration as end:
        one.queries, one.results = [], end.value
