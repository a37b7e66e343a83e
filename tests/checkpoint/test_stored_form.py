"""Models that Transformers stores in another form than it has in memory: exported in that form, a part at a time."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups, save_checkpoint
from losia_dist.checkpoint import description
from losia_dist.checkpoint.safetensors_io import Entry
from losia_dist.checkpoint.stored_names import class_conversions, conversions_of, describe_conversion
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import CheckpointError
from losia_dist.export import model_directory
from losia_dist.export.delta import apply_delta, save_delta
from losia_dist.export.live import _gather, save_whole_model
from losia_dist.export.stored_form import StoredForm
from tests.checkpoint.stored_models import ATTENTION, STORED, stored_model
from tests.support import resume as runs
from tests.support.cases import grid, only
from tests.support.families import tiny_model
from tests.support.training import Run, _wrap

TOKENS = torch.arange(24).reshape(2, 12)
SHARDED = Run(steps=3, family="mixtral", config={"rank_factor": 0.25, "period": 2, "target_modules": ATTENTION})
OFTEN = ["qwen3_moe-read", "mixtral-made", "hrm_text-made", "gpt_neox-read"]


def start(model, targets=ATTENTION) -> LoSiA:
    config = LoSiAConfig(rank_factor=0.25, period=1, target_modules=targets)
    converted = get_losia_model(model.train(), config)
    return LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-2), lr=1e-2), config)


def train(losia: LoSiA, steps: int = 3) -> None:
    for _ in range(steps):
        losia.model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        losia.state.optimizer.step()
        losia.step()
        losia.state.optimizer.zero_grad()


def contents(directory: Path) -> dict[str, bytes]:
    """File -> what it holds; the model card aside, which says where the model was written from."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family, origin", grid(list(STORED), ("made", "read"), often=OFTEN))
def test_an_export_is_what_the_plain_model_saves(tmp_path, family, origin):
    model = stored_model(family)
    if origin == "read":  # its rules are those that reading used
        model.save_pretrained(tmp_path / "base")
        model = read(tmp_path / "base")
        model.save_pretrained(tmp_path / "again")  # which changes the patterns of the rules that it noted
    losia = start(model, STORED[family][1])
    train(losia)
    save_checkpoint(tmp_path / "run", model=model, optimizer=losia.state.optimizer, losia=losia)
    export_model(losia, tmp_path / "live")
    export_model(tmp_path / "run", tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "live")

    losia.consolidate()
    plain = read(tmp_path / "base") if origin == "read" else stored_model(family)
    start_of = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(_gather(losia.model, losia.parameters))
    assert any(not torch.equal(tensor, start_of[name]) for name, tensor in plain.state_dict().items())
    plain.save_pretrained(tmp_path / "plain")
    assert_same_weights(tmp_path / "live", tmp_path / "plain")
    texts = [json.loads((tmp_path / where / "config.json").read_text()) for where in ("live", "plain")]
    assert texts[0] == texts[1] and "quantization_config" not in texts[0]

    loaded = read(tmp_path / "model")
    with torch.no_grad():
        again, logits = (one.eval()(input_ids=TOKENS, use_cache=False).logits for one in (loaded, losia.model))
    assert torch.equal(again, logits)


def read(directory: Path):
    loaded, report = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded


def export_all_ways(engine: str, directory: Path, run: Run = SHARDED) -> None:
    """Train, save, export live; and let a plain model with the same weights save itself."""
    losia, stepper, close = runs.start(engine, run)
    unwrap(losia.model).enable_input_require_grads()  # or DeepSpeed's stage 3 finds no gradient at its first backward
    runs.train_on(losia, stepper, run, run.steps)
    save_checkpoint(directory / "run", **runs.parts(losia))
    export_model(losia, directory / "live")
    losia.consolidate()
    weights = _gather(unwrap(losia.model), losia.parameters)
    if dist.get_rank() == 0:
        plain = tiny_model(run.family, **run.model)
        plain.load_state_dict(weights)
        plain.save_pretrained(directory / "plain")
    close()


@pytest.mark.parametrize("engine", only(["fsdp2"], ["ddp", "zero2", "zero3", "fsdp2"]))
def test_sharded_runs_export_what_one_process_does(ranks, tmp_path, engine):
    ranks(2, export_all_ways, engine, tmp_path)
    export_model(tmp_path / "run", tmp_path / "model")
    assert_same_weights(tmp_path / "live", tmp_path / "plain")
    assert contents(tmp_path / "model") == contents(tmp_path / "live")


def export_as_fsdp2_names_it(family: str, directory: Path) -> None:
    plain = stored_model(family)
    if dist.get_rank() == 0:
        plain.save_pretrained(directory / "plain")
    config = LoSiAConfig(rank_factor=0.25, period=2, target_modules=STORED[family][1])
    model = _wrap("fsdp2", get_losia_model(plain, config), "fp32")
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3)), config)
    kinds = [type(module) for module in model.modules()]
    export_model(losia, directory / "live")
    save_checkpoint(directory / "run", **runs.parts(losia))
    assert [type(module) for module in model.modules()] == kinds and kinds[0].__name__.startswith("FSDP")
    losia.detach()


def test_rules_that_go_by_a_class_are_found_under_fsdp2(ranks, tmp_path):
    ranks(2, export_as_fsdp2_names_it, "gpt_neox", tmp_path)
    assert_same_weights(tmp_path / "live", tmp_path / "plain")
    export_model(tmp_path / "run", tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "live")


def test_wider_weights_and_several_files_change_nothing_else(tmp_path, monkeypatch):
    """A mixture in bf16 with fp32 scores: each part is made once, though files begin with the wider types."""
    model = stored_model("deepseek_v3").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "experts.down_proj")):
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "plain")
    losia = start(model, STORED["deepseek_v3"][1])
    made, convert = [], StoredForm.convert
    monkeypatch.setattr(StoredForm, "convert", lambda self, part, tensors: made.append(part) or convert(self, part, tensors))
    monkeypatch.setitem(model_directory.write_model_directory.__kwdefaults__, "shard_bytes", 20_000)
    export_model(losia, tmp_path / "model")
    assert len(made) == len(set(made)) > 20
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "model").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    ours = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    theirs = load_file(tmp_path / "plain" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in theirs.values())
    assert ours.keys() == theirs.keys() and len(files) > 3
    assert all(ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in theirs.items())


class Living(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still there: the most at any time."""

    def __init__(self):
        super().__init__()
        self.most, self.made, self.before = 0, WeakIdKeyDictionary(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.before |= {places(t) for t in tensors_in((args, kwargs))} - {places(t) for t in self.made}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if places(tensor) not in self.before:
                self.made[tensor] = None
        self.most = max(self.most, sum({places(t): t.untyped_storage().nbytes() for t in self.made}.values()))
        return result


def tensors_in(values):
    """Those that have memory of their own; a DTensor's is its local tensor's."""
    found = [value for value in tree_leaves(values) if type(value) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if not tensor.is_meta]


def places(tensor):
    return tensor.untyped_storage().data_ptr()


def export_and_count(engine: str, directory: Path) -> tuple[int, int, int]:
    """(most bytes at once, bytes of the largest layer, bytes of the model)."""
    alone = engine == "one"
    losia, close = (start(stored_model("mixtral")), lambda: None) if alone else runs.start(engine, SHARDED)[::2]
    plain = unwrap(losia.model)
    named = {name: tensor for name, tensor in plain.named_parameters() if not name.endswith("subnet")}
    sizes = {name: math.prod(losia.parameters.shape(p)) * p.element_size() for name, p in named.items()}
    layers = {n.split(".layers.")[1].split(".")[0]: 0 for n in sizes if ".layers." in n}
    for name, size in sizes.items():
        for layer in layers:
            layers[layer] += size if f".layers.{layer}." in name else 0
    losia.consolidate()
    gc.collect()
    with Living() as living:
        save_whole_model(losia.model, directory, losia.parameters)
    close()
    return living.most, max(layers.values()), sum(sizes.values())


@pytest.mark.parametrize("engine", only(["one", "fsdp2"], ["one", "zero3", "fsdp2"]))
def test_less_than_a_layer_is_in_memory_at_a_time(ranks, tmp_path, engine):
    """All copies count: those of the sources, and whatever the rules make of them."""
    count = (engine, tmp_path / "model")
    for most, layer, model in [export_and_count(*count)] if engine == "one" else ranks(2, export_and_count, *count):
        assert layer / 3 < most < layer < model / 2
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(name.endswith("w1.weight") for name in found) > 4


def break_the_second_part(monkeypatch) -> None:
    convert, made = StoredForm.convert, []

    def broken(self, part, tensors):
        made.append(part)
        if len(made) > 5:
            raise KeyError("a rule that fails")
        return convert(self, part, tensors)

    monkeypatch.setattr(StoredForm, "convert", broken)


def export_with_a_rule_that_fails(directory: Path) -> None:
    losia, _, close = runs.start("fsdp2", SHARDED)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 0:
            break_the_second_part(monkeypatch)
        try:
            export_model(losia, directory)
        finally:
            close()


def test_a_rule_that_fails_leaves_the_old_directory(ranks, tmp_path, monkeypatch):
    target = tmp_path / "model"
    losia = start(stored_model("qwen3_moe"))
    export_model(losia, target)
    save_checkpoint(tmp_path / "run", model=losia.model, optimizer=losia.state.optimizer, losia=losia)
    before = contents(target)
    for kind, message in ranks.errors(2, export_with_a_rule_that_fails, target):
        assert kind == "ConfigError" and message.startswith("rank 0 of 2: ") and "a rule that fails" in message
    assert contents(target) == before
    with torch.no_grad():
        losia.sites[0].subnet.add_(1.0)
    for source in (losia, tmp_path / "run"):
        break_the_second_part(monkeypatch)
        with pytest.raises(Exception, match="could not be written to .*model: KeyError: 'a rule that fails'"):
            export_model(source, target)
        monkeypatch.undo()
        assert contents(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


@pytest.mark.parametrize(
    "family", only(["gpt_oss", "deepseek_v3"], [name for name in STORED if name not in ("hrm_text", "gpt_neox")])
)
def test_experts_that_trained_leave_a_checkpoint_as_they_leave_the_run(tmp_path, family):
    """Subnets in every expert that moved on, in parts of two: base, journal and subnets together are the live weights."""
    config = LoSiAConfig(rank_factor=0.25, period=1, experts_per_slot=2)
    model = get_losia_model(stored_model(family).train(), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2), config)
    for steps in (3, 9):
        train(losia, steps)
        save_checkpoint(tmp_path / "run", model=model, optimizer=losia.state.optimizer, losia=losia)
    with torch.no_grad():
        wanted = model.eval()(input_ids=TOKENS).logits
    live = export_model(losia, tmp_path / "live")
    assert_same_weights(export_model(tmp_path / "run", tmp_path / "offline"), live)
    loaded = AutoModelForCausalLM.from_pretrained(live, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        assert (loaded(input_ids=TOKENS).logits - wanted).abs().max() < 1e-5
    # A delta of it holds the experts' rows and columns, and gives the same model again.
    stored_model(family).save_pretrained(tmp_path / "base")
    delta = save_delta(tmp_path / "run", tmp_path / "delta.safetensors", tmp_path / "base")
    assert delta.stat().st_size < 0.9 * (live / "model.safetensors").stat().st_size
    assert_same_weights(apply_delta(delta, tmp_path / "base", tmp_path / "again"), live)


def test_base_and_delta_are_the_export_and_a_changed_expert_takes_its_rows_and_columns(tmp_path):
    stored_model("qwen3_moe").save_pretrained(tmp_path / "base")
    changed = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    rows, columns = torch.arange(0, 32, 3), torch.arange(1, 24, 2)
    changed[name][rows[:, None], columns] += 1.0
    save_file(changed, tmp_path / "base" / "model.safetensors", {"format": "pt"})  # the model had another value there

    losia = start(stored_model("qwen3_moe"))
    train(losia)
    save_checkpoint(tmp_path / "run", model=losia.model, optimizer=losia.state.optimizer, losia=losia)
    export_model(tmp_path / "run", tmp_path / "model", base_model=tmp_path / "base")
    delta = save_delta(tmp_path / "run", tmp_path / "run.delta", tmp_path / "base")
    apply_delta(delta, tmp_path / "base", tmp_path / "rebuilt")
    assert_same_weights(tmp_path / "rebuilt", tmp_path / "model")
    parts = load_file(delta)
    assert {key.split("/")[0] for key in parts if "experts" in key} == {name}
    assert torch.equal(parts[f"{name}/0/first"].long(), rows) and torch.equal(parts[f"{name}/0/second"].long(), columns)


@pytest.mark.parametrize("family, together", [("qwen3_moe", 1), ("hrm_text", 4), ("gpt_neox", 0)])
def test_parts_are_as_small_as_the_rules_let_them_be(family, together):
    model = stored_model(family)
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    form = StoredForm(model, entries, conversions_of(model))
    computed = [part for part in form.parts if part.is_computed]
    assert max((len(part.sources) for part in computed), default=0) == together
    assert all(len({source.rpartition(".mlp.")[0] for source in part.sources}) == 1 for part in computed)
    assert sorted(source for part in form.parts for source in part.sources) == sorted(entries)


def test_rules_are_told_apart():
    described = [json.dumps(describe_conversion(rule)) for rule in class_conversions(stored_model("mixtral"), add_legacy=True)]
    assert len(set(described)) == len(described) > 4


@pytest.mark.parametrize("error", [ImportError("elsewhere"), ValueError("other rules")])
def test_another_release_of_transformers_saves_it_whole(tmp_path, monkeypatch, error):
    losia = start(stored_model("mixtral"))
    export_model(losia, tmp_path / "streamed")

    def unknown(*_):
        raise error

    monkeypatch.setattr(StoredForm, "__init__", unknown)
    with pytest.warns(UserWarning, match=f"{error}.*rank 0 gathers the whole model"):
        export_model(losia, tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "streamed")


class Own(MixtralForCausalLM):
    """A class that Transformers does not have."""


def older(describe):
    def described(*args):
        found = describe(*args)
        del found["conversions"]
        return found

    return described


@pytest.mark.parametrize(
    "case, words",
    [
        ("class", "no class Own, and code of the model's own is not run"),
        ("version", "the version of losia_dist that saved it did not note the rules"),
        ("rule", r"no such rule for the class as WeightRenaming of \['old'\] to \['new'\]"),
        ("fails", r"its rules fail \(ValueError: other rules\)"),
    ],
)
def test_a_form_that_is_not_found_again_is_refused(tmp_path, monkeypatch, case, words):
    model = stored_model("mixtral")
    if case == "class":
        model.__class__ = Own
    if case == "version":
        monkeypatch.setattr(description, "describe_model", older(description.describe_model))
        monkeypatch.setattr("losia_dist.checkpoint.save.describe_model", description.describe_model, raising=False)
    if case == "rule":
        rule = ["WeightRenaming", ["old"], ["new"], None, None]
        monkeypatch.setattr(description, "describe_conversion", lambda _: rule)
    losia = start(model)
    save_checkpoint(tmp_path / "run", model=model, optimizer=losia.state.optimizer, losia=losia)
    if case == "fails":

        def unknown(*_):
            raise ValueError("other rules")

        monkeypatch.setattr(StoredForm, "__init__", unknown)
    for call in (
        lambda: export_model(tmp_path / "run", tmp_path / "model"),
        lambda: save_delta(tmp_path / "run", tmp_path / "run.delta", tmp_path / "nowhere"),
    ):
        with pytest.raises(CheckpointError, match=f"stores in another form.*{words}.*load_checkpoint, then export_model"):
            call()
    assert not (tmp_path / "model").exists() and not (tmp_path / "run.delta").exists()
