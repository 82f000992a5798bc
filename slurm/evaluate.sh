#!/usr/bin/env bash
# Scores every model of the run by domain and writes the report.
#   sbatch [--nodes=N --ntasks-per-node=R --gpus-per-node=R ...] slurm/evaluate.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin evaluate "$@"
preflight evaluate
alone evaluate
