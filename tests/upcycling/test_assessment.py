"""What models could become together: the same answers as `upcycle` and `extend` give."""

import json
import shutil

import pytest
import torch
from branches import NAMES, edit_config, edit_tensors, make_parts
from conftest import (
    add_token,
    of_another_origin,
    save_branch,
    train_shared_gates,
)

from nexus_ds.upcycling.assessment import assess, related
from tests.checkpoint.test_qwen3_next import SIZES, mixture


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed and three branches."""
    return make_parts(tmp_path, dense_dir, text_folder)


def of(parts, *names):
    return assess([parts / name for name in names])


def test_branches_of_a_seed(parts):
    found = of(parts, "seed", *NAMES)
    assert found.possible and found.as_dict()["as"] == "seed and experts" and not found.notes
    assert of(parts, "seed").kind == "expert" and of(parts, "seed").possible


def test_all_that_stands_against_it_is_listed(parts):
    edit_config(parts / "alpha", rms_norm_eps=1e-3, max_position_embeddings=32)
    of_another_origin(parts / "beta")
    add_token(parts / "beta")
    edit_tensors(parts / "gamma", lambda t: t.pop("model.norm.weight"))
    edit_tensors(parts / "seed", lambda t: t["model.norm.weight"].fill_(torch.nan))
    found = of(parts, "seed", *NAMES)
    for said in (
        "1 missing: model.norm.weight",
        "norm_eps: rms_norm_eps changes what is computed",
        "unrelated to those of the seed",
        "seed (",
        "beta: the tokenizer has token ids up to 31, the model embeds 31",
    ):
        assert any(said in problem for problem in found.problems), said
    assert len(found.problems) == 5 and not found.possible
    assert [note for note in found.notes if "max_position_embeddings is 32" in note]


def test_another_vocabulary(parts):
    path = parts / "alpha" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"sail"', '"sale"'))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    definition = json.loads(text)
    definition["added_tokens"].append({"id": 31, "content": "<x>", "special": True, **flags})
    (parts / "beta" / "tokenizer.json").write_text(json.dumps(definition))
    edit_config(parts / "beta", vocab_size=40)
    edit_tensors(
        parts / "beta", lambda t: t.update({"model.embed_tokens.weight": torch.randn(40, 16)})
    )
    (parts / "gamma" / "tokenizer.json").unlink()
    said = "\n".join(of(parts, "seed", *NAMES).problems)
    assert "alpha: its vocabulary is not that of" in said and "'sail' / 'sale'" in said
    assert "31 None / '<x>'; --align-vocab keeps them all" in said
    assert "gamma: no tokenizer of a known form" in said


def test_an_extension(nexus_dir, parts):
    save_branch(nexus_dir, parts / "delta")
    found = assess([nexus_dir, parts / "delta"])
    assert found.possible and found.kind == "extension"
    shutil.copytree(nexus_dir, parts / "tuned")
    train_shared_gates(parts / "tuned")
    [problem] = assess([parts / "tuned", parts / "delta"]).problems
    assert "the model was trained elsewhere" in problem
    shutil.copytree(nexus_dir, parts / "damaged")
    expert = "model.layers.1.mlp.experts.1.up_proj.weight"
    edit_tensors(parts / "damaged", lambda t: t[expert].fill_(torch.nan))
    [problem] = assess([parts / "damaged", parts / "delta"]).problems
    assert f"checkpoint ({parts / 'damaged'}): tensor {expert} has" in problem
    assert assess([nexus_dir]) is None and assess([parts / "seed", nexus_dir]) is None


def test_evidence_of_a_common_base(parts):
    found = related(parts / "seed", parts / "alpha")
    assert found["says"].startswith("shares a base: cosine 0.") and set(found["layers"]) == {
        "0",
        "1",
    }
    assert found["cosine"] > 0.8 and found["modules"]["mlp"]["distance"] > 0.3
    json.dumps(found)
    of_another_origin(parts / "beta")
    assert related(parts / "seed", parts / "beta")["says"].startswith("unrelated: cosine ")
    same = related(parts / "seed", parts / "seed")
    assert same["says"] == "the same weights, in the sample" and same["cosine"] == 1
    edit_tensors(parts / "gamma", lambda t: [t.pop(name) for name in list(t) if "attn" in name])
    assert related(parts / "seed", parts / "gamma")["says"].startswith("nothing to compare")


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_evidence_of_a_common_base_in_models_of_other_files(family, tmp_path, dense_dir):
    """A mixture and a branch hold the same weights under other names, or in another form."""
    sizes = {"rope_parameters": dict(rope_theta=9e3), "partial_rotary_factor": 0.5}
    sizes = SIZES | {"pad_token_id": None} | (sizes if family == "phi3" else {"head_dim": 16})
    mixture(tmp_path, dense_dir, family, sizes, "bf16", 1)
    found = related(tmp_path / "out", tmp_path / "a")
    assert found["says"].startswith("shares a base: cosine ") and found["cosine"] > 0.9
    assert {"self_attn", "input_layernorm", "embed_tokens"} <= set(found["modules"])
    assert related(tmp_path / "seed", tmp_path / "a")["cosine"] > 0.9
    # a model that can't become an expert is compared under its file's names
    edit_config(tmp_path / "a", hidden_act="relu")
    assert related(tmp_path / "a", tmp_path / "a")["says"] == "the same weights, in the sample"
