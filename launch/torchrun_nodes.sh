#!/usr/bin/env bash
# The same command on every machine, with its own NODE_RANK; rank 0 is on the machine MASTER_ADDR:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun_nodes.sh +model=llama3-8b [settings]
# Where host names do not lead to the right network: GLOO_SOCKET_IFNAME=eth0, also for ranks on
# GPUs, and for those NCCL_SOCKET_IFNAME=eth0.
set -euo pipefail
: "${NNODES:?number of machines}" "${NODE_RANK:?number of this machine, from 0}"
: "${MASTER_ADDR:?address of machine 0 that all machines reach}"
if [ $# -eq 0 ]; then set -- +model=llama3-8b; fi
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${NPROC:-gpu}" -m "${MODULE:-apb.run}" "$@"
