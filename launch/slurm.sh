#!/bin/bash
# OUT=runs/xl sbatch launch/slurm.sh --config recipes/imagenet-512/elit-dit-xl-mb.yaml --data DIR
#
# One task a GPU. Before its time is up, or when another job takes its place, every task gets SIGTERM: the run saves, ends
# with 0, and the job goes back into the queue until OUT/model is there. What fails stays down; start it again by hand.
#SBATCH --job-name=elit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=elit-%j.log
set -eu

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# exec: the signal must reach Python itself.
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec elit train --resume "$@"
' elit --out "$OUT" "$@"

[ -d "$OUT/model" ] || scontrol requeue "$SLURM_JOB_ID"
