#!/usr/bin/env bash
# DeepSpeed 0.19.8 and Transformers 5.24.0: with Ulysses over N ranks (register_with_transformers, mpu=) and the loss that the Hugging
# Face integration gives it (transformers.integrations.deepspeed.deepspeed_sp_compute_loss), gradients of stages 1 and 2 are N
# times too large: DeepSpeed divides their sum by the data-parallel ranks, while each rank's gradient is N times its part already, as
# that loss is gathered over the ranks and gradients come back from all of them. Stage 3 divides by all ranks and is right. Adam hides
# the factor; "gradient_clipping" clips by a norm that is N times too large.
# Seen (two ranks, gloo, a tiny Llama), norm of all gradients over one process's: stage 1: 2.000, stage 2: 2.000, stage 3: 1.000.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"; rm -f /dev/shm/deepspeed_allreduce_buffer_*_29881_*' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "setuptools<81" wheel ninja torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$work/venv/bin/pip" install -q deepspeed==0.19.8
cat > "$work/run.py" <<'PY'
import sys
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

stage = int(sys.argv[1])
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.1, attn_implementation="sdpa")).train()
ids = torch.arange(32).view(2, 16)
model(input_ids=ids, labels=ids).loss.backward()
alone = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
model.zero_grad(set_to_none=True)
deepspeed.init_distributed("gloo")
mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", sequence_parallel_size=2, micro_batch_size=2)
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    mpu=mpu,
    config={
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    },
)
part = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
targets = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
batch = {"input_ids": ids[:, part], "position_ids": torch.arange(16).expand(2, 16)[:, part], "shift_labels": targets[:, part]}
batch = {name: value.contiguous() for name, value in batch.items()}
parallelism = SimpleNamespace(sp_backend="deepspeed", sp_size=2)
loss = deepspeed_sp_compute_loss(None, engine, batch, False, parallelism)
engine.backward(loss)
engine.step()
if dist.get_rank() == 0:
    print(f"stage {stage}: {float(engine.get_global_grad_norm()) / float(alone):.3f}")
dist.barrier()
dist.destroy_process_group()
PY
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions"
found=""
for stage in 1 2 3; do
    torchrun --nproc_per_node 2 --master_port 29881 "$work/run.py" "$stage" > "$work/log" 2>&1 || { tail -5 "$work/log"; echo "changed: stage $stage does not run"; exit 1; }
    found+="$(grep "^stage" "$work/log"); "
done
echo "$found"
[[ $found == "stage 1: 2.000; stage 2: 2.000; stage 3: 1.000; " ]] || { echo "changed: the factors"; exit 1; }
