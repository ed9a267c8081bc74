#!/usr/bin/env bash
# Trains both stages of a preset on several machines of a Slurm cluster:
# `sbatch scripts/slurm.sh birds`. The checkout, its .venv, the runs and the
# data must be on storage that all machines share. There is one process per GPU, because JAX assigns
# one GPU to each process under Slurm. Two minutes before the time limit, the processes get SIGTERM
# and save the run, and the job is queued again.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

config="${1:?usage: sbatch scripts/slurm.sh NAME [settings]; NAME is a preset.}"
shift
for stage in vqgan prior; do
    status=0
    srun .venv/bin/python "train_$stage.py" --config "$config" --distributed "$@" || status=$?
    if [ "$status" = 143 ]; then # stopped by SIGTERM, and saved
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [ "$status" = 0 ] || exit "$status"
done
