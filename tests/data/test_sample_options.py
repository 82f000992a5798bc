"""The options that `embed` and `card` share, and the sample that they ask for."""

import argparse

import pytest

from nexus_ds.data import sample_options
from nexus_ds.data.sentence_encoder import DEFAULT_ENCODER
from nexus_ds.errors import ConfigError


def parsed(*words):
    parser = argparse.ArgumentParser()
    sample_options.add_options(parser)
    return parser.parse_args(words)


def test_the_sample_that_is_asked_for_is_the_one_that_is_embedded(monkeypatch):
    asked = []
    monkeypatch.setattr(sample_options, "embed_domains", lambda *a, **k: asked.append((a, k)))
    words = ("--documents=7", "--windows=3", "--seed=5", "--max-bytes=9", "--on-bad-row=skip")
    sample_options.embedded(parsed(*words), "source", ("a", "b"), "encoder")
    expected = {"windows": 3, "max_bytes": 9, "on_bad_row": "skip"}
    assert asked == [(("source", ["a", "b"], "encoder", 7, 5), expected)]
    assert parsed().encoder == DEFAULT_ENCODER


@pytest.mark.parametrize("word", ["--documents=0", "--windows=0"])
def test_no_sample_at_all(word):
    sample_options.check(parsed())
    with pytest.raises(ConfigError, match=r"^--documents \d+ and --windows \d: expected numbers"):
        sample_options.check(parsed(word))
