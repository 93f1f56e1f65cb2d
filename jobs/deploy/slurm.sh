#!/usr/bin/env bash
# One run on two nodes: sbatch jobs/deploy/slurm.sh. By a job file: python -m jobs.render JOB --to slurm.
# Exclusive: symmetric-run begins no second Ray on a machine, and ends all that is there (`ray stop`).
# Tried: bash -n; what jobs.render makes, on two network namespaces for machines. Not submitted: that needs SLURM.
#SBATCH --job-name=ssl-pretraining
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
PORT=$((6379 + SLURM_JOB_ID % 1000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
BEGAN=$(mktemp -u)
srun --export=ALL ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus 8 -- \
    bash -c 'touch "$0"; exec "$@"' "$BEGAN" \
    python -m pipeline.pretrain --backbone vit_s16 --data /data/photos --storage /data/runs --workers 2 \
    --run "/data/runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" # the same after a requeue, which goes on with it
# symmetric-run ends with 0 where Ray does not start.
rm "$BEGAN" 2>/dev/null || { echo "nothing ran: Ray did not start, for the reason above" >&2; exit 1; }
