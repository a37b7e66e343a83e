"""`losia-dist report`: the logs that a run leaves, and the page made of them."""

import base64
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.cli.main import main, train_main
from losia_dist.digits import percent
from losia_dist.localization.moves import SubnetMove
from losia_dist.recipe.logs import RunLog
from losia_dist.run import subnet_log
from losia_dist.tools.report import movement, page
from losia_dist.tools.report.run_directory import read_run
from tests.support.launching import arguments as words_of
from tests.support.launching import make_material
from tests.support.models import batches, tiny_llama
from tests.support.trainers import fresh_accelerate, trainer_of
from tests.support.training import Run

STEPS, PERIOD = 8, 2
SEEN: dict[int, int] = {}
GROUPS = ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]


@pytest.fixture(scope="module")
def script_run(tmp_path_factory):
    """Output directory of the training script: 8 steps, a slot of 2 groups every 2 steps, so that every group moves twice.

    SEEN is what subnets.jsonl held after each step, as a killed run would leave it: the latest step it speaks of.
    """
    directory = tmp_path_factory.mktemp("script")
    material = make_material(directory / "material")
    words = words_of(material, directory / "run", no_save=True, eval_steps=4, samples=1, sample_tokens=3)
    advance = RunLog.advance

    def watched(log, step, **values):
        advance(log, step, **values)
        SEEN[step] = lines_of(directory / "run" / "subnets.jsonl")[-1]["step"]

    RunLog.advance = watched
    try:
        assert train_main([str(word) for word in words]) == 0
    finally:
        RunLog.advance = advance
    return directory / "run"


def report(directory, *words, output=None):
    output = output or directory / "report.html"
    assert main(["report", str(directory), "--output", str(output), *map(str, words)]) == 0
    return output.read_text(encoding="utf-8")


def refused(capsys, *words) -> str:
    """The one line with which the command line refuses these words, with exit code 2."""
    capsys.readouterr()
    assert main(["report", *map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Reader(HTMLParser):
    """What a page is made of: its text, its figures by title, and every address and event handler in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.addresses, self.handlers, self.alts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "alt":
                self.alts.append(value)

    def handle_data(self, data):
        self.text.append(data)


# What a run writes.


def test_the_script_logs_what_the_report_needs(script_run):
    told = json.loads((script_run / "losia_run.json").read_text())
    assert told["groups"] == GROUPS and told["groups_per_slot"] == 2
    assert told["versions"]["torch"] == torch.__version__ and told["memory_of"] == "process"
    assert LoSiAConfig.from_pretrained(script_run).period == PERIOD
    logged = [line for line in lines_of(script_run / "metrics.jsonl") if "loss" in line]
    assert len(logged) == STEPS
    for line in logged:
        assert 0.05 < line["peak_memory_gb"] < 100
        assert len(line["learning_rates"]) == len(GROUPS)
        # Groups 0 and 1 rewarm for one step (rewarm_steps=1: at the full rate), so that every rate is the scheduled one.
        assert line["learning_rates"] == pytest.approx([line["lr"]] * len(GROUPS), rel=1e-5)


def test_every_subnet_is_logged_at_the_start_and_whenever_it_moves(script_run):
    lines = lines_of(script_run / "subnets.jsonl")
    first = [line for line in lines if line["reason"] == "random"]
    assert len(first) == 3 * 7 + 1 and all(line["step"] == 0 and line["captured"] is None for line in first)
    moved = [line for line in lines if line["reason"] == "relocalized"]
    groups_at = {step: {line["group"] for line in moved if line["step"] == step} for step in {line["step"] for line in moved}}
    assert groups_at == {
        2: {"model.layers.0", "model.layers.1"},
        4: {"model.layers.2", "lm_head"},
        6: {"model.layers.0", "model.layers.1"},
        8: {"model.layers.2", "lm_head"},
    }
    assert SEEN == {1: 0, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8}
    for line in moved:
        m, n = line["shape"]
        rows, columns = (
            list(range(size)) if written == "all" else written for written, size in ((line["rows"], m), (line["columns"], n))
        )
        r, c = len(rows), len(columns)
        assert rows == sorted(set(rows)) and columns == sorted(set(columns))
        assert line["random_share"] == pytest.approx(r * c / (m * n), rel=1e-6)
        assert line["random_share"] < line["captured"] <= 1  # chosen by importance, it holds more than a random one


def test_memory_is_counted_by_kind(script_run):
    told = json.loads((script_run / "losia_memory.json").read_text())
    held, trained, indices = told["held"], 0, 0
    for line in lines_of(script_run / "subnets.jsonl")[: 3 * 7 + 1]:
        sides = zip((line["rows"], line["columns"]), line["shape"], strict=True)
        r, c = (size if written == "all" else len(written) for written, size in sides)
        trained, indices = trained + r * c, indices + r + c
    assert told["step"] == STEPS and told["peak"] > sum(held.values())
    assert held["trained"] == 4 * trained + 8 * indices
    assert held["optimizer"] == 8 * trained + 4 * (3 * 7 + 1)  # fp32: two moments, no masters; a step count each
    assert held["importance"] > 0 and held["weights"] > 0 and held["host"] == 0


def make_losia(config):
    model = get_losia_model(tiny_llama(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    return LoSiA(model, optimizer, config)


def train_steps(losia, log, steps):
    optimizer = losia.state.optimizer
    for (batch,) in batches(steps=steps, micro_batches=1, batch=2, length=8, vocab=97, seed=losia.steps):
        losia.model(**batch).loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        log.write()


def test_the_log_says_where_the_subnets_really_are(tmp_path):
    losia = make_losia(LoSiAConfig(rank_factor=0.25, period=1, layers_per_slot=3))
    log = subnet_log.SubnetLog(losia)
    log.begin(tmp_path, continues=False)
    train_steps(losia, log, 2)
    latest = {line["layer"]: (line["rows"], line["columns"]) for line in lines_of(tmp_path / "subnets.jsonl")}
    assert latest == {layer.name: (layer.row_index.tolist(), layer.col_index.tolist()) for layer in losia.sites}
    log.close()
    assert not losia.on_move


def test_all_rows_are_written_as_a_word(tmp_path):
    losia = make_losia(LoSiAConfig(rank_factor=(1.0, 0.25), period=1, layers_per_slot=3))
    log = subnet_log.SubnetLog(losia)
    log.begin(tmp_path, continues=False)
    train_steps(losia, log, 1)
    log.close()
    assert {line["rows"] for line in lines_of(tmp_path / "subnets.jsonl")} == {"all"}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert {move.overlap[0] for move in read_run(tmp_path).movement.moves if move.overlap is not None} == {1.0}
    words = " ".join(Reader(report(tmp_path)).text)
    assert "36 output and 36 input neurons, of which 36 and 9 are chosen" in words


def test_a_resumed_run_goes_on_with_its_lines_and_drops_what_came_after_its_checkpoint(tmp_path):
    losia = make_losia(LoSiAConfig(rank_factor=0.25, period=1))
    log = subnet_log.SubnetLog(losia)
    log.begin(tmp_path, continues=False)
    train_steps(losia, log, 2)
    log.close()
    path = tmp_path / "subnets.jsonl"
    whole = path.read_text()
    killed = SubnetMove(3, "relocalized", "x", "y", (4, 4), torch.arange(2), torch.arange(2), 0.5, 0.25)
    late = {"step": killed.step, "reason": killed.reason, "layer": "x", "group": "y", "shape": [4, 4]}
    path.write_text(whole + json.dumps({**late, "rows": [0], "columns": [0]}) + '\n{"step": 3, "reas')
    log = subnet_log.SubnetLog(losia)
    log.begin(tmp_path, continues=True)
    assert path.read_text() == whole
    train_steps(losia, log, 1)
    log.close()
    assert path.read_text().startswith(whole) and {line["step"] for line in lines_of(path)} == {0, 1, 2, 3}
    # Without its earlier lines, a resumed run says where its subnets are and that it was resumed.
    path.unlink()
    log = subnet_log.SubnetLog(losia)
    log.begin(tmp_path, continues=True)
    log.close()
    assert {(line["step"], line["reason"]) for line in lines_of(path)} == {(3, "resumed")}


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path):
    losia = make_losia(LoSiAConfig(rank_factor=0.25, period=1))
    log = subnet_log.SubnetLog(losia)
    (tmp_path / "subnets.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"subnets.jsonl cannot be written .* will lack its subnets"):
        log.begin(tmp_path, continues=False)
    train_steps(losia, log, 2)
    assert losia.steps == 2
    log.close()


# Figures from known numbers.


def record(step, rows, columns, layer="model.layers.0.mlp.up", captured=None, shape=(8, 6)):
    reason = "relocalized" if step else "random"
    return {
        "step": step,
        "reason": reason,
        "layer": layer,
        "group": "model.layers.0",
        "shape": list(shape),
        "rows": rows,
        "columns": columns,
        "captured": captured,
        "random_share": len(rows) * len(columns) / (shape[0] * shape[1]),
    }


def test_overlap_is_the_share_of_the_new_neurons_that_were_there_before():
    found = movement.Movement()
    assert found.add(record(0, [0, 1, 2, 3], [0, 1]))
    assert found.add(record(2, [0, 1, 2, 7], [4, 5], captured=0.5))
    assert found.add(record(4, [0, 1, 2, 7], [3, 4], captured=0.25))
    assert [move.overlap for move in found.moves] == [None, (0.75, 0.0), (1.0, 0.5)]
    assert not found.add(record(5, "some", [3, 4]))
    (layer,) = found.layers.values()
    assert (layer.kind, layer.captured, layer.random_share) == ("mlp.up", 0.25, 4 * 2 / 48)
    assert layer.first[0].tolist() == [0, 1, 2, 3] and layer.latest[1].tolist() == [3, 4]


def test_experts_overlap_expert_by_expert():
    found = movement.Movement()
    experts = {"layer": "model.layers.0.mlp.experts.up_proj"}
    for rows in ([[0, 1], [2, 3]], [[0, 1], [0, 1]]):  # the first expert stays, the second moves
        assert found.add({**record(0, [0, 1], [0]), **experts, "rows": rows, "columns": [[0], [5]]})
    assert found.moves[-1].overlap == (0.5, 1.0)
    (layer,) = found.layers.values()
    assert layer.count == 2 and layer.taken == (2, 1) and layer.random_share == 2 / 48
    assert not found.add({**record(0, [0], [0]), **experts, "rows": [[0], [1]]})


@pytest.mark.parametrize(
    "change",
    [{"rows": [8]}, {"columns": [-1]}, {"rows": []}, {"shape": [8]}, {"step": None}, {"rows": "abc"}, {"rows": [[1]]}],
    ids=str,
)
def test_a_line_that_is_no_subnet_is_passed_over(change):
    assert not movement.Movement().add({**record(0, [0], [0]), **change})


def test_the_map_has_each_neuron_in_its_place_and_colour():
    from losia_dist.tools.report import maps

    found = movement.Movement()
    found.add(record(0, [0, 1], [0]))
    found.add(record(1, [1, 7], [0]))
    (layer,) = found.layers.values()
    colours = [tuple(round(float(c), 6) for c in colour) for colour in maps._strip(layer, 0, 8)]
    white = (1.0, 1.0, 1.0)
    left, stayed, joined = (tuple(map(float, c)) for c in (maps._LEFT, maps._STAYED, maps._JOINED))
    assert colours == [left, stayed, white, white, white, white, white, joined]
    # Wider than the picture: neighbours are counted together, and none is lost at the end.
    wide = movement.Layer(
        "x", "x", "x", (28_672, 8), ((layer.first[0]), layer.first[1]), (layer.latest[0] + 28_664, layer.first[1])
    )
    strip = maps._strip(wide, 0, 28_672)
    assert len(strip) <= 400 and (strip[0] < 1).any() and (strip[-1] < 1).any() and (strip[1:-1] == 1).all()


# The page.


def test_the_page_shows_the_run_and_loads_nothing(script_run, tmp_path):
    text = report(script_run, "--png", tmp_path / "png", output=tmp_path / "page.html")
    read = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(read.tags) and not read.handlers
    assert read.addresses and all(address.startswith("data:image/svg+xml;base64,") for address in read.addresses)
    for address in read.addresses:
        svg = base64.b64decode(address.partition(",")[2]).decode()
        assert "<script" not in svg and not re.search(r'(?:href|src)="(?!#|data:)', svg)
    assert "default-src 'none'" in text
    words = " ".join(read.text)
    summary = json.loads((script_run / "summary.json").read_text())
    for value in (summary["held_out_loss_before"], summary["held_out_loss_after"]):
        assert f"{value:.3f}" in words
    for part in (
        "Memory by kind",
        "Importance captured",
        "Overlap of successive subnets",
        "mlp.up_proj",
        "Every layer was stepped with it",
    ):
        assert part in words
    for part in (torch.__version__, "layers_per_slot", "22 of 22", summary["samples_after"][0]["prompt"]):
        assert part in words
    assert all(read.alts) and len(read.alts) == read.tags.count("img")
    pictures = sorted((tmp_path / "png").iterdir())
    assert len(pictures) == len(read.alts)
    for picture in pictures:
        assert picture.suffix == ".png" and picture.read_bytes().startswith(b"\x89PNG")


def test_without_an_output_the_page_goes_into_the_runs_directory(script_run, capsys):
    capsys.readouterr()
    assert main(["report", str(script_run)]) == 0
    assert capsys.readouterr().out == f"written: {script_run / 'report.html'}\n"
    assert (script_run / "report.html").is_file()


def test_other_runs_losses_are_drawn_beside(script_run, tmp_path):
    other = tmp_path / "run"  # of the same name: told apart by the directory above
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 3.25}\n{"step": 2, "loss": 2.125, "held_out": 9.5}\n')
    words = " ".join(Reader(report(script_run, "--compare", other, output=tmp_path / "page.html")).text)
    assert "Losses of all runs" in words and "2.1250" in words and "9.5000" in words
    assert f"{tmp_path.name}/run" in words and f"{script_run.parent.name}/run" in words


def test_text_of_a_run_stays_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "losia_run.json").write_text(json.dumps({"method": "losia", "engine": evil, "versions": {evil: evil}}))
    sample = {"prompt": evil, "answer": evil, "expected": evil}
    (tmp_path / "summary.json").write_text(json.dumps({"samples_before": [sample], "samples_after": [sample]}))
    read = Reader(report(tmp_path))
    assert not read.handlers and all(address.startswith("data:") for address in read.addresses)
    assert " ".join(read.text).count(evil) >= 5


def test_a_run_without_subnets_is_full_fine_tuning(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n{"step": 2, "loss": 0.5, "lr": 0.2}\n')
    (tmp_path / "losia_run.json").write_text('{"method": "full", "groups": [], "steps": 2}')
    words = " ".join(Reader(report(tmp_path)).text)
    assert "Full fine-tuning run" in words and "Where the subnets are" not in words and "subnets.jsonl" not in words


# Runs whose subnets are drawn.


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("drawn")
    material = make_material(directory / "material")
    material["losia"].write_text("rank_factor: [0.5, 0.25]\nperiod: 2\nselection: random\nlayers_per_slot: 2\n")
    assert train_main(words_of(material, directory / "run", no_save=True, eval_file=None)) == 0
    return directory / "run"


def test_a_drawn_runs_page_says_how_much_has_trained_and_draws_no_maps_of_noise(drawn_run, script_run, tmp_path):
    read = Reader(report(drawn_run, output=tmp_path / "page.html"))
    words = " ".join(read.text)
    assert "How much of the weights has trained" in words and "Trained so far, by layer" in words
    assert "Where the subnets are" not in words and "Overlap of successive subnets" not in words
    assert "layers drawn anew" in words and "layers re-localized" not in words
    covered, moves = {}, read_run(drawn_run).movement
    for line in lines_of(drawn_run / "subnets.jsonl"):
        m, n = line["shape"]
        mask = covered.setdefault(line["layer"], torch.zeros(m, n, dtype=torch.bool))
        rows = torch.arange(m) if line["rows"] == "all" else torch.tensor(line["rows"])
        columns = torch.arange(n) if line["columns"] == "all" else torch.tensor(line["columns"])
        mask[rows.unsqueeze(1), columns] = True
    for name, mask in covered.items():
        assert moves.layers[name].covered == pytest.approx(mask.double().mean().item())
    down = [mask.double().mean().item() for name, mask in covered.items() if name.endswith("down_proj")]
    assert 0.125 < min(down) < 1
    assert percent(sum(down) / len(down)) in words
    other = " ".join(Reader(report(script_run, output=tmp_path / "other.html")).text)
    assert "How much of the weights has trained" not in other and "Where the subnets are" in other


def test_a_wide_layers_coverage_is_told_by_some_of_its_rows_and_columns():
    layer = movement.Layer("l", "g", "k", (4096, 2048), *[(movement.np.arange(1), movement.np.arange(1))] * 2)
    every = movement.np.arange(4096)
    assert layer.cover(every[::2], every[:1024]) == pytest.approx(0.25, abs=0.01)
    assert layer.cover(every[::2], every[:1024]) == pytest.approx(0.25, abs=0.01)  # the same once more
    assert layer.cover(every, every[1024:2048]) == pytest.approx(0.75, abs=0.01)


def test_several_runs_on_one_page(script_run, drawn_run, tmp_path):
    assert main(["report", str(script_run), str(drawn_run), "--output", str(tmp_path / "page.html")]) == 0
    words = " ".join(Reader((tmp_path / "page.html").read_text()).text)
    assert "Losses of all runs" in words and words.count(f"{drawn_run.parent.name}/run") >= 2  # its losses, its memory
    assert words.index("All runs") < words.index("Learning rate")
    for run in (script_run, drawn_run):
        counted = json.loads((run / "losia_memory.json").read_text())["held"]
        assert f"{counted['optimizer'] / 1000:.3g} kB" in words


def test_memory_that_is_no_count_is_left_out_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "losia_memory.json").write_text('{"peak": 5, "held": {"weights": 1}}')
    words = " ".join(Reader(report(tmp_path)).text)
    assert "losia_memory.json could not be read" in words and "Memory by kind" not in words


# What is wrong with a run's files.


def test_a_killed_runs_half_line_is_left_out_and_said(script_run, tmp_path):
    for name in ("metrics.jsonl", "subnets.jsonl", "losia_run.json"):
        (tmp_path / name).write_bytes((script_run / name).read_bytes())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (tmp_path / "metrics.jsonl").write_text("".join(kept) + lines[-2][:40])
    with (tmp_path / "subnets.jsonl").open("a") as file:
        file.write('{"step": 9, "reason": "relo')
    words = " ".join(Reader(report(tmp_path)).text)
    assert "1 line of metrics.jsonl could not be read" in words and "1 line of subnets.jsonl could not be read" in words
    assert "The logs end at step 5 of 8" in words


def test_a_run_that_diverged_is_drawn_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "grad_norm": 1.0}\n{"step": 2, "loss": NaN, "grad_norm": Infinity}\n'
    )
    assert "not finite from step 2 on" in " ".join(Reader(report(tmp_path)).text)


def test_what_is_no_run_is_refused_in_one_line(capsys, tmp_path, script_run, monkeypatch):
    assert "missing is not there: give a run's output_dir" in refused(capsys, tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "file is a file: give a run's output_dir" in refused(capsys, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no logs of a run" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "events.out.tfevents.0.x").write_bytes(b"not events")
    assert "holds no logs of a run" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert "holds no whole line yet" in refused(capsys, tmp_path / "empty")
    assert "empty/metrics.jsonl holds no whole line" in refused(capsys, script_run, "--compare", tmp_path / "empty")
    assert "is a directory: give the name of an HTML file" in refused(capsys, script_run, "--output", tmp_path)
    said = refused(capsys, script_run, "--output", tmp_path / "file" / "page.html")
    assert "page.html cannot be written" in said
    page_there = tmp_path / "page.html"
    assert "cannot be written" in refused(capsys, script_run, "--output", page_there, "--png", tmp_path / "file" / "png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "needs matplotlib: pip install 'losia_dist[report]'" in refused(capsys, script_run)


# Runs of the Trainer, and TensorBoard alone.


class Looking(TrainerCallback):
    """The latest step that subnets.jsonl speaks of, after each step."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(lines_of(self.path)[-1]["step"])


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory):
    """Output directory of a LoSiATrainer that saves a checkpoint and writes TensorBoard; 6 steps, slots of 2."""
    directory = tmp_path_factory.mktemp("trainer")
    run = Run(steps=6, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2})
    with fresh_accelerate():
        settings = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 4}
        looking = Looking(directory / "subnets.jsonl")
        trainer = trainer_of(str(directory), "one", run, callbacks=[looking], eval_strategy="steps", eval_steps=3, **settings)
        trainer.train()
        assert looking.seen == [0, 2, 2, 4, 4, 6]
        trainer.losia.detach()
    return directory


def test_a_trainers_run_is_read_from_its_state_or_from_tensorboard(trainer_run, tmp_path):
    from_state = read_run(trainer_run)
    assert "checkpoint-6/trainer_state.json" in from_state.files or "checkpoint-4/trainer_state.json" in from_state.files
    assert {move.step for move in from_state.movement.moves} == {0, 2, 4, 6}
    assert from_state.facts["groups"] == GROUPS and from_state.config["period"] == 2
    for path in trainer_run.rglob("events.out.tfevents.*"):
        copy = tmp_path / path.relative_to(trainer_run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    from_events = read_run(tmp_path)
    assert from_events.files == [f"TensorBoard events in {next(tmp_path.rglob('events*')).parent.relative_to(tmp_path)}"]
    assert not from_events.curves.rates  # trackers get three numbers for all groups
    for curves in (from_state.curves, from_events.curves):
        assert curves.loss.steps[:4] == [1, 2, 3, 4]
        assert curves.held_out["held-out"].steps[0] == 3
        assert curves.memory and curves.rate and curves.grad_norm
    # After its slot (steps 1 and 2) the first layer rewarms over two steps: half the scheduled rate, then all of it.
    curves = from_state.curves
    assert set(curves.rates) == set(GROUPS)
    ratio = [curves.rates["model.layers.0"].points[step] / curves.rate.points[step] for step in (2, 3, 4)]
    assert ratio == pytest.approx([1.0, 0.5, 1.0], rel=1e-5)
    for step in from_state.curves.loss.steps:
        assert from_events.curves.loss.points[step] == pytest.approx(from_state.curves.loss.points[step], rel=1e-6)
    assert "Learning rate of every layer" in report(trainer_run, output=tmp_path / "page.html")


def test_the_scripts_tensorboard_alone_gives_its_curves(script_run, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    for path in (script_run / "tensorboard").iterdir():
        (tmp_path / "tensorboard" / path.name).write_bytes(path.read_bytes())
    whole, alone = read_run(script_run).curves, read_run(tmp_path).curves
    assert alone.loss.steps == whole.loss.steps and alone.rate.steps == whole.rate.steps
    assert set(whole.rates) == set(GROUPS) and not alone.rates  # trackers get three numbers for all groups
    assert alone.held_out["held-out"].values == pytest.approx(whole.held_out["held-out"].values, rel=1e-6)


def test_several_evaluation_sets_keep_their_names(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("eval/maths_loss", 2.0, 1)
    writer.add_scalar("eval/loss", 1.0, 1)
    writer.add_scalar("train/unknown", 1.0, 1)
    writer.close()
    curves = read_run(tmp_path).curves
    assert {name: curve.last for name, curve in curves.held_out.items()} == {"maths": 2.0, "held-out": 1.0}
    assert not curves.loss


# Values.


def test_values_of_a_configuration_are_shown_for_people():
    shown = [page.shown(value) for value in (True, None, 12345, 0.000050, [0.25, 0.0625], [], {"a": 1}, "x")]
    assert shown == ["yes", "not set", "12,345", "5e-05", "0.25, 0.0625", "none", "a: 1", "x"]
