#!/usr/bin/env bash
# Transformers 5.24.0 with torch 2.13.0: fully_shard (FSDP2) gives a model another class of the same name with "FSDP" before it, and
# save_pretrained finds the names of some families by the class's name. A GPT-NeoX that was made new (from a configuration) and sharded
# is saved with "lm_head.weight" where the same model, not sharded, has "embed_out.weight", as the family's files on the Hub do. No
# error, no warning. Programs that read the family's own names do not find the output layer.
# Seen (one process, gloo): plain ['embed_out.weight'], sharded ['lm_head.weight'].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy
cat > "$work/run.py" <<'PY'
import os, tempfile
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29881", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")


def names(sharded):
    config = GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = GPTNeoXForCausalLM(config)
    with tempfile.TemporaryDirectory() as directory:
        if sharded:
            fully_shard(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model.save_pretrained(directory, state_dict=state)
        with safe_open(f"{directory}/model.safetensors", "pt") as opened:
            return set(opened.keys())


plain, sharded = names(False), names(True)
print("plain", sorted(plain - sharded), "sharded", sorted(sharded - plain))
dist.destroy_process_group()
PY
found=$("$work/venv/bin/python" "$work/run.py" 2> "$work/log" | grep "^plain") || { tail -5 "$work/log"; exit 1; }
echo "$found"
[[ $found == "plain ['embed_out.weight'] sharded ['lm_head.weight']" ]] || { echo "changed"; exit 1; }
