#!/bin/bash
# One run on the GPUs of several nodes of a SLURM cluster, with one process for each GPU:
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 scripts/slurm.sh --config qwen_eif --run_dir "$SCRATCH/qwen_eif"
# The options after the script are those of fit; run_dir must be a folder that all nodes share. A minute before
# the time limit, and after a preemption, the job is queued again and goes on where it stopped.
#SBATCH --job-name=stasc
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -u
export HF_HUB_OFFLINE=1  # most compute nodes have no internet: fetch model and data before
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over by itself
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# Without --kill-on-bad-exit the processes on other nodes would wait for one that has ended.
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m stasc fit "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" &
wait $!
