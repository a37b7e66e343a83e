#!/usr/bin/env bash
# Transformers 5.24.0 with Accelerate 1.15.0: Trainer.evaluate() before Trainer.train() leaves the model without DDP.
# The evaluation registers the model with the accelerator, so that train() takes it for prepared and does not wrap it: no
# gradient is reduced, every rank trains a model of its own, and the losses of rank 0 look healthy.
# Seen (two ranks, gloo, CPU): "alone: ranks differ by 0.000000", "after evaluate: ranks differ by 0.00" and more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$work/run.py" <<'PY'
import sys
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, i):
        x = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": x, "labels": x.clone()}

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2))
arguments = TrainingArguments(output_dir=sys.argv[1], per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2,
                              use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
if sys.argv[2] == "evaluate":
    trainer.evaluate()
trainer.train()
mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
others = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(others, mine)
if dist.get_rank() == 0:
    print("apart", f"{(others[0] - others[1]).abs().max().item():.6f}", type(trainer.model_wrapped).__name__, flush=True)
dist.barrier()
PY
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
run() { "$work/venv/bin/torchrun" --nproc_per_node 2 "$work/run.py" "$work/out" "$1" 2>/dev/null | grep '^apart'; }
alone=$(run no)
after=$(run evaluate)
echo "train() alone:            $alone"
echo "evaluate(), then train(): $after"
[[ $alone == "apart 0.000000 DistributedDataParallel" ]] || { echo "changed: train() alone"; exit 1; }
[[ $after != "apart 0.000000"* && $after == *LlamaForCausalLM ]] || { echo "changed: the ranks agree"; exit 1; }
