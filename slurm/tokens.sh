#!/usr/bin/env bash
# Tokenises the text of all stages that train, on CPUs; needs nothing but the text.
#   sbatch [--cpus-per-task=C ...] slurm/tokens.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-tokens
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin tokens "$@"
preflight tokens
alone tokens
