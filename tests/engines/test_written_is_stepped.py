"""What the library writes is what the engine steps: proved at the start on every engine, and once after the first move."""

import logging
from dataclasses import replace

import pytest
import torch

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.errors import UnsupportedError
from losia_dist.run import masters
from losia_dist.sharding import zero_state
from losia_dist.sharding.torch_state import TorchState
from tests.support.cases import slow
from tests.support.models import batches, tiny_llama
from tests.support.training import Run, train, variant

CONFIG = LoSiAConfig(rank_factor=0.25, period=2)
RUN = Run(steps=4, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2})


def tried_on(name: str, dtype: str):
    """Masters and model before and after the probe, and that it really looked at every subnet."""
    seen = {}

    def inspect(stage, losia, engine):
        if losia.steps or stage == "after":
            return
        before = [t.clone() for t in losia.state.state_tensors()] + [
            losia.parameters.read_whole(layer.subnet) for layer in losia.sites
        ]
        masters.check_masters(losia.parts)
        after = losia.state.state_tensors() + [losia.parameters.read_whole(layer.subnet) for layer in losia.sites]
        seen["kept"] = all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after, strict=True))
        seen["reached"] = [0 if found is None else found[0].numel() for found in map(losia.state.stepped, subnets(losia))]
        seen["sizes"] = [layer.row_index.numel() * layer.col_index.numel() for layer in losia.sites]

    train(name, variant(RUN, steps=1, dtype=dtype), inspect)
    return seen


def bits(tensor):
    """Partitions end in padding that nobody wrote: it may be NaN, which equals nothing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def subnets(losia):
    return [layer.subnet for layer in losia.sites]


@pytest.mark.parametrize(
    "name, dtype",
    [
        slow("ddp", "bf16"),
        slow("zero0", "bf16"),
        ("zero1", "bf16"),
        slow("zero2", "bf16"),
        ("zero3", "bf16"),
        slow("zero3-offload", "fp32"),
        slow("zero2-offload", "bf16"),
        ("fsdp2", "bf16"),
        slow("fsdp2-offload", "fp32"),
    ],
)
def test_the_probe_reaches_every_master_and_leaves_everything_as_it_was(ranks, name, dtype):
    by_rank = ranks(2, tried_on, name, dtype)
    assert all(seen["kept"] for seen in by_rank)
    reached = [sum(parts) for parts in zip(*(seen["reached"] for seen in by_rank), strict=True)]
    copies = 2 if name in ("ddp", "zero0") else 1
    assert reached == [copies * size for size in by_rank[0]["sizes"]]


def settings(**zero):
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0.0}


def start_with_deepspeeds_own_setter():
    """Round robin partitions through DeepSpeed's `safe_set_full_fp32_param`, as they were written before."""
    from deepspeed.utils import safe_set_full_fp32_param

    real = zero_state.ZeroState.write_master
    zero_state.ZeroState.write_master = lambda self, parameter, values: safe_set_full_fp32_param(parameter, values)
    try:
        initialize(model=tiny_llama(), losia_config=CONFIG, config=settings(stage=2, round_robin_gradients=True))
    finally:
        zero_state.ZeroState.write_master = real


def test_partitions_in_another_order_than_the_writers_are_seen_at_the_start(ranks):
    for kind, message in ranks.errors(2, start_with_deepspeeds_own_setter):
        assert kind == "UnsupportedError"
        assert "do not reach the masters that the engine steps" in message and "model.layers.0.self_attn.k_proj" in message


def start_with_two_masters():
    """DeepSpeed's bf16 masters with LoSiAAdamW's own inside, with every refusal out of the way."""
    from losia_dist.integrations.deepspeed import initialize as integration
    from losia_dist.sharding import handed_over

    kept = integration.refuse_unsupported, handed_over.refuse_unsupported, zero_state._refuse_low_precision
    integration.refuse_unsupported = handed_over.refuse_unsupported = zero_state._refuse_low_precision = lambda _: None
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    try:
        initialize(model=tiny_llama(), losia_config=CONFIG, config={**settings(stage=2), "bf16": bf16})
    finally:
        integration.refuse_unsupported, handed_over.refuse_unsupported, zero_state._refuse_low_precision = kept


def test_a_second_master_inside_the_first_is_seen_at_the_start(ranks):
    for kind, message in ranks.errors(2, start_with_two_masters):
        assert kind == "UnsupportedError" and "do not reach the masters that the engine steps" in message


class HiddenMasters(LoSiAAdamW):
    """Keeps fp32 values out of anybody's reach, from its first step on, and passes for Adam, which is not tried."""

    keeps_adam_state = True

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not hasattr(self, "hidden"):
            self.hidden = {p: p.detach().clone() for p in parameters}
        for p in parameters:
            p.data.copy_(self.hidden[p])
        result = super().step(closure)
        self.hidden = {p: p.detach().clone() for p in parameters}
        return result


def run_plainly(optimizer_class, rank_factor=0.25):
    config = LoSiAConfig(rank_factor=rank_factor, period=2, rewarm_steps=0)
    model = get_losia_model(tiny_llama(), config)
    optimizer = optimizer_class(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    for (batch,) in batches(steps=4, micro_batches=1, batch=2, length=8, vocab=97, seed=0):
        model(**batch).loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
    return losia


def test_masters_out_of_reach_are_seen_in_the_first_step_after_a_move():
    with pytest.raises(UnsupportedError, match=r"model.layers.0.*old subnet's values in the new place.*Use LoSiAAdamW"):
        run_plainly(HiddenMasters)
    losia = run_plainly(LoSiAAdamW)
    assert losia._first_move.done and not losia._first_move._old and not losia._first_move._moved


def test_weights_loaded_behind_the_masters_are_seen_at_the_start():
    model = get_losia_model(tiny_llama(), CONFIG).bfloat16()
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    optimizer.create_state()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.subnet.mul_(2)
    with pytest.raises(UnsupportedError, match=r"master values of model.layers.1.mlp.up_proj are not the model's"):
        LoSiA(model, optimizer, CONFIG)


def test_a_subnet_that_no_optimizer_steps_is_an_error():
    model = get_losia_model(tiny_llama(), CONFIG)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3)), CONFIG)
    copies = {subnet: subnet.detach().clone() for subnet in subnets(losia)}  # which its optimizer does not hold
    state = TorchState(losia.state.optimizer, masters=copies)
    with pytest.raises(UnsupportedError, match="no optimizer steps model.layers.0.self_attn.q_proj"):
        masters.check_masters(replace(losia.parts, state=state))


def handed_over(extra: dict):
    """An engine that the user's own code made."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    model = get_losia_model(tiny_llama(), CONFIG)
    config = {**settings(stage=2, round_robin_gradients=True), "zero_allow_untested_optimizer": True, **extra}
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        losia = LoSiA(engine.module, engine.optimizer, CONFIG)
        for (batch,) in batches(steps=3, micro_batches=1, batch=2, length=8, vocab=97, seed=torch.distributed.get_rank()):
            engine.backward(engine(**batch).loss)
            engine.step()
            losia.step()
        return losia.steps
    finally:
        engine.destroy()


def test_an_engine_of_the_users_own_is_looked_at_like_initializes(ranks):
    assert ranks(2, handed_over, {}) == [3, 3]
    for kind, message in ranks.errors(2, handed_over, {"gradient_allreduce_op": "sum"}):
        assert kind == "UnsupportedError" and '"gradient_allreduce_op"' in message
