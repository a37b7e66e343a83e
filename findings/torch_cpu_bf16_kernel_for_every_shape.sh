#!/usr/bin/env bash
# torch 2.13.0, CPU with AVX512-BF16: a product of bf16 matrices makes a oneDNN kernel for every new set of sizes. Where a size is
# the number of tokens that an expert was sent, it is new in almost every step: the first product of a size takes many times as long
# as the second of the same size, and the fp32 product, which makes no kernel, is faster than either first one.
# Seen (A^T B, A and B [t, 64], 300 values of t between 40 and 340, one thread, medians): bf16 first 488 us, again 31 us;
# fp32 first 20 us. On processors without these units bf16 goes another way, and the script says so.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this processor has no AVX512-BF16: nothing to see"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$work/run.py" <<'PY'
import statistics
import time

import torch

torch.set_num_threads(1)


def median(dtype, sizes):
    seconds = []
    for size in sizes:
        a, b = (torch.randn(size, 64, dtype=dtype) for _ in range(2))
        began = time.perf_counter()
        a.t() @ b
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)


sizes = range(40, 340)
for _ in range(3):  # what is made once for all sizes
    torch.randn(32, 64, dtype=torch.bfloat16).t() @ torch.randn(32, 64, dtype=torch.bfloat16)
    torch.randn(32, 64).t() @ torch.randn(32, 64)
first, again, plain = median(torch.bfloat16, sizes), median(torch.bfloat16, sizes), median(torch.float32, sizes)
print(f"bf16 first {first:.0f} us, again {again:.0f} us; fp32 first {plain:.0f} us")
assert first > 3 * again and first > 3 * plain, "this release behaves otherwise"
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/run.py" 2>/dev/null
