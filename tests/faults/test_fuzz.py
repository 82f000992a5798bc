"""A few seconds of tests/fuzz.py, the same inputs at every run; what it found before is held by the
test of each reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).parents[1] / "fuzz.py"


def run(*words):
    paths = [str(FUZZ.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, FUZZ, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_no_reader_meets_a_file_that_it_does_not_answer_for():
    code, out, errors = run("all", "--examples", 25)
    assert code == 0, out + errors
    lines = [line for line in out.splitlines() if " inputs in " in line]
    assert len(lines) == FUZZ.read_text().count("\n@target\n")
    assert all(line.endswith("s, 0 findings") for line in lines), out


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("raise KeyError(1)", "KeyError-fuzz-read"),
        ("raise NexusError('something')", "unnamed-NexusError-fuzz-read"),
        ("bytearray(2 << 30)", "MemoryError-fuzz-read"),
        ("while True: pass", "TooSlow-fuzz-_too_slow"),
    ],
)
def test_a_reader_that_does_not_is_found(tmp_path, fault, found):
    """A traceback, an error without a name, memory and time."""
    script = tmp_path / "broken.py"
    script.write_text(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FUZZ.parent)!r})
import fuzz
from nexus_ds.errors import NexusError
fuzz.OUT, fuzz.SECONDS_EACH = Path("found"), 0.3

def broken(box):
    (box / "a.json").write_text('{{"a": 1}}')
    def read():
        if b'"a": 1}}' not in (box / "a.json").read_bytes():
            {fault}
    read.__code__ = read.__code__.replace(co_filename=fuzz.__file__)
    return fuzz.Target({{"a.json": fuzz.json_text({{"a": 1}})}}, [read], box)

fuzz.TARGETS["broken"] = broken
sys.exit(not fuzz.fuzz("broken", 0.0, 30, 0))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert found in done.stdout
    [kept] = [path for path in (tmp_path / "found/broken").iterdir() if path.suffix == ".json"]
    assert kept.name == f"{found}--a.json"
