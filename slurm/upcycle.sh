#!/usr/bin/env bash
# Assembles the branches into one mixture-of-experts and trains it; makes what is missing for that first.
#   sbatch [--nodes=N --ntasks-per-node=R --gpus-per-node=R ...] slurm/upcycle.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-upcycle
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin upcycle "$@"
preflight moe
alone upcycle
ranks moe
