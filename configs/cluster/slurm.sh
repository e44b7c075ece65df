#!/bin/bash
# A command of align on several nodes of a SLURM cluster, with a Ray cluster that lives as long as the command:
#
#     sbatch configs/cluster/slurm.sh run experiment.yaml
#     sbatch configs/cluster/slurm.sh resume runs/NAME
#
# The current folder, the model and the environment must be on storage that the nodes share. ALIGN_ENVIRONMENT names the
# virtual environment; ALIGN_HEAD_ADDRESS, where a node has several networks, the first node's address in the right one.
#SBATCH --job-name=align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=align-%j.log
# This script is sent SIGTERM ten minutes before the end of the time: enough for a step and a checkpoint.
#SBATCH --signal=B:TERM@600
set -euo pipefail

source "${ALIGN_ENVIRONMENT:-.venv}/bin/activate"

# The script runs on the first node, which becomes the head. Ray must be told an address that the others reach: a host
# name may resolve to 127.0.1.1.
head=${ALIGN_HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
address=$head:$((20000 + SLURM_JOB_ID % 10000))

# Who reaches Ray's ports can run code: only processes with this job's token may join.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

process=$(mktemp)
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --disable-usage-stats \
    -- bash -c 'echo $$ > "$0"; exec align "$@"' "$process" "$@" "cluster.address=$address" &
step=$!

# A stop goes to align alone, which ends its step and writes a checkpoint; Ray must live until then.
trap 'kill -TERM "$(cat "$process")"' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do # the signal has ended the wait, not the run
    status=0
    wait "$step" || status=$?
done
rm -f "$process"
exit "$status"
