"""Files from outside: only files, and none larger than what they are for."""

import os

import pytest

from nexus_ds import inputs
from nexus_ds.errors import CheckpointError, DataError
from nexus_ds.inputs import read_bounded, require_few_values, require_file


def test_a_file_is_read_where_it_is_one_and_not_too_large(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"four")
    assert read_bounded(path) == read_bounded(path, 4) == b"four"
    assert require_file(path) == 4
    with pytest.raises(DataError, match="x has 4 bytes, expected at most 3; is it the right file"):
        read_bounded(path, 3, DataError)
    # a hole costs nothing, and would take all memory
    os.truncate(path, 3 << 30)
    assert require_file(path) == 3 << 30
    with pytest.raises(CheckpointError, match="has 3,221,225,472 bytes, expected at most 100,000,"):
        read_bounded(path)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none")


def test_what_is_no_file_is_not_opened(tmp_path):
    """Whoever opens a pipe waits until somebody writes into it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a pipe, socket or device, expected a file"):
        read_bounded(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a folder, expected a file; put the file itself"):
        read_bounded(tmp_path)


def test_values_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr(inputs, "MOST_VALUES", 5)
    require_few_values(b'{"a": [1, 2], "b": {}}')
    with pytest.raises(ValueError, match="some 6 values, expected at most 5"):
        require_few_values(b'{"a": [1, 2], "b": [{}]}')
