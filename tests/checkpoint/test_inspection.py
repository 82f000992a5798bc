"""Facts of checkpoints: parameter counts against transformers, kind, sidecar, damage that is shown
and not hidden."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.errors import CheckpointError
from tests.checkpoint.test_dense import changed


def test_dense(dense_dir):
    from transformers import AutoModelForCausalLM

    facts, model = (
        describe(dense_dir),
        AutoModelForCausalLM.from_pretrained(dense_dir, local_files_only=True),
    )
    count = sum(p.numel() for p in model.parameters())
    assert facts["parameters"] == {"total": count, "active": count}
    assert facts["bytes"] == 4 * count
    assert (facts["kind"], facts["family"], facts["dtype"], facts["layers"]) == (
        "dense",
        "llama",
        "F32",
        2,
    )
    assert facts["routed_experts"] == 0 and "experts" not in facts


def test_nexus_counts_only_the_chosen_expert_as_active(nexus_dir):
    """Paper section 10, fact 12: total - active = (n - k) FFN stacks."""
    facts = describe(nexus_dir)
    stack = 2 * 3 * 16 * 24
    assert facts["parameters"]["total"] - facts["parameters"]["active"] == (3 - 1) * stack
    assert facts["kind"] == "Nexus" and facts["routed_experts"] == 3 and facts["top_k"] == 1
    assert [expert["name"] for expert in facts["experts"]] == ["alpha", "beta", "gamma"]
    assert facts["router"]["rows"] == "equal to P(D)" and facts["encoder"]["dimension"] == 8
    json.dumps(facts)


def test_a_name_of_more_digits_than_int_takes_is_no_expert(dense_dir, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    facts, before = describe(tmp_path / "m"), describe(dense_dir)
    assert facts["parameters"]["active"] == before["parameters"]["active"] + 3


def test_mixture_without_sidecar(plain_moe_dir):
    facts = describe(plain_moe_dir)
    assert facts["kind"] == "mixture of experts"
    assert facts["parameters"]["total"] - facts["parameters"]["active"] == (4 - 2) * 2 * 3 * 16 * 24


def test_an_experts_number_that_python_makes_none_of_is_no_experts(tmp_path):
    odd = f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight"
    save_file({odd: torch.ones(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of somebody else"}')
    assert describe(tmp_path)["parameters"] == {"total": 6, "active": 6}


def test_damaged_rows_are_shown(nexus_dir, tmp_path):
    shutil.copytree(nexus_dir, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert describe(tmp_path / "copy")["router"]["rows"].startswith("DAMAGED: ")


def test_a_gate_that_was_trained_elsewhere_is_shown(nexus_dir, tmp_path):
    assert describe(nexus_dir)["shared_expert_gate"] == "constant"
    shutil.copytree(nexus_dir, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] -= 0.01
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    said = describe(tmp_path / "copy")["shared_expert_gate"]
    assert (
        said.startswith("TRAINED ELSEWHERE: ")
        and "layer 1: the shared expert's gate has weights up to 1.0e-02" in said
    )


def test_sequence_length_of_the_training(dense_dir, tmp_path):
    assert describe(dense_dir)["sequence_length"] is None
    shutil.copytree(dense_dir, tmp_path / "copy")
    (tmp_path / "copy" / "training.yaml").write_text("data:\n  sequence_length: 32\n")
    assert describe(tmp_path / "copy")["sequence_length"] == 32


def test_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)


def test_what_transformers_4_makes_of_it_is_told(nexus_dir, context_dir):
    assert describe(nexus_dir)["transformers_4"] == "as 5"
    assert describe(context_dir)["transformers_4"].startswith("it has no model of type nexus_moe")


def test_a_family_behind_a_view_is_shown_as_its_own_class_has_it(dense_dir, tmp_path):
    """And not as the Qwen2-MoE that it would become: with an epsilon for a smaller residual stream,
    and RoPE of a whole head."""
    granite = changed(
        dense_dir,
        tmp_path / "granite",
        model_type="granite",
        residual_multiplier=0.25,
        rms_norm_eps=1e-5,
    )
    facts = describe(granite)
    assert facts["norm_eps"] == 1e-5 and facts["tied_embeddings"] is True
    phi = changed(dense_dir, tmp_path / "phi", model_type="phi3", partial_rotary_factor=0.75)
    assert describe(phi)["rope"] == {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.75,
    }
