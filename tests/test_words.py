"""What a user types: settings anywhere among the options, and a hint at what was meant."""

import argparse

import pytest

from nexus_ds.words import nearest, parse_words


def parser(overrides=True):
    made = argparse.ArgumentParser(prog="verb")
    made.add_argument("--out")
    if overrides:
        made.add_argument("overrides", nargs="*")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["a.b=1", "c.d=2", "--out", "DIR"],
        ["--out", "DIR", "a.b=1", "c.d=2"],
        ["a.b=1", "--out", "DIR", "c.d=2"],
    ],
)
def test_settings_stand_before_between_and_after_options(words):
    args = parse_words(parser(), words)
    assert (args.out, args.overrides) == ("DIR", ["a.b=1", "c.d=2"])


@pytest.mark.parametrize(
    ("words", "overrides", "unknown"),
    [
        (["a.b=1", "--out", "DIR", "word"], True, "word"),
        (["--ou=DIR", "--lr=1"], True, "--lr=1"),
        (["a.b=1"], False, "a.b=1"),
    ],
)
def test_what_is_neither_an_option_nor_a_setting_is_refused(words, overrides, unknown, capsys):
    with pytest.raises(SystemExit):
        parse_words(parser(overrides), words)
    message = f"unknown argument {unknown}; settings are given as section.key=value"
    assert message in capsys.readouterr().err


def test_the_nearest_known_word_is_named_else_all_of_them():
    assert nearest("stepz", ["steps", "tokens"]) == ", did you mean steps?"
    assert nearest("xyz", ["steps", "tokens"]) == "; known: steps, tokens"
