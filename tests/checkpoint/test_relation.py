"""What two models have in common: branches, other origins, what moved."""

import shutil

import pytest
import torch
from conftest import of_another_origin, shaken
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.relation import OUTSIDE, UNRELATED, module_of, relation


def changed(source, out, change):
    shutil.copytree(source, out)
    tensors = change(load_file(out / "model.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return Headers(out)


def test_modules_by_their_names():
    assert module_of("model.layers.12.self_attn.q_proj.weight") == (12, "self_attn")
    assert module_of("model.layers.3.mlp.experts.1.up_proj.weight") == (3, "mlp")
    assert module_of("model.embed_tokens.weight") == (OUTSIDE, "embed_tokens")
    assert module_of("lm_head.weight") == (OUTSIDE, "lm_head")
    # int() takes no more than 4,300 digits, and fewer signs than isdecimal()
    assert module_of(f"model.layers.{'9' * 5000}.mlp.x") == (OUTSIDE, "layers")


def test_a_branch_and_a_model_of_another_origin(dense_dir, tmp_path):
    seed = Headers(dense_dir)
    branch = relation(seed, changed(dense_dir, tmp_path / "branch", lambda t: shaken(t, 1)))
    assert branch.cosine > 0.8 and not branch.unrelated
    shutil.copytree(dense_dir, tmp_path / "other")
    of_another_origin(tmp_path / "other")
    other = relation(seed, Headers(tmp_path / "other"))
    assert abs(other.cosine) < UNRELATED and other.unrelated
    assert other.modules()["input_layernorm"].distance == 0


def test_sums_by_layer_are_those_of_the_weights(dense_dir, tmp_path):
    def change(tensors):
        for name in tensors:
            if "layers.1.self_attn" in name:
                tensors[name] = tensors[name].bfloat16()
                tensors[name] *= -1
        return tensors

    found = relation(Headers(dense_dir), changed(dense_dir, tmp_path / "x", change))
    assert set(found.layers) == {OUTSIDE, 0, 1}
    assert found.layers[0]["self_attn"].distance == 0
    assert found.layers[1]["self_attn"].cosine == pytest.approx(-1, abs=1e-4)
    assert found.layers[1]["self_attn"].distance == pytest.approx(2, abs=1e-2)
    moved = {name for name, one in found.modules().items() if one.distance > 0}
    assert moved == {"self_attn"}


def test_what_can_not_be_compared_is_left_out(dense_dir, tmp_path):
    def change(tensors):
        for name in list(tensors):
            if "self_attn" in name:
                tensors[name] = torch.full_like(tensors[name], torch.nan)
            if "mlp" in name:
                tensors[name] = torch.zeros(3)
        del tensors["model.norm.weight"]
        return tensors

    found = relation(Headers(dense_dir), changed(dense_dir, tmp_path / "x", change))
    assert set(found.modules()) == {
        "embed_tokens",
        "self_attn",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert found.cosine != found.cosine and not found.unrelated
