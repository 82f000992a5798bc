"""The command line itself: what every verb waits for before it does anything."""

import subprocess
import sys

import pytest

LIGHT = """
import sys
from nexus_ds.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:  # --help
    code = ended.code
heavy = {"torch", "transformers", "deepspeed", "numpy", "matplotlib"} & sys.modules.keys()
assert code == 0 and not heavy, (code, heavy)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--help"],  # declares the verb's own options, and one line of every other verb
        ["plan", "--help"],
        # what SLURM's templates ask, several times a job
        ["stage", "--show=output", "moe", "pipeline.run=RUN"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_no_tensor_waits_for_no_torch(words, tmp_path):
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
