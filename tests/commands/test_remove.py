"""The verb `remove`: what is left computes what the mixture computes without that expert's
column."""

import itertools
import json
import math
import shutil

import numpy as np
import oracle
import pytest
import torch
from conftest import make_nexus, train_shared_gates

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.records import RemoveStep
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.data.corpora import open_source, token_files, windows
from nexus_ds.evaluation.perplexity import score
from nexus_ds.settings import RouterConfig

TOKENS = torch.arange(20).remainder(29).view(1, 20)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def test_the_others_renormalise_and_nothing_else_changes(tmp_path, nexus_dir, capsys):
    assert (
        main(
            [
                "remove",
                "--checkpoint",
                str(nexus_dir),
                "--expert",
                "beta",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "2 experts (alpha, gamma)" in capsys.readouterr().out
    expected = oracle.load(nexus_dir, torch.float32, RouterConfig())
    for layer in expected.model.layers:
        rows = layer.mlp.router.rows
        layer.mlp.router.rows = lambda dtype, rows=rows: rows(dtype)[[0, 2]]
        for stacked in ("w1", "w2", "w3"):
            parameter = getattr(layer.mlp.experts, stacked)
            parameter.data = parameter.data[[0, 2]]
    assert (
        float((logits(load_stock(tmp_path / "out", torch.float32)) - logits(expected)).abs().max())
        <= 1e-6
    )
    sidecar = read_sidecar(tmp_path / "out")
    assert [expert.name for expert in sidecar.experts] == ["alpha", "gamma"]
    assert sidecar.lineage[-1] == RemoveStep(checkpoint="nexus", experts=["beta"])


def test_a_shared_gate_that_was_trained_elsewhere(tmp_path, nexus_dir, capsys):
    odd = shutil.copytree(nexus_dir, tmp_path / "odd")
    train_shared_gates(odd)
    assert (
        main(
            ["remove", "--checkpoint", str(odd), "--expert", "beta", "--out", str(tmp_path / "out")]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert (
        "layer 0: the shared expert's gate has weights up to 1.0e-02" in said
        and "Traceback" not in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_json_and_several_at_once(tmp_path, nexus_dir, capsys):
    words = ["remove", "--checkpoint", str(nexus_dir), "--expert", "beta", "--expert", "alpha"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == ["gamma"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["beta", "beta"], "--expert names one twice: beta, beta; name each once"),
        (["delta"], "--expert delta: the checkpoint has alpha, beta, gamma; name one of these"),
        (
            ["alpha", "beta", "gamma"],
            "0 experts would be left, but each token goes to 1; keep at least as many",
        ),
    ],
)
def test_mistakes(tmp_path, nexus_dir, capsys, names, message):
    words = [part for name in names for part in ("--expert", name)]
    assert (
        main(["remove", "--checkpoint", str(nexus_dir), *words, "--out", str(tmp_path / "out")])
        == 1
    )
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_top_two_needs_two(tmp_path, capsys):
    checkpoint = make_nexus(tmp_path / "nexus", names=["a", "b"], top_k=2)
    assert (
        main(
            [
                "remove",
                "--checkpoint",
                str(checkpoint),
                "--expert",
                "a",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert "1 experts would be left, but each token goes to 2" in capsys.readouterr().err


# Before and after ---------------------------------------------------------------------------------


def removed(nexus_dir, text_folder, out, *more):
    words = ["remove", "--checkpoint", str(nexus_dir), "--expert", "beta", "--out", str(out)]
    windows = [] if "--windows" in more else ["--windows", "24"]
    return main([*words, "--data", str(text_folder), *windows, *more])


@pytest.fixture(scope="module")
def losses(nexus_dir, text_folder, tmp_path_factory):
    """Loss of each of 24 windows, of the mixture with and without beta, by the scoring itself."""
    root = tmp_path_factory.mktemp("removed")
    assert (
        main(
            [
                "remove",
                "--checkpoint",
                str(nexus_dir),
                "--expert",
                "beta",
                "--out",
                str(root / "out"),
            ]
        )
        == 0
    )
    source = open_source(str(text_folder))
    files = token_files(source, ["alpha", "beta", "gamma"], "validation", nexus_dir, root / "cache")
    # 64: all that this model reads
    text = {domain: windows(file, 24, 64) for domain, file in files.items()}
    return [score(path, text).window_loss for path in (nexus_dir, root / "out")]


def interval(losses, domain):
    """Return the 95% interval of the paired difference in nats over ten groups: t of 9 degrees of
    freedom is 2.2622."""
    difference_W = losses[1][domain] - losses[0][domain]
    mean, bounds = difference_W.mean(), [24 * group // 10 for group in range(11)]
    sums = np.array([(difference_W[a:b] - mean).sum() for a, b in itertools.pairwise(bounds)])
    noise = 2.2622 * math.sqrt(10 / 9 * (sums**2).sum()) / 24
    return mean - noise, mean + noise


def test_table_before_and_after(tmp_path, nexus_dir, text_folder, losses, capsys):
    assert removed(nexus_dir, text_folder, tmp_path / "out", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    before, after = losses
    assert list(verdict["domains"]) == ["alpha", "beta", "gamma"]
    for domain, entry in verdict["domains"].items():
        assert entry["before"] == pytest.approx(math.exp(before[domain].mean()))
        assert entry["after"] == pytest.approx(math.exp(after[domain].mean()))
        assert entry["interval"] == pytest.approx(np.expm1(interval(losses, domain)), abs=1e-7)
    assert removed(nexus_dir, text_folder, tmp_path / "again", "--scored", "gamma,alpha") == 0
    lines = capsys.readouterr().out.splitlines()
    (table,) = [n for n, line in enumerate(lines) if line.startswith("perplexity of")]
    assert [line.split()[0] for line in lines[table + 1 : -1]] == ["gamma", "alpha", "all"]
    assert all(" ± " in line for line in lines[table + 1 : -1])


def test_worse_than_allowed_is_an_exit_code_of_its_own(
    tmp_path, nexus_dir, text_folder, losses, capsys
):
    low, high = interval(losses, "beta")  # nats, and as good as a share: they are tiny
    assert low > 1e-5, "this model gains by losing its expert: the test needs another one"
    assert (
        removed(nexus_dir, text_folder, tmp_path / "good", "--fail-if-worse", f"{110 * high:.6f}%")
        == 0
    )
    assert "--fail-if-worse" not in capsys.readouterr().err
    assert (
        removed(nexus_dir, text_folder, tmp_path / "open", "--fail-if-worse", f"{110 * low:.6f}%")
        == 0
    )
    said = capsys.readouterr().err
    assert "nexus-ds remove: 24 windows do not decide --fail-if-worse" in said and "beta (+" in said
    assert (
        removed(nexus_dir, text_folder, tmp_path / "bad", "--fail-if-worse", f"{90 * low:.6f}%")
        == 3
    )
    said = capsys.readouterr().err
    assert "beta (+" in said and f"{tmp_path / 'bad'} is written all the same" in said
    assert [expert.name for expert in read_sidecar(tmp_path / "bad").experts] == ["alpha", "gamma"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fail-if-worse", "3"], "--fail-if-worse '3': expected a percentage such as 3%"),
        (["--windows", "0"], "--windows: expected a number of at least 1, found 0"),
        (
            ["--scored", "alpha,alpha"],
            "--scored names a domain twice: alpha, alpha; name each once",
        ),
        (["--scored", "alpha,delta"], "no domain delta; found: alpha, beta, gamma"),
    ],
)
def test_mistakes_of_the_table_come_before_the_checkpoint(
    tmp_path, nexus_dir, text_folder, capsys, more, message
):
    assert removed(nexus_dir, text_folder, tmp_path / "out", *more) == 1
    said = capsys.readouterr().err
    assert message in said and (
        "delta" not in message or "name those that are there with --scored A,B" in said
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("alpha,alpha", "--scored names a domain twice: alpha, alpha; name each once"),
        ("delta", "--scored needs --data DIR, the text to score; or leave it out"),
    ],
)
def test_domains_of_a_table_without_text(tmp_path, nexus_dir, capsys, names, message):
    words = ["remove", "--checkpoint", str(nexus_dir), "--expert", "beta"]
    assert main([*words, "--out", str(tmp_path / "out"), "--scored", names]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_limit_needs_text(tmp_path, nexus_dir, capsys):
    words = [
        "remove",
        "--checkpoint",
        str(nexus_dir),
        "--expert",
        "beta",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--fail-if-worse", "3%"]) == 1
    assert "--fail-if-worse needs --data DIR, the text to judge by" in capsys.readouterr().err
