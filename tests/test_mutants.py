"""The faults of `make mutants` still fit the code, and the driver tells a fault that is seen from
one that is not."""

import ast
import subprocess
from pathlib import Path

import mutants
import pytest
from mutant_faults import FAULTS, Fault
from mutants import ROOT, confirmed, judge, main

FOLDERS = {
    "checkpoint",
    "commands",
    "data",
    "evaluation",
    "experiments/benchmarks",
    "experiments/comparison",
    "generation",
    "model",
    "planning",
    "report",
    "runtime",
    "serving",
    "slurm",
    "upcycling",
    "warm_start",
    "",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_one_place_a_program_that_can_be_read_and_tests(fault):
    faulty = fault.faulty(fault.path(ROOT).read_text())
    if fault.file.endswith(".py"):
        ast.parse(faulty)
    else:
        subprocess.run(["bash", "-n"], input=faulty, text=True, check=True)
    files = [ROOT / word.partition("::")[0] for word in fault.tests(ROOT) if ".py" in word]
    assert files and all(file.is_file() for file in files)


def test_faults_lie_in_every_folder_and_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    assert {fault.file.rpartition("/")[0] for fault in FAULTS} == FOLDERS


def test_text_that_is_not_there_exactly_once_is_an_error():
    for old, times in (("nowhere", 0), ("a", 2)):
        with pytest.raises(
            ValueError, match=f"twice: '{old}' stands {times} times in x.py, expected 1"
        ):
            Fault("twice", "x.py", old, "b").faulty("a = a")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one module with one test."""
    for name, text in (
        ("nexus_ds/x.py", "def double(n):\n    return 2 * n  # two\n"),
        (
            "tests/test_x.py",
            "from nexus_ds.x import double\n\n\ndef test_double():\n    assert double(3) == 6\n",
        ),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return tmp_path


SEEN = Fault("seen", "x.py", "2 * n", "3 * n")
UNSEEN = Fault("unseen", "x.py", "# two", "# three")
CASES = {  # faults: exit code, what is said
    (SEEN,): (0, "killed 1 of 1 faults (100%, goal 95%)"),
    (SEEN, UNSEEN): (1, "killed 1 of 2 faults (50%, goal 95%)"),
    (SEEN, Fault("gone", "x.py", "4 * n", "5 * n")): (
        2,
        "UNFIT: gone (x.py): gone: '4 * n' stands 0 times in x.py",
    ),
    (Fault("broken", "x.py", "def", "del"),): (2, "UNFIT: broken (x.py)"),
    (Fault("none", "x.py", "2 * n", "3 * n", "-k nothing"),): (2, "UNFIT: none (x.py)"),
    (Fault("hangs", "x.py", "return", "while True: "),): (1, "TIMEOUT: hangs (x.py)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", CASES, ids=lambda faults: "-".join(fault.name for fault in faults)
)
def test_the_driver_tells_what_the_tests_see(tree, monkeypatch, capsys, faults):
    monkeypatch.setattr(mutants, "FAULTS", faults)
    monkeypatch.setattr(mutants, "SECONDS", 60 if faults[0].name != "hangs" else 8)
    code, said = CASES[faults]
    before = {path: path.read_text() for path in tree.rglob("*.py")}
    assert main([]) == code
    assert said in capsys.readouterr().out
    assert {path: path.read_text() for path in tree.rglob("*.py")} == before


@pytest.mark.slow
def test_a_test_that_fails_anyhow_kills_nothing(tree):
    (tree / "tests" / "test_x.py").write_text("def test_red():\n    assert False\n")
    result = judge(UNSEEN, tree)
    assert (result.outcome, result.detail) == ("killed", "tests/test_x.py::test_red")
    assert confirmed([result], tree)[0].outcome == "UNFIT"
    assert Path(tree / "nexus_ds" / "x.py").read_text().endswith("# two\n")
