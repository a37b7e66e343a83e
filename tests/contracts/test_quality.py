"""The quality benchmark on a tiny model: every method trains, shares are of full fine-tuning's gain, a cut night goes on."""

from __future__ import annotations

import copy
import importlib.util
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import figures
from benchmarks.methods import NEVER, target_linears
from benchmarks.quality import search, summary
from benchmarks.quality.__main__ import main
from benchmarks.quality.batches import collate, encode, evaluation_batches, training_batches
from benchmarks.quality.columns import ColumnSteps
from benchmarks.quality.command import parse
from benchmarks.quality.flat import FlatNoise
from benchmarks.quality.loss import answer_loss, mean_loss
from benchmarks.quality.methods import METHODS, equal_rank
from benchmarks.quality.setting import Setting, parse_options
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import final_number
from benchmarks.quality.training import Bench, fit, rate_factor
from benchmarks.quality.variants import VARIANTS
from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.data import load_records
from tests.support.cases import only
from tests.support.launching import make_material
from tests.support.models import tiny_llama


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality")
    make_material(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True)
    return Bench(model, tokenizer, directory, "fp32")


RECOMMENDED = dict(METHODS["losia"].defaults)


@pytest.fixture(autouse=True)
def short_slots(monkeypatch):
    """One cycle of slots of one step: the recommended schedule does not fit runs of three."""
    monkeypatch.setitem(METHODS["losia"].defaults, "period", 1)
    monkeypatch.setitem(METHODS["losia"].defaults, "cycles", 1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Records of a few words, of which the answer repeats the question: something to learn at once."""
    generator, words = random.Random(0), ["sea", "tree", "of", "stone", "light"]
    path = tmp_path_factory.mktemp("task") / "echo.jsonl"
    lines = []
    for _ in range(300):
        text = " ".join(generator.choice(words) for _ in range(generator.randint(1, 6)))
        lines.append(json.dumps({"instruction": text, "output": text}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def quality(bench, tmp_path, *arguments):
    """A command line's results, in fp32: bf16 is slow on processors without units for it."""
    arguments = ["--precision", bench.precision, *arguments]
    runs = ["--runs", str(tmp_path / "runs.jsonl"), "--json", str(tmp_path / "quality.json")]
    return main([*runs, "--steps", "3", "--batch", "8", "--scored", "0", "--threads", "1", *arguments], bench)


def runs_of(results, task):
    return [(run["setting"]["method"], run["result"]) for run in results["runs"][task]]


@pytest.mark.parametrize("method", only(["lora", "losia", "losia_published"], list(METHODS)))
def test_every_method_learns_and_leaves_the_start_alone(bench, task, tmp_path, method):
    if method == "galore" and importlib.util.find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed")
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    results = quality(bench, tmp_path, "--methods", method, "--tasks", task, "--rates", "1e-2", "--seeds", "0")
    ((_, result),) = runs_of(results, task)
    assert result["after"]["held_out"] < result["before"]["held_out"] - 1e-3
    assert result["gain"] == pytest.approx(result["before"]["held_out"] - result["after"]["held_out"])
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


@pytest.mark.parametrize("method", ["full", "lora", "losia", "losia_published"])
def test_the_plain_model_is_the_trained_one(bench, task, method):
    setting = Setting(task, method, 3e-2, 0, steps=5, batch=8, precision="fp32")
    done = fit(bench.fresh(), bench.fresh, bench.data(task), setting)
    examples = bench.data(task).batches["choice"]
    trained = copy.deepcopy(done.trained.model) if method == "lora" else done.trained.model  # LoRA merges in place
    plain = done.trained.plain()
    assert type(plain) is type(bench.model) and plain.state_dict().keys() == bench.model.state_dict().keys()
    assert mean_loss(plain, examples, "fp32") == pytest.approx(mean_loss(trained, examples, "fp32"), abs=1e-4)


@pytest.mark.slow
def test_a_run_is_the_same_every_time_and_every_method_sees_the_same_data(bench, task, tmp_path):
    arguments = ["--tasks", task, "--methods", "losia", "lora", "--rates", "1e-3", "--seeds", "0"]
    first = runs_of(quality(bench, tmp_path / "a", *arguments), task)
    again = runs_of(quality(bench, tmp_path / "b", *arguments), task)
    assert [result["training_losses"] for _, result in first] == [result["training_losses"] for _, result in again]
    # No method has learned anything when it sees the first batch.
    assert first[0][1]["training_losses"][0] == pytest.approx(first[1][1]["training_losses"][0], abs=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_configuration_of_its_own(variant):
    resolve = METHODS["losia"].resolve
    resolved = {name: resolve({**RECOMMENDED, **options}) for name, options in VARIANTS.items()}
    assert [name for name, found in resolved.items() if found == resolved[variant]] == [variant]


@pytest.fixture
def no_search(monkeypatch):
    """The rate in the middle is taken: searches have tests of their own."""
    monkeypatch.setattr(search, "RATES", 1)
    monkeypatch.setattr(search, "MOST_RATES", 1)


@pytest.mark.slow
def test_an_interrupted_night_goes_on_where_it_stopped(bench, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "MOST_RATES", 3)
    arguments = ["--methods", "full", "losia", "--tasks", task, "--seeds", "0", "1"]
    whole = quality(bench, tmp_path, *arguments)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(whole["runs"][task]) == 8  # three rates and a second seed for each
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-2]) + lines[-1][:50])  # ended while a line was written
    capsys.readouterr()
    again = quality(bench, tmp_path, *arguments)
    assert capsys.readouterr().out.count("[stored]") == len(lines) - 2
    assert again["share_of_full"] == whole["share_of_full"]
    assert len(Store(tmp_path / "runs.jsonl").records()) == len(lines)
    stored = json.loads((tmp_path / "quality.json").read_text())
    assert stored["share_of_full"] == whole["share_of_full"] and stored["share_of_full"]["full"] == 1.0


@pytest.mark.slow
def test_stored_runs_are_summarized_without_making_any_and_what_is_not_there_is_said(bench, task, tmp_path, no_search, capsys):
    arguments = ["--tasks", task, "--methods", "full", "losia", "random", "--seeds", "0", "1"]
    quality(bench, tmp_path, "--tasks", task, "--methods", "full", "losia", "--rates", "2e-3", "--seeds", "0")
    quality(bench, tmp_path, "--tasks", task, "--methods", "full", "--seeds", "0", "1")
    capsys.readouterr()
    lines = (tmp_path / "runs.jsonl").read_text()
    found = quality(bench, tmp_path, *arguments, "--stored")
    assert (tmp_path / "runs.jsonl").read_text() == lines
    seeds = {name: entry["seeds"] for name, entry in found["tasks"][task].items()}
    assert seeds == {"full": [0, 1], "losia": [0]} and found["share_of_full"]["losia"] > 0
    assert found["missing"] == {
        f"{task}: losia": "1 stored runs; the first that is not there: rate 0.002, seed 1",
        f"{task}: random": "0 stored runs; the first that is not there: rate 0.008, seed 0",
    }
    said = capsys.readouterr().out
    assert "random: 0 stored runs" in said and said.count("[stored]") == 3  # each run once
    assert parse(["--stored"]).json is None and parse([]).json is not None  # a whole result is not overwritten by a part
    with pytest.raises(SystemExit):
        quality(bench, tmp_path, "--sequence", "--stored")


@pytest.mark.slow
def test_fp32_arithmetic_is_another_run_and_computes_in_fp32(bench, task, tmp_path):
    rounded = Bench(bench.model, bench.tokenizer, bench.data_directory, "bf16")
    arguments = ["--tasks", task, "--methods", "losia", "--rates", "1e-2", "--seeds", "0"]
    ((_, ours),) = runs_of(quality(bench, tmp_path, *arguments), task)
    ((_, theirs),) = runs_of(quality(rounded, tmp_path, *arguments), task)
    assert len(Store(tmp_path / "runs.jsonl").records()) == 2
    examples = bench.data(task).batches["held_out"]
    whole = mean_loss(copy.deepcopy(bench.model).double(), examples, "fp32")
    assert abs(ours["before"]["held_out"] - whole) < 1e-5 < abs(theirs["before"]["held_out"] - whole)
    assert 0 < abs(ours["gain"] - theirs["gain"]) < 2e-2


def test_the_result_is_drawn(bench, task, tmp_path, no_search):
    pytest.importorskip("matplotlib")
    quality(bench, tmp_path, "--methods", "full", "losia", "--tasks", task, "--seeds", "0")
    (drawn,) = figures.main(["--results", str(tmp_path)])
    text = drawn.read_text()
    assert "LoSiA" in text and "% of full fine-tuning" in text and "unrelated text" in text


def test_a_run_is_repeated_where_a_setting_or_a_default_changed(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    setting = Setting("gsm8k", "losia", 1e-3, 0, resolved={"period": 100})
    store.append(setting, {"gain": 1.0}, {})
    assert store.find(setting)["result"] == {"gain": 1.0}
    # Naming a default asks for the same run.
    assert store.find(Setting("gsm8k", "losia", 1e-3, 0, options={"period": 100}, resolved={"period": 100})) is not None
    for other in (setting.at(seed=1), setting.at(rate=2e-3), Setting("gsm8k", "losia", 1e-3, 0, resolved={"period": 50})):
        assert store.find(other) is None
    assert METHODS["losia"].resolve({}) != METHODS["losia"].resolve({"period": 7})


def test_a_run_made_before_an_option_was_there_or_went_is_not_made_again(tmp_path):
    store, resolved = Store(tmp_path / "runs.jsonl"), METHODS["losia"].resolve({})
    before = {name: value for name, value in resolved.items() if name != "full_lr_scale"}
    asked = Setting("gsm8k", "losia", 1e-3, 0, resolved=resolved)
    store.append(Setting("gsm8k", "losia", 1e-3, 0, resolved={**before, "moments": "kept"}), {"gain": 1.0}, {})
    assert store.find(asked) is None
    store.append(Setting("gsm8k", "losia", 1e-3, 0, resolved={**before, "moments": "cleared"}), {"gain": 1.0}, {})
    assert store.find(asked) is not None and len(store.family(asked)) == 1
    assert store.find(Setting("gsm8k", "losia", 1e-3, 0, resolved={**resolved, "full_lr_scale": 0.5})) is None


@pytest.mark.parametrize(
    "best, wanted", [(0, {-1, 0, 1}), (1, {-1, 0, 1, 2}), (-3, {-4, -3, -2, -1, 0, 1}), (9, {-1, 0, 1, 2, 3, 4})]
)
def test_a_search_goes_on_beyond_an_edge_that_is_best(best, wanted):
    tried = []

    def runner(setting):
        tried.append(setting.rate)
        exponent = torch.tensor(setting.rate / 1e-3).log2().round().item()
        return {"result": {"after": {"choice": abs(exponent - best)}}}

    rate = search.search_rate(Setting("gsm8k", "lora", 0.0, 0), 1e-3, runner)
    assert {round(torch.tensor(one / 1e-3).log2().item()) for one in tried} == wanted and len(tried) == len(wanted)
    assert rate == pytest.approx(1e-3 * 2.0 ** (best if best in wanted else max(wanted)))


def test_a_rate_that_diverges_is_never_the_best():
    losses = {5e-4: 0.9, 1e-3: 0.8, 2e-3: None}
    found = search.search_rate(
        Setting("gsm8k", "lora", 0.0, 0), 1e-3, lambda setting: {"result": {"after": {"choice": losses[setting.rate]}}}
    )
    assert found == 1e-3


def made(method, rate, seed, choice, gain, forgetting=0.1):
    setting = Setting("gsm8k", method, rate, seed).to_dict()
    result = {"before": {"held_out": 2.0}, "after": {"choice": choice, "held_out": 2.0 - gain}, "gain": gain}
    result |= {"forgetting": forgetting, "score": None, "score_before": None, "seconds_per_step": 1.0}
    result |= {"seconds_of_preparation": 0.0, "peak_bytes": 10**9, "trained_parameters": 5}
    return {"setting": setting, "result": result, "header": {}}


def test_shares_are_of_full_fine_tunings_mean_gain_at_the_best_rate_of_each():
    runs = [
        made("full", 1e-4, 0, 1.2, 0.8),
        made("full", 2e-4, 0, 1.3, 0.9),  # better on what is reported, worse on what the rate is chosen by
        made("full", 1e-4, 1, 1.2, 0.6),
        made("lora", 1e-3, 0, 1.4, 0.60),
        made("lora", 2e-3, 0, 1.5, 0.65),
        made("lora", 1e-3, 1, 1.4, 0.66),
    ]
    entries = summary.summarize(runs)
    assert entries["lora"]["share"]["values"] == pytest.approx([0.60 / 0.7, 0.66 / 0.7])
    assert summary.share_of_full({"gsm8k": entries}) == {"full": 1.0, "lora": 0.9}
    twice = {name: {**entry, "share": {"mean": 0.5}} for name, entry in entries.items() if name == "lora"}
    assert summary.share_of_full({"gsm8k": entries, "reasoning": twice}) == {"lora": 0.7}  # full is missing from one
    assert summary.share_of_full({"gsm8k": summary.summarize(runs[3:])}) == {}


def test_forgetting_is_compared_where_two_methods_gain_the_same():
    points = [(2e-3, 0.6, 0.3), (1e-3, 0.4, 0.1), (4e-3, 0.5, 0.9)]  # the highest rate forgets more for less
    runs = [made("lora", rate, 0, 1.0, gain, lost) for rate, gain, lost in points]
    assert summary.forgetting_at(runs, "lora", 0.5) == pytest.approx(0.2)
    assert summary.forgetting_at(runs, "lora", 0.7) is None
    unsteady = [made("lora", rate, 0, 1.0, gain, 0.3) for rate, gain in [(1e-3, 0.6), (2e-3, 0.3), (4e-3, 0.5)]]
    assert summary.forgetting_at(unsteady, "lora", 0.4) is None  # only rates beyond the best gain so little
    entries = summary.summarize([*runs, made("full", 1e-4, 0, 1.0, 0.45)])
    assert entries["full"]["forgetting_of_lora"] == pytest.approx(0.15)


def test_the_loss_without_mask_and_logits_of_prompts_is_the_models_own(bench, task):
    examples = encode(load_records(task), bench.tokenizer, 256)[:9]
    batch = collate(examples)
    labels = torch.full_like(batch.tokens, -100)
    labels.view(-1)[batch.places + 1] = batch.targets
    assert [int((example["labels"] != -100).sum()) for example in examples] == (labels != -100).sum(1).tolist()
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(batch.tokens.shape[1]) < lengths[:, None]).long()
    own = bench.model(input_ids=batch.tokens, attention_mask=mask, labels=labels).loss
    assert answer_loss(bench.model, batch).item() == pytest.approx(own.item(), abs=1e-5)
    # In evaluation every token counts once, however it is batched.
    alone = mean_loss(bench.model, evaluation_batches(examples, tokens=1), "fp32")
    assert mean_loss(bench.model, evaluation_batches(examples), "fp32") == pytest.approx(alone, abs=1e-4)


def test_the_order_depends_on_the_seed_and_each_example_comes_once_an_epoch(bench, task):
    examples = encode(load_records(task), bench.tokenizer, 256)
    for place, example in enumerate(examples):
        example["input_ids"][0] = place  # so that it can be told
    seen = [row[0].item() for batch in training_batches(examples, 4, 75, seed=3) for row in batch.tokens]
    assert sorted(seen) == list(range(300))
    assert seen == [row[0].item() for batch in training_batches(examples, 4, 75, seed=3) for row in batch.tokens]
    assert seen != [row[0].item() for batch in training_batches(examples, 4, 75, seed=4) for row in batch.tokens]


@pytest.mark.parametrize("share, ranks_of_both", [(1 / 64, (6, 5)), (1 / 16, (22, 22))])
def test_lora_and_dora_train_no_fewer_parameters_than_the_subnets_and_hardly_more(share, ranks_of_both):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):  # SmolLM2-135M's layers
        model = tiny_llama(**sizes, num_hidden_layers=1)
    shapes = [module.weight.shape for module in target_linears(model)]
    subnets = sum(m * int(n * share) for m, n in shapes)
    per_rank, magnitudes = sum(m + n for m, n in shapes), sum(m for m, _ in shapes)
    lora, dora = equal_rank(model, share), equal_rank(model, share, dora=True)
    assert (lora, dora) == ranks_of_both
    assert subnets <= lora * per_rank < subnets + per_rank
    assert subnets <= dora * per_rank + magnitudes < subnets + per_rank


@pytest.mark.slow
def test_what_trains_is_everything_or_the_same_linear_layers(bench, task, tmp_path):
    arguments = ["--tasks", task, "--rates", "1e-3", "--seeds", "0", "--methods", "full", "full_linears", "losia"]
    counts = {method: result["trained_parameters"] for method, result in runs_of(quality(bench, tmp_path, *arguments), task)}
    shapes = [module.weight.shape for module in target_linears(bench.model)]
    assert counts["full"] == sum(parameter.numel() for parameter in bench.model.parameters())
    assert counts["full_linears"] == sum(m * n for m, n in shapes)
    assert counts["losia"] == sum(m * (n // 16) for m, n in shapes)  # the recommended shape


def test_the_rate_warms_up_and_falls_to_a_tenth():
    factors = [rate_factor(step, 60) for step in range(60)]
    assert factors[0] == pytest.approx(1 / 6) and factors[5] == factors[6] == 1.0
    assert factors[6:] == sorted(factors[6:], reverse=True) and 0.1 < factors[-1] < 0.11


def test_answers_are_scored(bench, task, tmp_path, monkeypatch):
    data = bench.data(task)
    monkeypatch.setattr(data.task, "score", lambda answer, index: float(answer == data.task.held_out[index]["output"]))
    monkeypatch.setattr(data.task, "answer_tokens", 3)
    arguments = ["--methods", "losia", "--tasks", task, "--rates", "1e-2", "--seeds", "0", "--scored", "5"]
    results = quality(bench, tmp_path, *arguments)
    ((_, result),) = runs_of(results, task)
    assert 0.0 <= result["score"] <= 1.0 and result["score_before"] == 0.0


def test_a_final_number_is_read_as_gsm8k_writes_it():
    assert final_number("so 3 * 4 = 12\n#### 1,234") == "1234" and final_number("#### -2.5.") == "-2.5"
    assert final_number("12") is None


@pytest.mark.slow
def test_variants_and_sequences_run_from_their_own_options(bench, task, tmp_path, no_search):
    found = quality(bench, tmp_path, "--ablation", "located", "rank factor 1/4", "--tasks", task)
    labels = list(found["tasks"][task])
    assert labels[0] == "full" and len(labels) == 3 and found["tasks"][task]["full"]["rate"] == 1e-4
    again = quality(bench, tmp_path, "--ablation", "located", "--tasks", task, "--rates", "2e-2")
    assert [entry["rate"] for entry in again["tasks"][task].values()] == [1e-4, 2e-2]
    assert all(found["tasks"][task][label]["share"] for label in labels)
    found = quality(bench, tmp_path, "--sequence", "--methods", "full", "losia", "--tasks", task, task)
    for record in found["sequence"]:
        stages = record["result"]["stages"]
        assert len(stages) == 3 and stages[2][task] < stages[1][task] < stages[0][task]


def test_missing_data_and_wrong_options_are_said(bench, tmp_path, capsys):
    results = quality(bench, tmp_path, "--methods", "losia", "--tasks", "gsm8k", "--rates", "1e-3")
    assert "prepare_quickstart" in results["missing"]["gsm8k"] and results["share_of_full"] == {}
    assert parse_options(["losia.rank_factor=[1, 0.5]", "losia.init=random"]) == {
        "losia": {"rank_factor": [1, 0.5], "init": "random"}
    }
    with pytest.raises(SystemExit, match="METHOD.OPTION=VALUE"):
        parse_options(["rank_factor=2"])
    with pytest.raises(SystemExit):
        quality(bench, tmp_path, "--methods", "lora", "--set", "losia.period=3")
    assert "not among the methods that run" in capsys.readouterr().err


def test_random_subnets_never_move():
    assert METHODS["random"].options({})["period"] == NEVER


def test_noise_is_there_while_gradients_are_taken_and_gone_when_weights_are_stepped():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    model = get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    conductor = LoSiA(model, optimizer, config)
    FlatNoise(conductor, model, optimizer, size=0.5, seed=3)
    tokens = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    values = [layer.subnet.detach().clone() for layer in conductor.sites]

    def is_noisy():
        return [not torch.equal(layer.subnet, before) for layer, before in zip(conductor.sites, values, strict=True)]

    quiet = model.eval()(**tokens).loss
    assert not any(is_noisy())
    loss = model.train()(**tokens).loss
    assert all(is_noisy()) and loss != quiet
    loss.backward()
    optimizer.step()
    conductor.step()
    stepped = max((a.subnet - b).abs().max() for a, b in zip(conductor.sites, values, strict=True))
    assert 0 < stepped <= 1.01e-3  # what AdamW's first step can come to, and no noise


def test_with_steps_over_input_size_all_columns_move_the_output_alike_and_as_much_as_before():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    model = get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3, eps=1e-12)
    conductor = LoSiA(model, optimizer, config)
    layer, seen = conductor.sites[0], []
    layer.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    ColumnSteps(conductor, optimizer, exponent=1.0)
    before = layer.subnet.detach().clone()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    steps = (layer.subnet.detach() - before).abs().mean(dim=0)  # AdamW's first step is the rate everywhere
    sizes = seen[0].flatten(0, -2).square().mean(0).sqrt()[layer.col_index]
    assert sizes.max() > 1.2 * sizes.min()
    torch.testing.assert_close(steps * sizes, (steps * sizes).mean().expand_as(sizes), rtol=1e-3, atol=0)
    torch.testing.assert_close(steps.mean(), torch.tensor(1e-3), rtol=1e-3, atol=0)
