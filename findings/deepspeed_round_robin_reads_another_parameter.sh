#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-2 with "round_robin_gradients": true: deepspeed.utils.safe_get_full_fp32_param gives another parameter's
# values. The option deals the parameters of a group to the ranks in turn, so that they lie in the flat vector in another order;
# the mapping that the function goes by is still that of the order in the group. safe_set_full_fp32_param goes by it too.
# Seen (two ranks, gloo, CPU; each parameter filled with its own number): plain "0 1 2 3", with the option "0 2 1 3".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "setuptools<81" wheel ninja torch==2.13.0
"$work/venv/bin/pip" install -q deepspeed==0.19.8
cat > "$work/run.py" <<'PY'
import sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(4)])
with torch.no_grad():
    for number, p in enumerate(model.parameters()):
        p.fill_(number)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "round_robin_gradients": sys.argv[1] == "yes"},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}})
read = [safe_get_full_fp32_param(p).mean().item() for p in engine.module.parameters()]
if dist.get_rank() == 0:
    print("read", *[f"{value:g}" for value in read], flush=True)
dist.barrier()
PY
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions"
run() { torchrun --nproc_per_node 2 "$work/run.py" "$1" 2>/dev/null | grep '^read'; }
plain=$(run no)
dealt=$(run yes)
echo "plain:                 $plain"
echo "round_robin_gradients: $dealt"
[[ $plain == "read 0 1 2 3" ]] || { echo "changed: the plain run"; exit 1; }
[[ $dealt == "read 0 2 1 3" ]] || { echo "changed: what the option makes it read"; exit 1; }
