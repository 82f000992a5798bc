"""How verbs are called: every call is one that the verb itself understands."""

import shlex
import sys
from pathlib import Path

import pytest

from nexus_ds.__main__ import build_parser
from nexus_ds.command_lines import (
    DS_JSON,
    EXPERT_NAME,
    TRAIN,
    embed_words,
    evaluate_words,
    extend_words,
    next_evaluation,
    next_extension,
    next_training,
    next_words,
    no_bos,
    train_command,
    train_words,
    typed_training,
    upcycle_words,
)
from nexus_ds.config import load_config
from nexus_ds.settings import DataConfig

READING = ["data.on_bad_row=skip", "data.bos=false", "data.chat=true"]
CONFIG = load_config("demo", [*READING, "seed=7"])
EXPERTS = {"a": Path("branches/a"), "b": Path("branches/b")}


def parsed(words):
    return build_parser(words[0]).parse_args([*words, "--out", "made"])


def parsed_generate(words):
    return build_parser("generate").parse_args(words)


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
    assert args.chat
    plain = evaluate_words(load_config("demo"), {"s": Path("s")}, ["a"], Path("t"))
    assert not parsed(plain).chat


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


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a_b.c-1", True),
        ("2024", True),
        ("a=b", False),
        # of a file's name, 255 at most, its lock and its temporary name take 55
        ("x" * 200, True),
        ("x" * 201, False),
    ],
)
def test_names_of_experts(name, good):
    assert bool(EXPERT_NAME.fullmatch(name)) is good


def test_printed_commands_are_quoted_for_a_shell():
    out = Path("a b")
    words = shlex.split(next_training(out, "my data", "demo", "moe"))
    assert words == [
        "deepspeed",
        str(TRAIN),
        "--deepspeed",
        str(DS_JSON),
        "--config",
        "demo",
        "stage=moe",
        "model.path=a b",
        "data.path=my data",
        "output=a b-trained",
    ]
    words = shlex.split(next_evaluation(out, DataConfig(path="my data")))
    assert words[2:] == ["--checkpoint", "a b", "--data", "my data", "--out", "a b-report"]
    spoken = ["nexus-ds", "generate", "--checkpoint", "a b", "The first thing"]
    assert shlex.split(next_words(out, "The first thing", mixture=False)) == spoken
    routed = shlex.split(next_words(out, "it's $x", mixture=True))
    assert routed == [*spoken[:4], "it's $x", "--show-routing"]
    assert parsed_generate(routed[1:]).prompt == "it's $x"
    without = shlex.split(next_words(out, "The first thing", mixture=False, bos=False))
    assert without == [*spoken, "--no-bos"] and parsed_generate(without[1:]).no_bos
    words = shlex.split(next_extension(out))
    assert words[:4] == ["nexus-ds", "extend", "--checkpoint", "a b"]
    assert parsed(words[1:-2]).expert == ["NAME=DIR"] and parsed(words[1:-2]).base is None
    assert parsed(shlex.split(next_extension(out, seed=True))[1:-2]).base == "SEED"
    assert parsed(words[1:-2]).share is None
    assert parsed(shlex.split(next_extension(out, kept=True))[1:-2]).share == 0


def test_printed_commands_name_files_that_are_there(tmp_path, monkeypatch):
    """In a clone as the README does, elsewhere by their whole paths; another file of that name is
    not train.py."""
    clone = TRAIN.parents[1]
    monkeypatch.chdir(clone)
    assert shlex.split(typed_training([])) == [
        "deepspeed",
        "nexus_ds/train.py",
        "--deepspeed",
        "ds_configs/z3.json",
    ]
    (tmp_path / "nexus_ds").mkdir()
    (tmp_path / "nexus_ds" / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert shlex.split(typed_training(["seed=1"])) == [
        "deepspeed",
        str(TRAIN),
        "--deepspeed",
        str(DS_JSON),
        "seed=1",
    ]
    assert shlex.split(typed_training([], launcher=["srun", "python"], ds_json="x.json"))[:5] == [
        "srun",
        "python",
        str(TRAIN),
        "--deepspeed",
        "x.json",
    ]
