#!/usr/bin/env bash
# The quickstart on several machines that share the repository. On each machine, from its root:
#     NODES=2 DEVICES=8 NODE=0 MASTER=10.0.0.1 bash examples/torchrun.sh [options of fit]
# DEVICES is the number per machine; NODE is 0 on the first, whose address is MASTER, 1 on the next, and so on.
# A step takes NODES * DEVICES * batch_size examples, so an epoch has fewer steps by the same factor: a ramp given as a
# share of the training shrinks with it, a ramp in steps does not.
set -euo pipefail
exec torchrun --nnodes "${NODES:?}" --nproc-per-node "${DEVICES:?}" --node-rank "${NODE:?}" \
    --master-addr "${MASTER:?}" --master-port "${PORT:-29500}" \
    -m lightning_rdrop fit --config examples/quickstart.yaml \
    --trainer.strategy ddp --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES" "$@"
