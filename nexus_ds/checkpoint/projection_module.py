"""P of a checkpoint as torch's module, for whoever trains or fits it.

Shapes: E routed experts, M width of a domain embedding, H hidden size.
Not covered: P(D) without torch (`expert_rows`), a new P (`upcycling.new_router`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nexus_ds.checkpoint.expert_rows import last_map
from nexus_ds.checkpoint.projections import State
from nexus_ds.checkpoint.records import RouterRecord
from nexus_ds.checkpoint.sidecar import FREE_ROWS, Sidecar, form_of
from nexus_ds.errors import CheckpointError
from nexus_ds.model.router import Projection, expert_embeddings_in
from nexus_ds.model.threads import one_thread


def new_projection(router: RouterRecord, embedding_size: int, hidden_size: int) -> Projection:
    """Return an untrained P of a recorded form, from embeddings [.., M] to rows [.., H]."""
    return Projection(
        embedding_size,
        hidden_size,
        router.depth,
        router.width,
        router.projection,
        router.row_norm,
    )


def from_state(router: RouterRecord, state: State) -> Projection:
    """Return P with weights of the sidecar's form, which are copied."""
    hidden_size, _ = state[last_map(router)].shape
    _, embedding_size = state["maps.0.weight"].shape
    # of no memory, and nothing is drawn, until it gets these
    with torch.device("meta"):
        projection = new_projection(router, embedding_size, hidden_size)
    weights = {name: torch.from_numpy(values.copy()) for name, values in state.items()}
    projection.load_state_dict(weights, assign=True)
    return projection


def state_of(named: Mapping[str, Tensor]) -> State:
    """Return weights of P as a sidecar has them: fp32 on the CPU, copies."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, tensor in named.items()
    }


def load_projection(sidecar: Sidecar, layer: int) -> Projection:
    """Return P of one layer in fp32; CheckpointError if its weights are of another form."""
    state = sidecar.projections[layer]
    form_of(sidecar, layer, state)
    # copies: whoever changes the module does not change the sidecar
    return from_state(sidecar.router, state)


def domain_inputs(sidecar: Sidecar) -> Tensor:
    """Return what P reads of the experts' domains, [E, M] fp32; a copy."""
    return torch.from_numpy(sidecar.domain_inputs().copy())


def inputs_of(sidecar: Sidecar, vectors: Tensor) -> Tensor:
    """Return what P reads of raw embeddings [.., M] fp32 on the CPU."""
    return torch.from_numpy(sidecar.inputs_of(vectors.numpy()))


@one_thread()
def expert_embeddings(sidecar: Sidecar, layer: int, dtype: torch.dtype) -> Tensor:
    """Return what P(D) gives one layer of a model of `dtype`, [E, H] (paper section 3).

    Raises:
        CheckpointError: the router is linear: its expert embeddings are in the model file alone.
    """
    if sidecar.router.kind != "nexus":
        raise CheckpointError(FREE_ROWS)
    projection = load_projection(sidecar, layer)
    return expert_embeddings_in(projection, domain_inputs(sidecar), dtype)
