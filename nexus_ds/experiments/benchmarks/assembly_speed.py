"""What putting models together costs, against reading all of them once and writing the result once.

A seed and its branches of a Llama's shapes, or of a Qwen3's, whose mixture is written in another
form, are made up and stored in shards. Programs then take
turns, each in a process of its own that starts anew: `floor` reads every input in blocks, writes as
many bytes as the mixture has and flushes them to the disk, as the verb does; `upcycle` is the verb
with all that it checks and hashes, without a warm start; its bytecode is there, as an installed
package's is. A ratio is of two runs of one round, each
begun with nothing left to flush; in a cold round the inputs were dropped from the page cache first.
Where mergekit is installed it takes its turn with the same models: the seed is its shared expert
and gives all that is not an FFN, nothing is averaged, checked or flushed.
Peak memory is that of the process alone (VmHWM: `ru_maxrss` has its parent's too).
Not covered: disks that are not this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense import MODEL_DTYPES
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import dense_weights
from nexus_ds.checkpoint.file_layout import in_files
from nexus_ds.checkpoint.headers import (
    ITEM_BYTES,
    Headers,
    tensor_bytes,
)
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.qwen2_moe import moe_config, planned
from nexus_ds.checkpoint.values import encoded
from nexus_ds.children import tie_to_parent
from nexus_ds.console import print_text
from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import write_json

HELP = "upcycling's one pass against reading and writing alone: time, CPU, memory, warm and cold"
KINDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
SIZES = {"tiny": (64, 2), "250m": (1024, 16), "1b": (2048, 18)}
"""Hidden size and layers; a vocabulary of 32,768 (tiny: 320)."""
FAMILIES = ("llama", "qwen3")
NAMES = ("alpha", "beta", "gamma")
BLOCK = 1 << 20
MERGEKIT = "mergekit-moe"
NOISE = 0.3
"""Of a branch's weights beside its seed's."""


class Cost(NamedTuple):
    """What one process took."""

    wall: float
    """Seconds, start of the interpreter included."""
    cpu: float
    """Seconds, user and system."""
    peak: float
    """MiB."""


@dataclass(frozen=True)
class Row:
    """One program's costs over those of the floor in the same round: median, least and most."""

    program: str
    cold: bool
    seconds: float
    wall: tuple[float, float, float]
    cpu: tuple[float, float, float]
    peak: float
    """MiB, the most of all rounds."""


# Models -------------------------------------------------------------------------------------------


def _config(size: str, dtype: str, family: str) -> ConfigJson:
    """Return config.json of a dense model with tied embeddings; `dtype` is a key of KINDS."""
    hidden, layers = SIZES[size]
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": MODEL_DTYPES[KINDS[dtype]],
        "vocab_size": 320 if size == "tiny" else 32_768,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    heads = max(4, hidden // 128)
    qwen3 = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": hidden // heads,
    }
    return llama | qwen3 if family == "qwen3" else llama


def _noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(2 * BLOCK, np.float32)


def _values(number: int, kind: str) -> np.ndarray:
    """Return stored values that any model's tensors are ranges of."""
    values = _noise(0)
    if number:
        values += np.float32(NOISE) * _noise(number)
    return encoded(np.float32(0.02) * values, kind)


def make_model(
    folder: Path,
    size: str,
    dtype: str,
    number: int,
    shard: int,
    family: str = "llama",
) -> None:
    """Store a model; `number` 0 is the seed, others are its branches.

    Args:
        folder: without weights.
        size: of SIZES.
        dtype: a key of KINDS.
        number: what its noise is drawn by.
        shard: bytes of a file at most.
        family: of FAMILIES.
    """
    config = _config(size, dtype, family)
    kind = KINDS[dtype]
    data = _values(number, kind)
    weights = dense_weights(settings(config))
    plan = {name: (kind, weight.shape) for name, weight in weights.items()}
    starts = np.random.default_rng(1)
    step = BLOCK * ITEM_BYTES[kind]
    with NewFiles(folder, plan, shard) as files:
        for name in plan:
            place = files.place(name)
            # each tensor from another value on, alike in all models
            first = int(starts.integers(BLOCK)) * ITEM_BYTES[kind]
            for start in range(place.start, place.end, step):
                block = data[first : first + min(step, place.end - start)]
                os.pwrite(place.descriptor, block.data, start)
            os.fsync(place.descriptor)
            files.wrote(name)
    write_json(folder / "config.json", config)


def make_inputs(
    root: Path,
    size: str,
    dtype: str,
    shard: int,
    family: str = "llama",
) -> None:
    """Store a seed, its branches, their tokenizer and domain embeddings."""
    for number, name in enumerate(("seed", *NAMES)):
        text = iter(["the cat sat on the mat"] * 8)
        train_tokenizer(text, 300, root / name)
        make_model(
            root / name,
            size,
            dtype,
            number,
            shard,
            family,
        )
    vectors = np.random.default_rng(0).standard_normal((len(NAMES), 384), np.float32)
    domains = DomainEmbeddings(
        list(NAMES),
        vectors,
        encoder="made up",
        revision="1" * 64,
        max_tokens=16,
        windows=4,
        documents=dict.fromkeys(NAMES, 5),
        seed=0,
        data="nowhere",
    )
    write_domain_embeddings(root / "domains.safetensors", domains)


# Programs -----------------------------------------------------------------------------------------


def mixture_bytes(root: Path) -> int:
    """Return the bytes of the mixture's weights, its routers' among them."""
    seed = Headers(root / "seed")
    config = json.loads((root / "seed" / "config.json").read_text())
    dtype = seed.info(seed.names()[0]).dtype
    target = moe_config(config, len(NAMES), 1, "token")
    sizes = [tensor_bytes(*entry) for entry in in_files(planned(target, dtype), target).values()]
    return sum(sizes)


def floor(root: Path, out: Path) -> None:
    """Read all inputs once and write as much as the mixture has."""
    block = bytearray(BLOCK)
    for name in ("seed", *NAMES):
        for file in Headers(root / name).files():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass
    left = mixture_bytes(root)
    with (out / "model.safetensors").open("wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(memoryview(block)[: min(left, BLOCK)])
        os.fsync(stream.fileno())


def upcycle(root: Path, out: Path) -> None:
    """Upcycle by the verb."""
    words = ["upcycle", f"--seed={root / 'seed'}", f"--domains={root / 'domains.safetensors'}"]
    words += [f"--expert={name}={root / name}" for name in NAMES]
    words += [f"--out={out / 'mixture'}", "--no-warm-start", "--json"]
    sys.argv[1:] = words
    try:
        # as `python -m` does: a benchmark stands below the command line
        runpy.run_module("nexus_ds", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


PROGRAMS: dict[str, Callable[[Path, Path], None]] = {"floor": floor, "upcycle": upcycle}


def mergekit(root: Path, out: Path) -> Cost:
    """Let mergekit put the same models together.

    Raises:
        ConfigError: it can't, with its own last word.
    """
    experts = [{"source_model": str(root / name), "positive_prompts": [name]} for name in NAMES]
    shared = {"source_model": str(root / "seed"), "positive_prompts": ["x"], "residual_scale": 1.0}
    config = {
        "base_model": str(root / "seed"),
        "architecture": "qwen",
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": experts,
        "shared_experts": [shared],
    }
    write_json(out / "config.yml", config)
    command = shutil.which(MERGEKIT)
    assert command is not None
    log = out / "log.txt"
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [command, str(out / "config.yml"), str(out / "mixture")], stdout=stream, stderr=stream
        )
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(
            f"{command} ended with {process.returncode}: {' '.join(last)}; mend its installation, "
            "or take it off PATH"
        )
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def child(
    program: str,
    root: str,
    out: str,
) -> None:
    """Run one program, then print what this process took, as JSON."""
    tie_to_parent()
    PROGRAMS[program](Path(root), Path(out))
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [kib] = re.findall(r"VmHWM:\s+(\d+)", status)
    cpu = used.ru_utime + used.ru_stime
    print_text(json.dumps({"cpu": cpu, "peak": int(kib) / 1024}))


# Measuring ----------------------------------------------------------------------------------------


def _forget(root: Path) -> None:
    """Drop the inputs from the page cache; they were flushed when they were made."""
    for path in root.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(program: str, root: Path) -> Cost:
    """Run a program in a process of its own; CheckpointError is its own matter."""
    with tempfile.TemporaryDirectory(dir=root) as out:
        if program == MERGEKIT:
            return mergekit(root, Path(out))
        code = f"from {__name__} import child; import sys; child(*sys.argv[1:])"
        started = time.perf_counter()
        words = [sys.executable, "-c", code, program, str(root), out]
        # an installed package has its bytecode; a checkout has it after the first start
        environment = os.environ | {"PYTHONPYCACHEPREFIX": str(root / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        found = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        wall = time.perf_counter() - started
    told = json.loads(found.stdout.splitlines()[-1])
    return Cost(wall, told["cpu"], told["peak"])


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def measure(
    root: Path,
    programs: list[str],
    rounds: int,
    cold: bool,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """Yield a row for the floor and each program, of rounds in which all take turns.

    Args:
        root: with inputs, see `make_inputs`.
        programs: of PROGRAMS, beside the floor.
        rounds: how often each is run.
        cold: whether inputs are dropped from the page cache before each run.
        say: gets a line of progress now and then.
    """
    order = ["floor", *programs]
    costs: dict[str, list[Cost]] = {program: [] for program in order}
    for turn in range(rounds):
        say(f"{'cold' if cold else 'warm'} round {turn + 1} of {rounds}")
        for program in order if turn % 2 == 0 else reversed(order):
            # what was written before is nobody's cost here
            os.sync()
            if cold:
                _forget(root)
            costs[program].append(cost(program, root))
    for program, found in costs.items():
        pairs = list(zip(found, costs["floor"], strict=True))
        yield Row(
            program=program,
            cold=cold,
            seconds=statistics.median([own.wall for own in found]),
            wall=_spread([own.wall / least.wall for own, least in pairs]),
            cpu=_spread([own.cpu / least.cpu for own, least in pairs]),
            peak=max(own.peak for own in found),
        )


def describe(rows: list[Row]) -> str:
    """Return rows as a table."""
    lines = [f"{'':20}{'seconds':>9}{'wall / floor':>20}{'CPU / floor':>20}{'peak MiB':>10}"]
    for row in rows:
        cells = []
        for middle, low, high in (row.wall, row.cpu):
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})".rjust(20))
        name = f"{row.program}, {'cold' if row.cold else 'warm'}"
        lines.append(f"{name:20}{row.seconds:>9.2f}{cells[0]}{cells[1]}{row.peak:>10.0f}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench assemble`."""
    parser.add_argument("--size", choices=tuple(SIZES), default="250m", help="of a model (250m)")
    parser.add_argument(
        "--dtype", choices=tuple(KINDS), default="bf16", help="of its weights (bf16)"
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of a model (llama)")
    parser.add_argument(
        "--shard", type=int, default=150, metavar="MB", help="a file of a model at most (150)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="repetitions (5)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where inputs and outputs lie meanwhile (here)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Measure and print."""
    if args.rounds < 1 or args.shard < 1:
        raise ConfigError(f"--rounds {args.rounds}, --shard {args.shard}: expected numbers above 0")
    if args.family == "qwen3" and args.dtype == "fp16":
        raise ConfigError(
            "--family qwen3 --dtype fp16: found a mixture whose form fp16 can't hold; use bf16 or "
            "fp32"
        )
    programs = ["upcycle"]
    if args.family == "llama" and args.dtype == "bf16" and shutil.which(MERGEKIT):
        programs.append(MERGEKIT)
    with tempfile.TemporaryDirectory(dir=args.work or Path.cwd()) as folder:
        root = Path(folder)
        say("making a seed and three branches")
        make_inputs(root, args.size, args.dtype, args.shard * 1_000_000, args.family)
        rows: list[Row] = []
        # not counted: it leaves the bytecode that later starts read
        cost("upcycle", root)
        for cold in (False, True):
            rows += measure(root, programs, args.rounds, cold, say)
    if args.json:
        print_text(json.dumps([vars(row) for row in rows]))
        return 0
    cores = len(os.sched_getaffinity(0))
    print_text(f"{args.family}, {args.size}, {args.dtype}, {args.rounds} rounds, {cores} cores")
    print_text(describe(rows))
    print_text("next: the same with --family, --size, --dtype or --shard for models like yours")
    return 0
