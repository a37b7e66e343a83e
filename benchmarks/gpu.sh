#!/bin/bash
# Everything that only a GPU can show, in at most 8 minutes on one GPU of 80 GB or more, from a plain checkout:
#     benchmarks/gpu.sh [--output FILE] [--budget SECONDS] [--only TASK ...] [--rehearse]
# Needs torch >= 2.11 with its Triton (for torch.compile), and Transformers; pytest, PEFT and DeepSpeed are used where they are installed.
# Results are appended to a file of JSON lines as they come, so that a run that is cut short still counts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
