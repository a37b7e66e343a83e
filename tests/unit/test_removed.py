"""What an earlier version took is refused by name, with what to use now; the value that was kept passes."""

import os

import pytest
import torch.distributed as dist

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.cli.main import REFUSED, main
from losia_dist.config.removed import refuse_removed_variables
from losia_dist.errors import ConfigError
from tests.support.models import tiny_llama


def conductor():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    get_losia_model(model, config)
    return LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)


@pytest.mark.parametrize("value", ["auto", "write", "write,gradient"])
def test_a_variable_that_asks_for_the_kernels_is_refused(monkeypatch, value):
    monkeypatch.setenv("LOSIA_KERNELS", value)
    with pytest.raises(ConfigError, match=rf"LOSIA_KERNELS={value}: the Triton kernels were removed.*Unset LOSIA_KERNELS"):
        conductor()


def test_a_variable_that_asks_for_none_passes():
    refuse_removed_variables({"LOSIA_KERNELS": "none"})
    refuse_removed_variables({})


def with_kernels_on_the_second_rank():
    if dist.get_rank() == 1:
        os.environ["LOSIA_KERNELS"] = "write"
    try:
        conductor()
    finally:
        os.environ.pop("LOSIA_KERNELS", None)


def test_a_variable_of_one_rank_stops_them_all(ranks):
    for kind, message in ranks.errors(2, with_kernels_on_the_second_rank):
        assert kind == "ConfigError" and "LOSIA_KERNELS is 'none' on rank 0 and 'write' on rank 1" in message


REMOVED = {
    "selection": ("alternating", "greedy", "0.8027 where 'greedy' ended at 0.8025.*docs/quality.md.*Set selection='greedy'"),
    "moments": ("kept", "cleared", "0.7946.*0.7867.*docs/quality.md.*Leave moments out"),
    "importance_accumulation": ("micro_batch", "step", "0.9 of 54.7 GB.*CHANGELOG.md.*Leave importance_accumulation out"),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_file_with_a_removed_value_says_why_and_what_to_set(tmp_path, name):
    removed, kept, why = REMOVED[name]
    file = tmp_path / "losia.yaml"
    file.write_text(f"period: 7\n{name}: {removed}\n")
    with pytest.raises(ConfigError, match=rf"losia.yaml: {name}='{removed}' was removed: .*{why}") as caught:
        LoSiAConfig.from_file(file)
    assert "\n" not in str(caught.value)
    file.write_text(f"period: 7\n{name}: {kept}\n")
    assert LoSiAConfig.from_file(file) == LoSiAConfig(period=7)


def test_a_removed_value_in_a_program_is_refused_too():
    with pytest.raises(ConfigError, match="selection='alternating' was removed"):
        LoSiAConfig(selection="alternating")


def test_the_command_that_allocated_budgets_says_where_its_numbers_stand(capsys):
    assert main(["allocate", "--model", "MODEL", "--train_file", "x.jsonl", "--output", "losia.yaml"]) == REFUSED
    message = capsys.readouterr().err
    assert message.startswith("error: losia-dist allocate was removed: ") and message.count("\n") == 1
    assert "benchmarks/quality/NOTES.md" in message


def test_the_command_that_deleted_tokenized_data_says_where_it_lies(capsys):
    assert main(["cache", "--delete_unused", "30"]) == REFUSED
    message = capsys.readouterr().err
    assert (
        message.startswith("error: losia-dist cache was removed: ") and "docs/data.md" in message and message.count("\n") == 1
    )
