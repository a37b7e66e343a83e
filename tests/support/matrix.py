"""What the support matrix promises: engines, features, and their cells. Tests run every cell; docs/support-matrix.md shows
the table that this file renders (`python -m tests.support.matrix`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

ACCUMULATIONS = (1, 4)
CLIPPING = (0.0, 0.5)
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


@dataclass(frozen=True)
class Engine:
    """One way to hold the model. `refused` maps a kind of gradient checkpointing to the reason."""

    name: str
    title: str
    ranks: int
    refused: dict[str, str] = field(default_factory=dict, hash=False)


ENGINES = [
    Engine("one", "one process", 1),
    Engine("ddp", "DDP", 2),
    Engine("zero0", "DeepSpeed stage 0", 2),
    Engine("zero1", "DeepSpeed ZeRO-1", 2),
    Engine("zero2", "DeepSpeed ZeRO-2", 2),
    Engine("zero3", "DeepSpeed ZeRO-3", 2),
    Engine("zero2-offload", "ZeRO-2, optimizer on the CPU", 2),
    Engine("zero3-offload", "ZeRO-3, optimizer and parameters on the CPU", 2),
    Engine("fsdp2", "FSDP2", 2),
    Engine("fsdp2-noreshard", "FSDP2, reshard_after_forward=False", 2),
    Engine("fsdp2-offload", "FSDP2, CPUOffloadPolicy", 2),
    Engine("hsdp", "HSDP, 2 x 2", 4),
]


# What `make test` runs: everything at once on one engine of each kind, the others bare. Other tests run the main engines bare,
# and tests/parity/test_chunked_loss.py FSDP2 with accumulation.
_EVERYTHING = {"zero2": (4, 0.5, "reentrant"), "fsdp2": (1, 0.5, "non-reentrant")}
_BARE = ("zero0", "zero1", "zero3-offload", "zero2-offload", "fsdp2-noreshard", "fsdp2-offload", "hsdp")


@dataclass(frozen=True)
class Cell:
    """One combination that must equal the dense reference."""

    engine: Engine
    accumulation: int
    clipping: float
    checkpointing: str

    @property
    def label(self) -> str:
        return f"{self.engine.name}-acc{self.accumulation}-clip{self.clipping:g}-{self.checkpointing}"

    @property
    def sampled(self) -> bool:
        """Whether `make test` runs it."""
        options, name = (self.accumulation, self.clipping, self.checkpointing), self.engine.name
        return options == _EVERYTHING.get(name) or (options == (1, 0.0, "off") and name in _BARE)


CELLS = [
    Cell(engine, accumulation, clipping, checkpointing)
    for engine, accumulation, clipping, checkpointing in product(ENGINES, ACCUMULATIONS, CLIPPING, CHECKPOINTING)
    if checkpointing not in engine.refused
]


def render() -> str:
    """The table of the documentation: one row an engine, one column a feature."""
    kinds = [f"checkpointing {kind}" for kind in CHECKPOINTING[1:]]
    header = ["engine", "ranks tested", "plain", f"accumulation {ACCUMULATIONS[-1]}", "clipping", *kinds]
    rows = []
    for engine in ENGINES:
        checkpointing = [f"refused: {engine.refused[kind]}" if kind in engine.refused else "same" for kind in CHECKPOINTING[1:]]
        rows.append([engine.title, str(engine.ranks), "same", "same", "same", *checkpointing])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(render())
