"""The verb generate: the likeliest tokens by default, reproducible draws, room in the context, bad
options."""

import argparse
import json
import shutil

import pytest
import torch
from conftest import add_token

from nexus_ds.checkpoint import pieces
from nexus_ds.commands import generate
from nexus_ds.errors import ConfigError


def run(capsys, directory, *words):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    assert generate.run(parser.parse_args(["--checkpoint", str(directory), *words])) == 0
    return capsys.readouterr().out


def test_greedy_is_the_argmax_of_the_model(nexus_dir, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = json.loads(run(capsys, nexus_dir, "tree leaf", "--tokens", "4", "--json"))
    tokenizer = AutoTokenizer.from_pretrained(nexus_dir, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(nexus_dir, local_files_only=True).eval()
    ids = tokenizer("tree leaf", return_tensors="pt").input_ids
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer["text"] == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    assert answer["tokens"] == 4 and answer["tokens_per_second"] > 0


def test_seeds_repeat_and_differ(dense_dir, capsys):
    draws = [
        run(capsys, dense_dir, "tree", "--temperature", "2", "--tokens", "12", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert draws[0] == draws[1] != draws[2] and draws[0].startswith("tree")


def test_stops_at_the_end_of_the_context(dense_dir, capsys):
    prompt = " ".join(["tree"] * 62)
    assert json.loads(run(capsys, dense_dir, prompt, "--tokens", "40", "--json"))["tokens"] <= 2


def test_tokens_beyond_the_embedding_are_refused(nexus_dir, tmp_path, capsys):
    copy = shutil.copytree(nexus_dir, tmp_path / "large")
    add_token(copy)
    assert run(capsys, copy, "tree leaf").startswith("tree leaf")
    with pytest.raises(
        ConfigError,
        match=r"the prompt has the token id 31, the model embeds 31; .* the tokenizer that",
    ):
        run(capsys, copy, "tree <|im_end|> leaf")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tree", "--tokens", "0"], "--tokens: expected a number above 0, found 0"),
        (
            ["tree", "--temperature", "-1"],
            "--temperature: expected 0 or a positive number, found -1.0",
        ),
        (
            ["tree", "--temperature", "nan"],
            "--temperature: expected 0 or a positive number, found nan",
        ),
        ([""], "the prompt has no token; write at least one word"),
        ([" ".join(["tree"] * 64)], "the prompt has 64 tokens, the model reads 64; shorten it"),
    ],
)
def test_bad_options(dense_dir, capsys, words, message):
    with pytest.raises(ConfigError, match=message):
        run(capsys, dense_dir, *words)


def test_a_model_that_does_not_fit_gives_the_same_text_layer_by_layer(
    nexus_dir, monkeypatch, capsys
):
    words = ["tree leaf", "--tokens", "6"]
    whole = run(capsys, nexus_dir, *words)
    monkeypatch.setattr(pieces, "room_on", lambda place: 1)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    assert generate.run(parser.parse_args(["--checkpoint", str(nexus_dir), *words])) == 0
    found = capsys.readouterr()
    assert found.out == whole
    assert "generate: whole it takes" in found.err and "it runs layer by layer" in found.err
    assert "generate: 6/6 tokens" in found.err
