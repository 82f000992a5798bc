"""Passes over windows: the same numbers whole, in pieces, and on any number of devices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint import pieces
from nexus_ds.checkpoint.needs import Need, Way
from nexus_ds.evaluation import passes, perplexity
from nexus_ds.evaluation.passes import batch_loss, cut, sequences_at_once
from nexus_ds.evaluation.perplexity import score

CPU = torch.device("cpu")


@pytest.fixture
def windows():
    generator = np.random.default_rng(0)
    counts = {"alpha": 5, "beta": 7, "gamma": 1}
    return {name: generator.integers(2, 31, (count, 13)) for name, count in counts.items()}


def same(a, b):
    assert all(np.array_equal(a.window_loss[name], b.window_loss[name]) for name in a.window_loss)
    assert (a.routing is None) == (b.routing is None)
    if a.routing is not None:
        assert np.array_equal(a.routing.share, b.routing.share)
        assert np.array_equal(a.routing.gate, b.routing.gate)


@pytest.mark.parametrize("kind", ["dense_dir", "nexus_dir", "context_dir"])
def test_two_devices_give_the_numbers_of_one(kind, request, windows, monkeypatch):
    """Two copies of the model on the CPU stand for two GPUs."""
    directory = request.getfixturevalue(kind)
    one = score(directory, windows, batch=2)
    made = []

    class Watched(passes._Worker):
        def run(self, unit):
            made.append(self)
            return super().run(unit)

    monkeypatch.setattr(passes, "_Worker", Watched)
    same(score(directory, windows, batch=2, places=[CPU, CPU]), one)
    assert len(set(made)) == 2 and len({id(worker.model) for worker in made}) == 2


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("granite", dict(logits_scaling=6.0)),
        ("cohere2", dict(logit_scale=0.25)),
        ("gemma2", dict(final_logit_softcapping=1.5, head_dim=8)),
    ],
)
def test_a_loss_is_of_the_logits_that_a_family_returns(family, keys):
    """Some divide or cap what their output layer returns."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        **keys,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(31, (3, 9))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert float(batch_loss(model, tokens).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_no_more_copies_are_loaded_than_there_are_batches(nexus_dir, windows, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        perplexity, "open_way", lambda *asked: loaded.append(1) or pieces.open_way(*asked)
    )
    score(nexus_dir, {"gamma": windows["gamma"]}, places=[CPU, CPU, CPU])
    assert len(loaded) == 1


@pytest.mark.parametrize("kind", ["dense_dir", "nexus_dir", "context_dir", "uneven_moe_dir"])
@pytest.mark.parametrize("places", [1, 2])
def test_layer_by_layer_gives_the_numbers_of_the_whole(
    kind, places, request, windows, monkeypatch, capsys
):
    directory = request.getfixturevalue(kind)
    whole = score(directory, windows, batch=2)
    monkeypatch.setattr(pieces, "room_on", lambda place: 1)
    same(score(directory, windows, batch=1, places=[CPU] * places), score_one(directory, windows))
    monkeypatch.setattr(perplexity, "planned_way", lambda *asked: Way(streamed=True, rows=2))
    same(score(directory, windows, batch=2, places=[CPU] * places), whole)
    assert "it runs layer by layer, 1 sequence at once" in capsys.readouterr().err


def score_one(directory, windows):
    """Score one window at a time, as a whole model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "planned_way", lambda *asked: Way(streamed=False, rows=1))
        return score(directory, windows, batch=1)


def test_memory_that_runs_out_in_a_batch_costs_no_count(nexus_dir, windows, monkeypatch, capsys):
    """A pass that fails in the middle is made again as a whole: nothing is counted twice."""
    expected = score(nexus_dir, windows, batch=2)
    stock = passes.batch_loss
    calls = []

    def failing(model, tokens_WS, rows):
        calls.append(rows)
        found = stock(model, tokens_WS, rows)
        if rows == 4 and len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(passes, "batch_loss", failing)
    same(score(nexus_dir, windows, batch=4), expected)
    assert 4 in calls and 2 in calls
    assert "it goes on whole, 2 sequences at once" in capsys.readouterr().err


def test_windows_are_cut_in_order(windows):
    units = cut(windows, 3)
    assert [(unit.domain, len(unit.tokens_WS)) for unit in units] == [
        ("alpha", 3),
        ("alpha", 2),
        ("beta", 3),
        ("beta", 3),
        ("beta", 1),
        ("gamma", 1),
    ]


def test_a_streamed_pass_takes_what_may_wait_in_memory(monkeypatch):
    sizes = dict.fromkeys(Need.__annotations__, 0.0)
    need = Need(**sizes | {"hidden": 10.0, "layer": 5e4, "outside": 7e4, "resident": 2e4})
    gpu = torch.device("cuda")

    def windows(room, rows, *places):
        monkeypatch.setattr(passes, "host_room", lambda: room / 0.9)
        return sequences_at_once(need, Way(streamed=True, rows=rows), 100, places)

    # 2 x 10 bytes a token, 100 tokens a window: a quarter of what the model leaves
    states = 2000 * 50 / 0.25
    assert windows(7e4 + states, 8, CPU) == 48
    # on a GPU main memory holds the embeddings, and the states of the rows that compute
    assert windows(7e4 + 8 * 2000 + states, 8, gpu) == 48
    assert windows(7e4 + 64 * 2000 + states, 64, gpu) == 64
    # two devices share it
    assert windows(2 * (7e4 + 8 * 2000 + states), 8, gpu, gpu) == 48
    assert windows(7e4 + 8 * 2000 + states, 8, gpu, gpu) < 24
    assert windows(1.0, 8, CPU) == 8
    assert sequences_at_once(need, Way(streamed=False, rows=8), 100, [CPU]) == 8
