#!/usr/bin/env bash
# The whole run as jobs that wait for each other, the map of the project:
#
#   tokens -> seed -> dense_branch (array) -+-> upcycle -> finetune -> evaluate
#                                    embed -+
#
#   slurm/pipeline.sh [RECIPE] [section.key=value ...]      then: nexus-ds status RUN
set -euo pipefail
NEXUS_REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$NEXUS_REPO/slurm/common.sh"
arguments pipeline "$@"

logs=$(ask logs seed)
count=$(ask branches seed)
extension=$(ask extension seed)
[[ $count =~ ^[0-9]+$ ]] || die "expected the number of branches, found $count"
tag=$(basename -- "$recipe" .yaml)
tag=${tag//[^A-Za-z0-9._-]/_}

# submit TEMPLATE [SBATCH-OPTION ...]: print the id of the job. SLURM expands % in --output, so one of the path is doubled.
submit() {
  local name=$1 id ids=%j
  shift
  [ "$name" != dense_branch ] || ids=%A_%a
  id=$(sbatch --parsable --kill-on-invalid-dep=yes --job-name="$name-$tag" --output="${logs//%/%%}/$name-$ids.log" \
    "${SBATCH_FLAGS[@]}" "$@" "slurm/$name.sh" "$recipe" "${settings[@]}")
  id=${id%%;*}
  printf '%s %s\n' "$id" "$name" >>"$logs/jobs.txt"
  echo "$name: job $id" >&2
  echo "$id"
}

tokens=$(submit tokens "${CPU_FLAGS[@]}")
seed=$(submit seed "${WIDE_FLAGS[@]}" --dependency="afterok:$tokens")
branches=$(submit dense_branch "${BRANCH_FLAGS[@]}" --array="0-$((count - 1))" --dependency="afterok:$seed")
embed=$(submit embed "${BRANCH_FLAGS[@]}")
last=$(submit upcycle "${WIDE_FLAGS[@]}" --dependency="afterok:$branches:$embed")
if [ "$extension" = yes ]; then
  last=$(submit finetune "${WIDE_FLAGS[@]}" --dependency="afterok:$last")
fi
last=$(submit evaluate "${BRANCH_FLAGS[@]}" --dependency="afterok:$last")
echo "logs: $logs" >&2
echo "next: nexus-ds status ${logs%/logs}" >&2
echo "$last"
