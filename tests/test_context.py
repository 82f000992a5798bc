"""The verbs on a checkpoint whose router reads running means: evaluate, generate, inspect,
remove."""

import json

import pytest
import torch

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.qwen2_moe import mean_name
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.data.tokenizer import open_tokenizer


def test_evaluate_scores_and_meters_it(context_dir, text_folder, tmp_path, capsys):
    words = [
        "--checkpoint",
        str(context_dir),
        "--data",
        str(text_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["evaluate", *words, "--windows", "6", "--length", "16", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in summary["routing"].values())


@torch.no_grad()
def test_generate_equals_the_whole_pass(context_dir, capsys):
    assert (
        main(["generate", "--checkpoint", str(context_dir), "tree leaf", "--tokens", "6", "--json"])
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    tokenizer, model = open_tokenizer(context_dir), load_model(context_dir, "fp32")
    ids = tokenizer("tree leaf", return_tensors="pt").input_ids
    for _ in range(6):
        ids = torch.cat(
            [ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
        )
    assert "tree leaf" + answer["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_inspect_tells_what_it_is(context_dir, capsys):
    assert main(["inspect", str(context_dir), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "nexus_moe" and facts["router"]["input"] == "context"
    assert facts["router"]["row_norm"] == "fixed" and facts["router"]["rows"] == "equal to P(D)"


def test_remove_keeps_its_form(context_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["remove", "--checkpoint", str(context_dir), "--expert", "beta", "--out", str(out)])
        == 0
    )
    verify_expert_embeddings(out)
    assert read_sidecar(out).router.input == "context"
    assert torch.equal(
        TensorReader(out).read(mean_name(1)), TensorReader(context_dir).read(mean_name(1))
    )
    assert torch.isfinite(load_model(out, "fp32")(input_ids=torch.arange(9)[None]).logits).all()
