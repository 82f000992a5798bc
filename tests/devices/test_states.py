"""A training state on a pretend GPU: masters and moments go to a file and come back to the device.

How ZeRO lays them out is DeepSpeed's, and left out: its flat tensors are cut by views of one
storage, which tensors that wrap others don't have. tests/runtime/test_states*.py have real ranks.
"""

from types import SimpleNamespace

import torch
from pretend import GPU, gpu, on_device, to_gpu, values

from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import portable_state
from nexus_ds.runtime.portable_state import Piece, StateFiles, read_rank, write_rank

KINDS = (internals.MASTER, *internals.MOMENTS)
FLAT = torch.arange(6.0)


def pieces_of(numbers):
    """Return what a rank owns: two pieces of a parameter, by kind, on the device."""
    places = [to_gpu(numbers + kind) for kind in range(len(KINDS))]
    cuts = (slice(0, 4), slice(4, 6))
    return [
        Piece("weight", cut.start, {k: p[cut] for k, p in zip(KINDS, places, strict=True)})
        for cut in cuts
    ], places


def test_a_state_goes_to_a_file_and_back_to_the_device(tmp_path, monkeypatch):
    inner = SimpleNamespace(state={}, defaults={"fused": True})
    flat = to_gpu(FLAT)
    inner.state[flat] = {}
    optimizer = SimpleNamespace(optimizer=inner, fp32_partitioned_groups_flat=[flat])
    engine = SimpleNamespace(optimizer=optimizer)
    monkeypatch.setattr(internals, "weights_from_masters", lambda engine: None)
    written, expected = pieces_of(FLAT)
    fresh, found = pieces_of(torch.zeros(6))
    name = "rank_0.safetensors"
    with gpu() as watch:
        monkeypatch.setattr(portable_state, "pieces", lambda engine: written)
        write_rank(engine, tmp_path / name, lambda: None)
        assert watch.waits == {"portable_state._bytes: to host": 2 * len(KINDS)}
        monkeypatch.setattr(portable_state, "pieces", lambda engine: fresh)
        read_rank(engine, StateFiles(tmp_path, [name]), 7, name)
    for there, original in zip(found, expected, strict=True):
        assert torch.equal(values(there), values(original))
    state = inner.state[flat]
    assert {kind for kind in state} == {*internals.MOMENTS, "step"}
    # The fused optimizer reads its count on the device.
    assert all(on_device(tensor) for tensor in state.values()) and flat.device == GPU
    assert float(values(state["step"])) == 7
