#!/bin/bash
# Train on hosts that ssh reaches without a password, with one torchrun per host:
#
#   HOSTS="node1 node2" RANKS_PER_HOST=4 examples/ssh/train.sh configs/recipe/qwen3_8b_hapo.yaml parallel.dp=2 ...
#
# This folder, the environment (VENV), model, data and output_dir must have the same paths on every host. Ctrl-C ends
# the run at once, and the same command resumes it from its last checkpoint. SIGTERM to a torchrun ends it with a
# checkpoint.
set -euo pipefail

read -ra hosts <<<"${HOSTS:?names of the hosts; the first one runs the driver}"
bin=${VENV:-$PWD/.venv}/bin

run_on() { # arguments: rank of the host, its name, the arguments of `train`
    local rank=$1 host=$2
    shift 2
    # -tt: torchrun ends when this ssh ends.
    ssh -tt "$host" "cd $(printf %q "$PWD") && exec $(printf '%q ' "$bin/torchrun" \
        --nnodes "${#hosts[@]}" \
        --nproc-per-node "${RANKS_PER_HOST:-8}" \
        --node-rank "$rank" \
        --master-addr "${hosts[0]}" \
        --master-port "${RENDEZVOUS_PORT:-29500}" \
        -m megatron_hapo train "$@")" </dev/null 2>&1 | sed -u "s/^/$host: /"
}

for rank in "${!hosts[@]}"; do
    run_on "$rank" "${hosts[$rank]}" "$@" &
done
# Background processes of a script ignore Ctrl-C, so it is forwarded.
trap 'kill $(jobs -p) 2>/dev/null || true' INT TERM
status=0
for job in $(jobs -p); do
    wait "$job" || status=$?
done
exit "$status"
