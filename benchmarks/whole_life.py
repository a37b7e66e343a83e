"""A 7B's whole life on a machine of 24 GB and two cores: loaded, trained, killed, resumed, exported, rebuilt and reloaded.

    python -m benchmarks.whole_life --scale 7b --work FOLDER [--parts drawn located fsdp2 zero3 lora] [--json FILE]
    python -m benchmarks.whole_life --scale tiny        # the same in some minutes, to see that it works

The model has Qwen2.5-7B's shape and random weights, 15.2 GB in bf16, written to the disk shard by shard; tokenizer and records
are the quickstart's. Each part is one life, through the commands that a user has:

1. `losia-dist plan` for the shape and engine.
2. `launch/train.py` (one process, or `benchmarks.ranks`) with --save_steps; SIGKILL to all three steps after the save.
3. The same command line: it resumes, and must print the very losses, to the last bit, that the killed run had after its save.
4. `losia-dist export --delta`, `losia-dist export`; the export is loaded by Transformers alone, and its held-out loss compared.
5. `losia-dist apply`: every weight must have the export's bits.

`lora` is PEFT on the same model. A part that fails is reported, and the next one begins. Memory is that of all processes
of a command, launchers too (`benchmarks/watched.py`); above --limit they are killed. Every figure is stored when it is known.
On the disk at most two copies of the model and a delta lie at a time unless --disk allows a third: else the base's weights are
dropped for the time of the export, and made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, header
from benchmarks.watched import GB, Watched
from benchmarks.whole_life_model import SHAPES, drop_weights, prints, write_model
from benchmarks.whole_life_parts import PARTS, ZERO3, Part
from benchmarks.whole_life_report import report

ROOT = Path(__file__).parent.parent
STEPS, SAVE, BEYOND = 20, 10, 3  # of a run; the step that is saved; steps after it until the kill
HELD_OUT = 2  # records whose loss is compared
LORA = "lora"


class StageError(RuntimeError):
    """A stage of a part went wrong; the rest of the part is left out."""


@dataclass
class Life:
    """Where a life takes place, and what is known of it.

    Args:
        store: takes (part, stage, figures) as soon as a stage is over.
    """

    work: Path
    scale: str
    tokenizer: Path
    records: tuple[Path, Path]  # to train on, and held out
    limit: float
    disk: float
    store: Callable[[str, str, dict[str, Any]], None]
    size: int = 0  # bytes of the model's weights
    sums: dict[str, int] = field(default_factory=dict)  # of the export's weights

    @property
    def model(self) -> Path:
        return self.work / "model"

    def make_model(self) -> None:
        self.size = write_model(self.model, self.scale, self.tokenizer)

    def run(self, name: str, part: Part) -> None:
        """Every stage of a part. Raises: StageError."""
        place = self.work / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.make_model()
        try:
            self._plan(name, part, place)
            self._train(name, part, place)
            self._export(name, part.tokens, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def lora(self) -> None:
        """PEFT on the same model, with the same records."""
        self.make_model()
        self._plan(LORA, None, self.work)
        log = self.work / "lora.log"
        log.unlink(missing_ok=True)
        command = [*self._plain("lora", Part.tokens), "--steps", str(STEPS)]
        run = Watched(command, log, self.limit, _environment(1))
        first: list[float] = []

        def tick() -> bool:
            if not first and _last_step(log):
                first.append(run.seconds)
                run.enter("steps")
            return False

        code = run.wait(tick)
        steps = [line for line in _objects(log) if "step" in line]
        found = _memory(run) | {"startup_seconds": first[0] - steps[0]["seconds"] if first else None}
        found |= {"step_seconds": _median([line["seconds"] for line in steps[1:]]), "losses": [line["loss"] for line in steps]}
        found |= {k: v for line in _objects(log) for k, v in line.items() if k == "trainable_parameters"}
        self.store(LORA, "training", found)
        _check(code == 0, run, log)

    def _plan(self, name: str, part: Part | None, place: Path) -> None:
        """What the plan says of a part; None: of LoRA in one process."""
        asked = part or Part(LORA, "ddp")
        log = place / "plan.json"
        log.unlink(missing_ok=True)
        words = [
            "plan",
            "--model",
            str(self.model),
            "--engine",
            asked.engine,
            "--gpus-per-node",
            str(asked.ranks),
            "--reserve",
            "0",
            "--json",
        ]
        words += ["--gpu-memory", "24", "--sequence-length", str(asked.tokens), "--steps", str(STEPS)]
        if part is None:
            words += ["--method", "lora", "--lora-rank", "16"]
        else:
            (place / "losia.yaml").write_text(part.losia, encoding="utf-8")
            words += ["--losia_config", str(place / "losia.yaml")]
        run = Watched(_losia_dist(*words), log, self.limit, _environment(1))
        code = run.wait()
        _check(code == 0, run, log)
        text = log.read_text(encoding="utf-8", errors="replace")
        planned = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
        kept = ("planned_peak_bytes_per_gpu", "trained_parameters", "memory", "fullest_moment", "disk_bytes")
        self.store(name, "plan", {key: planned[key] for key in kept} | {"ranks": asked.ranks, "tokens": asked.tokens})

    def _train(self, name: str, part: Part, place: Path) -> None:
        """Train, kill after the save, resume, compare."""
        (place / "zero3.json").write_text(json.dumps(ZERO3), encoding="utf-8")
        output, log = place / "run", place / "train.log"
        words = ["--model", self.model, "--train_file", self.records[0], "--eval_file", self.records[1], "--output_dir", output]
        words += ["--losia", "--losia_config", place / "losia.yaml", "--precision", "bf16", "--max_length", part.tokens]
        words += [
            "--gradient_checkpointing",
            "non-reentrant",
            "--micro_batch",
            1,
            "--max_steps",
            STEPS,
            "--learning_rate",
            1e-4,
        ]
        words += ["--logging_steps", 1, "--save_steps", SAVE, "--keep_last", 1, "--resume", "auto", "--no_save"]
        words += ["--report_to", "none", "--data_cache", place / "data", *part.options]
        chosen = {"ZERO3": str(place / "zero3.json")}
        command = [chosen.get(str(w), str(w)) for w in (*part.launcher, ROOT / "launch" / "train.py", *words)]
        killed = self._start(name, "killed run", part, command, output, log)
        resumed = self._start(name, "resumed run", part, command, output, log)
        beyond = [step for step in killed if step > SAVE]
        equal = len(beyond) >= BEYOND and all(killed[step] == resumed.get(step) for step in beyond)
        told = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        found = {key: told[key] for key in ("resumed_from_step", "held_out_loss_before", "held_out_loss_after")}
        on_disk = {path.name: _size(path) for path in (output / "checkpoints").glob("*") if path.is_dir()}
        self.store(name, "resumed", {"equal_bits": equal, "compared_steps": beyond, "checkpoint_bytes": on_disk, **found})
        if not equal or told["resumed_from_step"] != SAVE:
            raise StageError(f"the resumed run differs from the killed one: {killed}, {resumed}")

    def _start(self, name: str, stage: str, part: Part, command: list[str], output: Path, log: Path) -> dict[int, float]:
        """Start the training, to be killed or to its end; the loss of every step."""
        metrics, is_killed = output / "metrics.jsonl", stage == "killed run"
        earlier = metrics.stat().st_ino if metrics.exists() else None  # a resumed run replaces it
        run, seen = Watched(command, log, self.limit, _environment(part.ranks)), dict[int, float]()

        def tick() -> bool:
            if not metrics.exists() or metrics.stat().st_ino == earlier:
                return False
            step = _last_step(metrics)
            if step > (0 if is_killed else SAVE) and step not in seen:
                seen[step] = run.seconds
                run.enter("saving" if step in (SAVE, STEPS) else "steps")
            return is_killed and step >= SAVE + BEYOND

        code = run.wait(tick, every=0.02 if self.scale == "tiny" else 0.5)
        lines = _objects(metrics)
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        at = {line["step"]: line["seconds"] for line in lines}
        took = {step: at[step] - at[step - 1] for step in losses if step - 1 in at}
        found = _memory(run) | {"losses": losses}
        if seen:
            found["startup_seconds"] = seen[min(seen)] - took.get(min(seen), 0.0)
            found["step_seconds"] = _median([took[step] for step in seen if step not in (min(seen), SAVE + 1) and step in took])
        self.store(name, stage, found)
        _check(code == (-9 if is_killed else 0), run, log)
        return losses

    def _export(self, name: str, tokens: int, place: Path) -> None:
        """Delta, export, reload, apply."""
        run, export, delta, rebuilt = (place / part for part in ("run", "export", "delta.safetensors", "rebuilt"))
        base = ("--base_model", str(self.model))
        self._command(name, "delta", place, ["export", "--delta", str(run), str(delta), *base], delta)
        drops = 3 * self.size + _size(delta) + 2 * GB > self.disk
        if drops:
            drop_weights(self.model)
        self._command(name, "export", place, ["export", str(run), str(export), *base], export)
        shutil.rmtree(run / "checkpoints")
        self.sums = prints(export)
        log = place / "loss.log"
        command = [*self._plain("loss", tokens, export, self.records[1])]
        loading = Watched(command, log, self.limit, _environment(1))
        code = loading.wait()
        found = _memory(loading)
        told = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        for line in _objects(log):
            found |= line | {"of_the_run": told["held_out_loss_after"], "before": told["held_out_loss_before"]}
        self.store(name, "reload", found)
        shutil.rmtree(export)
        _check(code == 0 and "held_out_loss" in found, loading, log)
        moved = abs(found["of_the_run"] - found["before"])
        if drops:
            self.make_model()
        self._command(name, "apply", place, ["apply", str(self.model), str(delta), str(rebuilt)], rebuilt)
        again = prints(rebuilt)
        self.store(name, "rebuilt", {"equal_bits": again == self.sums, "weights": len(again)})
        if again != self.sums:
            raise StageError("the model rebuilt from base and delta differs from the export")
        if abs(found["held_out_loss"] - found["of_the_run"]) > 0.01 * moved:
            raise StageError(f"the export's held-out loss is not the run's: {found}")

    def _command(self, name: str, stage: str, place: Path, words: list[str], target: Path) -> None:
        log = place / f"{stage}.log"
        run = Watched(_losia_dist(*words), log, self.limit, _environment(1))
        code = run.wait()
        self.store(name, stage, _memory(run) | {"bytes": _size(target)})
        _check(code == 0, run, log)

    def _plain(self, what: str, tokens: int, model: Path | None = None, records: Path | None = None) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.whole_life_plain", what, str(model or self.model)]
        return [*words, "--records", str(records or self.records[0]), "--max_length", str(tokens)]


def _objects(path: Path) -> list[dict[str, Any]]:
    """Lines that hold a JSON object, also among others."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # half written
    return found


def _last_step(path: Path) -> int:
    return max((line.get("step", 0) for line in _objects(path) if "loss" in line), default=0)


def _memory(run: Watched) -> dict[str, Any]:
    """Peaks in GB, over the command and by phase."""
    phases = {name: {kind: round(value / GB, 3) for kind, value in peaks.items()} for name, peaks in run.phases.items()}
    return {
        "seconds": round(run.seconds, 2),
        "peak_gb": round(run.peak() / GB, 3),
        "resident_gb": round(run.peak("resident") / GB, 3),
        "phases": phases,
        "ended": run.ended,
    }


def _check(is_right: bool, run: Watched, log: Path) -> None:
    if run.ended is not None:
        raise StageError(f"ended by the guard: {run.ended}")
    if not is_right:
        raise StageError(f"exit code {run.process.returncode}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def _losia_dist(*words: str) -> list[str]:
    return [sys.executable, "-m", "losia_dist", *words]


def _environment(ranks: int) -> dict[str, str]:
    """Both cores, between the ranks; no GPU, so that memory is the machine's.

    The C library hands back blocks of a MB and more when they are freed: left to itself it kept them, which doubled what two
    ranks of a small model took.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    found = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    found |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 20))
    return found | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Results:
    """Figures by part and stage, in a file that is whole after each of them. A part that runs again begins anew.

    Each part says where it was measured: the others may be another machine's.
    """

    def __init__(self, path: Path | None, scale: str) -> None:
        self.path, self.parts = path, dict[str, dict[str, Any]]()
        self._about = {"scale": scale, "shape": SHAPES[scale], "steps": STEPS}
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["scale"] == scale:
                self.parts = stored["results"]

    def begin(self, part: str) -> None:
        self.parts[part] = {"header": header()}

    def store(self, part: str, stage: str, found: dict[str, Any]) -> None:
        self.parts[part][stage] = found
        shown = {key: value for key, value in found.items() if key not in ("losses", "phases", "memory", "disk_bytes")}
        print(f"{part}, {stage}: {json.dumps(shown)}", flush=True)
        if self.path is not None:
            beside = self.path.with_suffix(".incomplete")
            beside.write_text(json.dumps({**self._about, "results": self.parts}, indent=1) + "\n", encoding="utf-8")
            beside.replace(self.path)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SHAPES, default="7b", help="tiny and small are rehearsals (7b)")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, LORA], default=[*PARTS, LORA], help="(all, in this order)")
    parser.add_argument("--work", type=Path, help="folder for models and runs; its model is kept, and taken if it is there")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "quickstart" / "model", help="(the quickstart's)")
    parser.add_argument("--records", type=Path, default=ROOT / "quickstart" / "train.jsonl", help="(the quickstart's)")
    parser.add_argument("--limit", type=float, default=22.0, metavar="GB", help="of a command's processes together (22)")
    parser.add_argument("--disk", type=float, default=40.0, metavar="GB", help="that model, run and exports may take (40)")
    parser.add_argument("--json", type=Path, help="(benchmarks/results/whole_life.json at 7b; else none)")
    options = parser.parse_args(arguments)
    path = options.json or (RESULTS / "whole_life.json" if options.scale == "7b" else None)
    for needed in (options.tokenizer, options.records):
        if not needed.exists():
            parser.error(f"{needed} is not there: make quickstart brings it, or name another (--tokenizer, --records).")
    results = Results(path, options.scale)
    print(header())
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        life = Life(
            work,
            options.scale,
            options.tokenizer,
            _records(options.records, work),
            options.limit * GB,
            options.disk * GB,
            results.store,
        )
        for name in options.parts:
            results.begin(name)
            began = time.monotonic()
            try:
                life.lora() if name == LORA else life.run(name, PARTS[name])
            except (StageError, OSError, ValueError, KeyError) as error:
                why = f"{type(error).__name__}: {error}".replace(str(work), "WORK").replace(str(ROOT), ".")
                results.store(name, "failed", {"why": why})
            results.store(name, "all", {"seconds": round(time.monotonic() - began)})
    print(f"\n{report(results.parts, {name: part.what for name, part in PARTS.items()})}")
    return results.parts


def _records(source: Path, work: Path) -> tuple[Path, Path]:
    """Few records, to train on and held out, as plain texts: all of their tokens are learned, up to the row's length."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[: HELD_OUT + 64]]
    texts = [json.dumps({"text": " ".join(str(value) for value in record.values())}) for record in records]
    for name, chosen in (("train.jsonl", texts[HELD_OUT:]), ("heldout.jsonl", texts[:HELD_OUT])):
        (work / name).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return work / "train.jsonl", work / "heldout.jsonl"


if __name__ == "__main__":
    main()
