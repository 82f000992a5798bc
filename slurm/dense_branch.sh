#!/usr/bin/env bash
# Trains one dense branch a task of the array, in the order of the recipe's domains, then new_domains.
# The demo has five; for another recipe: sbatch --array=0-N, or slurm/pipeline.sh, which counts them.
#   sbatch [--nodes=N --ntasks-per-node=R --gpus-per-node=R ...] slurm/dense_branch.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-branch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --array=0-4
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin dense_branch "$@"
preflight branch
ranks branch
