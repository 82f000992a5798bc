"""What is checked before models are put together, and while their tensors are written."""

import json

import pytest
import torch
from branches import (
    edit_tensors,
    left_over,
    make_parts,
    tensors_of,
    upcycle,
)
from safetensors.torch import save_file

from nexus_ds.errors import CheckpointError, IncompatibleModelsError


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def test_other_tokenizer(parts):
    path = parts / "gamma" / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["sail"], vocabulary["ship"] = vocabulary["ship"], vocabulary["sail"]
    path.write_text(json.dumps(value))
    with pytest.raises(
        IncompatibleModelsError,
        match=r"tokenizer of expert gamma .* 2 of \d+ tokens differ.*'sail'",
    ):
        upcycle(parts)
    assert not left_over(parts)


def test_missing_tensor(parts):
    edit_tensors(parts / "beta", lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"beta: .*1 missing: model.layers.1.self_attn.k_proj.weight"
    ):
        upcycle(parts)
    assert not left_over(parts)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.view(-1)[:3].fill_(torch.nan),
            "has 3 values that are NaN",
        ),
        (
            "model.norm.weight",
            lambda t: t[:1].fill_(torch.inf),
            "has 1 values that are NaN or infinite",
        ),
        ("model.layers.0.self_attn.q_proj.weight", lambda t: t.zero_(), "has only zeros"),
    ],
)
def test_bad_values_name_model_tensor_and_count(parts, name, change, message):
    edit_tensors(parts / "beta", lambda tensors: change(tensors[name]))
    with pytest.raises(CheckpointError, match=rf"expert beta \(.*beta\): tensor {name} {message}"):
        upcycle(parts)
    assert not left_over(parts)


@pytest.mark.parametrize(
    ("dtype", "kind", "large"), [(torch.bfloat16, "BF16", 3.4e38), (torch.float16, "F16", 7e4)]
)
def test_a_cast_that_overflows(parts, dtype, kind, large):
    for name in ("seed", "alpha", "gamma"):
        tensors = {n: t.to(dtype) for n, t in tensors_of(parts / name).items()}
        save_file(tensors, parts / name / "model.safetensors", metadata={"format": "pt"})
    edit_tensors(
        parts / "beta", lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[:2].fill_(large)
    )
    with pytest.raises(
        CheckpointError,
        match=rf"experts.1.up_proj.weight: 2 values overflow {kind}; expert beta",
    ):
        upcycle(parts)
    assert not left_over(parts)


def test_a_doubled_shared_expert_that_overflows(parts):
    edit_tensors(
        parts / "seed", lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[:2].fill_(3e38)
    )
    with pytest.raises(
        CheckpointError, match=r"shared_expert.down_proj.weight: 2 values overflow .* seed"
    ):
        upcycle(parts)
    assert not left_over(parts)
