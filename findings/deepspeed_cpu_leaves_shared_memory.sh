#!/usr/bin/env bash
# DeepSpeed 0.19.8 on CPUs, under its own launcher: init_distributed makes a shared-memory buffer for its all-reduce, 69 MB a rank in
# /dev/shm, named after the master's address and port; it stays there when the processes have ended normally, process group
# destroyed. Launches on ports that change fill the machine's memory: a hundred of two ranks took 14 GB. Under torchrun: none.
# Seen (two ranks, gloo): "left: 2 files, 138 MB" after a normal end, exit code 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"; rm -f /dev/shm/deepspeed_allreduce_buffer_*_29877_*' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "setuptools<81" wheel ninja torch==2.13.0
"$work/venv/bin/pip" install -q deepspeed==0.19.8
cat > "$work/run.py" <<'PY'
import torch.distributed as dist
import deepspeed
deepspeed.init_distributed("gloo")
dist.barrier()
dist.destroy_process_group()
PY
export PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions"
deepspeed --num_accelerators 2 --master_port 29877 "$work/run.py" > "$work/log" 2>&1 || { tail -5 "$work/log"; echo "changed: it does not run"; exit 1; }
found=(/dev/shm/deepspeed_allreduce_buffer_*_29877_*)
[[ -e ${found[0]} ]] || { echo "changed: nothing is left"; exit 1; }
bytes=$(stat -c %s "${found[@]}" | awk '{ sum += $1 } END { print int(sum / 1e6) }')
echo "left: ${#found[@]} files, $bytes MB"
[[ ${#found[@]} == 2 && $bytes == 138 ]] || { echo "changed: what is left"; exit 1; }
