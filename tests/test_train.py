"""train.py as a user starts it: real ranks, interruption and resumption, the verified checkpoint,
mistakes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_nexus
from launch import clean_environment, finish, fork_ranks, start_ranks
from safetensors.torch import load_file

from nexus_ds import train
from nexus_ds.config import dump, load_config
from nexus_ds.errors import DataError
from nexus_ds.outputs import held
from nexus_ds.pipeline import resolve
from nexus_ds.runtime.loop import read_data
from nexus_ds.train import main

REPOSITORY = Path(__file__).parents[1]
TRAIN, Z3 = REPOSITORY / "nexus_ds" / "train.py", REPOSITORY / "ds_configs" / "z3.json"
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
kept = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    logits = model(input_ids=kept["probe"], use_cache=False).logits.float()
assert "nexus_ds" not in sys.modules and "deepspeed" not in sys.modules
print(float((logits - kept["logits"]).abs().max()), float(kept["logits"].abs().max()))
"""


def settings(checkpoint, text, out, *more):
    """Return overrides that train a tiny checkpoint on tiny text for a few steps."""
    return [
        f"model.path={checkpoint}",
        f"model.tokenizer={checkpoint}",
        f"data.path={text}",
        f"output={out}",
        "data.domains=[alpha,beta,gamma]",
        "data.validation_domains=[alpha,gamma]",
        f"data.cache={out}-tokens",
        "data.sequence_length=16",
        "training.tokens=0",
        "training.steps=8",
        "training.batch_size=4",
        "training.lr=1e-2",
        "training.log_every=2",
        "training.eval_windows=4",
        "pipeline.run=unused",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_trained_checkpoint_computes_the_engines_logits_in_stock_transformers(
    tmp_path, nexus_dir, text_folder, dtype
):
    out, logits = tmp_path / "out", tmp_path / "logits.pt"
    words = settings(nexus_dir, text_folder, out, f"model.dtype={dtype}", "parallel.expert=2")
    config = tmp_path / "z3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"zero_optimization": zero}))
    log = finish(fork_ranks([Path(__file__).parent / "train_worker.py", logits, config, *words], 2))
    assert "reloaded in plain transformers: logits differ by" in log
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(out), str(logits)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in clean_environment().items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    difference, largest = map(float, done.stdout.split()[-2:])
    # A token that took another route would differ by far more than rounding does.
    assert difference <= (1e-5 if dtype == "fp32" else 1e-2) * max(1.0, largest)
    trained, before = (
        load_file(out / "model.safetensors"),
        load_file(Path(nexus_dir) / "model.safetensors"),
    )
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    assert not torch.equal(trained[name].float(), before[name].float())
    sidecar = json.loads((out / "nexus.json").read_text())
    assert [step["verb"] for step in sidecar["lineage"]] == ["upcycle", "train"]
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "out.training" / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds.count("train") == 4
    assert list((tmp_path / "out.training" / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_bit_equal_weights(tmp_path, nexus_dir, text_folder):
    def words(out):
        return settings(
            nexus_dir,
            text_folder,
            tmp_path / out,
            "training.steps=40",
            "training.log_every=1",
            f"data.cache={tmp_path / 'tokens'}",
            "parallel.expert=2",
        )

    finish(start_ranks([TRAIN, "--deepspeed", Z3, "--config", "demo", *words("straight")], 2))
    ranks = start_ranks([TRAIN, "--deepspeed", Z3, "--config", "demo", *words("stopped")], 2)
    log = tmp_path / "stopped.training" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count('"kind": "train"') >= 3):
        assert time.monotonic() < deadline and ranks[0].poll() is None
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)  # one rank alone is told; all agree
    said = finish(ranks, code=75)
    assert "stopped by signal 15 after step" in said
    assert not (tmp_path / "stopped").exists()
    said = finish(start_ranks([TRAIN, "--deepspeed", Z3, "--config", "demo", *words("stopped")], 2))
    assert ", resumed after step" in said
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [
        json.loads(line)["step"]
        for line in log.read_text().splitlines()
        if '"kind": "train"' in line
    ]
    assert steps == list(range(1, 41))


EARLY = """
import os, sys, time
from nexus_ds import train
from nexus_ds.runtime import loop

class Run:
    def __init__(self, *arguments):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(60)

loop.Run = Run
train.end(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (
            signal.SIGUSR1,
            75,
            "ended by SIGUSR1 before the first step of this start; start the same command again "
            "to go on",
        ),
    ],
)
def test_a_signal_before_the_first_step_ends_a_run_at_once(
    tmp_path, nexus_dir, text_folder, number, code, said
):
    """While it tokenises, loads or resumes, which may take hours, there is no step to wait for."""
    words = settings(nexus_dir, text_folder, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", EARLY, str(int(number)), *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, f"train.py: {said}")
    assert "Traceback" not in done.stderr


def fails(capsys, words, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    return capsys.readouterr().err


def test_a_finished_run_is_not_repeated_and_another_is_not_overwritten(
    tmp_path, nexus_dir, text_folder, capsys, monkeypatch
):
    words = settings(nexus_dir, text_folder, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.yaml").write_text(dump(resolve(load_config("demo", words))))
    assert main(["--config", "demo", *words]) == 0
    command = capsys.readouterr().out.partition("is finished already; next: ")[2]
    assert shlex.split(command) == [
        "nexus-ds",
        "evaluate",
        "--checkpoint",
        f"{tmp_path / 'out'}",
        "--data",
        str(text_folder),
        "--out",
        f"{tmp_path / 'out'}-report",
    ]
    said = fails(capsys, ["--config", "demo", *words, "training.lr=1e-3"], monkeypatch, tmp_path)
    assert "out exists already and is not the result of this configuration; give output=DIR" in said


def test_a_run_that_another_start_finished_meanwhile_is_not_repeated(
    tmp_path, nexus_dir, text_folder, capsys, monkeypatch
):
    words = settings(nexus_dir, text_folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    @contextmanager
    def held_late(out):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "training.yaml").write_text(dump(resolve(load_config("demo", words))))
        with held(out):
            yield

    def prepare(config, args):
        raise AssertionError("it trains again")

    monkeypatch.setattr(train, "held", held_late)
    monkeypatch.setattr(train, "_prepare", prepare)
    assert main(["--config", "demo", *words]) == 0
    assert f"{tmp_path / 'out'} is finished already; next: " in capsys.readouterr().out


def test_an_output_that_can_take_no_place_is_refused_before_the_training(
    tmp_path, nexus_dir, text_folder, capsys, monkeypatch
):
    (tmp_path / "out").symlink_to("nowhere")
    words = settings(nexus_dir, text_folder, tmp_path / "out")
    said = fails(capsys, ["--config", "demo", *words], monkeypatch, tmp_path)
    assert f"train.py: {tmp_path / 'out'} is a link, whose place no output can take" in said
    assert not (tmp_path / "out.training").exists()


def test_a_second_run_of_the_same_output_is_refused(
    tmp_path, nexus_dir, text_folder, capsys, monkeypatch
):
    words = settings(nexus_dir, text_folder, tmp_path / "out")
    with held(tmp_path / "out.training"):
        said = fails(capsys, ["--config", "demo", *words], monkeypatch, tmp_path)
    assert (
        f"out.training is being written by process {os.getpid()} on " in said
        and "Traceback" not in said
    )
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere"], "train.py: no recipe at nowhere; give a file, or one of:"),
        (["training.lrr=1"], "train.py: unknown key training.lrr, did you mean lr?"),
        (
            ["stage=branch"],
            "train.py: stage=branch trains one domain's dense expert; name it with branch=DOMAIN",
        ),
        (
            ["--config", "own", "stage=branch", "branch=law"],
            "train.py: stage=branch starts from the seed; there is none",
        ),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch, tmp_path):
    said = fails(capsys, words, monkeypatch, tmp_path)
    assert message in said
    assert "Traceback" not in said


def test_options_and_overrides_may_stand_in_any_order(tmp_path, capsys, monkeypatch):
    said = fails(
        capsys,
        ["seed=1", "--config", "demo", "training.lrr=1", "--deepspeed", "x.json"],
        monkeypatch,
        tmp_path,
    )
    assert "unknown key training.lrr" in said


def test_the_folder_of_the_script_shadows_nothing():
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']; "
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0
    assert "--deepspeed JSON" in done.stdout


@pytest.mark.slow
def test_a_leftover_state_of_another_model_is_refused(tmp_path, nexus_dir, text_folder):
    """Resuming it would put one model's weights under another's names."""
    words = settings(
        nexus_dir, text_folder, tmp_path / "out", "training.steps=4", "training.save_every=2"
    )
    finish(start_ranks([TRAIN, "--config", "demo", *words], 1))
    shutil.rmtree(tmp_path / "out")
    other = make_nexus(tmp_path / "other", seed=5)
    words = settings(
        other, text_folder, tmp_path / "out", "training.steps=4", "training.save_every=2"
    )
    said = finish(start_ranks([TRAIN, "--config", "demo", *words], 1), code=1)
    assert "belongs to another configuration" in said and "model at the start" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "ranks", "message"),
    [
        (
            "data.sequence_length=65",
            1,
            "data.sequence_length 65: the model reads at most 64 tokens; lower it",
        ),
        (
            "data.sequence_length=64 training.eval_windows=1000 training.eval_every=1",
            1,
            "alpha: the validation text makes 37 windows of data.sequence_length 64, expected "
            "training.eval_windows 1000; give",
        ),
        ("data.domains=[alpha,omega]", 1, "omega"),
        # other layouts: test_engine.py
        ("parallel.expert=4", 2, "parallel.expert 4 does not divide 2 ranks"),
    ],
)
def test_what_can_not_be_trained_is_one_line(
    tmp_path, nexus_dir, text_folder, word, ranks, message
):
    words = settings(nexus_dir, text_folder, tmp_path / "out", *word.split())
    said = finish(
        start_ranks([TRAIN, "--deepspeed", Z3, "--config", "demo", *words], ranks), code=1
    )
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out-tokens/*-train-*")), "tokenised before the mistake was found"


def test_without_validations_on_the_way_what_validation_text_there_is_serves(
    tmp_path, nexus_dir, text_folder, alone
):
    def read(*words):
        settled = settings(
            nexus_dir, text_folder, tmp_path / "out", "data.sequence_length=64", *words
        )
        return read_data(resolve(load_config("demo", settled)), Path(nexus_dir))

    data = read("training.eval_every=0", "training.eval_windows=1000")
    assert {name: len(found) for name, found in data.validation.items()} == {
        "alpha": 37,
        "gamma": 37,
    }
    assert data.messages == [
        f"{name}: 37 validation windows, training.eval_windows is 1000"
        for name in ("alpha", "gamma")
    ]
    data = read("training.eval_every=0", "training.eval_windows=4")
    assert [len(found) for found in data.validation.values()] == [4, 4] and data.messages == []
    with pytest.raises(
        DataError,
        match=r"alpha: the validation text makes 37 windows .* training.eval_windows 38; give",
    ):
        read("training.eval_every=5", "training.eval_windows=38", f"data.cache={tmp_path / 'new'}")
    # told before the training text is tokenised
    assert not list((tmp_path / "new").glob("*-train-*"))
    assert len(read("training.eval_every=5", "training.eval_windows=37").validation["alpha"]) == 37
    said = (
        r"makes 0 windows of data.sequence_length 2500, expected .* 48 \(with "
        r"training.eval_every 0 one is enough\); g"
    )
    with pytest.raises(DataError, match=said):
        read("training.eval_every=0", "training.eval_windows=48", "data.sequence_length=2500")


def test_a_checkpoint_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    said = fails(capsys, ["model.path=nowhere"], monkeypatch, tmp_path)
    assert "train.py: no checkpoint at nowhere; expected a directory that holds a model" in said


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        (
            "seed",
            {"model_type": "cohere"},
            "model_type 'cohere' can't become a Qwen2-MoE: its attention and FFN stand",
        ),
        ("branch", {"model_type": "gemma3n"}, "supported: llama, mistral, qwen2"),
        ("branch", {"attention_bias": True}, "has no place for a bias in o_proj"),
        ("branch", {"model_type": "mistral3"}, "a mistral3 is a language model within one that"),
    ],
)
def test_what_can_never_become_an_expert_is_refused_before_it_is_trained(
    tmp_path, dense_dir, text_folder, capsys, monkeypatch, stage, keys, message
):
    """What it computes is not known: it might be trained with another loss."""
    start = shutil.copytree(dense_dir, tmp_path / "start")
    config = json.loads((start / "config.json").read_text()) | keys
    (start / "config.json").write_text(json.dumps(config))
    words = settings(start, text_folder, tmp_path / "out", f"stage={stage}", "branch=alpha")
    said = fails(capsys, ["--config", "demo", *words], monkeypatch, tmp_path)
    assert message in said and said.startswith(f"train.py: {start}") and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
