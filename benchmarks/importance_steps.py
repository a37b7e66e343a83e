"""What importance from a few steps of a slot (`Located(importance_steps=k)`) chooses, beside importance from all of them.

    python -m benchmarks.importance_steps [--steps 100] [--period 20] [--layers_per_slot 6] [--counts 1 2 4 8]

One run of the quickstart's model on the GSM8K problems of the quality benchmark, driven by all steps of every slot. Beside
them, averages of k steps are kept for the same layers; when a slot ends, each of them chooses too. Shown: the share of places
that are equal; the importance (by the averages of all steps) that each choice holds, as a share of what all steps chose; how
many layers have equal places throughout.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, header, table, write_json
from benchmarks.quality.batches import training_batches
from benchmarks.quality.loss import answer_loss, autocast
from benchmarks.quality.training import Bench
from losia_dist import Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.formulas import takes_importance
from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.importance import fold_importance_
from losia_dist.localization.search import greedy
from losia_dist.localization.sharded_choice import select
from losia_dist.localization.slots import SlotGroup
from losia_dist.subnet.site import Site


class Beside:
    """Averages over k steps of the slot in progress, for every layer that localizes and every k."""

    def __init__(self, losia: LoSiA, counts: Sequence[int]) -> None:
        self.losia, self.counts = losia, counts
        self.found: list[dict[str, Any]] = []
        self._averages: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
        losia.on_relocalize.append(self._compare)

    def open_slot(self) -> None:
        """Begin anew where a slot has begun."""
        self._averages = {}
        for site, accumulator in self.losia.accumulators.items():
            for count in self.counts:
                self._averages[site, count] = torch.zeros_like(accumulator.mean), torch.zeros_like(accumulator.mean)
            accumulator.end_step = self._ending(site, accumulator)  # type: ignore[method-assign]

    def _ending(self, site: Site, accumulator: ImportanceAccumulator) -> Any:
        own = type(accumulator).end_step
        clock = self.losia.clock

        def end_step() -> None:
            gradient, weight = accumulator.gradient, accumulator.weight_rows
            assert gradient is not None and weight is not None
            for count in self.counts:
                if takes_importance(clock.step, clock.period, count):
                    mean, deviation = self._averages[site, count]
                    settings: Any = {"kind": accumulator.kind, "betas": accumulator.betas}
                    fold_importance_(gradient.clone(), weight, mean, deviation, **settings)
            own(accumulator)

        return end_step

    def _compare(self, group: SlotGroup) -> None:
        for site, accumulator in self.losia.accumulators.items():
            if site.group_name != group.name:
                continue
            score = accumulator.mean * accumulator.deviation

            def choose(of: Tensor, site: Site = site, accumulator: ImportanceAccumulator = accumulator) -> Any:
                search = greedy([(site.shape, site.subnet_shape)])
                return select(search, [of], [accumulator.rows], accumulator.collectives)[0]

            rows, columns, inside, total = choose(score)
            for count in self.counts:
                mean, deviation = self._averages[site, count]
                own_rows, own_columns, *_ = choose(mean * deviation)
                held = score[own_rows][:, own_columns].sum(dtype=torch.float64)
                self.found.append(
                    {
                        "layer": site.name,
                        "count": count,
                        "rows": torch.isin(own_rows, rows).double().mean().item(),
                        "columns": torch.isin(own_columns, columns).double().mean().item(),
                        "held": (held / inside).item(),
                        "captured": (inside / total).item(),
                    }
                )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--period", type=int, default=20)
    parser.add_argument("--layers_per_slot", type=int, default=6)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--json", default=str(RESULTS / "importance_steps.json"))
    options = parser.parse_args(arguments)
    print(header())
    bench = Bench.load(options.model, options.data, "fp32")
    batches = training_batches(bench.data("gsm8k").train, options.batch, options.steps, 0)
    config = LoSiAConfig(period=options.period, layers_per_slot=options.layers_per_slot, selection=Located())
    model = get_losia_model(bench.fresh().train(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=options.rate), lr=options.rate)
    losia = LoSiA(model, optimizer, config, total_steps=options.steps)
    beside = Beside(losia, options.counts)
    beside.open_slot()
    for batch in batches:
        with autocast("fp32"):
            answer_loss(model, batch).backward()
        optimizer.step()
        if losia.step():
            beside.open_slot()
        optimizer.zero_grad(set_to_none=True)
    kept = {name: value for name, value in vars(options).items() if name not in ("json", "data")}
    results = [{**kept, "layers": beside.found}]
    print("\n" + as_table(beside.found, options))
    write_json(options.json, results)
    return results


def as_table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """A line for each number of steps."""
    rows = []
    for count in options.counts:
        own = [one for one in found if one["count"] == count]
        means = [statistics.fmean(one[what] for one in own) for what in ("rows", "columns", "held")]
        equal = sum(one["rows"] == one["columns"] == 1 for one in own)
        rows.append([f"{count} of {options.period}", *(f"{mean:.3f}" for mean in means), f"{equal} of {len(own)}"])
    return table(["steps", "rows equal", "columns equal", "importance held / by all steps", "layers equal"], rows)


if __name__ == "__main__":
    main()
