"""The verb generate: the likeliest tokens by default, reproducible draws, files of prompts, routes
in colours, marks, JSON and on a page, bad options."""

import argparse
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import add_token, make_nexus
from safetensors.torch import save_file

from nexus_ds.checkpoint import pieces
from nexus_ds.commands import generate
from nexus_ds.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    UnsupportedModelError,
)
from nexus_ds.generation import continuation

SGR = re.compile(r"\x1b\[[0-9;]*m")


def arguments(directory, *words):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args(["--checkpoint", str(directory), *words])


def run(capsys, directory, *words):
    assert generate.run(arguments(directory, *words)) == 0
    return capsys.readouterr().out


def greedy(directory, text, count):
    """Return the ids of a prompt and the argmax of transformers' logits, one after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids, model, tokenizer.decode(ids[0], skip_special_tokens=True)


def test_greedy_is_the_argmax_of_the_model(nexus_dir, capsys):
    answer = json.loads(run(capsys, nexus_dir, "tree leaf", "--tokens", "4", "--json"))
    _, _, whole = greedy(nexus_dir, "tree leaf", 4)
    assert "tree leaf" + answer["text"] == whole
    assert answer["tokens"] == 4 and answer["tokens_per_second"] > 0
    assert answer.keys() == {"prompt", "text", "tokens", "tokens_per_second"}
    # as text, the prompt first; options may stand on both sides of it
    assert run(capsys, nexus_dir, "--tokens", "4", "tree leaf") == whole + "\n"


def test_seeds_repeat_and_differ(dense_dir, capsys):
    draws = [
        run(capsys, dense_dir, "tree", "--temperature", "2", "--tokens", "12", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert draws[0] == draws[1] != draws[2] and draws[0].startswith("tree")


def test_a_small_top_p_is_greedy(dense_dir, capsys):
    words = ["tree", "--tokens", "6"]
    drawn = run(capsys, dense_dir, *words, "--temperature", "2", "--top-p", "1e-6")
    assert drawn == run(capsys, dense_dir, *words)


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
        (["tree", "--batch", "0"], "--batch: expected a number above 0, found 0"),
        (
            ["tree", "--temperature", "-1"],
            "--temperature: expected 0 or a positive number, found -1.0",
        ),
        (
            ["tree", "--temperature", "nan"],
            "--temperature: expected 0 or a positive number, found nan",
        ),
        (["tree", "--top-p", "0"], "--top-p: expected a number above 0, at most 1, found 0.0"),
        (["tree", "--top-p", "nan"], "--top-p: expected a number above 0, at most 1, found nan"),
        (["tree", "--top-p", "0.9"], "--top-p draws tokens; give --temperature above 0 with it"),
        (["tree", "--layer", "0"], "--layer says whose routing is shown; give --show-routing or"),
        ([], "give one prompt, or --prompts FILE with one a line"),
        (["tree", "--prompts", "x"], "give one prompt, or --prompts FILE with one a line"),
        (["tree", "--chat"], "the prompt: the tokenizer has no chat template; leave --chat out"),
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
    assert generate.run(arguments(nexus_dir, *words)) == 0
    found = capsys.readouterr()
    assert found.out == whole
    assert "generate: whole it takes" in found.err and "it runs layer by layer" in found.err
    assert "generate: 6/6 tokens" in found.err


# Many prompts, and conversations -----------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("tree leaf\nship wind mast rope tide\n\nsum\n")
    return path


DRAWN = ["--tokens", "7", "--temperature", "1.5"]


def test_a_file_gives_what_each_prompt_gives_alone(nexus_dir, prompts, capsys):
    words = ["--prompts", str(prompts), "--batch", "2", *DRAWN]
    assert generate.run(arguments(nexus_dir, *words, "--json")) == 0
    found = capsys.readouterr()
    answers = [json.loads(line) for line in found.out.splitlines()]
    assert "generate: 3/3 prompts" in found.err
    texts = []
    for number, answer in enumerate(answers):
        seed = ["--seed", str(number)]
        alone = json.loads(run(capsys, nexus_dir, answer["prompt"], *DRAWN, *seed, "--json"))
        assert answer["text"] == alone["text"] and answer["tokens"] == alone["tokens"]
        texts.append(answer["prompt"] + answer["text"])
    assert [answer["prompt"] for answer in answers][1:] == ["ship wind mast rope tide", "sum"]
    assert run(capsys, nexus_dir, *words) == "".join(text + "\n\n" for text in texts)


def test_the_last_prompt_is_refused_before_the_first_is_begun(nexus_dir, prompts, capsys):
    prompts.write_text("tree\n" + "leaf " * 64)
    with pytest.raises(ConfigError, match=r"prompts.txt:2 has 64 tokens, the model reads 64"):
        run(capsys, nexus_dir, "--prompts", str(prompts), "--batch", "1")
    assert capsys.readouterr().out == ""


def test_a_conversation_shows_the_answer_alone(nexus_dir, tmp_path, prompts, capsys):
    copy = shutil.copytree(nexus_dir, tmp_path / "chatty")
    template = "{% for m in messages %}{{ m.content }} <|endoftext|> {% endfor %}tree"
    (copy / "chat_template.jinja").write_text(template)
    _, _, whole = greedy(copy, "leaf <|endoftext|> tree", 4)
    words = ["--tokens", "4"]
    assert "leaf tree" + run(capsys, copy, "leaf", "--chat", *words) == whole + "\n"
    talk = [{"role": "user", "content": "leaf"}]
    rows = [json.dumps({"messages": talk}), json.dumps({"prompt": "leaf"})]
    file = prompts.with_suffix(".jsonl")
    file.write_text("\n".join(rows))
    answer, plain = run(capsys, copy, "--prompts", str(file), "--json", *words).splitlines()
    answer = json.loads(answer)
    assert answer["prompt"] == talk and "leaf tree" + answer["text"] == whole
    assert "leaf" + json.loads(plain)["text"] == greedy(copy, "leaf", 4)[2]


# Routes ------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    return make_nexus(tmp_path / "nexus", top_k=2)


@pytest.mark.parametrize("layer", [None, 1])
def test_routes_are_those_of_the_models_router_logits(two, capsys, layer):
    words = ["tree leaf", "--tokens", "5", "--show-routing"]
    words += [] if layer is None else ["--layer", str(layer)]
    answer = json.loads(run(capsys, two, *words, "--json"))
    ids, model, whole = greedy(two, "tree leaf", 5)
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    weight_LTE = torch.stack(logits).softmax(-1)
    routing = answer["routing"]
    assert routing["experts"] == routing["domains"] == ["alpha", "beta", "gamma"]
    assert routing["layers"] == [0, 1]
    assert [token["id"] for token in routing["tokens"]] == ids[0].tolist()
    assert "".join(token["text"] for token in routing["tokens"]) == whole
    assert [token["added"] for token in routing["tokens"]] == [False] * 2 + [True] * 5
    for place, token in enumerate(routing["tokens"]):
        weight_LE = weight_LTE[:, place]
        assert token["experts"] == weight_LE.argmax(-1).tolist()
        assert token["weights"] == pytest.approx(weight_LE.amax(-1).tolist(), abs=1e-5)
    marked = run(capsys, two, *words)
    text, _, legend = marked.partition("\n\n")
    assert re.sub(r"\[\w+ \d\.\d\d\]", "", text) == whole and "\x1b" not in marked
    assert ("in layer 1" if layer else "most of 2 layers") in legend.splitlines()[0]
    shown = re.findall(r"\[(\w+) (\d\.\d\d)\]", text)
    if layer:
        first, *_, last = weight_LTE[1].max(-1).indices.tolist()
        assert shown[0][0] == ["alpha", "beta", "gamma"][first]
        assert shown[-1][0] == ["alpha", "beta", "gamma"][last]


def test_colours_on_a_terminal_alone(two, capsys, monkeypatch):
    words = ["tree leaf", "--tokens", "5", "--show-routing"]
    plain = run(capsys, two, *words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run(capsys, two, *words)
    assert len(SGR.findall(coloured)) > 2 * 7
    text, legend = SGR.sub("", coloured).split("\n\n")
    assert text == re.sub(r"\[\w+ \d\.\d\d\]", "", plain.split("\n\n")[0])
    assert "alpha" in legend and "mean weight" in legend
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, two, *words) == plain


def test_a_page_without_marks_in_the_text(two, prompts, capsys, tmp_path):
    out = tmp_path / "page.html"
    words = ["--prompts", str(prompts), "--tokens", "3"]
    text = run(capsys, two, *words)
    assert run(capsys, two, *words, "--html", str(out)) == text
    page = out.read_text()
    assert page.count("<h2>") == 3 and "Where nexus sends tokens" in page
    assert len(re.findall(r'title="layer 0: \w+ \d\.\d\d\nlayer 1: ', page)) >= 8
    with pytest.raises(OutputExistsError, match=r"page.html exists already; give another --html"):
        run(capsys, two, *words, "--html", str(out))


def test_models_without_a_sidecar_have_numbers_for_names(uneven_moe_dir, capsys):
    words = ["tree", "--tokens", "2", "--show-routing"]
    answer = json.loads(run(capsys, uneven_moe_dir, *words, "--json"))["routing"]
    assert answer["experts"] == [f"expert {n}" for n in range(4)] and answer["layers"] == [1]
    with pytest.raises(ConfigError, match="--layer 0: no router there; layers with one: 1 to 1"):
        run(capsys, uneven_moe_dir, *words, "--layer", "0")


def test_dense_models_have_no_routing(dense_dir, capsys):
    for words in (["--show-routing"], ["--html", "page.html"]):
        with pytest.raises(UnsupportedModelError, match=r"llama without routers, of .*or give"):
            run(capsys, dense_dir, "tree", *words)


def claims(directory, shape=(2, 4), **config):
    """Write a mixture that is nothing but one router's header and what config.json says."""
    stated = {"model_type": "qwen2_moe", "num_hidden_layers": 1, **config}
    (directory / "config.json").write_text(json.dumps(stated))
    gate = {"model.layers.0.mlp.gate.weight": torch.zeros(shape)}
    save_file(gate, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "deepseek_v2", "n_routed_experts": 2},
        {"num_experts": 2, "num_hidden_layers": 2**62},
        {"num_experts": "x"},
    ],
)
def test_layers_and_experts_of_a_legend_are_those_that_have_weights(tmp_path, config):
    """Found by reading config.json alone: KeyError, a loop without end, TypeError."""
    legend = generate._legend(claims(tmp_path, **config), None)
    assert (legend.experts, legend.layers) == (["expert 0", "expert 1"], [0])


@pytest.mark.parametrize("shape", [(2,), (2**40, 0), (2, 2, 1)])
def test_a_router_without_a_row_for_each_expert_is_named(tmp_path, shape):
    with pytest.raises(CheckpointError) as caught:
        generate._legend(claims(tmp_path, shape), None)
    assert str(caught.value) == (
        f"{tmp_path}: model.layers.0.mlp.gate.weight has the shape {shape}, expected a row for "
        "each expert; the file is damaged, fetch or save it again"
    )


# As it comes -------------------------------------------------------------------------------------


def test_text_is_printed_token_by_token(nexus_dir, capsys, monkeypatch):
    whole = run(capsys, nexus_dir, "tree leaf", "--tokens", "4")
    seen = []
    take = continuation._Row.take
    monkeypatch.setattr(
        continuation._Row,
        "take",
        lambda row, token: (take(row, token), seen.append(capsys.readouterr().out)),
    )
    rest = run(capsys, nexus_dir, "tree leaf", "--tokens", "4")
    assert len(seen) == 4 and all(seen) and rest == "\n"
    assert "".join(seen) + rest == whole


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_nothing_is_printed_twice_where_memory_runs_out(
    nexus_dir, capsys, monkeypatch, routed, other
):
    """In the middle of a text; begun anew, it is the same one, or a rounding made it another."""
    words = ["tree leaf", "--tokens", "6", *["--show-routing"] * routed]
    whole = run(capsys, nexus_dir, *words)
    calls = []
    tell = continuation._Row._tell_up_to

    def fail_once(row, end):
        calls.append(end)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if other and len(calls) == 2 and row.pieces.ids:
            row.pieces.tokenizer = Louder(row.pieces.tokenizer)
        tell(row, end)

    monkeypatch.setattr(continuation._Row, "_tell_up_to", fail_once)
    found = run(capsys, nexus_dir, *words)
    if not other:
        assert found == whole
    else:
        before, _, after = found.partition("\n")
        assert "!" in before and whole.endswith(after) and len(after) > 20


class Louder:
    """A tokenizer that writes another text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids, **how):
        return self.tokenizer.decode(ids, **how) + "!" * len(ids)


def test_what_a_model_writes_moves_no_cursor(nexus_dir, capsys, monkeypatch):
    voice = generate._Voice(None)
    assert voice.safe("\x1b[2J") == "\x1b[2J", "a file gets the text as it is"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate._Voice(None).safe("\x1b[2Jx\n") == "\\u001b[2Jx\n"
