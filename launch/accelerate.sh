#!/usr/bin/env bash
# accelerate launch on several nodes. Run it on every node, each with its own NODE (0 on HEAD, 1, 2, ...):
#
#   NODE=0 NODES=2 GPUS=8 HEAD=10.0.0.1 CONFIG=configs/accelerate/fsdp2-multi-node.yaml launch/accelerate.sh \
#     --model M --train_file F --output_dir /shared/run
#
# In hsdp-multi-node.yaml the two sizes of the mesh stand in the file: nodes, and GPUs of a node. Accelerate starts nothing
# again by itself; the same words go on from the newest checkpoint.
set -euo pipefail

NODE="${NODE:?number of this node, from 0}"
NODES="${NODES:?how many nodes}"
GPUS="${GPUS:?GPUs of a node}"
HEAD="${HEAD:?address of node 0, as the others reach it}"
CONFIG="${CONFIG:?one of configs/accelerate/*-multi-node.yaml}"

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$folder/common.sh"

exec accelerate launch --config_file "$CONFIG" \
  --machine_rank "$NODE" --num_machines "$NODES" --num_processes "$((NODES * GPUS))" \
  --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
  "$folder/train.py" "${RESUMABLE[@]}" "$@"
