#!/usr/bin/env bash
# One run on two nodes: sbatch jobs/deploy/slurm.sh. By a job file: python -m jobs.render JOB --to slurm.
# Tried: bash -n. Not submitted: that needs a SLURM cluster.
#SBATCH --job-name=ssl-pretraining
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
PORT=$((6379 + SLURM_JOB_ID % 1000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_USAGE_STATS_ENABLED=0
exec srun --export=ALL .venv/bin/ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    .venv/bin/python -m pipeline.pretrain --backbone vit_s16 --data /data/photos --storage /data/runs --workers 2
