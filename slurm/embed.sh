#!/usr/bin/env bash
# Embeds the text of all domains for the router; needs nothing but the text.
#   sbatch [--nodes=N --ntasks-per-node=R --gpus-per-node=R ...] slurm/embed.sh [RECIPE] [section.key=value ...]
#SBATCH --job-name=nexus-embed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${NEXUS_REPO:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" ||
  { echo "error: submit from the repository's folder, or export NEXUS_REPO=/path/to/it" >&2; exit 1; }
begin embed "$@"
preflight embed
alone embed
