#!/usr/bin/env bash
# Installs what kit.sh packed and runs `bench gpu`, without a network: bash .gpu/gpu_check.sh [OPTION ...], in a clone's root.
# gpu.json and logs.txt come into $OUT (runs/gpu).
set -uo pipefail
kit=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$kit")
nvidia-smi || echo "no nvidia-smi here" >&2
install=(python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir)
# Beside torch where that folder can be written, else in a folder of its own.
if ! "${install[@]}" "$kit"/wheels/*.whl; then
  site=$(mktemp -d)
  "${install[@]}" --target "$site" "$kit"/wheels/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python3 -m nexus_ds bench gpu --inputs "$kit/inputs" --out "${OUT:-runs/gpu}" "$@"
