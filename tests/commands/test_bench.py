"""The verb `bench`: what it prints and writes, and one sentence for a user's mistake."""

import csv
import json

import pytest
import torch

from nexus_ds.__main__ import main
from nexus_ds.experiments.benchmarks import layer_speed, scaling

SMALL = [
    "--preset=tiny",
    "--rounds=1",
    "--hidden=32",
    "--heads=2",
    "--ffn=24",
    "--vocabulary=60",
    "--layers=1",
    "--batch=2",
    "--length=16",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (layer_speed, scaling):
        monkeypatch.setattr(module, "BUSY_SECONDS", 0.0)


def test_train_prints_a_table_and_writes_lines_a_csv_and_a_figure(tmp_path, capsys):
    out = tmp_path / "bench"
    assert main(["bench", "train", *SMALL, "--models=nexus-loop", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert (
        "train, preset tiny, 32 tokens a step, torch.float32; device " in printed
        and "share of the step" in printed
    )
    assert f"wrote {out}; next: open {out / 'train.png'}" in printed
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    # the baseline is measured unasked
    assert [line["model"] for line in lines] == ["dense", "nexus-loop"]
    assert lines[0]["shape"]["hidden"] == 32 and lines[0]["machine"]["torch"] == torch.__version__
    with (out / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["share router"]) > 0 and rows[0]["share router"] == ""
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "train", *SMALL, f"--out={out}"]) == 1
    assert f"{out} exists already" in capsys.readouterr().err


def test_growth_prints_exponents_and_answers_in_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "SWEEPS", {"layers": (1, 2)})
    monkeypatch.setattr(scaling, "ROUTER_SWEEPS", {"experts": (2, 4), "tokens": (8, 16)})
    assert main(["bench", "growth", *SMALL, "--json", f"--out={tmp_path / 'g'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        set(found["exponents"]) == {"layers", "router experts", "router tokens"}
        and len(found["rows"]) == 6
    )
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [
        "growth.csv",
        "growth.jsonl",
        "growth.png",
    ]
    assert main(["bench", "growth", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert (
        "exponent" in printed
        and "router of a layer with P: " in printed
        and "next: the same with --out DIR" in printed
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset=big"], "--preset: unknown preset 'big'; expected one of tiny, cpu, 470m"),
        (["--device=tpu"], "--device: unknown device 'tpu'; expected cpu or cuda"),
        (["--dtype=fp16"], "--dtype: unknown value 'fp16'; expected fp32 or bf16"),
        (["--rounds=0"], "--rounds: expected a number above 0, found 0"),
        (["--layers=0"], "--layers: expected a number above 0, found 0"),
        (["--top-k=5"], "--top-k 5 is more than the 4 experts; lower it"),
        (["--heads=5"], "--hidden 96 is not a multiple of --heads 5; change one of them"),
        (
            ["--models=nexus-lop"],
            "--models: unknown model 'nexus-lop'; "
            "expected dense, nexus-loop, nexus-grouped, autoep",
        ),
        (["--baseline=sparse"], "--baseline: unknown model 'sparse'; expected dense"),
    ],
)
def test_mistakes_are_one_sentence(words, message, capsys):
    preset = [] if "--preset=big" in words else ["--preset=tiny"]
    assert main(["bench", "train", *preset, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nexus-ds bench: {message}") and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said_at_once(capsys):
    assert main(["bench", "growth", "--device=cuda"]) == 1
    assert (
        "--device cuda: torch finds no CUDA device on this machine; use --device cpu"
        in capsys.readouterr().err
    )
