"""Ways to start a layer's router from text: free rows or P, by labels, in closed form, or from
chunks of text.

    label_fit     rows or P by the cross-entropy of domain labels (SGD)
    hidden_mean   a row is the mean router input of its domain's text
    ridge         rows by ridge regression of one-hot domain labels, then one temperature for all
    chunks        P so that P(embedding of a chunk) knows that chunk's tokens among those of other
    chunks (InfoNCE) closed_form   a linear P by ridge regression from embeddings of chunks to their
    mean whitened inputs

`chunks` and `closed_form` show P a direction for every chunk instead of one a domain: what P(d) of
a domain that it has
never seen is worth depends on that, and on how much of all text the chunks come from: background
text has no expert.
Shapes: T tokens in windows of S, E routed experts, H hidden size, C chunks (= windows), M width of
an embedding.
Not covered: where the inputs come from (`fit`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.errors import ConfigError
from nexus_ds.model.router import Projection
from nexus_ds.settings import CHUNK_WARM_STARTS, RouterConfig

DEFAULT_LR = {"nexus": 1e-3, "linear": 5e-3}
NORM_LR = 20.0  # of a fixed row length, relative to P's: its logarithm has far to go
TOKENS_PER_STEP = 4096
CHUNKS_PER_STEP = 512  # that compete for a token
TOKENS_PER_CHUNK = 8  # and step
JUDGED_TOKENS = 1 << 14  # that a temperature is chosen on
RIDGE = 1e-3  # relative to the mean of the diagonal
WHITEN = 1e-3
# chosen by leaving out one old domain after the other, as are the sizes around it
CHUNK_RIDGE = 3.0
DOMAIN_WEIGHT = 0.3  # of all domain rows beside all chunks

FREE_WARM_STARTS = ("hidden_mean", "ridge", "embedding")


@dataclass
class Features:
    """What the router of one layer sees of text; all on one device, fp32."""

    x_TH: Tensor
    labels_T: Tensor
    """Domain of each token, 0 .. E-1 of those that have an expert and text; -1: background, which
    has no expert."""
    generator: torch.Generator
    inputs_EM: Tensor | None = None
    """What P reads of each of these domains; None for free rows."""
    chunks_CM: Tensor | None = None
    """What P reads of each window's own embedding, for `chunks` and `closed_form`."""

    def labelled(self) -> Features:
        """Return what it sees of domains with an expert; the chunks don't fit these tokens any
        more."""
        known_T = self.labels_T >= 0
        return replace(
            self, x_TH=self.x_TH[known_T], labels_T=self.labels_T[known_T], chunks_CM=None
        )


def check_start(start: str, kind: str, projection: str) -> None:
    """Raise ConfigError for a `router.warm_start` that a router of this kind and form of P can't
    have."""
    if kind == "nexus" and start in FREE_WARM_STARTS:
        raise ConfigError(
            f"router.warm_start {start} sets free rows, but this router's rows are P(d); use label_fit, chunks, "
            "closed_form or none, or router.kind linear"
        )
    if kind == "linear" and start in CHUNK_WARM_STARTS:
        raise ConfigError(
            f"router.warm_start {start} fits P, but this router has free rows; use label_fit, hidden_mean, ridge, "
            "embedding or none, or router.kind nexus"
        )
    if start == "closed_form" and projection != "linear":
        raise ConfigError(
            f"router.warm_start closed_form needs a linear P, this one is {projection}; use chunks, or "
            "router.projection linear from upcycling on"
        )


def temperature(x_TH: Tensor, labels_T: Tensor, embeddings_EH: Tensor) -> float:
    """Return the factor of the rows with the least cross-entropy of domain labels, among powers of
    2^(1/4)."""
    step = max(1, len(x_TH) // JUDGED_TOKENS)
    logits_TE, labels_T = F.linear(x_TH[::step], embeddings_EH), labels_T[::step]
    factors = (2.0 ** torch.arange(-8, 12, 0.25)).tolist()
    losses = [float(F.cross_entropy(logits_TE * factor, labels_T)) for factor in factors]
    return factors[losses.index(min(losses))]


def means(x_TH: Tensor, groups_T: Tensor, count: int) -> Tensor:
    """Return the mean [count, H] of each group's inputs; NaN for a group without tokens."""
    sums_GH = torch.zeros(count, x_TH.shape[1], device=x_TH.device).index_add_(0, groups_T, x_TH)
    return sums_GH / torch.bincount(groups_T, minlength=count)[:, None]


def whitener(x_TH: Tensor) -> Tensor:
    """Return the symmetric W [H, H] that makes the second moments of x W the identity (ZCA)."""
    moments_HH = x_TH.T @ x_TH / len(x_TH)
    values_H, vectors_HH = torch.linalg.eigh(moments_HH)
    return (vectors_HH / (values_H + WHITEN * values_H.mean()).sqrt()) @ vectors_HH.T


def ridge_embeddings(x_TH: Tensor, labels_T: Tensor, experts: int) -> Tensor:
    """Return rows [E, H] that regress one-hot labels on the inputs (DUME's way), at the best
    temperature."""
    moments_HH = x_TH.T @ x_TH
    penalty = RIDGE * moments_HH.diagonal().mean() * torch.eye(len(moments_HH), device=x_TH.device)
    targets_HE = x_TH.T @ F.one_hot(labels_T, experts).to(x_TH)
    embeddings_EH = torch.linalg.solve(moments_HH + penalty, targets_HE).T.contiguous()
    return embeddings_EH * temperature(x_TH, labels_T, embeddings_EH)


def hidden_mean_embeddings(x_TH: Tensor, labels_T: Tensor, old_EH: Tensor, kept: int) -> Tensor:
    """Return rows [E, H] of mean inputs; the first `kept` stay, the others are put to their mean
    norm.

    A row that joins others is the difference to the mean of their domains: what is common to all
    text decides nothing.
    """
    embeddings_EH = means(x_TH, labels_T, len(old_EH))
    if not kept:
        return embeddings_EH
    new_EH = (
        F.normalize(embeddings_EH[kept:] - embeddings_EH[:kept].mean(0), dim=-1)
        * old_EH[:kept].norm(dim=-1).mean()
    )
    return torch.cat([old_EH[:kept], new_EH])


def warm_start_embeddings(
    old_EH: Tensor, seen: Features, config: RouterConfig, kept: int
) -> Tensor:
    """Return the free rows [E, H] that a linear router starts with.

    Args:
        old_EH: the rows so far.
        seen: text of every expert's domain.
        config: `warm_start`, `fit_steps`, `fit_lr`.
        kept: rows of older experts, which `hidden_mean` leaves as they are.
    """
    if config.warm_start == "ridge":
        return ridge_embeddings(seen.x_TH, seen.labels_T, len(old_EH))
    if config.warm_start == "hidden_mean":
        return hidden_mean_embeddings(seen.x_TH, seen.labels_T, old_EH, kept)
    embeddings_EH = nn.Parameter(old_EH.clone())
    optimizer = torch.optim.AdamW(
        [embeddings_EH], lr=config.fit_lr or DEFAULT_LR["linear"], weight_decay=0.0
    )
    for _ in range(config.fit_steps):
        _step(optimizer, _label_loss(seen, embeddings_EH))
    return embeddings_EH.detach()


def warm_start_projection(projection: Projection, seen: Features, config: RouterConfig) -> None:
    """Fit P in place.

    Args:
        projection: of one layer, on the device of `seen`.
        seen: for `label_fit` text of every expert's domain; for the others of some, with
            `chunks_CM`, and background.
        config: `warm_start`, `fit_steps`, `fit_lr`.
    """
    if config.warm_start == "closed_form":
        _closed_form(projection, seen)
        return
    assert seen.inputs_EM is not None
    optimizer = _adam(projection, config.fit_lr or DEFAULT_LR["nexus"])
    if config.warm_start == "label_fit":
        for _ in range(config.fit_steps):
            _step(optimizer, _label_loss(seen, projection(seen.inputs_EM)))
        return
    projection.fold(None)
    white_HH = whitener(seen.x_TH)
    whitened = replace(seen, x_TH=seen.x_TH @ white_HH)
    labelled = whitened.labelled()
    for _ in range(config.fit_steps):
        _step(
            optimizer,
            _chunk_loss(whitened, projection) + _label_loss(labelled, projection(seen.inputs_EM)),
        )
    _finish(projection, white_HH, seen)


def _adam(projection: Projection, lr: float) -> torch.optim.Optimizer:
    groups = [{"params": list(projection.maps.parameters()), "lr": lr}]
    if projection.log_norm is not None:
        groups.append({"params": [projection.log_norm], "lr": lr * NORM_LR})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _label_loss(seen: Features, embeddings_EH: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(x E^T) against the labels of some tokens."""
    count = min(TOKENS_PER_STEP, len(seen.x_TH))
    pick = torch.randint(len(seen.x_TH), (count,), generator=seen.generator).to(seen.x_TH.device)
    return F.cross_entropy(F.linear(seen.x_TH[pick], embeddings_EH), seen.labels_T[pick])


def _chunk_loss(seen: Features, projection: Projection) -> Tensor:
    """Return the cross-entropy with which rows of chunks tell their own tokens from those of the
    other chunks."""
    assert seen.chunks_CM is not None
    chunks = len(seen.chunks_CM)
    length = len(seen.x_TH) // chunks
    pick = torch.randperm(chunks, generator=seen.generator)[:CHUNKS_PER_STEP]
    where = torch.randint(length, (len(pick), TOKENS_PER_CHUNK), generator=seen.generator)
    tokens = (pick[:, None] * length + where).flatten().to(seen.x_TH.device)
    own = torch.arange(len(pick), device=seen.x_TH.device).repeat_interleave(TOKENS_PER_CHUNK)
    return F.cross_entropy(
        F.linear(seen.x_TH[tokens], projection(seen.chunks_CM[pick.to(own.device)])), own
    )


@torch.no_grad()
def _closed_form(projection: Projection, seen: Features) -> None:
    """Set a linear P by ridge regression of mean whitened inputs on embeddings, of chunks and
    (weighted) of domains.

    With whitened inputs this is also the bilinear form of ESZSL: one matrix between embeddings and
    inputs.
    """
    assert seen.chunks_CM is not None and seen.inputs_EM is not None
    white_HH = whitener(seen.x_TH)
    chunks, domains, device = len(seen.chunks_CM), len(seen.inputs_EM), seen.x_TH.device
    chunk_T = torch.arange(chunks, device=device).repeat_interleave(len(seen.x_TH) // chunks)
    labelled = seen.labelled()
    domain_EH = means(labelled.x_TH, labelled.labels_T, domains)
    targets_GH = torch.cat([means(seen.x_TH, chunk_T, chunks), domain_EH]) - domain_EH.mean(0)
    inputs_GM = torch.cat([seen.chunks_CM, seen.inputs_EM])
    weight_G1 = torch.ones(len(inputs_GM), 1, device=device)
    weight_G1[chunks:] = DOMAIN_WEIGHT * chunks / domains
    moments_MM = inputs_GM.T @ (weight_G1 * inputs_GM)
    penalty = CHUNK_RIDGE * moments_MM.diagonal().mean() * torch.eye(len(moments_MM), device=device)
    map_MH = torch.linalg.solve(
        moments_MM + penalty, inputs_GM.T @ (weight_G1 * (targets_GH @ white_HH))
    )
    projection.maps[0].weight.copy_(map_MH.T)
    _finish(projection, white_HH, seen)


@torch.no_grad()
def _finish(projection: Projection, white_HH: Tensor, seen: Features) -> None:
    """Fold the whitening of the inputs into P, and put its rows to the temperature that suits the
    labels."""
    assert seen.inputs_EM is not None
    labelled = seen.labelled()
    projection.fold(white_HH)
    projection.scale_output(
        temperature(labelled.x_TH, labelled.labels_T, projection(seen.inputs_EM))
    )
