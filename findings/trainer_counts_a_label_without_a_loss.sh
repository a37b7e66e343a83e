#!/usr/bin/env bash
# Transformers 5.9.0: the Trainer divides a causal model's loss by all labels of a batch, the first of each sequence among them, of
# which no loss is taken. With sequences of 12 labels losses and gradients are 11/12 of the mean over the tokens that are predicted:
# the shorter the sequences, the smaller the steps, and clipping sees smaller norms. 5.10.1 counts the labels that have a loss.
# Seen: "5.9.0 trainer / mean 0.9167", "5.12.1 trainer / mean 1.0000".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes))
rows = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(0, 64, (4, 12))]
tokens = torch.stack([row["input_ids"] for row in rows])
with torch.no_grad():
    logits = model(input_ids=tokens).logits[:, :-1]
mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
settings = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": []}
trainer = Trainer(model, TrainingArguments("out", save_strategy="no", disable_tqdm=True, **settings), train_dataset=rows)
trainer.train()
logged = trainer.state.log_history[0]["loss"]
print(f"{transformers.__version__} trainer / mean {logged / mean:.4f}")
PY
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
for version in 5.9.0 5.12.1; do
  "$work/venv/bin/pip" install -q --disable-pip-version-check "transformers==$version"
  "$work/venv/bin/python" run.py 2> "$version.log" | grep mean | tee -a seen.txt
done
grep -q "5.9.0 trainer / mean 0.9167" seen.txt && grep -q "5.12.1 trainer / mean 1.0000" seen.txt
