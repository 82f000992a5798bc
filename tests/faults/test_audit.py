"""What Python itself tells of a training, its resumption and the verbs: nothing is unpickled, no
program is started but a few that are named, no connection leaves this machine."""

import ipaddress
import json
import os
import platform
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from branches import NAMES, embed, make_parts, stock
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
    # The address alone: a socket's own text has one, too.
    what = {"socket.connect": 1, "socket.getaddrinfo": 0, "subprocess.Popen": 1}.get(event)
    given = arguments if what is None else arguments[what]
    text = json.dumps([event, given, stack[:40]], default=os.fsdecode) + "\\n"
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
# Programs that libraries start on this machine: from where. DeepSpeed asks which cores are near
# which memory, and builds its Adam for CPUs with torch's help.
DEEPSPEED, BUILD = "/deepspeed/", "/torch/utils/cpp_extension.py"
PROGRAMS = {
    "numactl": (DEEPSPEED,),
    "ninja": (BUILD,),
    "which": (DEEPSPEED, BUILD),
    "compiler": (DEEPSPEED, BUILD),
    # which fonts there are, once for a user
    "fc-list": ("/matplotlib/font_manager.py",),
}
# Targets of an export that no package is needed for that is not always there.
WRITTEN = ("transformers4", "vllm", "sglang", "hub")
SECRET = "canary_of_a_secret"
COMPILERS = {"c++", "g++", *shlex.split(os.environ.get("CXX", ""))[:1]}


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
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)

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
    said = heard()
    assert ["socket.connect", ["127.0.0.1", 9]] in [entry[:2] for entry in said]
    kinds = {entry[0] for entry in said}
    assert kinds >= {"pickle.find_class", "subprocess.Popen", "os.system", "socket.connect"}


def check(entries):
    """Assert that nothing was unpickled, and nobody spoken to but this machine."""
    assert ["here", "", []] in entries, "the watch was not there"
    heard = [entry for entry in entries if entry[0] != "here"]
    wrong = [entry for entry in heard if not harmless(*entry)]
    assert wrong == [], "\n".join(f"{entry[:2]} {entry[2][:6]}" for entry in wrong)


def check_secrets(folder):
    """Assert that no file tells a secret of the environment of those who wrote them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and [path for path in files if SECRET.encode() in path.read_bytes()] == []


def harmless(event, given, stack):
    """Return whether what was heard stays on this machine; `given`: address, host or words."""
    if event == "socket.connect":
        # a path is a socket of this machine
        return isinstance(given, str) or is_here(given[0])
    if event == "socket.getaddrinfo":
        return is_here(given)
    if event != "subprocess.Popen":
        return False
    words = [given] if isinstance(given, str) else given
    name = "compiler" if words[0] in COMPILERS else words[0]
    # By its bare name, or where the bare name is found.
    for known in PROGRAMS:
        name = known if name == shutil.which(known) else name
    return any(part in caller(stack) for part in PROGRAMS.get(name, ()))


def caller(stack):
    """Return the file of the innermost frame that is not of the standard library."""
    return next((file for file in stack if "/site-packages/" in file), "")


def is_here(host):
    """Return whether a host is this machine: a loopback address, its name, or one of its own."""
    # gloo asks for this machine's own name
    if host in (None, "", "localhost", "0.0.0.0", "::", platform.node()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or host in own_addresses()


def own_addresses():
    try:
        return {entry[4][0] for entry in socket.getaddrinfo(platform.node(), None)}
    except OSError:
        return set()


@pytest.mark.parametrize(
    ("event", "given", "stack", "expected"),
    [
        ("socket.connect", ["127.0.0.1", 1], [], True),
        ("socket.connect", ["::ffff:127.0.0.1", 1], [], True),
        ("socket.connect", "/run/x", [], True),
        ("socket.connect", [platform.node(), 1], [], True),
        ("socket.connect", [f"{platform.node()}.example.org", 1], [], False),
        ("socket.connect", ["127.0.0.1.example.org", 1], [], False),
        ("socket.connect", ["8.8.8.8", 1], [], False),
        ("socket.getaddrinfo", "localhost.example.org", [], False),
        ("socket.getaddrinfo", "huggingface.co", [], False),
        ("pickle.find_class", ["os", "system"], [], False),
        ("os.system", ["which"], ["/x/site-packages/deepspeed/a.py"], False),
        ("subprocess.Popen", ["which", "a"], ["/x/site-packages/deepspeed/a.py"], True),
        ("subprocess.Popen", ["which", "a"], ["/x/site-packages/other/a.py"], False),
        ("subprocess.Popen", ["/tmp/which", "a"], ["/x/site-packages/deepspeed/a.py"], False),
        ("subprocess.Popen", ["sh", "-c", "which"], ["/x/site-packages/deepspeed/a.py"], False),
        ("subprocess.Popen", "which a", ["/x/site-packages/deepspeed/a.py"], False),
    ],
)
def test_what_is_let_pass_is_narrow(event, given, stack, expected):
    assert harmless(event, given, stack) == expected


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
    assert list(tmp_path.glob("out-tokens/*.bin"))
    check_secrets(tmp_path)


def test_verbs_that_read_checkpoints_of_others(heard, tmp_path, nexus_dir, dense_dir, text_folder):
    parts = make_parts(tmp_path, dense_dir, text_folder)
    embed(parts / "more.safetensors", ("delta",), text_folder, seed=3)
    made, wider = str(parts / "out"), str(parts / "wider")
    recipe = ["--config", str(parts / "recipe.yaml")]
    experts = [word for name in NAMES for word in ("--expert", f"{name}={parts / name}")]
    old, new = str(parts / "domains.safetensors"), str(parts / "more.safetensors")
    seed, delta = str(parts / "seed"), f"delta={parts / 'alpha'}"
    extend = ["extend", "--checkpoint", made, "--expert", delta, "--domains", new, "--out", wider]
    scores = ["--out", str(parts / "scores")]
    # as another program writes it
    stock(nexus_dir).save_pretrained(parts / "tuned")
    fewer, data = ["--expert", "beta", "--expert", "alpha"], ["--data", str(text_folder)]
    card = ["--domain", "alpha", "--seed-model", seed, "--documents", "4", "--windows", "4"]
    mixed = ["--data", str(text_folder / "alpha" / "train.jsonl"), "--domains", "2"]
    verbs = [
        ["upcycle", "--seed", seed, *experts, "--domains", old, "--out", made, *recipe],
        [*extend, *recipe, "--no-refit"],
        ["verify", wider, "--sources"],
        ["evaluate", "--checkpoint", wider, "--data", str(text_folder), "--windows", "2", *scores],
        ["inspect", str(nexus_dir), str(dense_dir)],
        ["generate", "--checkpoint", str(nexus_dir), "tree leaf", "--tokens", "4"],
        ["embed", *data, "--out", str(tmp_path / "d.safetensors")],
        ["adopt", str(parts / "tuned"), "--from", str(nexus_dir)],
        ["remove", "--checkpoint", str(nexus_dir), *fewer, "--out", str(parts / "fewer")],
        *(
            ["export", "--checkpoint", made, "--for", name, "--out", str(parts / f"for {name}")]
            for name in WRITTEN
        ),
        ["card", str(parts / "alpha"), *data, *card],
        ["discover", *mixed, "--out", str(parts / "found"), "--documents", "4"],
    ]
    finish(start_ranks(["-c", VERBS, json.dumps(verbs)], 1))
    check(heard())
    check_secrets(tmp_path)
