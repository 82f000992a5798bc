import json
from pathlib import Path

import pytest

from nexus_ds.__main__ import main
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.experiments.benchmarks.data_speed import Figures, Seconds, gather, measure

TEXTS = [f"the cat {i} sat on mat {i * i}" for i in range(400)]


def test_texts_are_repeated_until_there_is_enough():
    assert gather(iter(TEXTS), 0.001) == TEXTS[: len(gather(iter(TEXTS), 0.001))]
    assert gather(iter(TEXTS[:2]), 0.0001) == (TEXTS[:2] * 3)[:5]


def test_the_ratio_compares_times_of_one_round():
    alone = [Seconds(1.0, 1.8), Seconds(2.0, 1.8), Seconds(1.5, 1.8)]
    pipeline = [Seconds(1.25, 2.0), Seconds(2.0, 2.0), Seconds(2.0, 2.0)]
    found = Figures(10.0, 2, alone, pipeline, pipeline).summary()
    assert found.ratio == [0.8, 0.75, 1.0]
    assert found.cpu_ratio == pytest.approx([0.9, 0.9, 0.9])
    assert (found.tokenizer_mb_per_second, found.pipeline_mb_per_second) == (10 / 1.5, 5.0)
    told = json.loads(json.dumps(found.to_json()))
    assert told["ratio"] == [0.8, 0.75, 1.0]
    assert told["rounds"]["tokenizer"] == [[1.0, 1.8], [2.0, 1.8], [1.5, 1.8]]


def test_it_times_the_very_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train_tokenizer(iter(TEXTS), 300, tmp_path / "tokenizer")
    said: list[str] = []
    figures = measure(TEXTS, tmp_path / "tokenizer", 2, 1, said.append)
    assert figures.megabytes == sum(map(len, TEXTS)) / 1e6
    assert [len(times) for times in (figures.alone, figures.pipeline, figures.reading)] == [2, 2, 2]
    assert all(seconds.wall > 0 for seconds in figures.alone + figures.pipeline)
    assert 0 < figures.sample_seconds < 0.01
    assert said == ["round 1 of 2", "round 2 of 2"]


def test_the_verb_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = tmp_path / "text" / "all"
    folder.mkdir(parents=True)
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "train.jsonl").write_text("".join(rows))
    words = ["bench", "data", f"--data={tmp_path / 'text'}", "--megabytes=0.05"]
    words += ["--rounds=1", "--workers=1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for part in ("from .jsonl.gz to token files", "ratio of CPU times", "next: "):
        assert part in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["megabytes"] == pytest.approx(0.05, rel=0.01)
    assert main(["bench", "data", "--rounds", "0"]) == 1
    expected = "--rounds 0, --megabytes 64.0, --workers 0: expected numbers above 0"
    assert expected in capsys.readouterr().err
