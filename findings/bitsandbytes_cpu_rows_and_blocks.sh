#!/usr/bin/env bash
# bitsandbytes 0.50.2 on the CPU: quantize_4bit gives a scale to every 64 values that follow each other in the flattened matrix, and
# dequantize_4bit reads the scales as if every row began a block. Where rows are no multiple of the block (48, 80, 96 columns) most
# values come back with another block's scale, without a word; a Linear4bit of such a size computes with them. The same codes as one
# flat row come back right. A GPU was not tried.
# Seen (matrix 64 x 96, NF4, blocks of 64): largest error 9.98 by dequantize_4bit, 0.93 flat; 64 x 128: 1.05 both ways.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy torch==2.13.0
"$work/venv/bin/pip" install -q bitsandbytes==0.50.2
cat > "$work/run.py" <<'PY'
import torch
import bitsandbytes.functional as functional

torch.manual_seed(0)
for columns in (96, 128):
    rows_of_unlike_size = torch.randn(64, columns) * torch.rand(64, 1) * 3
    codes, state = functional.quantize_4bit(rows_of_unlike_size, quant_type="nf4", blocksize=64)
    whole = functional.dequantize_4bit(codes, state)
    state.shape = torch.Size([rows_of_unlike_size.numel()])
    flat = functional.dequantize_4bit(codes, state).view(64, columns)
    by_matrix, by_row = ((found - rows_of_unlike_size).abs().max().item() for found in (whole, flat))
    print(f"64 x {columns}: as a matrix {by_matrix:.2f}, flat {by_row:.2f}")
    assert (by_matrix > 3 * by_row) == (columns == 96), "this release behaves otherwise"
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/run.py" 2>/dev/null
