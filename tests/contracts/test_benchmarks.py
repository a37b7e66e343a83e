"""The benchmarks at tiny sizes: they run, they compare like with like, and a cut run keeps what it had."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    authors,
    figures,
    growth,
    long_context,
    memory,
    methods,
    profile_step,
    relocalization,
    step_time,
    whole_life,
)
from benchmarks.__main__ import BENCHMARKS
from benchmarks.common import bar, bar_table
from benchmarks.gpu import Task, run, summary, tasks
from benchmarks.gpu import main as gpu
from benchmarks.shapes import Shape
from benchmarks.timing import interleave, median_interval
from benchmarks.watched import GB, Watched
from benchmarks.whole_life_model import drop_weights, prints, write_model
from tests.support.launching import make_material

TINY = Shape(layers=2, hidden=64, intermediate=96, vocabulary=64, length=16)
SIZES = ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64", "--length", "16"]


@pytest.mark.slow
def test_step_time_measures_every_method_and_pools_runs(tmp_path):
    path = tmp_path / "step_time.json"
    arguments = ["--dtype", "fp32", "--rounds", "2", "--json", str(path), *SIZES]
    (first,) = step_time.main(arguments)
    wanted = {"floor", *step_time.METHODS} - {"lora64-cast"}  # in fp32 the same as lora64
    assert set(first["methods"]) | set(first["not_measured"]) == wanted
    assert all(method["ratio"] > 0 and method["steps"] >= 1 for method in first["methods"].values())
    assert first["methods"]["cycle"]["slot_ends"] >= 1
    if importlib.util.find_spec("peft") is not None:
        assert len({bar["bar"] for bar in first["bars"]}) == 15  # seven for each of the two shapes, one of the short preset
    step_time.main([*arguments, "--methods", "losia", "--add"])
    stored = json.loads(path.read_text())
    (entry,) = stored["results"]
    assert entry["methods"]["losia"]["steps"] == 4 and entry["methods"]["localizing"]["steps"] == 2
    measured = {bar["bar"]: bar["measured"] for bar in entry["bars"]}
    assert measured["no group localizing / floor"] == entry["methods"]["losia"]["ratio"]
    assert stored["header"]["torch"] == torch.__version__
    stored["header"]["torch"] = "0"
    path.write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="measured elsewhere"):
        step_time.main([*arguments, "--add"])


def test_a_method_is_compared_with_the_floor_right_beside_it(monkeypatch):
    """A machine that becomes ten times slower between two rounds must not show in the ratios."""
    monkeypatch.setattr("benchmarks.timing.timed", lambda step, tokens, clock: (step(tokens), False))
    seconds = {"floor": iter([1.0, 1.0, 10.0, 10.0]), "twice": iter([2.0, 11.0, 20.0])}
    floor = methods.Method("floor", torch.nn.Identity(), lambda _: next(seconds["floor"]))
    twice = methods.Method("twice", torch.nn.Identity(), lambda _: next(seconds["twice"]))
    found = interleave(floor, [twice], torch.zeros(1), rounds=3, budget=60.0, warmup=0)
    assert found["twice"].ratios == [2.0, 2.0, 2.0]
    assert found["twice"].summary()["interval"] == [2.0, 2.0]


def test_the_interval_of_a_median_ignores_an_outlier():
    low, high = median_interval([1.0] * 12 + [50.0])
    assert low == high == 1.0
    low, high = median_interval([float(value) for value in range(101)])
    assert 30 < low < 50 < high < 70


def test_a_missed_bar_is_said():
    shown = bar_table([bar("a", 1.02, 1.03), bar("b", 1.04, 1.03)])
    assert re.search(r"\| a \| 1.02 \| 1.03 \| met \|", shown) and re.search(r"\| b \| 1.04 \| 1.03 \| NOT MET \|", shown)


@pytest.mark.parametrize("baseline", [authors.plain, authors.pro])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_baselines_written_from_the_paper_train_as_the_package_does(baseline, dtype):
    shape = replace(TINY, dtype=dtype)
    tokens = shape.tokens()
    ours, theirs = methods.losia(shape, localizing=False), baseline(shape)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    for _ in range(3):
        ours.step(tokens)
        theirs.step(tokens)
    ours.losia.consolidate()
    trained = 0
    for name, value in theirs.model.state_dict().items():
        moved = value - start[name]
        expected = ours.model.state_dict()[name] - start[name]
        assert torch.allclose(moved.float(), expected.float(), atol=1e-6 if dtype == "fp32" else 1e-4), name
        trained += int((moved != 0).sum())
    subnets = sum(layer.subnet.numel() for layer in ours.losia.sites)
    assert 0.5 * subnets < trained <= subnets if dtype == "fp32" else 0 < trained <= subnets


def test_memory_counts_what_is_kept_and_held():
    found = {name: memory.measure(TINY, name) for name in ("losia", "full-master", "plain")}
    losia, full = found["losia"], found["full-master"]
    assert losia["kept"] * 8 == full["kept"] > 0  # p = 1/8 of each input
    tokens, layers = 2 * 16, 2
    assert full["kept"] == 4 * tokens * layers * (6 * 64 + 96)  # fp32: six linears read the hidden size, one the inner
    for key in ("master", "moments", "gradients"):
        assert losia[key] * 64 == full[key] > 0
    assert full["moments"] == 2 * full["master"]
    assert found["plain"]["kept"] == full["kept"]
    assert losia["peak"] > 1e8  # a process with torch in it


@pytest.mark.slow
def test_memory_measures_each_method_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "memory.json"
    (entry,) = memory.main(["--dtype", "bf16", "--methods", "losia", "full-master", "--json", str(path), *SIZES])
    assert [b["met"] for b in entry["bars"]] == [True, True] and path.exists()


@pytest.mark.slow
def test_relocalization_and_growth_at_tiny_sizes(tmp_path):
    sizes = [*SIZES[2:], "--heads", "4"]
    (moved,) = relocalization.main(["--dtype", "fp32", "--depth", "3", "--json", str(tmp_path / "relocalization.json"), *sizes])
    assert moved["relocalization_seconds"] > 0 and moved["slot_seconds"] == 50 * 3 * moved["layer_seconds"]
    arguments = ["--axes", "rank-factor", "--points", "0.25", "--rounds", "2", "--json", str(tmp_path / "growth.json")]
    grown = growth.main([*arguments, *SIZES])
    assert grown["axes"]["rank-factor"][0]["losia"]["ratio"] > 0
    assert any(entry["difference"] for entry in profile_step.compare(TINY, "losia", 1))


@pytest.mark.slow
def test_figures_are_drawn_from_the_stored_results(tmp_path):
    pytest.importorskip("matplotlib")
    step_time.main(
        ["--dtype", "fp32", "--methods", "losia", "--rounds", "2", "--json", str(tmp_path / "step_time.json"), *SIZES]
    )
    (drawn,) = figures.main(["--results", str(tmp_path)])
    assert "LoSiA, not localizing" in drawn.read_text(encoding="utf-8")


def test_every_benchmark_that_is_listed_exists():
    assert all(importlib.util.find_spec(f"benchmarks.{name}") is not None for name in BENCHMARKS)


@pytest.mark.slow
def test_the_gpu_run_rehearses_and_streams(tmp_path):
    path = tmp_path / "gpu.jsonl"
    arguments = ["--rehearse", "--output", str(path), "--only", "nccl", "1b-2048", "8b-nf4-2048", "moe-2048", "8b-4096-fp8"]
    lines = gpu(arguments)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert lines[0]["task"] == "environment" and lines[0]["rehearsal"] is True
    checks = {line["check"]: line for line in lines if "check" in line}
    assert set(checks) == {"ddp", "fsdp2", "collectives of localization"} and all(line["equal"] for line in checks.values())
    trained = {line["key"]: line for line in lines if line["task"] == "1b-2048" and "key" in line}
    assert {"floor", "losia", "localizing", "full"} <= set(trained)
    assert trained["losia"]["tokens_per_second"] > 0
    assert [line["status"] for line in lines if "status" in line] == ["done"] * 5
    told = summary(lines)
    assert all(
        name in told
        for name in ("LoSiA, not localizing", "LoSiA, 1 x 1/16", "QLoRA", "LoSiA, drawn", "target_parameters", "FP8 products")
    )


def test_a_task_that_hangs_is_cut_and_keeps_what_it_said():
    code = "import time; print('{\"measured\": 1}', flush=True); time.sleep(60)"
    found = list(run(Task("hangs", 2, ["-c", code]), 2.0))
    assert found[0] == {"measured": 1}
    assert found[1]["status"].startswith("cut") and found[1]["seconds"] < 10
    (failed,) = run(Task("fails", 9, ["-c", "raise ValueError('why')"]), 9.0)
    assert failed["status"] == "failed with exit status 1" and "why" in failed["error"]


def test_a_gpu_run_without_a_gpu_or_with_an_unknown_task_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu(["--rehearse", "--only", "9b", "--output", str(tmp_path / "gpu.jsonl")])
    assert "no such task" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu(["--output", str(tmp_path / "gpu.jsonl")])
        assert "no GPU" in capsys.readouterr().err


def test_the_most_important_gpu_tasks_fit_into_eight_minutes():
    planned = tasks(rehearse=False)
    first = [task.name for task in planned[:5]]
    assert first[:2] == ["tests", "nccl"] and sum(task.seconds for task in planned[:5]) <= 480


SEQUENCES = ["--hidden_size", "64", "--intermediate_size", "96", "--vocab_size", "64", "--layers", "2", "--heads", "4"]


@pytest.mark.slow
def test_long_context_counts_what_ranks_tiles_and_offload_keep(ranks):
    def kept(size, *more):
        options = long_context.options_of(["kept", *SEQUENCES, "--length", "64", *more])
        return ranks(size, long_context.kept, size, options)[0]

    alone, together = kept(1), kept(2)
    assert together["kept"] == pytest.approx(alone["kept"] / 2, rel=0.05)
    assert alone["sent"] == 0 < together["sent"]
    assert kept(1, "--tiles", "4")["kept"] < alone["kept"]
    stays, away = kept(1, "--checkpointing", "recomputed"), kept(1, "--checkpointing", "offloaded")
    assert away["host"] == 2 * 64 * 64 * 4  # the inputs of both layers
    assert away["kept"] + away["host"] == stays["kept"] and stays["host"] == 0


CHILD = "import time; held = bytearray({size}); print('there', flush=True); time.sleep(60)"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_that_hold_too_much_together_are_killed(tmp_path):
    command = [sys.executable, "-c", PARENT, CHILD.format(size=400_000_000)]
    run = Watched(command, tmp_path / "log", 0.3 * GB, {})
    assert run.wait() == -9 and run.seconds < 30
    assert "above the limit of 0.30 GB" in run.ended and run.peak() > 0.3 * GB
    kept = Watched(command, tmp_path / "log", 4 * GB, {})
    kept.enter("killed by hand")
    assert kept.wait(lambda: kept.peak() > 0.4 * GB) == -9 and kept.ended is None  # the child is counted, and killed too
    assert 0.4 * GB < kept.phases["killed by hand"]["own"] < 0.6 * GB and kept.phases["start"]["own"] < 0.4 * GB


def test_a_life_s_model_has_the_same_bits_when_it_is_made_again(material, tmp_path):
    size = write_model(tmp_path, "tiny", material["model"])
    first = prints(tmp_path)
    drop_weights(tmp_path)
    assert prints(tmp_path) == {} and write_model(tmp_path, "tiny", material["model"]) == size
    assert prints(tmp_path) == first and len(first) > 30
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.nbytes for p in model.parameters()) == size
    assert model.model.layers[0].mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert bool((model.model.norm.weight == 1).all()) and not model.model.layers[0].self_attn.q_proj.bias.any()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_whole_life_at_a_tiny_size(material, tmp_path):
    given = ["--tokenizer", str(material["model"]), "--records", str(material["instruction"]), "--work", str(tmp_path)]
    # On so small a disk the base's weights are dropped for the time of the export.
    given += ["--scale", "tiny", "--parts", "located", "fsdp2", "--disk", "0.01", "--json", str(tmp_path / "life.json")]
    found = whole_life.main(given)
    for part, ranks in (("located", 1), ("fsdp2", 2)):
        life = found[part]
        assert "failed" not in life and life["plan"]["ranks"] == ranks, life.get("failed")
        assert life["resumed"]["equal_bits"] and life["resumed"]["compared_steps"][0] == 11
        assert life["rebuilt"]["equal_bits"]
        assert life["reload"]["held_out_loss"] == pytest.approx(life["reload"]["of_the_run"], rel=1e-6)
        assert 0.1 < life["killed run"]["peak_gb"] < 4 and life["killed run"]["startup_seconds"] > 0
    stored = json.loads((tmp_path / "life.json").read_text())
    assert [part["header"]["torch"] for part in stored["results"].values()] == [torch.__version__] * 2
    assert stored["results"]["fsdp2"]["all"] == found["fsdp2"]["all"] and str(tmp_path) not in json.dumps(stored["results"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_that_fails_is_reported_and_the_next_one_begins(material, tmp_path, capsys):
    given = ["--tokenizer", str(material["model"]), "--records", str(material["instruction"]), "--work", str(tmp_path)]
    found = whole_life.main([*given, "--scale", "tiny", "--parts", "drawn", "lora", "--limit", "0.2"])
    assert all("above the limit of 0.20 GB" in found[part]["failed"]["why"] for part in ("drawn", "lora"))
    assert "drawn failed: StageError: ended by the guard" in capsys.readouterr().out
    assert not (tmp_path / "drawn").exists()
