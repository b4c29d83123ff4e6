#!/usr/bin/env bash
# One rank per GPU of this machine (or NPROC ranks): launch/torchrun.sh +model=llama3-8b [settings]
set -euo pipefail
if [ $# -eq 0 ]; then set -- +model=llama3-8b; fi
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m "${MODULE:-apb.run}" "$@"
