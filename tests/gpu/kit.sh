#!/usr/bin/env bash
# Packs what `bench gpu` needs on a machine without a network that has torch and transformers for CUDA: wheels, models, text.
#   kit.sh PYTHON OUT [VERSION]      PYTHON has this project's packages; VERSION is that of python there (3.12), on x86-64
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=$1 out=$2 version=${3:-3.12}
limit=40 # MB
pip=("$python" -m pip --quiet --disable-pip-version-check)
rm -rf "$out"
mkdir -p "$out/wheels"
# DeepSpeed and its dependencies as they are pinned or installed here; of them pydantic-core and zstandard are compiled.
pins() { "$python" -c 'import sys; from importlib.metadata import version as v; print(*(f"{n}=={v(n)}" for n in sys.argv[1:]))' "$@"; }
# DeepSpeed comes as source only; without its operators nothing is compiled, and the wheel is for every python.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$out/wheels" $(pins deepspeed)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
"${pip[@]}" download --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" \
  --dest "$out/wheels" $(pins hjson pydantic pydantic-core annotated-types typing-inspection typing-extensions zstandard)
"$python" -m nexus_ds.experiments.benchmarks.gpu_steps inputs "$out/inputs"
cp "$here/gpu_check.sh" "$out/"
size=$(du -sm "$out" | cut -f 1)
((size < limit)) || { echo "$out takes $size MB, expected less than $limit" >&2; exit 1; }
echo "wrote $out ($size MB); next, on the machine with the GPU, in a copy of this folder: bash $out/gpu_check.sh"
