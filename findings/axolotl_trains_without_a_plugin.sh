#!/usr/bin/env bash
# axolotl 0.19.0: a plugin that cannot be imported does not end the run. One line of the log says so, and the model is then trained
# without what the plugin was to do, with exit code 0. With LoSiA's plugin that was full fine-tuning.
# Seen: "exit code 0", "Failed to load plugin: my_plugin.MyPlugin", and a trained model.
# AXOLOTL: an environment that has axolotl 0.19.0 already; without it one is made (minutes).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bin="${AXOLOTL:-$work/venv}/bin"
if [ -z "${AXOLOTL:-}" ]; then
  python3 -m venv "$work/venv"
  "$bin/pip" install -q torch==2.13.0 axolotl==0.19.0
fi
cd "$work"
echo 'import a_module_that_is_not_there' > my_plugin.py
cat > make.py <<'PY'
import json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
inner = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
inner.add_special_tokens(["<end>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
tokenizer.save_pretrained("model")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).save_pretrained("model")
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps({"text": f"row {place} of a text"}) + "\n" for place in range(32))
PY
cat > run.yaml <<'YAML'
base_model: model
plugins: [my_plugin.MyPlugin]
datasets: [{path: rows.jsonl, ds_type: json, type: completion}]
output_dir: out
sequence_len: 64
micro_batch_size: 4
num_epochs: 1
max_steps: 2
learning_rate: 0.001
optimizer: adamw_torch
lr_scheduler: constant
bf16: false
YAML
export PATH="$bin:$PATH" PYTHONPATH="$work" AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$bin/python" make.py > made.log 2>&1
code=0
"$bin/axolotl" train run.yaml --launcher python > axolotl.log 2>&1 || code=$?
echo "exit code $code"
grep -o "Failed to load plugin: [a-zA-Z_.]*" axolotl.log | head -n 1 || tail -n 20 axolotl.log
if [ -f out/model.safetensors ]; then echo "a model was trained all the same: out/model.safetensors"; fi
if [ "$code" != 0 ] || ! grep -q "Failed to load plugin: my_plugin.MyPlugin" axolotl.log; then echo "changed"; exit 1; fi
