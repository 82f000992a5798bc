#!/usr/bin/env bash
# Trains the seed model that every branch starts from.
#   sbatch [--nodes=N --ntasks-per-node=R --gpus-per-node=R ...] slurm/seed.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-seed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin seed "$@"
preflight seed
ranks seed
