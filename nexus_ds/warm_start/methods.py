"""Ways to start one layer's router from text: free expert embeddings, or P.

    label_fit     either, by the cross-entropy of domain labels (AdamW)
    hidden_mean   an expert embedding is the mean router input of its domain's text
    ridge         ridge regression of one-hot domain labels, then one temperature for all
    chunks        P so that P(embedding of a chunk) knows that chunk's tokens among those of other
                  chunks (InfoNCE)
    closed_form   a linear P by ridge regression from the embeddings of chunks to the mean of their
                  whitened router inputs

`chunks` and `closed_form` show P a direction for every chunk instead of one a domain. What P(d) of
a domain that it has never seen is worth depends on that, and on how much of all text the chunks
come from: background text has no expert.
Shapes: T tokens in windows of S, L of them of domains with an expert, n tokens of a step, E routed
experts, H hidden size, C chunks (= windows), M width of an embedding.
Not covered: where the inputs come from (`fit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.model.router import Projection
from nexus_ds.settings import RouterConfig

DEFAULT_LR = {"nexus": 1e-3, "linear": 5e-3}
# Of a fixed length, relative to P's: its logarithm has far to go.
NORM_LR = 20.0
SLICE_TOKENS = 1 << 15  # on the device at once: 0.3 GB at H = 2560
TOKENS_PER_STEP = 4096
CHUNKS_PER_STEP = 512  # that compete for a token
TOKENS_PER_CHUNK = 8  # and step
JUDGED_TOKENS = 1 << 14  # that a temperature is chosen on
TEMPERATURES = (2.0 ** torch.arange(-8, 12, 0.25)).tolist()
RIDGE = 1e-3  # relative to the mean of the diagonal
WHITEN = 1e-3
# Chosen by leaving out one old domain after the other, as are the sizes around it.
CHUNK_RIDGE = 3.0
DOMAIN_WEIGHT = 0.3  # of all domains beside all chunks


@dataclass(frozen=True)
class Features:
    """What the router of one layer reads of text, and what is known of that text.

    The first L of the T tokens are of domains that have an expert. The others are background: they
    show P more directions, and are nobody's. All fp32 and on one device, but `x_TH` may be in main
    memory: a slice of it or some of its rows come to the device.
    """

    x_TH: Tensor
    """Router inputs, window after window."""
    labels_L: Tensor
    """Domain of each of the first tokens, 0 .. E-1 of the domains that have text."""
    inputs_EM: Tensor | None = None
    """What P reads of each of these domains; None for free expert embeddings."""
    chunks_CM: Tensor | None = None
    """What P reads of each window's own embedding, for `chunks` and `closed_form`."""

    white_HH: Tensor | None = None
    """What `rows` are multiplied with; None: nothing."""

    @property
    def x_LH(self) -> Tensor:
        """The inputs that have a label."""
        return self.x_TH[: len(self.labels_L)]

    @property
    def place(self) -> torch.device:
        """Where is computed."""
        return self.labels_L.device

    def rows(self, picked_n: Tensor) -> Tensor:
        """Return some tokens' inputs [n, H], whitened if they are to be, where is computed."""
        x_nH = self.x_TH[picked_n.to(self.x_TH.device)].to(self.place)
        return x_nH if self.white_HH is None else x_nH @ self.white_HH


def parts(x_TH: Tensor, place: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of SLICE_TOKENS tokens, and their inputs on a device."""
    for start in range(0, len(x_TH), SLICE_TOKENS):
        part = slice(start, start + SLICE_TOKENS)
        yield part, x_TH[part].to(place)


def mean(x_TH: Tensor, place: torch.device) -> Tensor:
    """Return the mean [H] of all inputs, on a device."""
    sum_H = torch.zeros(x_TH.shape[1], dtype=torch.float64, device=place)
    for _, x_tH in parts(x_TH, place):
        sum_H += x_tH.sum(0, dtype=torch.float64)
    return (sum_H / len(x_TH)).float()


def moments(x_TH: Tensor, place: torch.device) -> Tensor:
    """Return the sum [H, H] of x x^T over all inputs, on a device."""
    hidden = x_TH.shape[1]
    moments_HH = torch.zeros(hidden, hidden, device=place)
    for _, x_tH in parts(x_TH, place):
        moments_HH += x_tH.T @ x_tH
    return moments_HH


def temperature(x_LH: Tensor, labels_L: Tensor, embeddings_EH: Tensor) -> float:
    """Return the factor of the embeddings with the least cross-entropy of domain labels.

    Among powers of 2^(1/4); on every so many tokens, JUDGED_TOKENS of them or a few more.
    """
    step = max(1, len(x_LH) // JUDGED_TOKENS)
    x_nH = x_LH[::step].to(labels_L.device)
    logits_nE = F.linear(x_nH, embeddings_EH)
    labels_n = labels_L[::step]
    found = []
    for factor in TEMPERATURES:
        loss = F.cross_entropy(logits_nE * factor, labels_n)
        found.append(loss)
    # Read at once: on a GPU each reading waits for it.
    losses = torch.stack(found).tolist()
    best = losses.index(min(losses))
    return TEMPERATURES[best]


def sums(x_TH: Tensor, groups_T: Tensor, count: int) -> Tensor:
    """Return the sum [count, H] of each group's inputs, where the groups are."""
    sums_GH = torch.zeros(count, x_TH.shape[1], device=groups_T.device)
    for part, x_tH in parts(x_TH, groups_T.device):
        sums_GH.index_add_(0, groups_T[part], x_tH)
    return sums_GH


def means(x_TH: Tensor, groups_T: Tensor, count: int) -> Tensor:
    """Return the mean [count, H] of each group's inputs; NaN for a group without tokens."""
    counts_G = torch.bincount(groups_T, minlength=count)
    return sums(x_TH, groups_T, count) / counts_G[:, None]


def whitener(x_TH: Tensor, place: torch.device) -> Tensor:
    """Return the symmetric W [H, H] that makes the second moments of x W the identity (ZCA)."""
    moments_HH = moments(x_TH, place) / len(x_TH)
    values_H, vectors_HH = torch.linalg.eigh(moments_HH)
    # Directions without variance would be blown up to the noise that they hold.
    scales_H = (values_H + WHITEN * values_H.mean()).sqrt()
    return (vectors_HH / scales_H) @ vectors_HH.T


def _penalty(moments: Tensor, ridge: float) -> Tensor:
    """Return ridge * I for the normal equations, relative to the mean of their diagonal."""
    identity = torch.eye(len(moments), device=moments.device)
    return ridge * moments.diagonal().mean() * identity


def ridge_embeddings(x_LH: Tensor, labels_L: Tensor, experts: int) -> Tensor:
    """Return the [E, H] that regress one-hot labels on the inputs, at the best temperature.

    This is DUME's way.
    """
    moments_HH = moments(x_LH, labels_L.device)
    # the inputs' product with one-hot labels
    targets_HE = sums(x_LH, labels_L, experts).T
    # without a penalty, directions that no token has would have no solution
    penalised_HH = moments_HH + _penalty(moments_HH, RIDGE)
    solution_HE = torch.linalg.solve(penalised_HH, targets_HE)
    embeddings_EH = solution_HE.T.contiguous()
    # regression finds directions; how sharp a softmax over them is it leaves open
    factor = temperature(x_LH, labels_L, embeddings_EH)
    return embeddings_EH * factor


def hidden_mean_embeddings(x_LH: Tensor, labels_L: Tensor, old_EH: Tensor, kept: int) -> Tensor:
    """Return the mean inputs [E, H] of the domains; the first `kept` experts stay as they are.

    An expert that joins others gets the difference to the mean of their domains, at their mean
    norm: what is common to all text decides nothing.
    """
    means_EH = means(x_LH, labels_L, len(old_EH))
    if not kept:
        return means_EH
    kept_EH = old_EH[:kept]
    common_H = means_EH[:kept].mean(0)
    own_EH = means_EH[kept:] - common_H
    directions_EH = F.normalize(own_EH, dim=-1)
    norm = kept_EH.norm(dim=-1).mean()
    new_EH = directions_EH * norm
    return torch.cat([kept_EH, new_EH])


def warm_start_embeddings(
    old_EH: Tensor,
    features: Features,
    config: RouterConfig,
    kept: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the free expert embeddings [E, H] that a linear router starts with.

    Args:
        old_EH: those so far.
        features: of text of every expert's domain, no background.
        config: `warm_start`, `fit_steps`, `fit_lr`.
        kept: older experts, which `hidden_mean` leaves as they are.
        generator: draws the tokens of each step of `label_fit`.
    """
    x_LH, labels_L = features.x_LH, features.labels_L
    if config.warm_start == "ridge":
        return ridge_embeddings(x_LH, labels_L, len(old_EH))
    if config.warm_start == "hidden_mean":
        return hidden_mean_embeddings(x_LH, labels_L, old_EH, kept)
    embeddings_EH = nn.Parameter(old_EH.clone())
    lr = config.fit_lr or DEFAULT_LR["linear"]
    optimizer = torch.optim.AdamW([embeddings_EH], lr=lr, weight_decay=0.0)
    for _ in range(config.fit_steps):
        loss = _label_loss(features, embeddings_EH, generator)
        _step(optimizer, loss)
    return embeddings_EH.detach()


def warm_start_projection(
    projection: Projection,
    features: Features,
    config: RouterConfig,
    generator: torch.Generator,
) -> None:
    """Fit P in place.

    Args:
        projection: of one layer, on the device of `features`.
        features: for `label_fit` of text of every expert's domain; for the others of some, with
            `chunks_CM`, and background.
        config: `warm_start`, `fit_steps`, `fit_lr`.
        generator: draws the tokens of each step.
    """
    if config.warm_start == "closed_form":
        _closed_form(projection, features)
        return
    lr = config.fit_lr or DEFAULT_LR["nexus"]
    optimizer = _adamw(projection, lr)
    if config.warm_start == "chunks":
        _fit_chunks(projection, features, optimizer, config.fit_steps, generator)
        return
    assert features.inputs_EM is not None
    for _ in range(config.fit_steps):
        embeddings_EH = projection(features.inputs_EM)
        loss = _label_loss(features, embeddings_EH, generator)
        _step(optimizer, loss)


def _adamw(projection: Projection, lr: float) -> torch.optim.Optimizer:
    groups = [{"params": list(projection.maps.parameters()), "lr": lr}]
    if projection.log_norm is not None:
        groups.append({"params": [projection.log_norm], "lr": lr * NORM_LR})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _label_loss(features: Features, embeddings_EH: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cross-entropy of softmax(x E^T) against the labels of some tokens."""
    labelled = len(features.labels_L)
    count = min(TOKENS_PER_STEP, labelled)
    # Drawn on the CPU and then moved: the same tokens whatever the device.
    picked_n = torch.randint(labelled, (count,), generator=generator)
    logits_nE = F.linear(features.rows(picked_n), embeddings_EH)
    picked_n = picked_n.to(features.place)
    return F.cross_entropy(logits_nE, features.labels_L[picked_n])


def _chunk_loss(features: Features, projection: Projection, generator: torch.Generator) -> Tensor:
    """Return the cross-entropy with which chunks tell their tokens from those of others (InfoNCE).

    Of CHUNKS_PER_STEP chunks c at once, and TOKENS_PER_CHUNK tokens of each.
    """
    x_TH, chunks_CM = features.x_TH, features.chunks_CM
    assert chunks_CM is not None
    chunks = len(chunks_CM)
    length = len(x_TH) // chunks
    place = features.place
    # Drawn on the CPU and then moved: the same chunks and tokens whatever the device.
    order_C = torch.randperm(chunks, generator=generator)
    picked_c = order_C[:CHUNKS_PER_STEP]
    drawn = (len(picked_c), TOKENS_PER_CHUNK)
    offsets = torch.randint(length, drawn, generator=generator)
    tokens = picked_c[:, None] * length + offsets
    x_nH = features.rows(tokens.flatten())
    own_c = torch.arange(len(picked_c), device=place)
    own_n = own_c.repeat_interleave(TOKENS_PER_CHUNK)
    inputs_cM = chunks_CM[picked_c.to(place)]
    embeddings_cH = projection(inputs_cM)
    logits_nc = F.linear(x_nH, embeddings_cH)
    return F.cross_entropy(logits_nc, own_n)


def _fit_chunks(
    projection: Projection,
    features: Features,
    optimizer: torch.optim.Optimizer,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Fit P to whitened inputs by chunks, and by the labels of the domains."""
    assert features.inputs_EM is not None
    # the whitening of an earlier fit, if any: this one is of other text
    projection.fold(None)
    white_HH = whitener(features.x_TH, features.place)
    # whitened as they are drawn: all of them at once would be there twice
    whitened = replace(features, white_HH=white_HH)
    for _ in range(steps):
        chunk_loss = _chunk_loss(whitened, projection, generator)
        embeddings_EH = projection(features.inputs_EM)
        label_loss = _label_loss(whitened, embeddings_EH, generator)
        _step(optimizer, chunk_loss + label_loss)
    _finish(projection, white_HH, features)


def _chunk_means(x_TH: Tensor, chunks: int, place: torch.device) -> Tensor:
    """Return the mean input [C, H] of each window."""
    # windows are of one length, and follow each other
    length = len(x_TH) // chunks
    chunk_C = torch.arange(chunks, device=place)
    chunk_T = chunk_C.repeat_interleave(length)
    return means(x_TH, chunk_T, chunks)


@torch.no_grad()
def _closed_form(projection: Projection, features: Features) -> None:
    """Set a linear P by ridge regression of mean whitened inputs on embeddings.

    G = C + E samples: each chunk, and (weighted) each domain. With whitened inputs this is also the
    bilinear form of ESZSL: one matrix between embeddings and inputs.
    """
    x_TH, chunks_CM, inputs_EM = features.x_TH, features.chunks_CM, features.inputs_EM
    assert chunks_CM is not None and inputs_EM is not None
    chunks, domains = len(chunks_CM), len(inputs_EM)
    white_HH = whitener(x_TH, features.place)

    chunk_means_CH = _chunk_means(x_TH, chunks, features.place)
    domain_means_EH = means(features.x_LH, features.labels_L, domains)
    means_GH = torch.cat([chunk_means_CH, domain_means_EH])
    # Less what is common to all text: it decides nothing.
    targets_GH = means_GH - domain_means_EH.mean(0)
    whitened_GH = targets_GH @ white_HH
    samples_GM = torch.cat([chunks_CM, inputs_EM])
    weights_G1 = torch.ones(chunks + domains, 1, device=features.place)
    # whatever their numbers: all domains together against all chunks together
    weights_G1[chunks:] = DOMAIN_WEIGHT * chunks / domains

    moments_MM = samples_GM.T @ (weights_G1 * samples_GM)
    products_MH = samples_GM.T @ (weights_G1 * whitened_GH)
    penalised_MM = moments_MM + _penalty(moments_MM, CHUNK_RIDGE)
    map_MH = torch.linalg.solve(penalised_MM, products_MH)
    projection.maps[0].weight.copy_(map_MH.T)
    _finish(projection, white_HH, features)


@torch.no_grad()
def _finish(projection: Projection, white_HH: Tensor, features: Features) -> None:
    """Fold the whitening into P, and scale it to the temperature that suits the labels."""
    assert features.inputs_EM is not None
    projection.fold(white_HH)
    embeddings_EH = projection(features.inputs_EM)
    factor = temperature(features.x_LH, features.labels_L, embeddings_EH)
    projection.scale_output(factor)
