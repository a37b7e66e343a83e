#!/usr/bin/env bash
# The deepspeed launcher on several nodes. Run it on one of them, which reaches all by ssh without a password and has pdsh:
#
#   HOSTFILE=launch/hostfile launch/deepspeed.sh --deepspeed configs/deepspeed/zero3.json --model M --train_file F \
#     --output_dir /shared/run
#
# All nodes have this folder, the Python environment and --output_dir under the same paths. A run that lost a rank is started again
# up to RESTARTS times, and goes on from the newest checkpoint.
set -euo pipefail

HOSTFILE="${HOSTFILE:?file with the nodes, as launch/hostfile}"
RESTARTS="${RESTARTS:-3}"

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$folder/common.sh"

# Left alone, DeepSpeed takes the first address that the first node lists, which may be a container bridge's.
first="$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$HOSTFILE")"

# ssh carries no environment over: DeepSpeed reads what every rank is to have from this file. No tokens in here: it becomes part
# of a command line.
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(PATH|(NCCL|GLOO|TORCH_NCCL|LOSIA)_[A-Z_]+|HF_HOME|HF_HUB_OFFLINE|OMP_NUM_THREADS|DS_ACCELERATOR|PYTHONUNBUFFERED)=' \
  >"$DS_ENV_FILE"

# A node that went down without a word would keep its ssh, and so the launcher, waiting for hours.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"

attempt=0 told=0
while true; do
  deepspeed --hostfile "$HOSTFILE" --launcher pdsh --master_addr "${HEAD:-$first}" --master_port "${PORT:-29500}" \
    "$folder/train.py" "${RESUMABLE[@]}" "$@" &
  launcher=$!
  trap 'signalled=1 told=1; kill -TERM "$launcher"' TERM INT
  await "$launcher"
  [ "$told" = 0 ] || exit 143 # DeepSpeed's own code is 1 then, whether or not the ranks have saved
  # 0: done. 2: refused, as it would be again. 143: told to end, and saved.
  case "$code" in 0 | 2 | 130 | 143) exit "$code" ;; esac
  [ "$attempt" -lt "$RESTARTS" ] || exit "$code"
  attempt=$((attempt + 1))
  echo "launch/deepspeed.sh: the run ended with code $code; start $attempt of $RESTARTS again" >&2
  sleep "${PAUSE:-10}"
done
