"""Scoring, generation and the export's check on a pretend GPU: results of the CPU, and waits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_nexus
from pretend import GPU, gpu, module_to_gpu, to_gpu, unwatched

from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.records import TrainStep
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.evaluation import perplexity
from nexus_ds.experiments.comparison import ensemble
from nexus_ds.generation.continuation import Asked, continue_prompts
from nexus_ds.generation.drawing import Drawing
from nexus_ds.generation.prompts import tokenised
from nexus_ds.model.head import use_loss_head
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import export as exporting
from nexus_ds.runtime.attention import attend_whole_windows
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config, RouterConfig

LAYERS = 2
FORMS = {"token": {}, "context": {"router_input": "context", "row_norm": "fixed"}}


@pytest.fixture(params=["dense", *FORMS])
def checkpoint(request, tmp_path, dense_dir):
    if request.param == "dense":
        return dense_dir
    return make_nexus(tmp_path / "nexus", top_k=2, **FORMS[request.param])


def load_there(directory, precision="auto"):
    with unwatched():
        return module_to_gpu(load_model(directory, precision))


def test_scoring_waits_for_a_batch_of_windows_and_not_for_its_layers(checkpoint, monkeypatch):
    random = np.random.default_rng(0)
    windows = {name: random.integers(0, 31, (4, 13)) for name in ("alpha", "beta")}
    expected = perplexity.score(checkpoint, windows, batch=2)
    open_here = perplexity.open_way

    def open_there(*args):
        with unwatched():
            return module_to_gpu(open_here(*args))

    monkeypatch.setattr(perplexity, "open_way", open_there)
    with gpu() as watch:
        found = perplexity.score(checkpoint, windows, batch=2)
    for name in windows:
        assert found.window_loss[name] == pytest.approx(expected.window_loss[name], rel=1e-5)
    if expected.routing is not None:
        assert np.array_equal(found.routing.share, expected.routing.share)
    passes = 2 * 2 + 1  # one uncounted before
    expected_waits = {"passes.on_device: to device": passes, "passes.run: to host": passes}
    if found.routing is not None:
        # What routers did: counts of all layers, and gates.
        expected_waits["passes.take: to host"] = 2 * passes
    own = {wait: n for wait, n in watch.waits.items() if wait.startswith("passes.")}
    assert own == expected_waits
    # The rest is transformers' own: whether texts are packed, for each kind of mask.
    rest = {wait.split(".")[0] for wait in watch.waits} - {"passes"}
    assert rest <= {"masking_utils"}


def test_an_ensemble_scores_batch_by_batch(dense_dir, monkeypatch):
    windows = np.random.default_rng(0).integers(0, 31, (4, 13))
    expected = ensemble.window_losses(dense_dir, windows, batch=2)
    monkeypatch.setattr(ensemble, "load_model", load_there)
    with gpu() as watch:
        found = ensemble.window_losses(dense_dir, windows, batch=2)
    torch.testing.assert_close(found, expected)
    own = {wait: n for wait, n in watch.waits.items() if wait.startswith("ensemble.")}
    assert own == {"ensemble.window_losses: to device": 2, "ensemble.window_losses: to host": 2}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation(checkpoint, temperature):
    """Text is the CPU's, drawn or not.

    Waits are a few at the start, and two a token: transformers asks whether it ends the text, and
    it is told; with padding a third, whether the mask can be left out.
    """
    tokenizer = open_tokenizer(checkpoint)
    prompts = [tokenised(tokenizer, text, text) for text in ("tree leaf root", "ship")]
    drawing = Drawing(temperature, top_p=0.9)
    here = load_model(checkpoint)
    expected = continue_prompts(here, tokenizer, prompts, Asked(6, drawing))
    there = load_there(checkpoint)
    waits, made = [], []
    for tokens in (1, 6):
        with gpu() as watch:
            found = continue_prompts(there, tokenizer, prompts, Asked(tokens, drawing))
        waits.append(sum(watch.waits.values()))
        made.append(max(one.tokens for one in found))
    assert found == expected
    assert waits[1] - waits[0] == 3 * (made[1] - made[0]) and waits[0] < 20


@pytest.mark.parametrize("form", FORMS)
def test_the_exports_check(form, tmp_path, alone, monkeypatch):
    """One rank; what is gathered on the device is written, read again, and compared there."""
    source = make_nexus(tmp_path / "source", **FORMS[form])
    model = load_nexus(source, torch.float32, Placement(3), RouterConfig(), False)
    use_loss_head(model)
    attend_whole_windows(model)
    module_to_gpu(model)
    monkeypatch.setattr(internals, "device", lambda: GPU)
    # The stream lets go of a layer by moving it to the meta device, which is the pretended GPU's:
    # so it runs on the CPU here, and the engine's tensors have to follow it.
    monkeypatch.setattr(internals, "device_with_room", lambda room: torch.device("cpu"))
    config = Config()
    config.model.path = config.model.tokenizer = str(source)

    class Engine(SimpleNamespace):
        def __call__(self, **inputs):
            return self.module(**inputs)

    engine = Engine(module=model, device=GPU)
    step = TrainStep(stage="moe", steps=1, tokens=1, mixture={})
    probe_BS = to_gpu(torch.arange(24).view(2, 12))
    with gpu():
        found = exporting.export(engine, config, torch.float32, tmp_path / "out", probe_BS, step)
    assert found.device == "cpu" and found.tokens == 12 and found.logits < 1e-5
