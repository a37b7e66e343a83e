"""On a GPU: the same training as on the CPU, no host synchronisation in a step, and the memory that the design promises."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import UnsupportedError
from tests.support.models import batches, tiny_llama

STEPS = 12


def trained(device: str, dtype: torch.dtype = torch.float32, compiled: bool = False) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and last row indices of a training through six re-localizations."""
    model = tiny_llama(attn_implementation="sdpa").to(device, dtype)
    config = LoSiAConfig(rank_factor=0.25, output_rank_factor=0.25, period=2)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    if compiled:
        model.compile()
    losses = []
    for (batch,) in batches(STEPS, 1, 4, 12, 96, seed=7):
        ids = batch["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), [layer.row_index.cpu() for layer in losia.sites]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_trains_as_the_cpu_does(compiled):
    torch.backends.cuda.matmul.allow_tf32 = False
    losses, rows = trained("cuda", compiled=compiled)
    expected, expected_rows = trained("cpu")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, expected_rows, strict=True))


@pytest.mark.gpu
def test_bf16_trains_on_a_gpu():
    losses, _ = trained("cuda", torch.bfloat16)
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["greedy", "random"])
def test_a_step_waits_for_no_host_synchronisation(selection):
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)]).cuda()
    config = LoSiAConfig(rank_factor=0.125, period=50, target_modules=["0", "1", "2", "3"], selection=selection)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    x = torch.randn(64, 256, device="cuda")

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()

    for _ in range(3):  # state, and the check that every subnet trains
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_needs_less_memory_than_full_fine_tuning():
    def peak(full: bool) -> int:
        model = tiny_llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=16).cuda()
        before = torch.cuda.memory_allocated()
        if full:
            optimizer = torch.optim.AdamW(model.parameters())
        else:
            config = LoSiAConfig(period=1000)
            get_losia_model(model, config)
            optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
            losia = LoSiA(model, optimizer, config)
        ids = torch.randint(0, 97, (1, 64), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            if not full:
                losia.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    assert peak(full=False) < 0.5 * peak(full=True)


@pytest.mark.gpu
def test_weights_cut_over_ranks_of_context_parallelism_are_refused(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        config = LoSiAConfig(rank_factor=0.25)
        model = get_losia_model(tiny_llama().to("cuda"), config)
        fully_shard(model, mesh=init_device_mesh("cuda", (1,), mesh_dim_names=("dp_shard_cp",)))
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        with pytest.raises(UnsupportedError, match="sharded over 'dp_shard_cp', ranks of context parallelism"):
            LoSiA(model, optimizer, config)
    finally:
        dist.destroy_process_group()
