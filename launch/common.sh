#!/usr/bin/env bash
# What the launch scripts of this folder share (`source`): the network's settings, where what is set outside wins, and more.

# The interface over which the nodes reach each other (`ip -brief address`), for example NETWORK_INTERFACE=eth0. Left alone,
# NCCL takes the first one that is up, which on a node with containers may be a bridge, and gloo the one of the host's name.
if [ -n "${NETWORK_INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}"
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}"
fi
# NCCL's warnings; INFO also tells which interfaces and transports it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# 3 (PyTorch's default): a collective that failed or timed out ends its rank. Some images set 0, which lets it hang.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# Logs appear as they are written.
export PYTHONUNBUFFERED=1

# Every script saves, and goes on from the newest checkpoint when it is started again with the same words. Options that are
# given to the script come later and win.
# shellcheck disable=SC2034 # used by the scripts that source this file
RESUMABLE=(--losia --save_steps "${SAVE_STEPS:-100}" --keep_last 3 --resume auto)

# await PROCESS: wait to its end, and leave its exit code in $code. A trapped signal ends bash's `wait` early, so that every
# trap has to set signalled=1.
await() {
  signalled=1
  # shellcheck disable=SC2034 # read by the scripts that source this file
  while [ "$signalled" = 1 ]; do
    signalled=0 code=0
    wait "$1" || code=$?
  done
}
