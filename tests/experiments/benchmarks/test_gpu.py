"""The runner of `bench gpu` with steps that fail, hang and find no time, its table, and all steps
in small sizes on a CPU."""

import ast
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nexus_ds.__main__ import main
from nexus_ds.experiments.benchmarks import gpu
from nexus_ds.experiments.benchmarks.gpu import (
    Report,
    Result,
    Runner,
    Step,
    read_figures,
    table,
    waves,
)

REPOSITORY = Path(__file__).parents[3]
PROFILE = {
    "kernels": 12345,
    "share": 0.25,
    "one": {"ms": 1.5, "MFU": None},
    "two": {"ms": 0.0012, "MFU": 0.4},
    "parts": {"head": 0.5},
}
STEPS = [Result("profile", "ok", 0, 12.5, 50, PROFILE), Result("z3", "failed", 1, 1.0, 110)]
REPORT = Report("2026-01-02", False, 480, STEPS)


def python(name, source, limit=60.0, **patterns):
    return Step(name, limit, ("-c", source), patterns)


def runner(tmp_path, seconds=600.0, side_by_side=1):
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    report = Report("2026-01-02", True, seconds)
    return Runner(tmp_path / "out", tmp_path / "work", report, side_by_side)


def written(tmp_path):
    return json.loads((tmp_path / "out" / "gpu.json").read_text())


def gone(pid):
    """Return whether a process has ended, waiting a moment for the system to notice."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(") ", 1)[1].startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def test_steps_that_fail_or_hang_are_recorded_with_their_last_lines_and_the_rest_goes_on(
    tmp_path, capsys
):
    child = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'child': child.pid}), flush=True)\n"
    )
    run = runner(tmp_path)
    run.run([python("breaks", child + "raise ValueError('no such kernel')")])
    run.run([python("hangs", child + "time.sleep(600)", limit=20.0)])
    run.run([python("is killed", "import os; os.kill(os.getpid(), 11)")])
    run.run([python("works", "print('{\"ms\": 1}'); print('{\"ms\": 2.5}'); print('done')")])
    steps = written(tmp_path)["steps"]
    assert [(step["name"], step["state"], step["code"]) for step in steps] == [
        ("breaks", "failed", 1),
        ("hangs", "outlasted its limit", -9),
        ("is killed", "failed", -11),
        ("works", "ok", 0),
    ]
    assert steps[0]["tail"][-1] == "ValueError: no such kernel"
    assert 20 <= steps[1]["seconds"] < 120
    # what they had found is kept, and what they had started ends with them
    assert all(gone(step["figures"]["child"]) for step in steps[:2])
    assert steps[3]["figures"] == {"ms": 2.5}
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert '######## breaks: failed, exit code 1\n{"child": ' in logs and "no such kernel" in logs
    said = capsys.readouterr().err
    assert "breaks: failed" in said and "    ValueError: no such kernel" in said


def test_the_file_is_whole_after_every_step(tmp_path):
    read = (
        f"import json; found = json.load(open({str(tmp_path / 'out' / 'gpu.json')!r}))\n"
        "print(json.dumps({'before': len(found['steps'])}))"
    )
    run = runner(tmp_path)
    for step in (python("first", "pass"), python("second", read), python("third", read)):
        run.run([step])
    found = written(tmp_path)
    assert found["small"] is True
    assert [step["figures"] for step in found["steps"]] == [{}, {"before": 1}, {"before": 2}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "logs.txt"]


def test_a_step_whose_limit_is_longer_than_what_is_left_is_skipped(tmp_path):
    run = runner(tmp_path, seconds=30.0)
    run.run([python("long", "raise SystemExit(3)", limit=40.0)])
    run.run([python("short", "pass", limit=20.0)])
    steps = written(tmp_path)["steps"]
    assert [(step["state"], step["code"]) for step in steps] == [
        ("skipped: no time", None),
        ("ok", 0),
    ]


def test_steps_of_a_wave_run_side_by_side_and_waves_one_after_the_other(tmp_path):
    def waits_for(mine, other):
        return (
            "import pathlib, time\n"
            f"pathlib.Path({str(tmp_path / mine)!r}).touch()\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)"
        )

    run = runner(tmp_path, side_by_side=2)
    run.run([python("a", waits_for("a", "b")), python("b", waits_for("b", "a"))])
    assert not run.running
    assert [step["state"] for step in written(tmp_path)["steps"]] == ["ok", "ok"]


def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    run = runner(tmp_path)
    monkeypatch.setattr(gpu.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run([python("long", "import time; time.sleep(600)")])
    (_, process, _), *_ = run.running.values()
    assert process.returncode == -9


def test_the_limits_fit_into_eight_minutes_and_the_most_valuable_comes_first(tmp_path):
    planned = waves(tmp_path / "in", tmp_path, small=False, make=True)
    assert sum(max(step.limit for step in wave) for wave in planned) <= gpu.SECONDS == 480
    names = [[step.name for step in wave] for wave in planned]
    assert names == [
        ["machine", "inputs"],
        [
            "tests/gpu",
            *(f"literal command, {stage}" for stage in ("z3", "z2", "z1", "z3_offload")),
            *("evaluate", "upcycle with label fit", "generate"),
        ],
        ["profile"],
        ["speed"],
        ["memory, ZeRO-1"],
        ["memory, ZeRO-3"],
        ["memory, ZeRO-3, checkpointing"],
        ["9.1B"],
        ["tests/gpu, comparison"],
    ]
    # side by side they need ports of their own
    words = [word for wave in planned for step in wave for word in step.command]
    ports = [word for word in words if word.startswith("--master_port=")]
    assert len(set(ports)) == 4
    assert "--small" not in words


def picked(which, names):
    """Return the names that `pytest -k` picks by an expression of words, and, or, not."""
    words = set(re.findall(r"\w+", which)) - {"and", "or", "not"}
    return [
        name for name in names if eval(which, {}, {word: word in name.lower() for word in words})
    ]


def test_every_gpu_test_is_in_one_of_the_steps(tmp_path):
    tree = ast.parse((REPOSITORY / "tests" / "gpu" / "test_gpu.py").read_text())
    tests = [node.name for node in tree.body if getattr(node, "name", "").startswith("test_")]
    assert len(tests) == 4
    commands = [
        step.command
        for wave in waves(tmp_path, tmp_path, small=False, make=True)
        for step in wave
        if "pytest" in step.command
    ]
    assert all(command[-1] == "tests/gpu" for command in commands)
    chosen = [picked(command[command.index("-k") + 1], tests) for command in commands]
    assert sorted(name for names in chosen for name in names) == sorted(tests)
    assert [len(names) for names in chosen] == [3, 1]


def test_the_environment_of_a_step_is_this_checkout_without_a_launchers_variables(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = gpu.environment()
    assert "RANK" not in found and found["OMP_NUM_THREADS"] == "4"
    assert found["PYTHONPATH"] == os.pathsep.join([str(REPOSITORY), "/elsewhere"])
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("text", "patterns", "figures"),
    [
        ('x\n{"a": 1}\n{"a": 2}\ny {"a": 3}\n{"a": ', {}, {"a": 2}),
        ("nothing", {}, {}),
        (
            "1 tok/s\n12,345 tok/s\n(logits differ by 1.5e-03)",
            {"speed": r"([\d,]+) tok/s", "off": r"differ by ([\d.e+-]+)\)", "none": "(x)"},
            {"speed": 12345, "off": 0.0015},
        ),
    ],
)
def test_figures_are_the_last_line_of_json_or_what_was_said_in_words(text, patterns, figures):
    assert read_figures(text, patterns) == figures


def test_the_table_has_a_line_for_each_step_and_tables_of_parts():
    assert table(REPORT).splitlines() == [
        "Measured 2026-01-02 by `nexus-ds bench gpu`:",
        "",
        "| step | outcome | seconds | figures |",
        "| --- | --- | --- | --- |",
        "| profile | ok | 12.50 | kernels 12,345; share 0.25 |",
        "| z3 | failed | 1.00 |  |",
        "",
        "| profile | ms | MFU |",
        "| --- | --- | --- |",
        "| one | 1.50 | – |",
        "| two | 1.2e-03 | 0.40 |",
        "",
        "| profile | head |",
        "| --- | --- |",
        "| parts | 0.50 |",
    ]


def test_a_document_takes_the_table_over_between_its_markers(tmp_path, capsys):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    (tmp_path / "gpu.json").write_text(json.dumps(asdict(REPORT)))
    for _ in range(2):  # the second time over the first
        assert main(["bench", "gpu", f"--out={tmp_path}", f"--table={document}"]) == 0
    assert document.read_text() == (f"before\n\n{gpu.BEGIN}\n{table(REPORT)}\n{gpu.END}\nafter\n")
    assert f"wrote {document}" in capsys.readouterr().out
    shipped = (REPOSITORY / "docs" / "performance.md").read_text()
    assert shipped.count(f"{gpu.BEGIN}\n") == 1 == shipped.count(f"{gpu.END}\n")


def test_a_table_of_nothing_and_a_document_without_markers_are_refused(tmp_path, capsys):
    document = tmp_path / "performance.md"
    document.write_text("nothing\n")
    words = ["bench", "gpu", f"--out={tmp_path}", f"--table={document}"]
    assert main(words) == 1
    assert f"{tmp_path / 'gpu.json'}: not what bench gpu writes" in capsys.readouterr().err
    (tmp_path / "gpu.json").write_text('{"small": true}')
    assert main(words) == 1
    assert "not what bench gpu writes (KeyError: 'steps')" in capsys.readouterr().err
    # found by tests/fuzz.py
    (tmp_path / "gpu.json").write_text("[" * 5000)
    assert main(words) == 1
    assert "not what bench gpu writes (RecursionError" in capsys.readouterr().err
    (tmp_path / "gpu.json").write_text(json.dumps(asdict(REPORT)))
    assert main(words) == 1
    assert f"expected the lines {gpu.BEGIN} and {gpu.END}" in capsys.readouterr().err
    assert document.read_text() == "nothing\n"


def test_mistakes_are_one_sentence(tmp_path, capsys):
    (tmp_path / "gpu.json").touch()
    assert main(["bench", "gpu", "--small", f"--out={tmp_path}"]) == 1
    assert f"{tmp_path} exists already" in capsys.readouterr().err
    assert main(["bench", "gpu", "--small", f"--inputs={tmp_path}", "--out=new"]) == 1
    assert f"--inputs: found no mixture in {tmp_path}; make gpu-kit" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said_at_once(capsys):
    assert main(["bench", "gpu", "--out=new"]) == 1
    expected = "torch finds no CUDA device on this machine; use --small for a rehearsal"
    assert expected in capsys.readouterr().err and not Path("new").exists()


def test_a_step_that_does_not_end_well_is_the_exit_code(tmp_path, monkeypatch):
    planned = [[python("works", "pass")], [python("breaks", "raise SystemExit(2)")]]
    monkeypatch.setattr(gpu, "waves", lambda *_: planned)
    assert main(["bench", "gpu", "--small", f"--out={tmp_path / 'out'}"]) == 1
    del planned[1]
    assert main(["bench", "gpu", "--small", f"--out={tmp_path / 'well'}"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_all_steps_in_small_sizes(tmp_path, capsys):
    """A rehearsal on a CPU; there the GPU tests skip themselves, and nothing waits for a device."""
    out = tmp_path / "out"
    assert main(["bench", "gpu", "--small", f"--out={out}"]) == 0
    steps = {step["name"]: step for step in json.loads((out / "gpu.json").read_text())["steps"]}
    planned = waves(tmp_path, tmp_path, small=True, make=True)
    assert set(steps) == {step.name for wave in planned for step in wave}
    assert {step["code"] for step in steps.values()} == {0}
    figures = {name: step["figures"] for name, step in steps.items()}
    for stage in ("z3", "z2", "z1", "z3_offload"):
        trained = figures[f"literal command, {stage}"]
        assert trained["tokens/s"] > 0 and trained["logits of the export differ by"] < 2e-2
    assert figures["upcycle with label fit"]["tokens at their domain's expert"] > 0.3
    assert figures["evaluate"]["tokens/s"] > 0 and figures["generate"]["tokens/s"] > 0
    assert figures["profile"]["operators"] > 100 and figures["profile"]["2 x 32 tokens"]["ms"] > 0
    assert sum(figures["profile"]["shares of the time"].values()) == pytest.approx(1, abs=0.01)
    assert set(figures["speed"]) == {"dense", "nexus-grouped", "transformers-grouped"}
    for name in ("memory, ZeRO-1", "memory, ZeRO-3", "memory, ZeRO-3, checkpointing"):
        assert figures[name]["planned GB"] > figures[name]["planned tensors GB"] > 0
    assert figures["9.1B"]["1 x 32 tokens"]["tokens/s"] > 0
    if not torch.cuda.is_available():
        assert figures["tests/gpu"] == {"skipped": 3}
        assert figures["tests/gpu, comparison"] == {"skipped": 1}
    printed = capsys.readouterr().out
    assert re.search(r"^\| literal command, z3 \| ok \| [\d.]+ \| tokens/s", printed, re.M)
    assert "| speed | tokens/s | over dense | MFU |" in printed
