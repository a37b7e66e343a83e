"""On a GPU: the same training as on the CPU, no host synchronisation in a step, and the memory that the design promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import UnsupportedError
from losia_dist.subnet import float8
from tests.support.models import batches, tiny_llama

STEPS = 12


def trained(device: str, dtype: torch.dtype = torch.float32, compiled: Any = None) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and last row indices of a training through six re-localizations. compiled: options of `model.compile`, or None."""
    model = tiny_llama(attn_implementation="sdpa").to(device, dtype)
    config = LoSiAConfig(rank_factor=0.25, output_rank_factor=0.25, period=2)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    if compiled is not None:
        model.compile(**compiled)
    losses = []
    for (batch,) in batches(STEPS, 1, 4, 12, 96, seed=7):
        ids = batch["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())  # a CUDA graph's next replay writes there
    return torch.stack(losses).tolist(), [layer.row_index.cpu() for layer in losia.sites]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, {}], ids=["eager", "compiled"])
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


def skip_without_float8() -> None:
    if torch.version.hip is not None or torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("no units for FP8 in e4m3fn and e5m2: refused there, tests/unit/test_float8.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_fp8_products_are_those_of_the_cpu(dtype, transposed):
    """To 2e-3 of the largest: units for FP8 add products up in fewer bits than fp32 has."""
    skip_without_float8()
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 40, 256).to(dtype), torch.randn(192, 256).to(dtype) / 16, torch.randn(192).to(dtype)
    grad_y = torch.randn(3, 40, 192).to(dtype) * 1e-5

    def products(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = weight.to(device)
        matrix = matrix.t().contiguous().t() if transposed else matrix
        y = float8.float8_linear(x.to(device), matrix, bias.to(device))
        return y, float8.float8_input_gradient(grad_y.to(device), matrix)

    for ours, theirs in zip(products("cuda"), products("cpu"), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        bound = 2e-3 if dtype == torch.float32 else 1e-2
        assert (ours.cpu().float() - theirs.float()).abs().max() < bound * theirs.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("selection, products", [("greedy", None), ("random", None), ("random", "fp8")])
def test_a_step_waits_for_no_host_synchronisation(selection, products):
    if products:
        skip_without_float8()
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)]).cuda()
    targets = ["0", "1", "2", "3"]
    config = LoSiAConfig(rank_factor=0.125, period=50, target_modules=targets, selection=selection, weight_products=products)
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


@pytest.mark.gpu
def test_a_layer_with_a_subnet_refuses_to_be_captured():
    model = get_losia_model(torch.nn.Sequential(torch.nn.Linear(64, 64)).cuda(), LoSiAConfig(rank_factor=0.25))
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(UnsupportedError, match="runs while a CUDA graph is captured"), torch.cuda.graph(graph):
            model(x)


@pytest.mark.gpu
def test_a_model_compiled_with_cuda_graphs_trains_as_an_eager_one():
    losses, rows = trained("cuda", compiled={"mode": "reduce-overhead"})
    expected, expected_rows = trained("cuda")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, expected_rows, strict=True))
