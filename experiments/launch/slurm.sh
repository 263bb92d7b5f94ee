#!/usr/bin/env bash
# Trains on two nodes of four GPUs: sbatch experiments/launch/slurm.sh RUN_FOLDER [FLAG ...]
# One process for each GPU, which JAX takes from Slurm's variables. RUN_FOLDER and the
# data lie on a file system that all nodes share. Where a node fails, requeueing starts
# the same command again, and it goes on from the last checkpoint.
#SBATCH --job-name=flax-lstm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

folder=${1:?give the run folder}
shift
# SIGTERM goes to the processes of the step two minutes before the end: they save, and
# end together. --kill-on-bad-exit ends those whose node was lost.
exec srun --kill-on-bad-exit=1 \
    flax-lstm train --distributed auto --auto-resume --out "$folder" \
    --save-minutes 10 "$@"
