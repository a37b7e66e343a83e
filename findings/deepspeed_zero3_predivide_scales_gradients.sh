#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-3 with "reduce_scatter": false: a "gradient_predivide_factor" equal to the number of ranks halves the
# gradients of two ranks. They are divided by the factor, averaged over the ranks, and multiplied by the factor again only where it
# is not the number of ranks. Seen with SGD at rate 1, where the change of a weight is its gradient; Adam would hide it.
# Seen (two ranks, gloo, CPU; the mean gradient is 1): stage 3 with factor 1 "changed by 1", with factor 2
# "changed by 0.5"; stage 2 both times "changed by 1".
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

stage, factor = int(sys.argv[1]), float(sys.argv[2])
model = torch.nn.Linear(8, 1, bias=False)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config={
    "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
    "gradient_predivide_factor": factor, "zero_optimization": {"stage": stage, "reduce_scatter": False}})
weight = next(engine.module.parameters())
before = safe_get_full_fp32_param(weight).clone()
engine.backward(engine(torch.ones(1, 8)).sum())  # the gradient is 1 on every rank
engine.step()
if dist.get_rank() == 0:
    print("changed by", f"{(before - safe_get_full_fp32_param(weight)).mean().item():g}", flush=True)
else:
    safe_get_full_fp32_param(weight)
dist.barrier()
PY
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions"
run() { torchrun --nproc_per_node 2 "$work/run.py" "$1" "$2" 2>/dev/null | grep '^changed'; }
for stage in 2 3; do
    for factor in 1 2; do
        seen[stage * 10 + factor]=$(run $stage $factor)
        echo "stage $stage, gradient_predivide_factor $factor: ${seen[stage * 10 + factor]}"
    done
done
[[ ${seen[21]} == "changed by 1" && ${seen[22]} == "changed by 1" && ${seen[31]} == "changed by 1" ]] || { echo "changed: what was right"; exit 1; }
[[ ${seen[32]} == "changed by 0.5" ]] || { echo "changed: stage 3"; exit 1; }
