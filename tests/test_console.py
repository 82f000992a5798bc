"""Ctrl-C, closed pipes, narrow encodings and foreign control characters, on real processes."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import MODULES

from nexus_ds.console import CONTROL, print_text, tell, visible
from nexus_ds.progress import say

TRAIN = Path(__file__).parents[1] / "nexus_ds" / "train.py"
# Stand for modules whose import takes long; the second swallows what an import may swallow.
SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
GREEDY = "try:\n    from slow import *\nexcept BaseException:\n    pass\n"


def start(words, folder, **more):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def interrupted(process):
    """Interrupt a process once it has said a line; return its code and what it says on stderr."""
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(60), said


@pytest.mark.parametrize(
    ("words", "module", "text", "line"),
    [
        (["-m", "nexus_ds", "train", "--help"], "yaml", GREEDY, "nexus-ds train"),
        (
            ["-m", "nexus_ds", "generate", "--checkpoint", ".", "x"],
            "torch",
            SLOW,
            "nexus-ds generate",
        ),
        ([TRAIN, "--help"], "yaml", GREEDY, "train.py"),
    ],
    ids=["parsing", "working", "train"],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, words, module, text, line):
    (tmp_path / f"{module}.py").write_text(text)
    (tmp_path / "slow.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), str(TRAIN.parents[1])])
    process = start(words, tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert interrupted(process) == (130, f"{line}: interrupted\n")


def test_ctrl_c_while_the_interpreter_is_torn_down_is_one_line_too(tmp_path):
    program = tmp_path / "nexus-ds"
    program.write_text(
        "import atexit, sys, time\n"
        "from nexus_ds.__main__ import main\n"
        "atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))\n"
        "sys.exit(main(['status', '.']))\n"
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "recipe.yaml").write_text("base: demo\n")
    process = start([program], tmp_path)
    for line in process.stdout:
        if line == "ending\n":
            break
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "nexus-ds status: interrupted\n"
    assert process.returncode == 130


def test_what_calls_the_command_line_keeps_its_own_ctrl_c(tmp_path):
    code = "import signal; from nexus_ds.__main__ import main; main(['inspect', '.']); "
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert start(["-c", code], tmp_path).communicate(timeout=120)[0] == "True\n"


def test_a_pipe_that_nobody_reads_is_no_error(tmp_path, dense_dir):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "nexus_ds", "inspect", str(dense_dir)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_device_is_told_once(dense_dir):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nexus_ds", "inspect", str(dense_dir)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = "nexus-ds inspect: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_stream_that_is_closed_from_the_start_is_no_error(tmp_path, closed):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "recipe.yaml").write_text("base: demo\n")
    command = f"exec {sys.executable} -m nexus_ds status . {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_narrow_encoding_gets_what_it_lacks_in_the_spelling_of_json(tmp_path, dense_dir):
    odd = tmp_path / "modèle – 😀\x1b[31m"
    odd.symlink_to(dense_dir)
    narrow = os.environ | {"PYTHONIOENCODING": "ascii"}

    def inspect(*words):
        command = [sys.executable, "-m", "nexus_ds", "inspect", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=narrow)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert json.loads(inspect("--json", odd))["directory"] == str(odd)
    said = inspect(odd, dense_dir)
    assert "mod\\u00e8le \\u2013 \\ud83d\\ude00\\u001b[31m" in said


def test_control_characters_of_foreign_text_are_shown_and_not_sent():
    given = "a\x1b]52;c;x\x07b\x9b\x7f\tc\nd – é"
    shown = "a\\u001b]52;c;x\\u0007b\\u009b\\u007f\tc\nd – é"
    assert visible(given) == shown


@pytest.mark.parametrize("speak", [print_text, tell, say])
def test_whatever_is_printed_is_visible(capsys, speak):
    speak("law\x1b[2J")
    assert "".join(capsys.readouterr()) == "law\\u001b[2J\n"


def test_json_stays_what_it_was(capsys):
    given = {"na\x9bme": "\x00\x1b\x7f\r\n\t"}
    print_text(json.dumps(given, ensure_ascii=False, indent=2))
    said = capsys.readouterr().out
    assert json.loads(said) == given and not CONTROL.search(said)


# Where printing may be done, and what becomes visible before it.
PRINTING = {
    "nexus_ds.console": "print_text and tell",
    "nexus_ds.progress": "say",
    "nexus_ds.commands.generate": "an added text, visible on a terminal, with the experts' colours",
}


def test_nothing_is_printed_by_another_way():
    found = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            if called == "print" or called.endswith(("stdout.write", "stderr.write")):
                found.add(module)
    assert found == set(PRINTING)
