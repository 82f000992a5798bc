# Sourced by the templates of this folder: where things are, one srun task a rank, signals, requeues.
# A value from a recipe or a name is only ever one quoted argument; no text is built into a command or an #SBATCH line.
# Not covered: two jobs on one run's same stage at once; old ranks that a lost node keeps running.
set -uo pipefail

MAX_STALLED=${MAX_STALLED:-3} # starts in a row without progress before a job gives up
CONTAINER=()                  # put before every python; see site.example.sh for these three
SRUN_FLAGS=()
SBATCH_FLAGS=() CPU_FLAGS=() BRANCH_FLAGS=() WIDE_FLAGS=()
# The plan counts on it: rows of every size would break a GPU's memory into pieces otherwise.
[ -n "${PYTORCH_CUDA_ALLOC_CONF+set}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
template='' job=${SLURM_JOB_ID:-none} stopping='' child='' code=0 output=''

say() { printf '%s [%s, job %s, start %s] %s\n' "$(date +%FT%T)" "$template" "$job" \
  "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# arguments TEMPLATE [RECIPE] [section.key=value ...]: what was asked for, where the repository and its python are.
arguments() {
  template=$1 recipe=demo
  shift
  if [ $# -gt 0 ] && { [ -f "$1" ] || [[ $1 != *=* ]]; }; then recipe=$1; shift; fi
  if [ -f "$recipe" ] && [[ $recipe != /* ]]; then recipe=$PWD/$recipe; fi
  settings=("$@")
  NEXUS_REPO=$(cd -- "$NEXUS_REPO" && pwd) && cd -- "$NEXUS_REPO" || die "no folder $NEXUS_REPO"
  export NEXUS_REPO
  site=${NEXUS_SITE:-$NEXUS_REPO/slurm/site.sh}
  # shellcheck disable=SC1090
  if [ -f "$site" ]; then
    set +u # it may extend what nobody has set, as LD_LIBRARY_PATH=/opt/x:$LD_LIBRARY_PATH
    source "$site" || die "$site ended with an error"
    set -u
  fi
  python=$NEXUS_REPO/.venv/bin/python
  if [ ! -x "$python" ]; then
    python=python3
    [ ${#CONTAINER[@]} -gt 0 ] || python3 -c 'import deepspeed, transformers, yaml' 2>/dev/null ||
      die "no $NEXUS_REPO/.venv and no deepspeed in python3; type: cd $NEXUS_REPO && make setup"
  fi
}

nexus() { "${CONTAINER[@]}" "$python" -m nexus_ds "$@"; }
ask() { nexus stage --show="$1" --config="$recipe" "$2" "${settings[@]}"; }

# begin TEMPLATE ...: the start of every job.
begin() {
  arguments "$@"
  [ -n "${SLURM_JOB_ID:-}" ] || die "not a job; type: sbatch slurm/$template.sh"
  # The last task of an array has the id of the whole array, and a requeue of that id would restart all of them.
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  logs=$(ask logs seed) || die "the recipe can't be used (see above)"
  local log=$logs/$template-$job.log
  if ! [ /proc/self/fd/1 -ef "$log" ]; then
    echo "log: $log"
    exec >>"$log" 2>&1
  fi
  printf '%s %s\n' "$job" "$template" >>"$logs/jobs.txt"
  NEXUS_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol show hostnames failed"
  export NEXUS_NODES
  export MASTER_ADDR=${NEXUS_MASTER_ADDR:-${NEXUS_NODES%%$'\n'*}}
  # Below the ephemeral ports; differs between jobs that share a node and between starts of one job.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1
  unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK # of the shell that submitted
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
  say "on ${NEXUS_NODES//$'\n'/, }: ${SLURM_NTASKS:-1} ranks; recipe $recipe ${settings[*]}"
}

on_signal() {
  stopping=$1
  say "received SIG$1: the ranks save their state at the next step boundary"
  # To all ranks; srun takes TERM as a wish to kill them.
  if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null; fi
}

# launch SRUN-OPTION ... -- VERB ...: run one srun step, its exit code in `code`; signals go on to the ranks meanwhile.
launch() {
  local options=()
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  # Ranks that end for the same reason end by themselves, so that their exit code is told; --wait ends those that hang.
  srun "${SRUN_FLAGS[@]}" --kill-on-bad-exit=0 --wait=60 "${options[@]}" \
    "${CONTAINER[@]}" "$python" -u -m nexus_ds "$@" &
  child=$!
  [ -z "$stopping" ] || kill -USR1 "$child" 2>/dev/null # it came before there was a child to tell
  while :; do # a trapped signal ends `wait` before the step does
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
}

# settle STAGE: after a step without output. Requeues what was interrupted, or crashed after progress; ends the job.
settle() {
  local stage=$1 record=$logs/.progress-$job-$1 now step last stalled state kept
  read -r stalled last <"$record"
  # What the stage, and what it has to make first, have reached; other jobs of the run don't count.
  now=$(ask progress "$1") || { say "how far $1 is can't be told (see above): counted as no progress"; now=$last; }
  step=${now##* }
  kept="the state of step ${step:-0} is kept"
  [ "${step:-0}" != 0 ] || kept='there is no state yet'
  # 65: several bad batches in a row. The state behind them is no progress that a requeue may count.
  case $code in *65) die "$stage ended after several bad batches in a row (see above); not requeued" ;; esac
  stalled=$([ "$now" = "$last" ] && echo $((stalled + 1)) || echo 0)
  # 75: stopped in order by a signal; 138 and 143: USR1 or TERM before the ranks listened.
  case $stopping$code in
    *75 | *138 | *143 | USR1* | TERM*) ;;
    *) [ "$stalled" = 0 ] || die "$stage failed (exit $code) without progress; its message stands above; not requeued" ;;
  esac
  [ "$stalled" -lt "$MAX_STALLED" ] ||
    die "no progress in $stalled starts at step ${step:-0} of $stage; not requeued. Is the time limit long enough for" \
      "one step, or training.save_every too large?"
  state=$(scontrol --oneliner show job "$job" | grep -oE -m 1 'JobState=[A-Z_]+')
  if [ -n "$state" ] && [ "$state" != JobState=RUNNING ]; then
    say "interrupted at step ${step:-0} of $stage; ${state#JobState=}, so SLURM decides what follows"
    exit 75
  fi
  printf '%s %s\n' "$stalled" "$now" >"$record"
  say "$stage is not finished (exit $code; $kept): requeue"
  scontrol requeue "$job" ||
    die "'scontrol requeue $job' failed; $kept: submit the same job again to go on"
  sleep 120 # SLURM ends this script
  exit 75
}

# started STAGE: note what there is before a step, so that one without progress can be told.
started() {
  local record=$logs/.progress-$job-$1 now last=''
  now=$(ask progress "$1") || die "the recipe can't be used (see above)"
  if [ -f "$record" ]; then read -r _ last <"$record"; fi
  # What a start made that nobody settled, for its node was lost, is progress too.
  [ "$now" = "$last" ] || printf '0 %s\n' "$now" >"$record"
}

# preflight STAGE: checks on all ranks before the expensive part.
preflight() {
  output=$(ask output "$1") || die "the recipe can't be used (see above)"
  [ ! -e "$output" ] || return 0
  started "$1"
  launch -- preflight --config="$recipe" --deepspeed="${NEXUS_DEEPSPEED:-}" "$1" "${settings[@]}"
  if [ "$code$stopping" = 1 ]; then die "preflight failed; nothing was started"; fi
  [ "$code" = 0 ] || settle "$1"
}

# alone STAGE: make a stage, and what it needs, with one process on the first node.
alone() {
  output=$(ask output "$1") || die "the recipe can't be used (see above)"
  if [ -e "$output" ]; then say "$1 is finished already"; return 0; fi
  started "$1"
  say "stage $1"
  [ -n "$stopping" ] ||
    launch --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
      -- stage --config="$recipe" "$1" "${settings[@]}"
  [ -e "$output" ] || settle "$1"
}

# ranks STAGE: train a stage on all ranks.
ranks() {
  output=$(ask output "$1") || die "the recipe can't be used (see above)"
  started "$1"
  say "stage $1"
  # srun does not inherit --cpus-per-task
  [ -n "$stopping" ] ||
    SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} launch -- stage --config="$recipe" --deepspeed="${NEXUS_DEEPSPEED:-}" "$1" "${settings[@]}"
  [ -e "$output" ] || settle "$1"
  # Above 128: a signal met ranks that were done. The output appears by a rename, as a whole.
  [ "$code" = 0 ] || [ "$code" -gt 128 ] || die "$1: exit $code, although $output is there; see above"
  say "stage $1 is finished"
}
