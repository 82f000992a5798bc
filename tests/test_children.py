"""What was started ends with who started it: real processes, killed as nobody can prepare for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nexus_ds.children import tied

STARTER = """
import subprocess, sys, time
from nexus_ds.children import tied
child = subprocess.Popen(tied([sys.executable, "-c", sys.argv[1]]), stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
CHILD = """
import signal, sys, time
def end(number, frame):
    open({told!r}, "w").write(str(number))
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("at work", flush=True)
time.sleep(60)
"""


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(process, seconds=30):
    deadline = time.monotonic() + seconds
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(process)


def test_a_killed_process_takes_its_children_along_and_lets_them_clear_up(tmp_path):
    told = tmp_path / "told"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, CHILD.format(told=str(told))],
        stdout=subprocess.PIPE,
        text=True,
    )
    child, said = starter.stdout.readline().split(maxsplit=1)
    assert said == "at work\n" and alive(int(child))
    starter.kill()
    starter.communicate()
    assert gone(int(child))
    assert told.read_text() == str(int(signal.SIGTERM))


def test_a_child_of_a_process_that_is_dead_already_does_not_begin(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    words = tied([sys.executable, "-c", f"open({str(tmp_path / 'begun')!r}, 'w')"])
    words[4] = str(dead.pid)
    assert subprocess.run(words).returncode == -signal.SIGTERM
    assert not (tmp_path / "begun").exists()


def test_the_command_is_what_it_would_be_otherwise():
    code = "import os, sys; print(sys.argv[1:], os.environ['WORD']); sys.exit(7)"
    words = tied([sys.executable, "-c", code, "a b", "-S"])
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"WORD": "x"})
    assert (done.returncode, done.stdout) == (7, "['a b', '-S'] x\n")


RANK = """
import signal, sys, time
from nexus_ds import children
children.LOOK_SECONDS = 0.05
signal.signal(signal.SIGTERM, lambda *_: sys.exit(open({told!r}, "w").write("15")))
children.tie_to_parent()
children.tie_to_runner()
print("at work", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
said = rank.stdout.readline().decode().strip()
print(rank.pid, said, flush=True)
time.sleep(60)
"""
RUNNER = """
import os, subprocess, sys, time
launcher = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(launcher.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name, ends", [("deepspeed", True), ("a shell", False)])
def test_a_rank_ends_with_the_runner_of_its_launcher_and_with_no_other_grandparent(
    tmp_path, name, ends
):
    told, script = tmp_path / "told", tmp_path / name
    script.write_text(RUNNER)
    runner = subprocess.Popen(
        [sys.executable, script, LAUNCHER, RANK.format(told=str(told))],
        stdout=subprocess.PIPE,
        text=True,
    )
    launcher = int(runner.stdout.readline())
    rank, said = runner.stdout.readline().split(maxsplit=1)
    try:
        assert said == "at work\n"
        runner.kill()
        runner.wait()
        assert gone(int(rank), 30 if ends else 1) == ends
        assert alive(launcher) and told.exists() == ends
    finally:
        for process in (launcher, int(rank)):
            if alive(process):
                os.kill(process, signal.SIGKILL)
        runner.communicate()


@pytest.mark.slow
def test_a_killed_demo_leaves_nothing_running(tmp_path):
    """Its stages, and the workers of theirs, end too."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "nexus_ds", "demo", "--out", str(out)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    demo = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **quiet)

    def mine():
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != demo.pid:
                try:
                    words = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(out).encode() in words and alive(int(folder.name)):
                    found.append(int(folder.name))
        return found

    deadline = time.monotonic() + 120
    while not mine() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = mine()
    assert children
    demo.kill()
    demo.communicate()
    # one that was started after the look, too
    assert all(gone(child) for child in {*children, *mine()})
    assert mine() == []
