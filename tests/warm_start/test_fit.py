"""The label fit: it streams what the whole model computes, and it makes routers tell domains
apart."""

import shutil

import numpy as np
import pytest
import torch
from conftest import DOMAINS, WORDS

from nexus_ds.checkpoint import pieces
from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.errors import DataError
from nexus_ds.settings import RouterConfig
from nexus_ds.warm_start import fit, methods
from nexus_ds.warm_start.fit import fit_router
from nexus_ds.warm_start.fit_text import FitText
from tests.checkpoint.test_native import SIZES, WINDOWS
from tests.checkpoint.test_qwen3_next import NAMES, mixture

LAYERS = {
    "post-norm": ("olmo2", {}),
    "RoPE by kind": ("olmo3", WINDOWS),
    "no RoPE": ("exaone4", WINDOWS | dict(head_dim=12)),
    "windows": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
}


@pytest.fixture
def checkpoint(tmp_path, nexus_dir):
    shutil.copytree(nexus_dir, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def windows():
    """Windows of random words: domain d uses tokens 2 + d, 5 + d, ... so that an embedding tells
    it."""
    generator = torch.Generator().manual_seed(0)
    picks = {
        d: torch.randint(9, (6, 20), generator=generator) * 3 + 2 + i for i, d in enumerate(DOMAINS)
    }
    assert len(WORDS) == len(picks)
    return FitText(picks, {})


def own_share(checkpoint, windows):
    """Return the share of tokens at their own expert, by the whole stock model in one pass."""
    model = load_stock(checkpoint, torch.float32).eval()
    chosen = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda module, inputs, output: chosen.append(output[2][:, 0])
        )
    hits = []
    for index, text in enumerate(windows.windows.values()):
        chosen.clear()
        with torch.no_grad():
            model(input_ids=text, use_cache=False)
        hits += [(picked == index).float().mean() for picked in chosen]
    return float(torch.stack(hits).mean())


def test_the_streamed_share_is_the_whole_models_and_grows(checkpoint, windows):
    before = own_share(checkpoint, windows)
    report = fit_router(checkpoint, windows, RouterConfig(fit_steps=60), seed=0)
    after = own_share(checkpoint, windows)
    assert report.after == pytest.approx(after, abs=1e-4)
    assert after > before + 0.1
    verify_expert_embeddings(checkpoint)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_those_of_the_family(kind, tmp_path, dense_dir, windows):
    """Norms behind the block; windows that text is longer than. Text of 20 tokens."""
    family, keys = LAYERS[kind]
    mixture(tmp_path, dense_dir, family, SIZES | keys, "fp32", 1)
    text = dict(zip(NAMES, windows.windows.values(), strict=True))
    before = own_share(tmp_path / "out", FitText(text, {}))
    report = fit_router(tmp_path / "out", FitText(text, {}), RouterConfig(fit_steps=60), seed=0)
    after = own_share(tmp_path / "out", FitText(text, {}))
    assert report.after == pytest.approx(after, abs=1e-4)
    assert after > before + 0.1


def test_nothing_but_the_router_changes(checkpoint, nexus_dir, windows):
    fit_router(checkpoint, windows, RouterConfig(fit_steps=3), seed=0)
    a, b = (
        load_stock(nexus_dir, torch.float32).state_dict(),
        load_stock(checkpoint, torch.float32).state_dict(),
    )
    assert {name for name in a if not torch.equal(a[name], b[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }
    old, new = read_sidecar(nexus_dir), read_sidecar(checkpoint)
    assert np.array_equal(old.vectors, new.vectors)
    assert np.array_equal(old.centre, new.centre)


def test_the_fit_is_deterministic(tmp_path, nexus_dir, windows):
    rows = []
    for name in ("one", "two"):
        shutil.copytree(nexus_dir, tmp_path / name)
        fit_router(tmp_path / name, windows, RouterConfig(fit_steps=5), seed=3)
        rows.append(read_sidecar(tmp_path / name).projections[1]["maps.0.weight"])
    assert np.array_equal(*rows)


def test_a_domain_without_text_is_named(checkpoint, windows):
    del windows.windows["beta"]
    with pytest.raises(
        DataError,
        match="the router's warm start label_fit has no text of beta; "
        "expected text of every expert's domain",
    ):
        fit_router(checkpoint, windows, RouterConfig(), seed=0)


@pytest.mark.parametrize("kind", ["nexus_dir", "context_dir"])
@pytest.mark.parametrize("start", ["label_fit", "chunks"])
def test_windows_in_slices_give_the_same_router(
    kind, start, request, tmp_path, windows, monkeypatch
):
    """One window of a layer and seven tokens of a router at once, or all of them."""
    generator = torch.Generator().manual_seed(1)
    if start == "chunks":
        windows.chunks = {d: torch.randn(6, 8, generator=generator) for d in DOMAINS}
    rows = []
    for batch, tokens in ((1, 7), (8, 1 << 30)):
        copy = tmp_path / f"{batch}"
        shutil.copytree(request.getfixturevalue(kind), copy)
        monkeypatch.setattr(fit, "FIT_BATCH", batch)
        monkeypatch.setattr(methods, "SLICE_TOKENS", tokens)
        config = RouterConfig(fit_steps=5, warm_start=start)
        report = fit_router(copy, windows, config, seed=0)
        model = load_stock(copy, torch.float32)
        rows.append([layer.mlp.gate.weight for layer in model.model.layers])
        if kind == "context_dir":
            rows[-1] += [layer.mlp.gate.mean for layer in model.model.layers]
        rows[-1].append(torch.tensor(report.after))
    for sliced, whole in zip(*rows, strict=True):
        assert torch.allclose(sliced, whole, rtol=1e-3, atol=1e-3)


def test_features_stay_in_main_memory_where_they_would_take_much_of_a_gpu(monkeypatch):
    monkeypatch.setattr(fit, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(fit, "room_on", lambda place: 100)
    assert fit._place_for(25).type == "cuda" and fit._place_for(26).type == "cpu"


def test_hours_on_a_cpu_are_told_of_before_they_begin(checkpoint, windows, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "cpu_speed", lambda: 1000.0)
    fit_router(checkpoint, windows, RouterConfig(fit_steps=1), seed=0)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("warm start label_fit: no GPU; 0.0B active parameters and 360 tokens")
