"""The one pass that writes a model: each kind of source, looked at on the way."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nexus_ds.checkpoint.tensors import TensorReader, TensorWriter
from nexus_ds.errors import CheckpointError
from nexus_ds.upcycling.sources import Blend, Computed, Part, Stack, mean_of
from nexus_ds.upcycling.writing import write_tensors

SHAPE = (6, 4)
CONFIG = {"model_type": "llama"}


def model(folder, *values):
    folder.mkdir()
    weight = torch.arange(24.0).view(SHAPE) + 1
    for place, value in enumerate(values):
        weight[place, 0] = value
    with TensorWriter(folder, {"w.weight": ("BF16", SHAPE)}) as writer:
        writer.write("w.weight", weight.bfloat16())
    return TensorReader(folder), weight.bfloat16().float()


def written(folder, made, dtype=torch.float32):
    folder.mkdir()
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    write_tensors(folder, {"w.weight": (kind, SHAPE)}, {"w.weight": made}, "write", CONFIG)
    return load_file(folder / "model.safetensors")["w.weight"]


def test_each_kind_of_source(tmp_path):
    (one, a), (two, b) = model(tmp_path / "a"), model(tmp_path / "b", 7.0)
    parts = [Part("one", one, "w.weight"), Part("two", two, "w.weight")]
    rows = np.arange(24, dtype=np.float32).reshape(SHAPE)
    expected = {
        "copy": (Blend(parts[:1], scale=2.0), 2 * a),
        "mean": (mean_of(parts), (a + b) / 2),
        "rows": (
            Stack(((0, 4, Blend(parts[:1])), (4, 6, Blend(parts[1:])))),
            torch.cat([a[:4], b[4:]]),
        ),
        "computed": (Computed(lambda: rows), torch.from_numpy(rows)),
        "given": (rows, torch.from_numpy(rows)),
        "number": (0.5, torch.full(SHAPE, 0.5)),
    }
    for name, (made, wanted) in expected.items():
        assert torch.equal(written(tmp_path / name, made), wanted), name


def test_what_is_no_number_is_named(tmp_path):
    reader, _ = model(tmp_path / "a", torch.nan, torch.inf)
    with pytest.raises(CheckpointError, match=r"one .*w.weight has 2 values that are NaN or inf"):
        written(tmp_path / "out", Blend([Part("one", reader, "w.weight")]))


def test_what_overflows_is_named(tmp_path):
    reader, _ = model(tmp_path / "a", 3e38)
    doubled = Blend([Part("one", reader, "w.weight")], scale=2.0)
    with pytest.raises(CheckpointError, match=r"w.weight: 1 values overflow .*; one has weights"):
        written(tmp_path / "out", doubled, torch.bfloat16)


def test_a_tensor_that_comes_from_nowhere_is_named_before_the_first_byte(tmp_path):
    plan = {"w.weight": ("F32", SHAPE), "x.weight": ("F32", SHAPE)}
    with pytest.raises(CheckpointError, match=r"1 planned tensors were not written, .*'x.weight'"):
        write_tensors(tmp_path, plan, {"w.weight": 0.5}, "write", CONFIG)
    assert not list(tmp_path.iterdir())
