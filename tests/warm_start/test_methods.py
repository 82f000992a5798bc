"""The router's warm starts on one layer's inputs: each does what its name says, and P learns
directions, not labels only."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import balanced_projection

from nexus_ds.model.router import unit
from nexus_ds.settings import RouterConfig
from nexus_ds.warm_start import methods
from nexus_ds.warm_start.methods import (
    Features,
    hidden_mean_embeddings,
    means,
    ridge_embeddings,
    temperature,
    warm_start_embeddings,
    warm_start_projection,
    whitener,
)

HIDDEN, WIDTH, DOMAINS, CHUNKS, LENGTH = 16, 12, 3, 60, 20


def world(seed=0, unseen=1, background=0):
    """Return text in which a chunk's inputs lie where a fixed linear map puts its topic, and its
    embedding near the topic.

    The last `unseen` domains have no tokens among those that a start sees, but for the first
    `background` of them, whose tokens have no label.
    """
    generator = torch.Generator().manual_seed(seed)
    topics = unit(torch.randn(DOMAINS + unseen, WIDTH, generator=generator))
    truth = torch.randn(WIDTH, HIDDEN, generator=generator) * 2
    spread = torch.diag(torch.linspace(0.3, 3.0, HIDDEN))

    def text(domain):
        chunks = unit(topics[domain] + 0.25 * torch.randn(CHUNKS, WIDTH, generator=generator))
        noise = torch.randn(CHUNKS, LENGTH, HIDDEN, generator=generator) @ spread
        return chunks, ((chunks @ truth)[:, None] + 0.5 * noise + 3.0).flatten(0, 1)

    texts = [text(domain) for domain in range(DOMAINS + unseen)]
    read = texts[: DOMAINS + background]
    features = Features(
        x_TH=torch.cat([x for _, x in read]),
        labels_L=torch.arange(DOMAINS).repeat_interleave(CHUNKS * LENGTH),
        inputs_EM=topics[:DOMAINS],
        chunks_CM=torch.cat([c for c, _ in read]),
    )
    return features, topics, texts[-1][1]


def draws():
    return torch.Generator().manual_seed(0)


def share(x_TH, embeddings_EH, index):
    return float((F.linear(x_TH, embeddings_EH).argmax(-1) == index).float().mean())


def own_share(features, embeddings_EH):
    return float(
        (F.linear(features.x_LH, embeddings_EH).argmax(-1) == features.labels_L).float().mean()
    )


def projection_of(features, form, row_norm="free"):
    return balanced_projection(features.inputs_EM, HIDDEN, form=form, row_norm=row_norm)


@pytest.mark.parametrize(
    ("start", "form", "row_norm"),
    [
        ("chunks", "swiglu", "free"),
        ("chunks", "linear", "free"),
        ("chunks", "linear", "fixed"),
        ("closed_form", "linear", "free"),
        ("closed_form", "linear", "fixed"),
    ],
)
def test_chunks_teach_p_directions_that_labels_do_not(start, form, row_norm):
    """A domain whose text P never saw finds its row P(d_new); the label fit of the same P does
    not."""
    features, topics, new_text = world()
    found, leaks = {}, {}
    for name in (start, "label_fit"):
        projection = projection_of(features, form, row_norm)
        warm_start_projection(
            projection, features, RouterConfig(warm_start=name, fit_steps=200, fit_lr=3e-3), draws()
        )
        embeddings_EH = projection(topics).detach()
        assert own_share(features, embeddings_EH[:DOMAINS]) > 0.6
        found[name], leaks[name] = (
            share(new_text, embeddings_EH, DOMAINS),
            share(features.x_TH, embeddings_EH, DOMAINS),
        )
    # The paper's SwiGLU learns a little of it; a linear P generalises.
    assert found[start] > found["label_fit"] + 0.2 and leaks[start] < 0.25
    assert found[start] > 0.7 or form == "swiglu"


@pytest.mark.parametrize(
    ("start", "form"), [("chunks", "swiglu"), ("chunks", "linear"), ("closed_form", "linear")]
)
def test_background_teaches_p_more_directions_and_is_nobodys_domain(start, form):
    """Text without an expert makes a row that it never belongs to, and room for the rows of its
    kind."""
    everything, topics, new_text = world(unseen=1 + DOMAINS, background=DOMAINS)
    labelled = len(everything.labels_L)
    without = replace(
        everything, x_TH=everything.x_LH, chunks_CM=everything.chunks_CM[: DOMAINS * CHUNKS]
    )
    found, rows = {}, {}
    for name, features in (("without", without), ("with", everything)):
        projection = projection_of(features, form, "fixed")
        warm_start_projection(
            projection,
            features,
            RouterConfig(warm_start=start, fit_steps=100, fit_lr=3e-3),
            draws(),
        )
        rows[name] = projection(torch.cat([topics[:DOMAINS], topics[-1:]])).detach()
        assert own_share(everything, rows[name][:DOMAINS]) > 0.6
        found[name] = share(new_text, rows[name], DOMAINS)
        background = projection(topics[DOMAINS:-1]).detach()
        found[f"background {name}"] = share(
            everything.x_TH[labelled:], torch.cat([rows[name], background]), DOMAINS + 1
        )
    assert found["with"] > found["without"] - 0.05
    assert found["background with"] > found["background without"] + 0.05


def test_fixed_rows_spread_their_logits_alike_after_a_start():
    features, topics, _ = world()
    spreads = {}
    for row_norm in ("fixed", "free"):
        projection = projection_of(features, "linear", row_norm)
        warm_start_projection(projection, features, RouterConfig(warm_start="closed_form"), draws())
        logits = F.linear(features.x_TH, projection(topics).detach())
        spreads[row_norm] = logits.square().mean(0).sqrt()
    assert (
        float(spreads["fixed"].max() / spreads["fixed"].min())
        < 1.05
        < float(spreads["free"].max() / spreads["free"].min())
    )


def test_starts_are_deterministic():
    rows = []
    for _ in range(2):
        features, topics, _ = world()
        projection = projection_of(features, "swiglu")
        warm_start_projection(
            projection, features, RouterConfig(warm_start="chunks", fit_steps=5), draws()
        )
        rows.append(projection(topics).detach())
    assert torch.equal(*rows)


def test_the_whitener_makes_second_moments_the_identity():
    features, _, _ = world()
    white = features.x_TH @ whitener(features.x_TH, features.place)
    assert torch.allclose(white.T @ white / len(white), torch.eye(HIDDEN), atol=0.05)


def test_the_temperature_is_the_best_of_its_grid():
    features, _, _ = world()
    embeddings_EH = means(features.x_TH, features.labels_L, DOMAINS)
    best = temperature(features.x_TH, features.labels_L, embeddings_EH)
    losses = {
        f: float(F.cross_entropy(features.x_TH @ (embeddings_EH * f).T, features.labels_L))
        for f in (best / 1.2, best, best * 1.2)
    }
    assert min(losses, key=losses.get) == best
    assert temperature(features.x_TH, features.labels_L, embeddings_EH * best) == pytest.approx(1.0)


def test_hidden_mean_is_the_mean_and_a_later_row_the_difference():
    features, _, _ = world()
    old_EH = torch.randn(DOMAINS, HIDDEN, generator=torch.Generator().manual_seed(3))
    embeddings_EH = hidden_mean_embeddings(features.x_TH, features.labels_L, old_EH, 0)
    assert torch.allclose(
        embeddings_EH[1], features.x_TH[features.labels_L == 1].mean(0), atol=1e-4
    )
    later_EH = warm_start_embeddings(
        old_EH, features, RouterConfig(warm_start="hidden_mean"), 2, draws()
    )
    assert torch.equal(later_EH[:2], old_EH[:2])
    assert torch.allclose(
        unit(later_EH[2]), unit(embeddings_EH[2] - embeddings_EH[:2].mean(0)), atol=1e-5
    )
    assert float(later_EH[2].norm()) == pytest.approx(
        float(old_EH[:2].norm(dim=1).mean()), rel=1e-5
    )


def test_ridge_is_the_normal_equations_solution_up_to_the_temperature():
    features, _, _ = world()
    embeddings_EH = ridge_embeddings(features.x_TH, features.labels_L, DOMAINS)
    x, y = features.x_TH.double(), F.one_hot(features.labels_L, DOMAINS).double()
    penalty = 1e-3 * float((x * x).sum(0).mean())
    expected = torch.linalg.lstsq(
        torch.cat([x, math.sqrt(penalty) * torch.eye(HIDDEN).double()]),
        torch.cat([y, torch.zeros(HIDDEN, DOMAINS)]),
    ).solution.T
    ratio = embeddings_EH.double() / expected
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-2)
    assert own_share(features, embeddings_EH) > 0.8


@pytest.fixture
def in_slices(monkeypatch):
    """Return a function that computes something with slices of 37 tokens, then with all at once."""

    def both(work):
        found = []
        for size in (37, 1 << 30):
            monkeypatch.setattr(methods, "SLICE_TOKENS", size)
            found.append(work())
        return found

    return both


def test_moments_and_means_add_up_over_slices(in_slices):
    """Slices change nothing but the order of sums; the right sides are made of all tokens."""
    features, _, _ = world(background=1)
    x_TH, place = features.x_TH, features.place
    groups_T = torch.arange(len(x_TH)) % 5
    one_hot_T5 = F.one_hot(groups_T, 5).float()
    expected = {
        methods.moments: x_TH.T @ x_TH,
        methods.mean: x_TH.mean(0),
    }
    for function, whole in expected.items():
        for found in in_slices(lambda function=function: function(x_TH, place)):
            assert torch.allclose(found, whole, rtol=1e-5, atol=1e-4)
    for found in in_slices(lambda: means(x_TH, groups_T, 5)):
        assert torch.allclose(found, one_hot_T5.T @ x_TH / one_hot_T5.sum(0)[:, None], atol=1e-4)


@pytest.mark.parametrize("start", ["label_fit", "chunks", "closed_form"])
def test_a_projection_started_in_slices_is_the_same(in_slices, start):
    features, topics, _ = world(background=1)
    config = RouterConfig(warm_start=start, fit_steps=20, projection="linear")

    def started():
        projection = balanced_projection(topics, HIDDEN, form="linear")
        warm_start_projection(projection, features, config, draws())
        return projection(topics).detach()

    sliced, whole = in_slices(started)
    assert torch.allclose(sliced, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["label_fit", "hidden_mean", "ridge"])
def test_rows_started_in_slices_are_the_same(in_slices, start):
    features, _, _ = world()
    config = RouterConfig(kind="linear", warm_start=start, fit_steps=20)
    old_EH = torch.zeros(DOMAINS, HIDDEN)

    def started():
        return warm_start_embeddings(old_EH, features, config, 0, draws())

    sliced, whole = in_slices(started)
    assert torch.allclose(sliced, whole, rtol=1e-3, atol=1e-4)
