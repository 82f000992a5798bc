"""Where tokens come from: every block of a text against the documents that were written."""

import json
import shutil

import pytest

from nexus_ds.data import provenance
from nexus_ds.data.corpora import open_source, token_files
from nexus_ds.data.encoding import load_tokenizer
from nexus_ds.data.provenance import documents_of, told
from nexus_ds.settings import DataConfig


@pytest.fixture
def opened(corpus, tokenizer_dir, tmp_path):
    """The tokenizer, one that opens texts with the token that closes them, and the file of each."""
    found = []
    for name in ("plain", "opening"):
        directory = tmp_path / name
        shutil.copytree(tokenizer_dir, directory)
        if name == "opening":
            definition = json.loads((directory / "tokenizer.json").read_text())
            end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
            text = {"Sequence": {"id": "A", "type_id": 0}}
            definition["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [end, text],
                "pair": [end, text, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {
                    "<|endoftext|>": {
                        "id": "<|endoftext|>",
                        "ids": [0],
                        "tokens": ["<|endoftext|>"],
                    }
                },
            }
            (directory / "tokenizer.json").write_text(json.dumps(definition))
        tokenizer = load_tokenizer(directory)
        source = open_source(str(corpus))
        file = token_files(source, ["alpha"], "train", directory, tmp_path / "cache")["alpha"]
        found.append((tokenizer, file, directory))
    assert found[1][0].begin == (found[1][0].end,)
    return found


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_every_stretch_of_ids_has_its_documents(opened, monkeypatch, chunk):
    monkeypatch.setattr(provenance, "CHUNK", chunk)
    for tokenizer, file, _ in opened:
        # by hand: who owns each id
        owners, number, ends = [], 0, 0
        for token in file.read(0, file.tokens).tolist():
            owners.append(number)
            ends += token == tokenizer.end
            number = ends // (1 + len(tokenizer.begin))
        assert number == file.documents == 40
        for start in range(0, file.tokens - 17, 5):
            for count in (1, 2, 17):
                mine = owners[start : start + count]
                found = documents_of(file, start, count, tokenizer)
                assert (found.start, found.stop - 1) == (mine[0], mine[-1])


def test_far_into_a_text_nobody_reads_it_again(opened, monkeypatch):
    monkeypatch.setattr(provenance, "READ_AGAIN", 100)
    monkeypatch.setattr(provenance, "documents_of", None)
    _, file, directory = opened[0]
    data = DataConfig(path="nowhere", sequence_length=16)
    expected = f"alpha, tokens 112 to 128 of {file.path.name}"
    assert told(data, directory, file, "alpha", 7) == expected


def test_a_block_is_told_by_file_and_line(opened, corpus):
    tokenizer, file, directory = opened[0]
    data = DataConfig(path=str(corpus), sequence_length=16)
    path = corpus / "alpha" / "train.jsonl"
    for block in (0, 3, file.blocks(16) - 1):
        numbers = documents_of(file, block * 16, 17, tokenizer)
        lines = [f"{path}:{number + 1}" for number in (numbers.start, numbers.stop - 1)]
        expected = f"alpha, {lines[0]}" if lines[0] == lines[1] else f"alpha, {' to '.join(lines)}"
        assert told(data, directory, file, "alpha", block) == expected
    path.unlink()
    assert told(data, directory, file, "alpha", 0).startswith("alpha, documents 1 to ")
