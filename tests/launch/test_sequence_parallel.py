"""The script with `--sequence_parallel`: one process's trajectory, checkpoints that other ranks go on from, exports."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from losia_dist.errors import ConfigError
from tests.launch.conftest import zero
from tests.launch.test_resume import assert_same_model, complete
from tests.launch.test_script_engines import losses, train
from tests.support.cases import only
from tests.support.launching import arguments


@pytest.fixture(scope="module")
def shared(material, tmp_path_factory):
    """The same records, and a model whose heads two and four ranks can share."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(material["model"])
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 77, "num_hidden_layers": 3, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(directory)
    return {**material, "model": directory}


def together(stage: int, **options):
    return {"deepspeed": zero(stage), "sequence_parallel": 2, "micro_batch": 4, **options}


CASES = {
    "ZeRO-3, packed, chunked loss": (3, {"packing": True, "loss": "chunked", "eval_steps": 3}),
    "ZeRO-3, MLPs in tiles": (3, {"tiled_mlp": 3, "eval_steps": 3}),
    "ZeRO-2, samples": (2, {"samples": 1, "sample_tokens": 4, "gradient_accumulation": 2, "max_steps": 4}),
    "ZeRO-3, located": (3, {"losia_config": "LOCATED"}),
}


@pytest.mark.parametrize("case", only(["ZeRO-3, packed, chunked loss"], CASES))
def test_ranks_that_share_sequences_train_as_one_process(shared, ranks, tmp_path, case):
    stage, options = case
    if "losia_config" in options:
        text = shared["losia"].read_text() + "selection:\n  located: {start: importance, calibration_batches: 2}\n"
        located = tmp_path / "located.yaml"
        located.write_text(text)
        options = {**options, "losia_config": located}
    alone, _ = train(arguments(shared, tmp_path / "alone", **{"micro_batch": 4, **options}))
    words = arguments(shared, tmp_path / "ours", **together(stage, **options))
    summary, _ = ranks(2, train, words)[0]
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    for name in ("held_out_loss_before", "held_out_loss_after"):
        assert summary[name] == pytest.approx(alone[name], abs=1e-5)
    if "tiled_mlp" in options:
        assert "3 MLPs compute a micro-batch in 3 tiles each" in summary["notes"]
    assert summary["ranks_per_sequence"] == 2 and summary["tokens"] == alone["tokens"]
    assert summary["samples_after"] == alone["samples_after"]
    assert_same_model(tmp_path / "ours", tmp_path / "alone", atol=1e-5)


GOES_ON = {
    "the same ranks": (2, together(3)),
    "one process": (1, {"micro_batch": 4}),
    "two ranks, each with sequences of its own": (2, {"micro_batch": 2, "deepspeed": zero(2)}),
    "two groups of two": (4, together(2, micro_batch=2)),
}


@pytest.fixture(scope="module")
def uninterrupted(shared, ranks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    ranks(2, train, arguments(shared, directory, **together(3, save_steps=3)))
    assert complete(directory) == [3, 6, 8]
    return directory


@pytest.mark.parametrize("case", only(["the same ranks"], GOES_ON))
def test_another_number_of_ranks_goes_on(shared, ranks, uninterrupted, tmp_path, case):
    world, options = case
    lost = tmp_path / "lost"
    shutil.copytree(uninterrupted, lost)
    for step in (6, 8):
        shutil.rmtree(lost / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (lost / "summary.json").unlink()
    left = complete(lost)
    assert left == [3], left
    words = arguments(shared, lost, **{**options, "save_steps": 3, "resume": "newest"})
    summary = train(words)[0] if world == 1 else ranks(world, train, words)[0][0]
    assert summary["resumed_from_step"] == 3
    assert losses(lost) == pytest.approx(losses(uninterrupted), abs=1e-5)
    assert_same_model(lost, uninterrupted, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"sequence_parallel": 2},
            "--sequence_parallel 2: each sequence is computed by that many of the 1 ranks, under DeepSpeed",
        ),
        ({"sequence_parallel": 2, "sharding": "fsdp2"}, "--sequence_parallel 2 is DeepSpeed's"),
        ({"sequence_parallel": 2, "losia": None, "losia_config": None}, "works with --losia only"),
        ({"sequence_parallel": 3, "packing": True}, "--max_length 64 is not divided by --sequence_parallel 3"),
        ({"sequence_parallel": 0}, "--sequence_parallel 0: at least 1 is needed"),
        ({"tiled_mlp": 0}, "--tiled_mlp 0: at least 1 is needed"),
        ({"tiled_mlp": 2, "losia": None, "losia_config": None}, "--tiled_mlp 2 works with --losia only"),
    ],
)
def test_what_does_not_go_together_is_refused(shared, tmp_path, options, words):
    with pytest.raises(ConfigError) as raised:
        train(arguments(shared, tmp_path, **options))
    assert words in str(raised.value)


def test_tiles_without_deepspeed_are_refused_where_ranks_reduce_gradients(shared, ranks, tmp_path):
    for kind, message in ranks.errors(2, train, arguments(shared, tmp_path, tiled_mlp=2)):
        assert kind == "ConfigError" and "--tiled_mlp 2: DDP and FSDP2 would reduce" in message
