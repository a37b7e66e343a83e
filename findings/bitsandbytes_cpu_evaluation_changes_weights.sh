#!/usr/bin/env bash
# bitsandbytes 0.50.2, processors with AVX512-BF16: the first forward of a Linear4bit in evaluation mode lays its packed weight out
# anew, in place, and rounds its scales to bf16. From then on dequantize_4bit(layer.weight, layer.weight.quant_state), by which
# adapters are merged and weights read, gives other values, without a word. A layer that was only trained is read rightly.
# Seen (NF4, 64 x 128, fp32): largest difference to the values before 0.0 after a forward in training mode, 5.65 after one in
# evaluation mode (weights up to 4). On other processors nothing changes, and the script says so.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this processor has no AVX512-BF16: nothing to see"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy torch==2.13.0
"$work/venv/bin/pip" install -q bitsandbytes==0.50.2
cat > "$work/run.py" <<'PY'
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4", module=layer).to("cpu")


def values():
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


before, found = values(), {}
for mode in ("training", "evaluation"):
    layer.train(mode == "training")
    with torch.no_grad():
        layer(torch.randn(3, 128))
    after = values()
    found[mode] = (after - before).abs().max().item() if after.shape == before.shape else float("nan")
    print(f"after a forward in {mode} mode: {found[mode]:.2f}")
assert found["training"] == 0.0 and not found["evaluation"] < 0.5, "this release behaves otherwise"
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/run.py" 2>/dev/null
