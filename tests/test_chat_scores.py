"""Chats are scored by the loss on their answers, by every verb, as stock transformers finds it with
the labels of all else masked."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import DOMAINS, make_nexus, save_branch, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.__main__ import main
from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings

COUNT, LENGTH = 6, 16
# the words before an answer are known, and no answer begins with one
TEMPLATE = (
    "{% for m in messages %}{{ 'sum ' if m.role == 'user' else 'proof ' }}{{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}proof {% endif %}"
)
MARKS = {"user": "sum", "assistant": "proof"}


def chats(domain, seed):
    """Return chats of one or three questions, so that windows differ in their answer tokens."""
    found = []
    for number, text in enumerate(sentences(domain, 30, seed)):
        turns = text.split(". ")[: 2 if number % 3 else 6]
        roles = ("user", "assistant") * 3
        found.append([{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)])
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two mixtures with a template, and validation text: chats, but of gamma, which is plain."""
    root = tmp_path_factory.mktemp("chats")
    for seed, name in enumerate(("nexus", "other")):
        make_nexus(root / name, seed)
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    for index, domain in enumerate(DOMAINS):
        (root / "text" / domain).mkdir(parents=True)
        rows = [{"messages": chat} for chat in chats(domain, index)]
        if domain == "gamma":
            rows = [{"text": text} for text in sentences(domain, 20, index)]
        lines = [json.dumps(row) for row in rows]
        for split in ("train", "validation"):
            (root / "text" / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def windows_of(made, domain, length):
    """Return ids and labels of the windows [W, S+1], rendered, marked and cut by hand."""
    tokenizer = AutoTokenizer.from_pretrained(made / "nexus")
    ids, labels = [], []

    def add(text, learned):
        found = tokenizer(text, add_special_tokens=False).input_ids
        ids.extend(found)
        labels.extend(found if learned else [-100] * len(found))

    for line in (made / "text" / domain / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "text" in row:
            add(row["text"], True)
        for message in row.get("messages", []):
            add(MARKS[message["role"]], False)
            add(message["content"], message["role"] == "assistant")
        ids.append(tokenizer.eos_token_id)
        # which the template doesn't write after an answer
        labels.append(tokenizer.eos_token_id if "text" in row else -100)
    blocks = (len(ids) - 1) // length
    starts = [length * (n * blocks // COUNT) for n in range(COUNT)]
    return [torch.tensor([v[s : s + length + 1] for s in starts]) for v in (ids, labels)]


def reference(made, checkpoint, length):
    """Return loss and answer tokens by domain: one mean over all the answer tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    losses, counts = {}, {}
    for domain in DOMAINS:
        ids_WS, labels_WS = windows_of(made, domain, length)
        with torch.no_grad():
            losses[domain] = float(model(input_ids=ids_WS, labels=labels_WS).loss)
        counts[domain] = (labels_WS[:, 1:] >= 0).sum(1)
    assert counts["alpha"].min() < counts["alpha"].max(), "any mean over windows would do"
    assert counts["gamma"].tolist() == [length] * COUNT
    return losses, counts


def evaluation(made, out, *more):
    words = ["evaluate", "--data", str(made / "text"), "--windows", str(COUNT), "--out", str(out)]
    words += ["--length", str(LENGTH), "--checkpoint", str(made / "nexus")]
    return [*words, *more]


def test_evaluate_scores_answers_alone(made, tmp_path, capsys):
    words = ["--checkpoint", str(made / "other"), "--before", "nexus", "--chat"]
    assert main(evaluation(made, tmp_path / "out", *words)) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("nexus", "other"):
        losses, counts = reference(made, made / name, LENGTH)
        assert summary["loss"][name] == pytest.approx(losses, abs=1e-6)
        for domain, change in summary["change"]["domains"].items():
            side = "before" if name == "nexus" else "after"
            assert change[side] == pytest.approx(math.exp(losses[domain]), rel=1e-5)
    found = summary["window_labels"]["other"]
    assert found == {domain: [n for n in counts[domain].tolist() if n] for domain in found}
    assert list(found) == ["alpha", "beta"], "gamma is plain text"
    total = int(counts["alpha"].sum())
    assert f"Of chats the answers alone count: {total:,} tokens of alpha, " in said
    # a limit judges by the same numbers
    assert main(evaluation(made, tmp_path / "bad", *words, "--fail-if-worse", "0%")) in (0, 3)
    again = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert again["change"]["domains"] == summary["change"]["domains"]


def test_text_without_chats_is_scored_as_ever(made, tmp_path):
    words = ["--domains", "gamma"]
    assert main(evaluation(made, tmp_path / "plain", *words)) == 0
    assert main(evaluation(made, tmp_path / "chat", *words, "--chat")) == 0
    found = []
    for name in ("plain", "chat"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert "window_labels" not in summary
        found.append([summary["window_loss"], summary["loss"], summary["routing"]])
    assert found[0] == found[1]


def test_chats_want_the_option(made, tmp_path, capsys):
    assert main(evaluation(made, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "a chat (messages), expected text; data.chat=true reads chats" in said
    assert "--chat of evaluate and remove" in said


def test_models_of_other_templates_read_their_own_windows(made, tmp_path, capsys):
    other = shutil.copytree(made / "nexus", tmp_path / "other")
    # the same words in another place
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("'sum '", "'sum lemma '"))
    words = ["--checkpoint", str(other), "--chat"]
    assert main(evaluation(made, tmp_path / "out", *words)) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "2 different tokenizers or chat templates" in summary["warnings"][-1]
    assert summary["loss"]["nexus"]["alpha"] != summary["loss"]["other"]["alpha"]
    assert summary["change"] is None
    words += ["--fail-if-worse", "3%"]
    assert main(evaluation(made, tmp_path / "not", *words)) == 1
    assert "with --chat also of one chat template" in capsys.readouterr().err
    (other / "chat_template.jinja").unlink()
    assert main(evaluation(made, tmp_path / "not", *words)) == 1
    assert f"{other}: the tokenizer has no chat template" in capsys.readouterr().err


def judged(made, out, verdict):
    """Hold a verdict of a change from `nexus` to `out` to the reference. 64: all that they read."""
    for side, checkpoint in (("before", made / "nexus"), ("after", out)):
        losses, _ = reference(made, checkpoint, 64)
        for domain in DOMAINS:
            expected = pytest.approx(math.exp(losses[domain]), rel=1e-5)
            assert verdict["domains"][domain][side] == expected
        mean = sum(losses.values()) / len(losses)
        assert verdict["all"][side] == pytest.approx(math.exp(mean), rel=1e-5)


def test_extend_judges_by_answers(made, tmp_path, capsys):
    branch = save_branch(made / "nexus", tmp_path / "delta")
    vectors = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    write_domain_embeddings(
        tmp_path / "d.safetensors",
        DomainEmbeddings(["delta"], vectors, "tiny", "1" * 64, 16, 4, {"delta": 5}, 0, "nowhere"),
    )
    words = ["extend", "--checkpoint", str(made / "nexus"), "--expert", f"delta={branch}"]
    words += ["--domains", str(tmp_path / "d.safetensors"), "--data", str(made / "text")]
    words += ["--verdict", "--scored", ",".join(DOMAINS), "--windows", str(COUNT)]
    words += ["--no-refit", "--json", "--out", str(tmp_path / "out"), "data.chat=true"]
    assert main(words) == 0
    judged(made, tmp_path / "out", json.loads(capsys.readouterr().out)["verdict"])


def test_remove_judges_by_answers(made, tmp_path, capsys):
    words = ["remove", "--checkpoint", str(made / "nexus"), "--expert", "beta"]
    words += ["--data", str(made / "text"), "--windows", str(COUNT), "--json"]
    assert main([*words, "--out", str(tmp_path / "not")]) == 1
    assert "--chat of evaluate and remove" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()
    assert main([*words, "--chat", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    judged(made, tmp_path / "out", result["verdict"])
    assert "--chat" in result["next"].split()
