"""Scoring against plain transformers: losses, routing counts, gates, cosines; bad text and bad
weights by message."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.evaluation import passes
from nexus_ds.evaluation.perplexity import (
    DEFAULT_LENGTH,
    Routing,
    cosine_matrix,
    cosines,
    score,
    window_length,
)


def some_windows(count=5, length=12, vocabulary=31, seed=0):
    generator = np.random.default_rng(seed)
    return {d: generator.integers(2, vocabulary, (count, length + 1)) for d in ("alpha", "beta")}


def stock(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("kind", ["dense_dir", "nexus_dir", "plain_moe_dir"])
def test_loss_is_that_of_transformers(kind, request):
    directory, windows = request.getfixturevalue(kind), some_windows()
    scores = score(directory, windows, batch=2)
    model = stock(directory)
    for domain, array in windows.items():
        tokens = torch.from_numpy(array)
        expected = model(input_ids=tokens, labels=tokens).loss.item()
        assert scores.loss[domain] == pytest.approx(expected, abs=1e-5)
        assert scores.perplexity[domain] == pytest.approx(math.exp(expected), rel=1e-5)
        assert scores.tokens[domain] == 5 * 12
    assert scores.tokens_per_second > 0


def some_answers():
    """Return windows in which few ids are labels, of one domain; the second window has none, and
    the last one's first id is no label of its own."""
    generator = np.random.default_rng(3)
    windows = some_windows()
    learned_WS = generator.random((5, 13)) < np.array([[0.2], [0.0], [0.9], [0.5], [0.1]])
    learned_WS[:, 0] = False
    learned_WS[4, :2] = True
    windows["alpha"] = np.where(learned_WS, windows["alpha"], ~windows["alpha"])
    return windows, learned_WS


@pytest.mark.parametrize("kind", ["dense_dir", "nexus_dir"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_of_chats_the_answers_alone_are_scored(kind, at_once, request, monkeypatch):
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", at_once * 31)
    directory, (windows, learned_WS) = request.getfixturevalue(kind), some_answers()
    scores = score(directory, windows, batch=2)
    model = stock(directory)
    ids_WS = torch.from_numpy(some_windows()["alpha"])
    labels_WS = torch.where(torch.from_numpy(learned_WS), ids_WS, -100)
    expected = model(input_ids=ids_WS, labels=labels_WS).loss.item()
    assert scores.loss["alpha"] == pytest.approx(expected, abs=1e-6)
    assert scores.perplexity["alpha"] == pytest.approx(math.exp(expected), rel=1e-5)
    kept = [0, 2, 3, 4]
    for loss, window in zip(scores.window_loss["alpha"], kept, strict=True):
        one = model(input_ids=ids_WS[[window]], labels=labels_WS[[window]]).loss.item()
        assert loss == pytest.approx(one, abs=1e-6)
    counts = learned_WS[:, 1:].sum(axis=1)
    assert scores.window_labels["alpha"].tolist() == counts[kept].tolist()
    assert scores.tokens == {"alpha": 4 * 12, "beta": 5 * 12}
    # plain text beside it is what it is without chats
    assert list(scores.window_labels) == ["alpha"]
    plain = score(directory, some_windows(), batch=2)
    assert plain.window_labels == {}
    assert np.array_equal(plain.window_loss["beta"], scores.window_loss["beta"])
    if scores.routing:
        # prompts of windows that are read go somewhere, too
        assert scores.routing.share[:, 0].sum(axis=1) == pytest.approx(1.0)


def test_chats_without_a_token_of_an_answer(dense_dir):
    windows = some_windows()
    windows["beta"] = ~windows["beta"]
    # an input only
    windows["beta"][:, 0] = 3
    message = r"domain 'beta': no token of an answer in its 5 windows; .* fit into 12 tokens"
    with pytest.raises(DataError, match=message):
        score(dense_dir, windows)


def test_loss_does_not_depend_on_batch_and_slices(dense_dir, monkeypatch):
    whole = score(dense_dir, some_windows(), batch=5).loss
    # 7 tokens a slice: the last slice is a partial one
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 7 * 31)
    assert score(dense_dir, some_windows(), batch=3).loss == pytest.approx(whole, abs=1e-6)


def test_routing_counts_every_token_once(nexus_dir):
    windows = some_windows()
    routing = score(nexus_dir, windows, batch=2).routing
    model = stock(nexus_dir)
    for d, (_, array) in enumerate(windows.items()):
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(array[:, :-1]), output_router_logits=True
            ).router_logits
        for layer, logits_TE in enumerate(logits):
            chosen = logits_TE.argmax(-1).bincount(minlength=3).double() / len(logits_TE)
            assert routing.share[layer, d] == pytest.approx(chosen.numpy(), abs=1e-12)
            assert routing.gate[layer, d] == pytest.approx(
                float(logits_TE.softmax(-1).amax(-1).mean()), abs=1e-6
            )
    assert routing.experts == routing.expert_domains == ["alpha", "beta", "gamma"]
    assert routing.layers == [0, 1] and routing.share.shape == (2, 2, 3)


def test_top_2_shares_sum_to_one_and_experts_without_sidecar_are_numbered(plain_moe_dir):
    routing = score(plain_moe_dir, some_windows()).routing
    assert routing.experts == ["expert_0", "expert_1", "expert_2", "expert_3"]
    assert routing.share.sum(axis=-1) == pytest.approx(np.ones((2, 2)))
    assert routing.share.max() <= 0.5  # with top-2 no expert gets a token twice
    assert routing.own_share() == {}


def test_dense_models_have_no_routing(dense_dir):
    assert score(dense_dir, some_windows()).routing is None


def a_routing():
    share = np.array([[[0.6, 0.4, 0.0], [0.1, 0.7, 0.2]], [[0.8, 0.0, 0.2], [0.3, 0.3, 0.4]]])
    return Routing(
        ["a", "b"], ["first", "second", "new"], ["a", "b", "c"], [0, 1], share, np.full((2, 2), 0.5)
    )


def test_own_share_mean_share_and_leak():
    routing = a_routing()
    assert routing.mean_share()["a"] == pytest.approx({"first": 0.7, "second": 0.2, "new": 0.1})
    assert routing.own_share() == pytest.approx({"a": 0.7, "b": 0.5})
    assert routing.leak("new") == pytest.approx((0.0 + 0.2 + 0.2 + 0.4) / 4)
    # its own domain does not count as a leak
    assert routing.leak("first") == pytest.approx((0.1 + 0.3) / 2)
    assert routing.leak("new", ["b"]) == pytest.approx(0.3)
    assert math.isnan(routing.leak("new", []))


def test_leak_names_what_it_does_not_know():
    with pytest.raises(
        ConfigError, match="no expert 'x' in this model; it has: first, second, new"
    ):
        a_routing().leak("x")
    with pytest.raises(ConfigError, match="no text of z was scored; scored: a, b"):
        a_routing().leak("new", ["z"])


def test_saturated_places():
    routing = a_routing()
    assert routing.saturated() == []
    routing.gate[1, 0] = 0.97
    assert routing.saturated() == [(1, "a", 0.97)]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({}, "no domain to score"),
        (
            {"a": np.zeros((0, 5), np.int64)},
            r"domain 'a': found windows of shape \(0, 5\), expected",
        ),
        ({"a": np.zeros(5, np.int64)}, r"found windows of shape \(5,\)"),
        ({"a": np.full((1, 5), 31)}, r"found token ids from 31 to 31, .* knows 0 to 30; tokenise"),
        ({"a": np.full((1, 5), ~31)}, "found token ids from 31 to 31"),
        (
            {"a": np.zeros((1, 66), np.int64)},
            "windows of 65 tokens, .* reads at most 64; choose a smaller length",
        ),
    ],
)
def test_text_that_the_model_can_not_read(dense_dir, windows, message):
    with pytest.raises(DataError, match=message):
        score(dense_dir, windows)


def test_batch_must_be_positive(dense_dir):
    with pytest.raises(ConfigError, match="batch: expected a number above 0, found 0"):
        score(dense_dir, some_windows(), batch=0)


def test_weights_that_are_not_numbers(dense_dir, tmp_path):
    model = stock(dense_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="the loss on alpha, beta is nan, expected a finite number"
    ):
        score(tmp_path, some_windows())


def test_cosines_before_and_after_the_projection(nexus_dir):
    from nexus_ds.checkpoint.sidecar import read_sidecar

    found, sidecar, model = cosines(nexus_dir), read_sidecar(nexus_dir), stock(nexus_dir)
    assert found.names == ["alpha", "beta", "gamma"]
    vectors = torch.from_numpy(sidecar.vectors)
    pair = torch.nn.functional.cosine_similarity(vectors[0], vectors[2], dim=0)
    assert found.embeddings[0, 2] == pytest.approx(float(pair), abs=1e-6)
    rows = model.model.layers[1].mlp.gate.weight.detach()
    centred = rows - rows.mean(0)
    assert found.rows[1, 0, 1] == pytest.approx(
        float(torch.cosine_similarity(rows[0], rows[1], dim=0)), abs=1e-6
    )
    assert found.centred_rows[1] == pytest.approx(cosine_matrix(centred))
    assert np.diag(found.inputs) == pytest.approx(np.ones(3))


def test_cosines_without_sidecar_and_without_router(plain_moe_dir, dense_dir):
    found = cosines(plain_moe_dir)
    assert found.embeddings is None and found.inputs is None and found.rows.shape == (2, 4, 4)
    with pytest.raises(
        CheckpointError, match=r"no router weights .* expected a mixture-of-experts checkpoint"
    ):
        cosines(dense_dir)


def test_stored_precision_runs_in_the_stored_dtype(dense_dir, tmp_path):
    stock(dense_dir).to(torch.bfloat16).save_pretrained(tmp_path)
    full, stored = (
        score(tmp_path, some_windows(), precision=p).loss["alpha"] for p in ("fp32", "stored")
    )
    assert full != stored and full == pytest.approx(stored, rel=0.02)


def test_window_length():
    models = [
        {"sequence_length": None, "max_positions": 2048},
        {"sequence_length": None, "max_positions": 64},
    ]
    assert window_length(0, models) == 64
    assert window_length(0, models[:1]) == DEFAULT_LENGTH
    assert window_length(0, [{"sequence_length": 512, "max_positions": 2048}]) == 512
    assert window_length(32, models) == 32


@pytest.mark.parametrize("stated", ["abc", -1, 1e400, [64], True])
def test_a_model_that_states_no_number_of_positions_is_named(stated):
    told = [{"directory": "m", "sequence_length": None, "max_positions": stated}]
    with pytest.raises(CheckpointError) as caught:
        window_length(0, told)
    assert str(caught.value) == (
        f"m/config.json: max_position_embeddings is {stated!r}, expected a number above 0"
    )


def changed(directory, out, **config):
    """Return a copy of a model whose config.json says something else."""
    path = shutil.copytree(directory, out) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


@pytest.mark.parametrize("key", ["max_position_embeddings", "vocab_size"])
def test_a_model_of_sizes_that_are_none_is_named_before_it_is_scored(dense_dir, tmp_path, key):
    copy = changed(dense_dir, tmp_path / "m", **{key: "abc"})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is 'abc', expected a whole"):
        score(copy, some_windows())


@pytest.mark.parametrize("stated", [2**62, "abc"])
def test_layers_that_a_mixture_does_not_have_are_not_looked_for(plain_moe_dir, tmp_path, stated):
    copy = changed(plain_moe_dir, tmp_path / "m", num_hidden_layers=stated)
    if stated == "abc":
        with pytest.raises(CheckpointError, match="no router weights"):
            cosines(copy)
    else:
        assert cosines(copy).rows.shape == (2, 4, 4)
