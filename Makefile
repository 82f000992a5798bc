# Everything a fresh machine needs is made by these targets: the virtualenv, the packages, the outputs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
# Test files at once; those that start two ranks keep two cores busy by themselves.
JOBS ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup locked lock audit demo virtualenvs test test-all test-slurm test-serving test-faults fuzz soak mutants gpu gpu-kit lint clean
help:
	@echo "make demo      the whole pipeline on a small scale (CPU or GPU); ends with the report's path"
	@echo "make locked    the virtualenv with every package but torch by its hash (Linux, Python 3.11)"
	@echo "make audit     known weaknesses of these packages (pip-audit); make lock resolves them anew"
	@echo "make test      lint, types and tests (JOBS=2 files at once); make test-all adds the full parity matrix"
	@echo "make test-slurm  the templates on a real SLURM, installed and started for the test (Debian, as root)"
	@echo "make test-serving  exports in the programs that they are for: llama.cpp, vLLM, transformers 4 (2.5 GB of packages)"
	@echo "make test-faults  every promise of docs/reliability.md, which it writes, and five minutes of hostile files: some 20 minutes on two cores"
	@echo "make fuzz SECONDS=60  hostile files for each reader of outside files, guided by coverage"
	@echo "make soak MINUTES=30  a training under a seeded list of faults ends bit-equal to an undisturbed one"
	@echo "make mutants   put faults into copies of the code and count those that the tests see"
	@echo "make gpu       on a machine with a GPU, in 8 minutes: its tests, speed, memory; runs/gpu/gpu.json"
	@echo "make gpu-kit   pack what that needs where there is no network into .gpu/ (bash .gpu/gpu_check.sh there)"
	@echo "make clean     remove runs/, .gpu/ and caches (the virtualenv stays)"

# The shell scripts beside python begin with the path of the virtualenv, which can't have a space.
ifneq ($(words $(CURDIR)),1)
$(warning $(CURDIR) has a space: pip's scripts (.venv/bin/deepspeed, nexus-ds) will not start there; \
  use a path without one, or .venv/bin/python -m nexus_ds)
endif

# Reinstalled only when the pins or the package's metadata change.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; expected 3.11 or 3.12: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

setup: $(READY)

# As setup, but every package by its hash: Linux on x86-64, Python 3.11. torch alone comes as your pip
# finds it: PIP_INDEX_URL of PyTorch's index of CPU builds, for that line, takes the small one.
locked:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet `grep ^torch== requirements.txt`
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $(READY)

# pip-audit and a pip that resolves without downloads, in a virtualenv of their own.
.venv-audit/ready: Makefile
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --upgrade pip pip-audit==2.10.1
	@touch $@

lock: .venv-audit/ready
	.venv-audit/bin/python tests/lock.py write

audit: .venv-audit/ready
	.venv-audit/bin/python tests/lock.py audit

demo: $(READY)
	$(BIN)/nexus-ds demo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Packages of a few tests beside the project's own: 18 MB, once. Without a network these tests are skipped and say so.
virtualenvs: $(READY)
	-@$(BIN)/python tests/transformers4.py
	-@$(BIN)/python tests/llama_cpp.py

test: lint virtualenvs
	$(PYTEST) -m "not full and not slurm"

test-all: lint virtualenvs
	$(PYTEST) -m "not slurm"

# SLURM's packages are installed on Debian as root; elsewhere the tests are skipped and say why.
test-slurm: $(READY)
	$(BIN)/python tests/slurm/cluster.py install
	$(BIN)/pytest tests/slurm -m "slurm and not full" --timeout 1800 -rs $(ARGS)

# 2.5 GB of packages for vLLM; a quarter of an hour.
test-serving: virtualenvs
	$(BIN)/python tests/vllm_cpu.py
	$(BIN)/pytest tests/serving tests/checkpoint/test_older_stacks.py -m slow --timeout 1800 -rs $(ARGS)

# With SLURM where it can be installed, as test-slurm does; elsewhere its rows say "skipped".
test-faults: $(READY)
	$(BIN)/python tests/slurm/cluster.py install
	$(BIN)/python tests/promises.py run -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/python tests/fuzz.py all 12

# Readers of outside files under inputs guided by coverage; atheris has wheels for Linux alone.
SECONDS ?= 60
fuzz: $(READY)
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet atheris==3.0.0
	PYTHONPATH=. $(BIN)/python tests/guided.py all $(SECONDS)

# As root under Linux with all faults; elsewhere it says which it leaves out.
MINUTES ?= 30
SEED ?= 0
soak: $(READY)
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --seed $(SEED) $(ARGS)

# A quarter of an hour on two cores; ARGS="growth router" for the faults with one of these words.
mutants: $(READY)
	$(BIN)/python tests/mutants.py $(ARGS)

gpu: $(READY)
	$(BIN)/nexus-ds bench gpu $(ARGS)

# For Python 3.12 on x86-64; ARGS=3.11 for another one.
gpu-kit: $(READY)
	bash tests/gpu/kit.sh $(BIN)/python .gpu $(ARGS)

clean:
	rm -rf runs .gpu .pytest_cache .mypy_cache .ruff_cache
