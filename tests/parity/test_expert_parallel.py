"""Experts spread over ranks (EP beside FSDP2, of Transformers) train as one process does: losses, whole weights, indices; and
checkpoints move between the two."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from losia_dist import (
    Drawn,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    clip_grad_norm_,
    export_model,
    get_losia_model,
    load_checkpoint,
    load_distributed_model,
    losia_parameter_groups,
    save_checkpoint,
)
from losia_dist.formulas import cycle_steps
from losia_dist.sharding.expert_parallel import is_spread
from tests.support.cases import slow

RANKS, VOCABULARY, RATE = 4, 96, 1e-3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
# Six experts over 2 x 2 ranks: three on each, which its two replicas cut unevenly.
QWEN = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
}


@dataclass(frozen=True)
class Case:
    """A run; `parallelism` is what `DistributedConfig` takes, on four ranks."""

    family: str = "qwen3_moe"
    model: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, int] = field(default_factory=lambda: {"fsdp_size": 4, "ep_size": 2})
    config: dict[str, Any] = field(default_factory=lambda: {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3})
    steps: int = 19
    accumulation: int = 1
    max_grad_norm: float = 0.0
    checkpointing: str = "off"
    one_sided: bool = False  # the router sends tokens to the first two experts alone


FULL = Case(accumulation=2, max_grad_norm=0.3)
NARROW = {"num_experts": 4}
NAMED = {"rank_factor": 0.25, "period": 3, "target_modules": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "located, clipped, accumulated": FULL,
    "drawn": Case(config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "selection": Drawn()}),
    "one expert a rank": Case(model=NARROW, parallelism={"fsdp_size": 4, "ep_size": 4}, max_grad_norm=0.3),
    "HSDP": replace(FULL, model=NARROW, parallelism={"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}),
    "FSDP2 alone": Case(model=NARROW, parallelism={"fsdp_size": 4}),
    "experts without tokens": Case(model={"num_experts": 4, "num_experts_per_tok": 1}, one_sided=True),
    "non-reentrant": Case(checkpointing="non-reentrant"),
    "reentrant": Case(checkpointing="reentrant"),
    "norms, embeddings and routers": Case(
        config={"rank_factor": 0.25, "period": 3, "train_norms": True, "train_embeddings": True, "router_lr_scale": 0.1},
        max_grad_norm=0.3,
    ),
    "mixtral": Case(family="mixtral"),
    "gpt_oss, with biases": Case(family="gpt_oss", config=NAMED),
    "deepseek_v3": Case(family="deepseek_v3"),
}
OFTEN = ("located, clipped, accumulated",)


def save_model(case: Case, directory: Path) -> str:
    """A seeded model on disk."""
    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES[case.family], **case.model}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **settings))
    if case.one_sided:
        for layer in model.model.layers:
            rows = layer.mlp.gate.weight.data
            rows[1] = -rows[0]  # one of the two is above zero
            rows[2:] = 0
    model.save_pretrained(directory)
    return str(directory)


class Training:
    """A model, its optimizer and its conductor, in this process alone or spread over the ranks that call."""

    def __init__(self, case: Case, directory: str, parallelism: dict[str, int] | None) -> None:
        from transformers.distributed.configuration_utils import DistributedConfig

        self.case, config = case, LoSiAConfig(**case.config)
        if parallelism is None:
            self.model = get_losia_model(AutoModelForCausalLM.from_pretrained(directory), config)
        else:
            self.model = load_distributed_model(directory, config, DistributedConfig(**parallelism))
        self.world, self.rank = (1, 0) if parallelism is None else (dist.get_world_size(), dist.get_rank())
        if case.checkpointing != "off":
            kind = {"use_reentrant": case.checkpointing == "reentrant"}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
            self.model.enable_input_require_grads()
        self.model.train()
        self.optimizer = LoSiAAdamW(losia_parameter_groups(self.model, lr=RATE), lr=RATE)
        self.losia = LoSiA(self.model, self.optimizer, config)

    def run(self, stop: int) -> list[list[float]]:
        """Steps up to `stop`: the loss of each, and the gradients' norm where they are clipped."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.case.steps, self.case.accumulation, 4, 12)
        found = []
        for micro_batches in torch.randint(0, VOCABULARY, shape, generator=generator)[self.losia.steps : stop]:
            total = torch.zeros(())
            for tokens in micro_batches:
                mine = tokens.chunk(self.world)[self.rank]
                loss = self.model(input_ids=mine, labels=mine, use_cache=False).loss / self.case.accumulation
                loss.backward()
                total += loss.detach()
            limit = self.case.max_grad_norm
            norm = clip_grad_norm_(self.model.parameters(), limit) if limit else torch.zeros(())
            self.optimizer.step()
            self.losia.step()
            self.optimizer.zero_grad()
            if self.world > 1:
                dist.all_reduce(total)
            found.append([(total / self.world).item(), norm.item()])
        return found

    def averages(self) -> dict[str, tuple[int, torch.Tensor]]:
        """This rank's part of what localizing weights have averaged: its first row, and [rows, 2 n]."""
        return {
            site.name: (one.start, torch.cat([one.mean, one.deviation], dim=1)) for site, one in self.losia.accumulators.items()
        }

    def whole(self) -> dict[str, Any]:
        """Every weight, with its subnet's values, and where the subnets are."""
        self.losia.consolidate()
        own = {site.names.subnet for site in self.losia.sites}
        weights = {
            name: self.losia.parameters.read_whole(parameter)
            for name, parameter in self.model.named_parameters()
            if name.rpartition(".")[2] not in own
        }
        places = {site.name: (site.row_index.clone(), site.col_index.clone()) for site in self.losia.sites}
        return {"weights": weights, "places": places}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Steps and weights to 1e-5, indices exactly."""
    torch.testing.assert_close(torch.tensor(found["steps"]), torch.tensor(expected["steps"]), rtol=0, atol=1e-5)
    assert found["places"].keys() == expected["places"].keys()
    for name, (rows, columns) in expected["places"].items():
        assert torch.equal(found["places"][name][0], rows), f"rows of {name}"
        assert torch.equal(found["places"][name][1], columns), f"columns of {name}"
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max().item() <= 1e-5, name


def train(case: Case, directory: str, parallelism: dict[str, int] | None) -> dict[str, Any]:
    training = Training(case, directory, parallelism)
    steps = training.run(case.steps)
    result = {"steps": steps, **training.whole()}
    if parallelism is not None:
        spread = [site for site in training.losia.sites if is_spread(site.weight)]
        assert bool(spread) == (parallelism.get("ep_size", 1) > 1)
        assert all(site.subnet.placements == site.weight.placements for site in spread)
    training.losia.detach()
    return result


@pytest.mark.parametrize("name", [name if name in OFTEN else slow(name) for name in CASES])
def test_spread_experts_train_as_in_one_process(ranks, tmp_path, name):
    case = CASES[name]
    directory = save_model(case, tmp_path / "model")
    expected = train(case, directory, None)
    for found in ranks(RANKS, train, case, directory, case.parallelism):
        assert_same(found, expected)


def test_a_run_spans_two_cycles_and_clips(tmp_path):
    config = LoSiAConfig(**FULL.config)
    assert FULL.steps > 2 * cycle_steps(3, config.period, 1)
    steps = train(replace(FULL, steps=4), save_model(FULL, tmp_path / "model"), None)["steps"]
    assert all(norm > FULL.max_grad_norm for _, norm in steps)


SAVED_AFTER = 11  # in the middle of a slot of the first layer, whose experts have averages then


def train_and_move(case: Case, directory: str, path: str) -> dict[str, Any]:
    """Save on spread experts in mid-slot and go on; then resume on them, and on FSDP2 alone."""
    training = Training(case, directory, case.parallelism)
    first = training.run(SAVED_AFTER)
    kept = {"model": training.model, "optimizer": training.optimizer, "losia": training.losia}
    save_checkpoint(f"{path}/saved", **kept)
    averages = training.averages()
    rest = training.run(case.steps)
    export_model(training.losia, f"{path}/exported")
    results = {"whole": {"steps": first + rest, "averages": averages, **training.whole()}}
    training.losia.detach()
    for name, parallelism, saved in [
        ("resumed", case.parallelism, "saved"),
        ("on FSDP2", {"fsdp_size": 4}, "saved"),
        ("from one process", case.parallelism, "alone"),
    ]:
        training = Training(case, directory, parallelism)
        kept = {"model": training.model, "optimizer": training.optimizer, "losia": training.losia}
        load_checkpoint(f"{path}/{saved}", **kept)
        averages = training.averages()
        results[name] = {"steps": first + training.run(case.steps), "averages": averages, **training.whole()}
        training.losia.detach()
    return results


@pytest.mark.slow
def test_checkpoints_of_spread_experts_resume_move_and_export(ranks, tmp_path):
    case = Case(model={"num_experts": 10}, max_grad_norm=0.3)  # five on a rank; FSDP2 alone cuts them by 3, 3, 3 and 1
    directory = save_model(case, tmp_path / "model")
    alone = Training(case, directory, None)
    first = alone.run(SAVED_AFTER)
    save_checkpoint(tmp_path / "alone", model=alone.model, optimizer=alone.optimizer, losia=alone.losia)
    averages = alone.averages()
    assert any("experts" in name for name in averages)
    expected = {"steps": first + alone.run(case.steps), **alone.whole()}
    alone.losia.detach()
    everyone = ranks(RANKS, train_and_move, case, directory, str(tmp_path))
    for name in everyone[0]:
        assert_same_averages([found[name]["averages"] for found in everyone], averages)
    for found in everyone:
        for result in found.values():
            assert_same(result, expected)
        whole, resumed = found["whole"], found["resumed"]
        assert resumed["steps"] == whole["steps"]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())
    back = Training(case, directory, None)
    load_checkpoint(tmp_path / "saved", model=back.model, optimizer=back.optimizer, losia=back.losia)
    assert_same({"steps": first + back.run(case.steps), **back.whole()}, expected)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert {name for name, _ in exported.named_parameters()} == expected["weights"].keys()
    for name, parameter in exported.named_parameters():
        assert (parameter - expected["weights"][name]).abs().max().item() <= 1e-5, name
    assert names_on_disk(tmp_path / "exported") == names_on_disk(tmp_path / "model")


def assert_same_averages(by_rank: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """The ranks' parts are all of what one process has, to 1e-4 of the largest number."""
    for name, (_, whole) in expected.items():
        pieces = sorted((found[name] for found in by_rank), key=lambda piece: (piece[0], len(piece[1])))
        found = torch.cat([rows for _, rows in pieces])
        assert found.shape == whole.shape
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4 * whole.abs().max().item())


def names_on_disk(directory: Path) -> set[str]:
    with safe_open(str(directory / "model.safetensors"), "pt") as file:
        return set(file.keys())
