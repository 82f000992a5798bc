"""P fitted to expert embeddings that were trained without it.

A mixture that stock transformers has trained knows rows of a router, not P. The last linear map of
P is changed by the smallest matrix (Frobenius norm) with which P gives these rows: least squares
over what the map reads, which are as many vectors as there are experts. They are independent, and
the rows come out exactly, as long as there are no more experts than numbers in a vector and P is
not linear in vectors that were centred. Those add up to zero with some weights: what a linear P
gives them can't be any rows, but it can be any rows up to one vector that is added to all, and of
that softmax sees nothing.
Shapes: E routed experts, M width of a domain embedding, K inputs of the last map, H hidden size.
Not covered: the other maps of P, which stay; text (`warm_start`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nexus_ds.model.router import Projection, expert_embeddings_in

DEPENDENT = 1e-5
"""Singular values below this share of the largest are rounding: vectors that are dependent."""


@dataclass(frozen=True)
class Refit:
    """A projection that gives trained rows."""

    projection: Projection
    rows_EH: Tensor
    """What it gives, as a model of the rows' dtype computes it."""
    error: float
    """Largest difference to the trained rows, relative to their largest entry; of shifted ones
    without what is added to all."""
    moved: float
    """Norm of the change of the last map, relative to the map's own."""
    shifted: bool
    """Whether one vector was added to all rows, which no softmax over them sees."""


def _last_map(projection: Projection) -> nn.Linear:
    if projection.out is not None:
        return projection.out
    last: nn.Linear = projection.maps[-1]
    return last


@torch.no_grad()
def _inputs_of_last(projection: Projection, inputs_EM: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the last map reads [E, K], as a model of `dtype` computes it; fp64."""
    rounded = copy.deepcopy(projection).to(dtype)
    seen: list[Tensor] = []

    def see(_: nn.Module, read: tuple[Tensor]) -> None:
        seen.extend(read)

    last = _last_map(rounded)
    last.register_forward_pre_hook(see)
    rounded(inputs_EM.to(dtype))
    return seen[0].double()


def _difference(found_EH: Tensor, rows_EH: Tensor, shifted: bool) -> float:
    exact_EH = rows_EH.double()
    apart_EH = found_EH.double() - exact_EH
    if shifted:
        apart_EH -= apart_EH.mean(0)
    # rows of zeros have no relative error
    scale = exact_EH.abs().max().clamp_min(1e-30)
    largest = apart_EH.abs().max()
    return float(largest / scale)


@torch.no_grad()
def _fitted(projection: Projection, inputs_EM: Tensor, rows_EH: Tensor, shifted: bool) -> Refit:
    """Return P with another last map; `shifted`: rows may have one vector added to all of them."""
    # in the model's dtype, whose rounding the new map makes up for; solved in fp64
    read_EK = _inputs_of_last(projection, inputs_EM, rows_EH.dtype)
    old_HK = _last_map(projection).weight.double()
    given_EH = read_EK @ old_HK.T
    missing_EH = rows_EH.double() - given_EH
    if shifted:
        read_EK -= read_EK.mean(0)
        missing_EH -= missing_EH.mean(0)
    # of all solutions, or of all nearest ones, the smallest
    inverse_KE = torch.linalg.pinv(read_EK, rtol=DEPENDENT)
    change_KH = inverse_KE @ missing_EH
    new = copy.deepcopy(projection)
    last = _last_map(new)
    last.weight.copy_(old_HK + change_KH.T)
    found_EH = expert_embeddings_in(new, inputs_EM, rows_EH.dtype)
    length = old_HK.norm().clamp_min(1e-30)
    moved = change_KH.norm() / length
    return Refit(
        new,
        found_EH,
        _difference(found_EH, rows_EH, shifted),
        float(moved),
        shifted,
    )


def refit(projection: Projection, inputs_EM: Tensor, rows_EH: Tensor, tolerance: float) -> Refit:
    """Return a projection that gives trained rows, as near to an old one as can be.

    Args:
        projection: P as it was before the training, fp32; it stays as it is.
        inputs_EM: what P reads of the domains.
        rows_EH: the trained rows, in the model's dtype.
        tolerance: of `Refit.error`, up to which rows count as given.

    Returns:
        P that gives the rows, else one that gives them but for a shift of all, else, with an error
        above the tolerance, the nearest of those.
    """
    dtype = rows_EH.dtype
    own_EH = expert_embeddings_in(projection, inputs_EM, dtype)
    # the router was frozen: nothing is to be solved, and no bit of P changes
    if torch.equal(own_EH, rows_EH):
        return Refit(projection, own_EH, 0.0, 0.0, False)
    found = _fitted(projection, inputs_EM, rows_EH, False)
    if found.error <= tolerance:
        return found
    return _fitted(projection, inputs_EM, rows_EH, True)
