"""What a run tells: one JSON line and one line of text a call, nested numbers flat on the board,
nothing on other ranks."""

import io
import json
import sys
import threading
import time
from contextlib import closing

import pytest
from launch import file_limit
from tqdm import tqdm

from nexus_ds.runtime.metrics import Metrics, _flat, steps_told

VALUES = {
    "loss": {"alpha": 2.5, "beta": 1},
    "lr": 1e-3,
    "note": "text",
    "router": {"own": {"a": 0.5}},
}


def test_nested_numbers_are_flat_and_words_are_left_out():
    assert _flat(VALUES) == {"loss/alpha": 2.5, "loss/beta": 1.0, "lr": 1e-3, "router/own/a": 0.5}


def test_a_call_is_a_line_in_the_file_and_one_on_the_screen(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run", "moe", 4, 10, True)
    metrics.log("train", 5, VALUES, "5/10 loss 2.5")
    metrics.close()
    again = Metrics(tmp_path / "run", "moe", 5, 10, True)  # a resumed run goes on in the same file
    again.log("validation", 10, {"loss": 1.0}, "done")
    again.close()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 5), ("validation", 10)]
    assert {key: lines[0][key] for key in VALUES} == VALUES
    assert abs(lines[0]["time"] - time.time()) < 600
    assert capsys.readouterr().err == "moe 5/10 loss 2.5\nmoe done\n"


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2}\n'])
def test_a_resumed_run_takes_back_a_line_that_was_not_finished(tmp_path, whole):
    log = tmp_path / "metrics.jsonl"
    log.write_text(whole + '{"kind": "train", "st')
    metrics = Metrics(tmp_path, "moe", 2, 10, True)
    metrics.log("train", 3, {"loss": 1.0}, "")
    metrics.close()
    text = log.read_text()
    assert text.startswith(whole) and json.loads(text[len(whole) :])["step"] == 3


def test_the_board_has_every_number_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, "moe", 0, 10, True)
    for step, loss in ((1, 3.0), (2, 2.0)):
        metrics.log("train", step, {"loss": loss, "router": {"gate": loss / 4}}, "")
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["train/loss", "train/router/gate"]
    assert [(event.step, event.value) for event in board.Scalars("train/router/gate")] == [
        (1, 0.75),
        (2, 0.5),
    ]


def test_another_rank_writes_nothing_and_says_nothing(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run", "moe", 0, 10, False)
    metrics.log("train", 1, VALUES, "line")
    metrics.say("words")
    metrics.advance()
    metrics.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_the_time_left_is_that_of_the_steps_left_at_the_speed_of_this_start(monkeypatch):
    metrics = Metrics(None, "moe", 10, 30, False)
    monkeypatch.setattr(time, "monotonic", lambda: metrics.started + 20.0)
    assert metrics.eta(14) == "1m20s"  # 4 steps in 20 s, 16 to go


# TensorBoard writes in a thread
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("count", "name"), [(500, r"metrics\.jsonl"), (60, "tensorboard")])
def test_a_full_disk_names_the_file(tmp_path, count, name):
    """Many short numbers are larger in TensorBoard's file than in ours."""
    threads = set(threading.enumerate())
    metrics = Metrics(tmp_path, "run", 0, 9, True)
    said = rf"\[Errno 27\] File too large: .*free [\d,]+: '{tmp_path}/{name}'$"
    with file_limit(1800), pytest.raises(OSError, match=said), closing(metrics):
        metrics.log("train", 1, {str(number): 1.0 for number in range(count)}, "line")
    for thread in set(threading.enumerate()) - threads if name == "tensorboard" else ():
        thread.join(60)  # it raises what was told here a moment later, in the next test


@pytest.mark.parametrize(
    ("log", "step"),
    [
        (None, 0),
        ("", 0),
        ('{"kind": "validation", "step": 7}\n', 0),
        ('{"kind": "train", "step": 9}\n{"kind": "train", "step": 4}\n', 9),
        # damaged
        ('{"kind": "train", "step": 3}\n[1]\n{"kind": "train", "step": "8"}\n{"kind": "tr', 3),
        ('{"kind": "train", "step": 5}\n\xff' + "[" * 100_000, 5),
    ],
)
def test_a_log_tells_how_far_its_run_had_come(tmp_path, log, step):
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log, encoding="latin-1")
    assert steps_told(tmp_path / "metrics.jsonl") == step


class Lost(io.StringIO):
    """A terminal that was closed, or a pipe whose reader has ended."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_that_nobody_reads_any_more_ends_nothing(tmp_path, monkeypatch, terminal):
    metrics = Metrics(tmp_path, "moe", 0, 10, True)
    lost = Lost(terminal)
    if terminal:
        metrics.bar = tqdm(total=10, file=io.StringIO(), mininterval=0)
        metrics.bar.sp = lost.write  # by which it writes
    monkeypatch.setattr(sys, "stderr", lost)
    metrics.advance()
    metrics.log("train", 1, {"loss": 3.0}, "line")
    metrics.say("words")
    metrics.close()
    [record] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["loss"] == 3.0
