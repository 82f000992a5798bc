"""What Python itself tells of a training, its resumption and the verbs: nothing is unpickled, no
program is started, no connection leaves this machine."""

import json
import os
import platform
from pathlib import Path

import pytest
from launch import finish, start_ranks
from test_train import settings

from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.runtime.states import steps_saved

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
TRAIN, Z3 = REPOSITORY / "nexus_ds" / "train.py", REPOSITORY / "ds_configs" / "z3.json"
# Imported by every interpreter that starts with its folder in PYTHONPATH.
HOOK = """
import json, os, sys

WATCHED = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
           "os.system", "os.exec", "os.posix_spawn", "os.fork")
busy = False

def told(event, arguments):
    global busy
    if event not in WATCHED or busy:
        return
    busy = True
    frame, stack = sys._getframe(1), []
    while frame is not None:
        stack.append(frame.f_code.co_filename)
        frame = frame.f_back
    text = json.dumps([event, repr(arguments), stack[:40]]) + "\\n"
    os.write(LOG, text.encode())
    busy = False

LOG = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(LOG, (json.dumps(["here", "", []]) + "\\n").encode())
sys.addaudithook(told)
"""
VERBS = """
import sys
from nexus_ds.__main__ import main
for words in __import__("json").loads(sys.argv[1]):
    print(">", *words, flush=True)
    if main(words):
        sys.exit(f"failed: {words}")
"""
# Programs that libraries start on this machine, with the reason.
PROGRAMS = {
    "numactl": "DeepSpeed asks which cores are near which memory",
    "ninja": "DeepSpeed builds its Adam for CPUs",
    "c++": "the same",
    "which": "the same",
}
LOOPBACK = ("'127.", "'localhost'", "'::1'", "'0.0.0.0'", "'::'", "'::ffff:127.")


@pytest.fixture
def heard(tmp_path, monkeypatch):
    """Have processes that are started from now on watched; return a function that tells what was
    heard, and forgets it."""
    folder, log = tmp_path / "hook", tmp_path / "audit.jsonl"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    paths = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("AUDIT_LOG", str(log))

    def tell():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return lines

    return tell


def test_the_watch_hears(heard, tmp_path):
    """What follows would be worth nothing if it did not."""
    script = tmp_path / "script.py"
    lines = ["import collections, os, pickle, socket, subprocess"]
    lines += ["pickle.loads(pickle.dumps(collections.OrderedDict()))"]
    lines += ["subprocess.run(['true'])", "os.system('true')", "socket.gethostbyname('127.0.0.1')"]
    lines += ["socket.socket().connect_ex(('127.0.0.1', 9))"]
    script.write_text("\n".join(lines))
    finish(start_ranks([script], 1))
    kinds = {entry[0] for entry in heard()}
    assert kinds >= {"pickle.find_class", "subprocess.Popen", "os.system", "socket.connect"}


def check(entries):
    """Assert that nothing was unpickled, and nobody spoken to but this machine."""
    assert ["here", "", []] in entries, "the watch was not there"
    heard = [entry for entry in entries if entry[0] != "here"]
    wrong = [entry for entry in heard if not harmless(*entry)]
    assert wrong == [], "\n".join(f"{entry[:2]} {entry[2][:6]}" for entry in wrong)


def harmless(event, arguments, stack):
    if event in ("socket.connect", "socket.getaddrinfo"):
        # a path is a socket of this machine; gloo asks for this machine's own name
        return any(place in arguments for place in (*LOOPBACK, platform.node(), "('/"))
    started = arguments.split("'")[1].rpartition("/")[2] if "'" in arguments else ""
    return event == "subprocess.Popen" and started in PROGRAMS and "site-packages" in "".join(stack)


def test_a_training_that_dies_and_goes_on(heard, tmp_path, nexus_dir, text_folder, monkeypatch):
    """It reads text, a checkpoint and a state, sends tokens to experts, and writes all of it."""
    out = tmp_path / "out"
    words = [TRAIN, "--deepspeed", Z3, "--config", "demo", "stage=moe"]
    words += settings(nexus_dir, text_folder, out, "parallel.expert=2", "training.save_every=2")
    words += ["training.steps=4", "training.eval_windows=2"]
    monkeypatch.setenv("NEXUS_FAULT", "kill:rank0:after_latest:2")
    for rank in start_ranks(words, 2):
        rank.communicate(timeout=240)
    monkeypatch.delenv("NEXUS_FAULT")
    assert steps_saved(tmp_path / "out.training" / "states") == [2]
    check(heard())
    assert "step 2" in finish(start_ranks(words, 2))
    check(heard())
    assert is_nexus(out)


def test_verbs_that_read_checkpoints_of_others(heard, tmp_path, nexus_dir, dense_dir, text_folder):
    verbs = [
        ["inspect", str(nexus_dir), str(dense_dir)],
        ["generate", "--checkpoint", str(nexus_dir), "tree leaf", "--tokens", "4"],
        ["embed", "--data", str(text_folder), "--out", str(tmp_path / "d.safetensors")],
    ]
    finish(start_ranks(["-c", VERBS, json.dumps(verbs)], 1))
    check(heard())
