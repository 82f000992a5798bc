"""How verbs are called: every call is one that the verb itself understands."""

import sys
from pathlib import Path

import pytest

from nexus_ds.__main__ import build_parser
from nexus_ds.command_lines import (
    EXPERT_NAME,
    TRAIN,
    embed_words,
    evaluate_words,
    extend_words,
    no_bos,
    train_command,
    train_words,
    upcycle_words,
)
from nexus_ds.config import load_config

CONFIG = load_config("demo", ["data.on_bad_row=skip", "data.bos=false", "seed=7"])
EXPERTS = {"a": Path("branches/a"), "b": Path("branches/b")}


def parsed(words):
    return build_parser(words[0]).parse_args([*words, "--out", "made"])


def test_text_is_embedded_as_it_is_trained_on():
    args = parsed(embed_words(CONFIG, ["a", "b"]))
    assert (args.data, args.domains, args.on_bad_row, args.seed) == ("demo", "a,b", "skip", 7)
    assert args.documents == CONFIG.pipeline.embedding_documents


def test_experts_are_named_after_their_domains():
    for words, model in [
        (upcycle_words(Path("seed"), EXPERTS, Path("d.safetensors"), CONFIG.data), "seed"),
        (extend_words(Path("nexus"), EXPERTS, Path("d.safetensors"), CONFIG.data), "nexus"),
    ]:
        args = parsed(words)
        assert args.expert == ["a=branches/a", "b=branches/b"]
        assert str(args.seed if words[0] == "upcycle" else args.checkpoint) == model
        assert (str(args.domains), args.data) == ("d.safetensors", "demo")


def test_models_are_scored_on_the_windows_that_training_validates_on():
    args = parsed(evaluate_words(CONFIG, {"seed": Path("s"), "N": Path("n")}, ["a"], Path("t")))
    assert (args.name, args.checkpoint) == (["seed", "N"], [Path("s"), Path("n")])
    assert (args.windows, args.length) == (
        CONFIG.training.eval_windows,
        CONFIG.data.sequence_length,
    )
    assert (args.on_bad_row, args.no_bos, str(args.cache)) == ("skip", True, "t")


def test_how_documents_begin():
    assert no_bos(CONFIG.data) == ["--no-bos"]
    assert no_bos(load_config("demo").data) == []


def test_several_ranks_are_launched_and_meet_at_a_port_of_their_own():
    words = train_words("demo", ["stage=moe"], "z.json")
    assert words == ["--deepspeed", "z.json", "--config", "demo", "stage=moe"]
    assert train_words("demo", []) == ["--config", "demo"]
    assert train_command("demo", [], 1) == [sys.executable, str(TRAIN), "--config", "demo"]
    command = train_command("demo", ["stage=moe"], 4, "z.json")
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "4"]
    assert command[-6:] == [str(TRAIN), *words]
    assert 10_000 <= int(command[command.index("--master_port") + 1]) < 20_000


@pytest.mark.parametrize(("name", "good"), [("a_b.c-1", True), ("2024", True), ("a=b", False)])
def test_names_of_experts(name, good):
    assert bool(EXPERT_NAME.fullmatch(name)) is good
