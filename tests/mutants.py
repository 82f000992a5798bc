"""Faults put into the code on purpose: each has to make a test fail (make mutants).

python tests/mutants.py [WORD ...]      all of `mutant_faults`, or those whose name or file contains
one of the words

Two copies of the tree, in a temporary folder, get one fault after the other; the tests that judge
it run there, slow ones only where the fault says so. A test that fails without any fault proves
nothing: those that killed are run once more at the end on the clean tree. Exit code: 1 below GOAL,
2 for a fault that can't be judged (its text is not there exactly once, its tests are not there or
can't be collected, or what killed it fails on the clean tree too).
Not covered: faults in several places, faults that only a GPU or a SLURM cluster shows.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from mutant_faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
GOAL = 0.95
WORKERS = 2
SECONDS = 420  # of one fault's tests; whoever hangs is no kill
FAST, SLOW = "not full and not slurm and not gpu and not slow", "not full and not slurm and not gpu"


class Result(NamedTuple):
    fault: Fault
    outcome: str
    """killed | SURVIVED | TIMEOUT | UNFIT."""
    detail: str
    seconds: float


def copy_tree(out: Path) -> Path:
    """Copy what git knows or would add, and a link to the virtual environment that the SLURM
    templates look for."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, out / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    link = out / ".venv"
    if (ROOT / ".venv").exists() and not link.is_symlink():
        link.symlink_to((ROOT / ".venv").resolve())
    return out


def run_tests(
    tree: Path, arguments: list[str], slow: bool, seconds: float
) -> tuple[int | None, list[str], str]:
    """Run pytest in a tree; return its exit code (None: too slow), the tests that failed, and the
    end of its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    more = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    cache, words = tree / ".failures", [] if "-m" in arguments else ["-m", SLOW if slow else FAST]
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *words, *arguments]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=kept | more,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks too
        process.communicate()
        return None, [], f"not done after {seconds:.0f} s"
    failed = cache / "v" / "cache" / "lastfailed"
    found = list(json.loads(failed.read_text())) if failed.is_file() else []
    return process.returncode, found, output[-2000:]


def judge(fault: Fault, tree: Path) -> Result:
    """Put one fault into a tree, run its tests, and take it out again."""
    started, path = time.monotonic(), fault.path(tree)
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(fault.faulty(text), encoding="utf-8")
        arguments = fault.tests(tree)
        if not any(word.partition("::")[0].endswith(".py") for word in arguments):
            raise ValueError(f"{fault.name}: no test judges {fault.file}")
        code, failed, output = run_tests(
            tree, ["-x", *arguments], "slow" in fault.judges.split(), SECONDS
        )
    except ValueError as error:
        return Result(fault, "UNFIT", str(error), 0.0)
    finally:
        path.write_text(text, encoding="utf-8")
    outcome = {0: "SURVIVED", 1: "killed", None: "TIMEOUT"}.get(code, "UNFIT")
    killer = failed[-1] if failed else " ".join(output.split())[-300:]
    detail = killer if outcome in ("killed", "UNFIT") else " ".join(arguments)
    return Result(fault, outcome, detail, time.monotonic() - started)


def run_all(faults: list[Fault], folder: Path) -> list[Result]:
    """Judge all faults, as many at once as there are WORKERS."""
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(min(WORKERS, len(faults))):
        trees.put(copy_tree(folder / f"tree{number}"))

    def one(fault: Fault) -> Result:
        tree = trees.get()
        try:
            result = judge(fault, tree)
        finally:
            trees.put(tree)
        print(
            f"{result.outcome:8} {fault.file:28} {fault.name:50} {result.seconds:4.0f} s  "
            f"{result.detail}",
            flush=True,
        )
        return result

    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(one, faults))
    return confirmed(results, trees.get())


def confirmed(results: list[Result], tree: Path) -> list[Result]:
    """Return the results, a kill by a test that fails without any fault as UNFIT."""
    killers = sorted({result.detail for result in results if result.outcome == "killed"})
    code, failed, output = run_tests(tree, killers, True, 4 * SECONDS) if killers else (0, [], "")
    if code in (0, 1):
        bad = set(failed)
    else:
        print(
            f"the tests that killed can't be run on the clean tree (exit {code}): {output}",
            flush=True,
        )
        bad = set(killers)
    return [
        result._replace(outcome="UNFIT", detail=f"{result.detail} fails without the fault")
        if result.detail in bad
        else result
        for result in results
    ]


def main(words: list[str]) -> int:
    """Run, print, and return the exit code."""
    faults = [
        f for f in FAULTS if not words or any(word in f.name or word in f.file for word in words)
    ]
    if not faults:
        print(f"no fault has one of the words {', '.join(words)} in its name or file")
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = run_all(faults, Path(folder))
    counts = Counter(result.outcome for result in results)
    rate = counts["killed"] / len(results)
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nkilled {counts['killed']} of {len(results)} faults ({rate:.0%}, goal {GOAL:.0%}) in "
        f"{minutes:.0f} min"
    )
    for result in results:
        if result.outcome != "killed":
            print(f"{result.outcome}: {result.fault.name} ({result.fault.file}): {result.detail}")
    return 2 if counts["UNFIT"] else int(rate < GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
