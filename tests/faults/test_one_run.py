"""One training that meets what a user, a disk and a colleague do to it, start after start.

Real ranks; each test is a start of the same run, in this order, since a start takes so long. That
weights stay those of an undisturbed run is what test_soak.py holds.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launch import clean_environment
from soak import LOST, Network, Run, SoakError, disk, tiny

from nexus_ds.runtime.states import damage

pytestmark = [pytest.mark.slow, pytest.mark.full]
WAIT = 300.0  # seconds for what takes a few on a quiet machine
CANARY = "hf_canary_of_a_secret"
LOADER = Path(__file__).parents[1] / "loader_worker.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory, text_folder):
    return shutil.copytree(text_folder, tmp_path_factory.mktemp("copy") / "text")


@pytest.fixture(scope="module")
def run(tmp_path_factory, nexus_dir, text):
    folder = tmp_path_factory.mktemp("run")
    (folder / "logs").mkdir()
    # Saving at each step, so that most signals come during a save.
    changed = ("training.steps=100000", "training.save_every=1", f"data.cache={folder}/tokens")
    found = Run([*tiny(nexus_dir, text), *changed], folder / "out", folder / "logs", Network())
    yield found
    found.kill()


def trained(run, steps=3):
    """Start, and wait until `steps` more steps are done."""
    before = len(run.steps())
    run.start()
    assert run.wait(WAIT, lambda: len(run.steps()) >= before + steps), run.said()


@pytest.fixture(autouse=True)
def nothing_of_the_test_before(request):
    """A test that failed leaves its ranks at work."""
    yield
    if "run" in request.fixturenames:
        request.getfixturevalue("run").kill()


def meeting_port(process):
    """Return the port at which the ranks of a process's run meet."""
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next(int(line[12:]) for line in variables if line.startswith("MASTER_PORT="))


def listening(process):
    """Return the addresses and ports at which a process listens, those on loopback left out."""
    own = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        # files are opened and closed meanwhile
        with suppress(FileNotFoundError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            own |= {found[1]} if found else set()
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]
    ]
    open_to = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in own]
    return [int(port, 16) for address, port in open_to if not address.endswith("0100007F")]


def held_in_a_save(run):
    """Stop all ranks while they save a state; return its step."""
    making = lambda: [path.name for path in run.states.glob("partial_*")]  # noqa: E731
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        assert run.wait(WAIT, making), run.said()
        for rank in run.ranks:
            rank.send_signal(signal.SIGSTOP)
        for rank in run.ranks:
            until_stopped(rank.pid)
        # Once nothing moves, for a save takes milliseconds; its files are there, its name is not.
        if found := making():
            return int(found[0].split("_")[1])
        for rank in run.ranks:
            rank.send_signal(signal.SIGCONT)
    raise AssertionError(f"no save was met within {WAIT} s")


def until_stopped(process):
    """Wait until a process that was sent SIGSTOP stands still."""
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def test_signals_in_a_heap_make_one_save_and_secrets_and_files_stay_closed(run, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = os.umask(0o027)
    try:
        trained(run)
        # A second run of the same output, while this one is at work.
        second = subprocess.run(
            [sys.executable, str(LOADER), "-1", *run.words, f"output={run.out}"],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
    finally:
        os.umask(before)
    assert second.returncode == 1
    holder = rf"process {run.ranks[0].pid} on \S+ since [-\d]+ [:\d]+ in SLURM job 4711"
    assert re.search(rf"out\.training is being written by {holder}; wait for it", second.stderr)
    assert "Traceback" not in second.stderr
    # torch's rendezvous listens on all addresses, nothing else on more than the one of the job.
    ports = [listening(rank.pid) for rank in run.ranks]
    assert ports == [[meeting_port(run.ranks[0].pid)], []]
    saving = held_in_a_save(run)
    for number in [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP] * 6:
        for rank in run.alive():
            rank.send_signal(number)
        # the first ones meet the save, the others what follows
        if number == signal.SIGHUP:
            for rank in run.alive():
                rank.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    assert run.ended(WAIT) == [75, 75], run.said()
    assert run.said().count("stopped by signal") == 1
    assert "Traceback" not in run.said()
    assert not list(run.states.glob("partial*"))
    last = run.steps()[-1][0]
    # The save that was met came to its end; the step that was due is the last.
    assert last == saving + 1 and f"step_{saving}" in [path.name for path in run.saved()]
    assert run.saved()[-1].name == f"step_{last}" and not damage(run.saved()[-1], 0, 1)
    files = [path for path in run.work.rglob("*") if path.is_file()]
    assert files and all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in files)
    told = [path for path in [*files, *run.logs.iterdir()] if CANARY.encode() in path.read_bytes()]
    assert told == []


def test_a_state_that_is_damaged_is_saved_again_under_its_name(run):
    newest, older = run.saved()[-1], run.saved()[-2]
    step = int(newest.name[5:])
    victim = newest / "rank_00001.safetensors"
    os.truncate(victim, victim.stat().st_size // 2)
    run.start()
    assert run.wait(WAIT, lambda: int(run.saved()[-1].name[5:]) > step), run.said()
    said = run.said()
    assert f"{newest} is damaged (rank_00001.safetensors: found" in said
    assert f"using step {older.name[5:]}" in said
    assert not newest.exists() or damage(newest, 0, 1) == ""
    run.ranks[1].kill()
    codes = run.ended(WAIT)
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert re.search(r"rank 1 (was lost: its process is gone|is silent)", run.said())
    assert re.search(LOST, run.said())


def test_an_error_while_a_batch_is_read_stands_before_what_the_others_say(run, monkeypatch):
    step = run.steps()[-1][0] + 4
    monkeypatch.setattr("soak.TRAIN", LOADER)
    before, run.words = run.words, [str(step), *run.words]
    run.start()
    codes = run.ended(WAIT)
    run.words = before
    assert codes[1] == 1 and codes[0] not in (0, None), run.said()
    own = (run.logs / f"out-{run.starts:03}-1.log").read_text()
    first = own.index("the text of rank 1 can't be read")
    assert own.count("Traceback") == 1 and "gloo" not in own[:first]
    other = (run.logs / f"out-{run.starts:03}-0.log").read_text()
    assert "rank 1 ended with an error" in other and "Traceback" not in other


def test_another_text_is_refused_by_its_name(run, text):
    path = text / "beta" / "train.jsonl"
    content = path.read_text()
    path.write_text(content + json.dumps({"text": "one more"}) + "\n")
    run.start()
    assert run.ended(WAIT) == [1, 1], run.said()
    path.write_text(content)
    refused = (
        "belongs to another configuration (not what it was: the text of beta); restore these "
        "settings, or give another output"
    )
    assert refused in run.said() and "Traceback" not in run.said()


def test_a_folder_that_is_removed_ends_the_run_with_a_line(run):
    trained(run)
    shutil.move(run.work, f"{run.work}-away")
    codes = run.ended(WAIT)
    assert 0 not in codes and None not in codes
    assert re.search(r"train.py: .*No such file or directory.*out\.training", run.said())
    shutil.rmtree(run.work, ignore_errors=True)
    shutil.move(f"{run.work}-away", run.work)


def test_it_goes_on_after_all_that(run):
    last = int(run.saved()[-1].name[5:])
    trained(run)
    assert f", resumed after step {last}" in run.said()
    run.ranks[0].send_signal(signal.SIGTERM)
    assert run.ended(WAIT) == [75, 75]


def test_a_run_whose_states_are_gone_says_that_it_starts_over(run):
    shutil.rmtree(run.states)
    last = max(step for step, _ in run.steps())
    trained(run)
    assert (
        f"metrics.jsonl tells of training up to step {last}, but {run.states} holds" in run.said()
    )
    assert ", resumed" not in run.said()


def test_a_disk_that_can_not_be_written_is_told_before_anything_is_read(
    tmp_path, nexus_dir, text_folder
):
    with disk(tmp_path / "disk") as allowed:
        if not allowed:
            pytest.skip("only root may mount a read-only disk")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        run = Run(tiny(nexus_dir, text_folder), tmp_path / "disk" / "out", tmp_path, Network())
        run.start()
        assert run.ended(WAIT) == [1, 1], run.said()
    message = (
        r"train.py: \[Errno 30\] .*out can't be made; .* or mount its disk for writing: '.*/disk'"
    )
    assert re.search(message, run.said())
    assert "Traceback" not in run.said() and "tokenise" not in run.said()


def test_a_rank_that_never_ends_is_seen(tmp_path):
    run = Run([], tmp_path / "out", tmp_path, Network())
    run.ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])] * 2
    run.starts = 1
    for rank in range(2):
        (tmp_path / f"out-001-{rank}.log").write_text("at work")
    with pytest.raises(SoakError, match="a rank was still there after 0s:\nat work"):
        run.ended(0.1)
