"""Tokens of a domain's text, counted as training would read them."""

from collections import Counter

import numpy as np
import pytest

from nexus_ds.data import token_counts
from nexus_ds.data.corpora import open_source, token_files
from nexus_ds.data.token_counts import count_tokens, counted
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.settings import DataConfig


def test_each_token_is_counted(text_folder, dense_dir, tmp_path, monkeypatch):
    """However few are read at once."""
    files = token_files(
        open_source(str(text_folder)), ["alpha"], "train", dense_dir, tmp_path, workers=1
    )
    file = files["alpha"]
    ids = file.read(0, file.tokens)
    monkeypatch.setattr(token_counts, "AT_ONCE", 7)
    found = counted(file)
    assert found.sum() == file.tokens
    assert {token: n for token, n in enumerate(found) if n} == Counter(ids.tolist())
    settings = DataConfig(workers=1)
    by_name = count_tokens(str(text_folder), {"mine": "alpha"}, dense_dir, settings)
    assert np.array_equal(by_name["mine"], found)


def test_text_that_is_not_there_is_told(text_folder, dense_dir):
    settings = DataConfig(workers=1)
    with pytest.raises(DataError, match="delta"):
        count_tokens(str(text_folder), {"delta": "delta"}, dense_dir, settings)
    with pytest.raises(ConfigError, match=r"give --data DIR, or set model\.merge_rows=alike"):
        count_tokens("", {"alpha": "alpha"}, dense_dir, settings)
