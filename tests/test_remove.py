"""The verb `remove`: what is left computes what the mixture computes without that expert's column."""

import json

import pytest
import torch
from conftest import make_nexus

from nexus_ds.__main__ import main
from nexus_ds.config import RouterConfig
from nexus_ds.model.build import load_reference, load_stock
from nexus_ds.model.checkpoint import read_sidecar

TOKENS = torch.arange(20).remainder(29).view(1, 20)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def test_the_others_renormalise_and_nothing_else_changes(tmp_path, nexus_dir, capsys):
    assert main(["remove", "--checkpoint", str(nexus_dir), "--expert", "beta", "--out", str(tmp_path / "out")]) == 0
    assert "2 experts (alpha, gamma)" in capsys.readouterr().out
    expected = load_reference(nexus_dir, torch.float32, RouterConfig())
    for layer in expected.model.layers:
        rows = layer.mlp.router.rows
        layer.mlp.router.rows = lambda dtype, rows=rows: rows(dtype)[[0, 2]]
        for stacked in ("w1", "w2", "w3"):
            parameter = getattr(layer.mlp.experts, stacked)
            parameter.data = parameter.data[[0, 2]]
    assert float((logits(load_stock(tmp_path / "out", torch.float32)) - logits(expected)).abs().max()) <= 1e-6
    sidecar = read_sidecar(tmp_path / "out")
    assert [expert.name for expert in sidecar.experts] == ["alpha", "gamma"]
    assert sidecar.lineage[-1] == {"verb": "remove", "checkpoint": "nexus", "experts": ["beta"]}


def test_json_and_several_at_once(tmp_path, nexus_dir, capsys):
    words = ["remove", "--checkpoint", str(nexus_dir), "--expert", "beta", "--expert", "alpha"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == ["gamma"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["delta"], "--expert delta: the checkpoint has alpha, beta, gamma; name one of these"),
        (["alpha", "beta", "gamma"], "0 experts would be left, but each token goes to 1; keep at least as many"),
    ],
)
def test_mistakes(tmp_path, nexus_dir, capsys, names, message):
    words = [part for name in names for part in ("--expert", name)]
    assert main(["remove", "--checkpoint", str(nexus_dir), *words, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_top_two_needs_two(tmp_path, capsys):
    checkpoint = make_nexus(tmp_path / "nexus", names=["a", "b"], top_k=2)
    assert main(["remove", "--checkpoint", str(checkpoint), "--expert", "a", "--out", str(tmp_path / "out")]) == 1
    assert "1 experts would be left, but each token goes to 2" in capsys.readouterr().err
