"""JSON of a model directory: strict, and only from inside it."""

import pytest

from nexus_ds.checkpoint import json_files
from nexus_ds.checkpoint.json_files import (
    confined,
    parse_json_object,
    read_json_object,
    require_directory,
)
from nexus_ds.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "thing holds list, expected a JSON object"),
        (b"{", "thing is not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the name 'a' stands twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the name 'b' stands twice"),
        (b'{"a": "\xff"}', "thing is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "thing is not valid JSON"),
        # 400 MB of 6
        pytest.param(
            b'{"a": [' + b"{}," * 2_000_000 + b"{}]}",
            "some 4,000,003 values, expected at most 4,000,000",
            id="many",
        ),
    ],
)
def test_text_that_is_no_object(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse_json_object(text, "thing")


def test_a_file_is_read_only_where_it_is_one_and_not_huge(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"layers": 2}')
    assert read_json_object(tmp_path, "config.json") == {"layers": 2}
    with pytest.raises(CheckpointError, match=r"has no other.json; expected a model directory"):
        read_json_object(tmp_path, "other.json")
    monkeypatch.setattr(json_files, "MAX_JSON", 5)
    with pytest.raises(CheckpointError, match="has 13 bytes, expected at most 5"):
        read_json_object(tmp_path, "config.json")
    assert require_directory(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="nothing is downloaded: fetch the model first"):
        require_directory(tmp_path / "org" / "model")


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a/../../x", "a\0b", "link"])
def test_a_name_that_leads_out(tmp_path, name):
    model = tmp_path / "model"
    model.mkdir()
    (model / "link").symlink_to("../x")
    assert confined(model, "config.json") == model / "config.json"
    with pytest.raises(CheckpointError, match="lies outside the model's directory"):
        confined(model, name)


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"found a file named '\\ud800', expected a name in UTF-8"
    ):
        confined(tmp_path, "\ud800")


def test_only_transformers_word_for_no_limit_is_larger_than_any_size():
    assert parse_json_object(f'{{"a": {int(1e30)}}}'.encode(), "x") == {"a": int(1e30)}
    with pytest.raises(CheckpointError, match=r"^x is not valid JSON \(the number 1000"):
        parse_json_object(f'{{"a": {10**30}}}'.encode(), "x")
