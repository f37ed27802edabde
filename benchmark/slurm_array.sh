#!/usr/bin/env bash
# One task of a Slurm array makes one run. Nothing to edit but the lines for your cluster below.
#
#   WORKERS=8 bash benchmark/grpo_dt.sh --slurm print      writes the list of runs, prints the sbatch commands
#   WORKERS=8 bash benchmark/grpo_dt.sh --slurm submit     submits them; WORKERS: tasks at the same time
#
# Submitting again after a time limit takes the runs that are not finished and resumes them.
#SBATCH --job-name=online-dt
#SBATCH --cpus-per-task=8          # threads of a run
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@120         # Ctrl-C two minutes before the limit: the run stops at its last checkpoint
#SBATCH --output=runs/slurm/%A_%a.out   # the launcher's console; a run's own is RUN_DIR/log.txt
# One "#" less for a GPU per run, a partition and an account:
##SBATCH --gres=gpu:1
##SBATCH --partition=NAME
##SBATCH --account=NAME
set -euo pipefail
exec "${PYTHON:-python}" benchmark/run.py --task "$1" "$SLURM_ARRAY_TASK_ID"
