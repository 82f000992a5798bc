"""What a user types: settings anywhere among the options, and a hint at what was meant."""

import pytest

from nexus_ds.words import Parser, nearest, parse_words


def parser(overrides=True):
    made = Parser(prog="verb")
    made.add_argument("--out")
    made.add_argument("--names", nargs="*")
    made.add_argument("--expert", action="append")
    made.add_argument("--json", action="store_true")
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
    ("words", "unknown"),
    [
        (["a.b=1", "--out", "DIR", "word"], "word"),
        (["--ou=DIR", "--lr=1"], "--lr=1"),
    ],
)
def test_what_is_neither_an_option_nor_a_setting_is_refused(words, unknown, capsys):
    with pytest.raises(SystemExit):
        parse_words(parser(), words)
    message = f"unknown argument {unknown}; settings are given as section.key=value"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["word", "a.b=1", "--lr=1"])
def test_a_verb_without_settings_says_so_with_its_own_usage(word, capsys):
    top = Parser(prog="top")
    verb = top.add_subparsers(dest="verb", required=True).add_parser("verb")
    verb.add_argument("--out")
    with pytest.raises(SystemExit) as ended:
        parse_words(top, ["verb", "--out", "DIR", word])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: top verb [-h] [--out OUT]\n")
    assert f"top verb: error: unknown argument {word}; top verb has no such option or word" in said
    args = parse_words(top, ["verb", "--out", "DIR"])
    assert vars(args) == {"verb": "verb", "out": "DIR"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "A", "--out=B"], "--out is given twice, as A and as B; expected once: leave"),
        (["--out", "A", "a.b=1", "--out", "A"], "--out is given twice, as A and as A"),
        (["--names", "a", "b", "--names", "c"], "--names is given twice, as a b and as c"),
    ],
)
def test_an_option_with_a_value_is_given_once(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_words(parser(), words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_appends_or_has_no_value_is_given_as_often_as_one_likes():
    args = parse_words(parser(), ["--expert", "a", "--expert", "b", "--json", "--json"])
    assert args.expert == ["a", "b"] and args.json


def test_the_nearest_known_word_is_named_else_all_of_them():
    assert nearest("stepz", ["steps", "tokens"]) == ", did you mean steps?"
    assert nearest("xyz", ["steps", "tokens"]) == "; known: steps, tokens"
