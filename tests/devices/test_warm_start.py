"""Every warm start on a pretend GPU: the shares of the CPU, one device, and what is waited for.

These run once, over some thousand tokens; a wait a step is borne where drawing the same tokens on
any device asks for it. What must not come back is a wait for each number that is looked at.
"""

import pytest
import torch
from conftest import DOMAINS, make_linear, make_nexus
from pretend import GPU, gpu

from nexus_ds.checkpoint.projection_module import expert_embeddings, state_of
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import TensorReader, overwrite
from nexus_ds.model.router import Projection
from nexus_ds.settings import RouterConfig
from nexus_ds.warm_start import fit
from nexus_ds.warm_start.fit_text import FitText

CONTEXT = {"router_input": "context", "row_norm": "fixed"}
LAYERS, STEPS, WINDOWS, BATCHES = 2, 3, 4, 2
TEMPERATURE = {"methods.temperature: to host": LAYERS}
WHITENED = {"methods.whitener: value": LAYERS}
# Which tokens, for their labels and for their inputs.
LABELS = {
    "methods._label_loss: to device": STEPS * LAYERS,
    "methods.rows: to device": STEPS * LAYERS,
}
CHUNKS = {
    **WHITENED,
    **LABELS,
    **TEMPERATURE,
    "methods._chunk_loss: to device": STEPS * LAYERS,
    "methods.rows: to device": 2 * STEPS * LAYERS,
}
# What `methods` waits for; how the layers are read and run is the same for all.
CASES = {
    ("label_fit", "nexus"): LABELS,
    ("label_fit", "context"): LABELS,
    ("label_fit", "linear"): LABELS,
    ("hidden_mean", "linear"): {"methods.means: size": LAYERS},
    ("ridge", "linear"): {
        "methods.ridge_embeddings: value": LAYERS,
        **TEMPERATURE,
    },
    ("chunks", "nexus"): CHUNKS,
    ("chunks", "context"): CHUNKS,
    ("closed_form", "straight"): {
        **WHITENED,
        **TEMPERATURE,
        "methods.means: size": 2 * LAYERS,
        "methods._closed_form: value": LAYERS,
    },
}


def straight(out):
    """Save a mixture whose P is one matrix, as `closed_form` wants it."""
    sidecar = read_sidecar(make_nexus(out))
    sidecar.router.projection, sidecar.router.depth = "linear", 1
    torch.manual_seed(0)
    reader = TensorReader(out)
    for layer in range(LAYERS):
        weights = Projection(8, 16, depth=1, form="linear").state_dict()
        sidecar.projections[layer] = state_of(weights)
        rows = expert_embeddings(sidecar, layer, torch.float32)
        overwrite(reader.info(gate_name(layer)), rows)
    write_sidecar(out, sidecar)
    return out


def checkpoint(kind, out):
    if kind == "straight":
        return straight(out)
    make = make_linear if kind == "linear" else make_nexus
    return make(out, **(CONTEXT if kind == "context" else {}))


def text(start):
    generator = torch.Generator().manual_seed(0)
    windows = {name: torch.randint(31, (WINDOWS, 12), generator=generator) for name in DOMAINS}
    chunks = {}
    if start in ("chunks", "closed_form"):
        chunks = {name: torch.randn(WINDOWS, 8, generator=generator) for name in DOMAINS}
    return FitText(windows, chunks)


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_a_warm_start(start, kind, tmp_path, monkeypatch):
    config = RouterConfig(warm_start=start, fit_steps=STEPS)
    expected = fit.fit_router(checkpoint(kind, tmp_path / "cpu"), text(start), config, seed=0)
    copy = checkpoint(kind, tmp_path / "gpu")
    monkeypatch.setattr(fit, "device", lambda: GPU)
    with gpu() as watch:
        found = fit.fit_router(copy, text(start), config, seed=0)
    assert (found.before, found.after) == pytest.approx((expected.before, expected.after), abs=1e-6)
    waits = {wait: n for wait, n in watch.waits.items() if wait.startswith("methods.")}
    assert waits == CASES[start, kind]
    # The states of all windows are the host's: each batch of them comes and goes. It comes once
    # more for what the router reads, with the input `context` twice.
    assert watch.waits["fit.advance: to host"] == LAYERS * BATCHES
    passes = 4 if kind == "context" else 2
    assert watch.waits["fit._run: to device"] == passes * LAYERS * BATCHES
    # positions, and RoPE's cosines and sines
    assert watch.waits["fit._on_device: to device"] == 3 * LAYERS
    assert watch.waits["fit._share: value"] == 2 * LAYERS
