#!/usr/bin/env bash
# torchrun on several nodes. Run it on every node, with the same words:
#
#   NODES=2 GPUS=8 HEAD=10.0.0.1 launch/torchrun.sh --sharding fsdp2 --model M --train_file F --output_dir /shared/run
#
# The nodes meet at HEAD:PORT, which the node of that address serves (c10d rendezvous), within JOIN_TIMEOUT seconds. A rank that
# fails makes torchrun start all of them again, on every node, up to RESTARTS times, and they go on from the newest checkpoint.
# A node that is lost ends torchrun on the others: start it again on all. --output_dir is on a file system that all nodes share.
set -euo pipefail

NODES="${NODES:?how many nodes}"
GPUS="${GPUS:?GPUs of a node}"
HEAD="${HEAD:?address of one of the nodes, as the others reach it}"
PORT="${PORT:-29400}"

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$folder/common.sh"

# torchrun's own store, shared with the ranks, keeps the addresses of the ranks before: those that are started again would
# connect to them, and fail or hang (PyTorch issue 135712). With 1, rank 0 makes a store of its own each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# ADDRESS: this node's own, where its host name does not lead the others to it.
# The time that a rank is given to save after SIGTERM (torchrun's default is 30 s) before SIGKILL.
exec torchrun \
  --nnodes "$NODES" --nproc_per_node "$GPUS" --max_restarts "${RESTARTS:-3}" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${RUN_ID:-losia}" \
  --rdzv_conf "join_timeout=${JOIN_TIMEOUT:-900}${IS_HOST:+,is_host=$IS_HOST}" ${ADDRESS:+--local_addr "$ADDRESS"} \
  --shutdown_timeout "${SAVE_SECONDS:-300}" \
  "$folder/train.py" "${RESUMABLE[@]}" "$@"
