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

id='' submitted=()
# submit TEMPLATE [SBATCH-OPTION ...]: leave the job's id in `id`. SLURM expands % in --output, so one of the path is doubled.
submit() { # never in $(...): bash goes on there after an error
  local name=$1 ids=%j
  shift
  [ "$name" != dense_branch ] || ids=%A_%a
  id=$(sbatch --parsable --kill-on-invalid-dep=yes --job-name="$name-$tag" --output="${logs//%/%%}/$name-$ids.log" \
    "${SBATCH_FLAGS[@]}" "$@" "slurm/$name.sh" "$recipe" "${settings[@]}") || id=''
  id=${id%%;*}
  if ! [[ $id =~ ^[0-9]+$ ]]; then
    echo "error: sbatch refused $name (see above), so the run is not submitted as a whole" >&2
    [ ${#submitted[@]} = 0 ] || echo "jobs before it are; to take them back type: scancel ${submitted[*]}" >&2
    exit 1
  fi
  submitted+=("$id")
  printf '%s %s\n' "$id" "$name" >>"$logs/jobs.txt"
  echo "$name: job $id" >&2
}

submit tokens "${CPU_FLAGS[@]}"
submit seed "${WIDE_FLAGS[@]}" --dependency="afterok:$id"
submit dense_branch "${BRANCH_FLAGS[@]}" --array="0-$((count - 1))" --dependency="afterok:$id"
branches=$id
submit embed "${BRANCH_FLAGS[@]}"
submit upcycle "${WIDE_FLAGS[@]}" --dependency="afterok:$branches:$id"
if [ "$extension" = yes ]; then
  submit finetune "${WIDE_FLAGS[@]}" --dependency="afterok:$id"
fi
submit evaluate "${BRANCH_FLAGS[@]}" --dependency="afterok:$id"
echo "logs: $logs" >&2
echo "next: nexus-ds status ${logs%/logs}" >&2
echo "$id"
