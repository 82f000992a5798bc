"""Parameters counted without a tensor: against checkpoints, new models and P itself, and the
paper's totals."""

import json
import re

import pytest
import torch
from plan_models import OTHER, SMALL, make_model

from nexus_ds.checkpoint.build import new_dense
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.config import load_config
from nexus_ds.errors import CheckpointError, ConfigError, UnsupportedModelError
from nexus_ds.model.router import Projection
from nexus_ds.planning.sizes import sizes_of


@pytest.mark.parametrize("sizes", [SMALL, OTHER], ids=["small", "other"])
def test_a_checkpoints_counts_are_those_that_inspect_reports(sizes, tmp_path):
    checkpoint = make_model(tmp_path / "model", sizes)
    found = sizes_of(load_config("demo", [f"model.path={checkpoint}"]))
    assert found == sizes
    counts = found.counts()
    assert {name: counts[name] for name in ("total", "active")} == describe(checkpoint)[
        "parameters"
    ]
    gates = sizes.layers * sizes.hidden * (sizes.experts + 1)
    assert counts["trained"] == counts["total"] - gates + counts["projection"]


def test_a_router_that_reads_running_means_has_a_vector_more_a_layer(context_dir):
    counts = sizes_of(load_config("demo", [f"model.path={context_dir}"])).counts()
    assert {name: counts[name] for name in ("total", "active")} == describe(context_dir)[
        "parameters"
    ]
    with_mean = sizes_of(load_config("demo", ["router.input=context"])).counts()
    without = sizes_of(load_config("demo")).counts()
    assert (
        with_mean["projection"] - without["projection"]
        == with_mean["total"] - without["total"]
        == 3 * 96
    )


def test_a_shared_expert_of_zeros_is_stored_but_not_active():
    with_it, without = (
        sizes_of(load_config("demo", more)).counts() for more in ([], ["model.shared_expert=none"])
    )
    assert with_it["total"] == without["total"]
    assert with_it["active"] - without["active"] == with_it["one_expert"]


def test_a_dense_checkpoints_counts_are_those_that_inspect_reports(dense_dir):
    counts = sizes_of(load_config("demo", ["stage=seed", f"model.path={dense_dir}"])).counts()
    assert {name: counts[name] for name in ("total", "active")} == describe(dense_dir)["parameters"]
    assert (
        counts["trained"] == counts["total"] and counts["one_expert"] == counts["projection"] == 0
    )


def test_biases_of_queries_keys_and_values_are_counted(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    counts = sizes_of(
        load_config("demo", ["stage=seed", f"model.path={tmp_path / 'qwen'}"])
    ).counts()
    assert counts["total"] == describe(tmp_path / "qwen")["parameters"]["total"]


BARE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
MIXTURE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "shared_expert_intermediate_size": 80,
}


def write_config(directory, **values):
    (directory / "config.json").write_text(json.dumps(values))
    return load_config("demo", [f"model.path={directory}"])


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {}),  # 8 heads for keys and values, whatever the number of heads
        ("mistral", {"num_key_value_heads": 2}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        # heads that are not as wide as the model together
        ("llama", {"num_key_value_heads": 4, "head_dim": 8}),
        ("qwen2", {"num_key_value_heads": None}),
        ("qwen2", {"num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
        ("qwen2_moe", {**MIXTURE, "num_key_value_heads": 4}),
        (
            "qwen2_moe",
            {**MIXTURE, "num_key_value_heads": 4, "qkv_bias": False, "tie_word_embeddings": True},
        ),
    ],
)
def test_what_a_config_leaves_out_is_counted_as_transformers_fills_it_in(family, more, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = write_config(tmp_path, model_type=family, **BARE, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    sizes, attention = sizes_of(config), model.model.layers[0].self_attn
    assert sizes.kv_width == attention.k_proj.out_features
    assert sizes.heads * sizes.head_size == attention.q_proj.out_features
    assert sizes.counts()["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"model_type": "cohere"},
            UnsupportedModelError,
            "model_type 'cohere' can't be planned; plan knows llama, mistral",
        ),
        ({}, UnsupportedModelError, "model_type None can't be planned"),
        (
            {"model_type": "qwen2_moe"},
            CheckpointError,
            "num_experts is None, expected a number above 0; plan needs a dense",
        ),
        (
            {"model_type": "qwen2_moe", **MIXTURE, "shared_expert_intermediate_size": 160},
            CheckpointError,
            "shared_expert_intermediate_size is 160; plan needs a Qwen2-MoE that has 80 there",
        ),
        (
            {"model_type": "qwen2_moe", **MIXTURE, "decoder_sparse_step": 2},
            CheckpointError,
            "decoder_sparse_step is 2; plan",
        ),
        (
            {"model_type": "qwen2_moe", **MIXTURE, "mlp_only_layers": [0]},
            CheckpointError,
            "mlp_only_layers is [0]; plan",
        ),
    ],
)
def test_models_that_would_be_counted_wrong_are_refused(values, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(f"{tmp_path / 'config.json'}: {message}")):
        sizes_of(write_config(tmp_path, **BARE, **values))


@pytest.mark.parametrize("more", [[], ["model.kv_heads=1", "model.tied_embeddings=false"]])
def test_a_new_models_count_is_that_of_its_tensors(more):
    config = load_config("demo", ["stage=seed", *more])
    model = new_dense(config.model, config.pipeline.vocabulary, 0, 0)
    assert sizes_of(config).counts()["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"depth": 1},
        {"depth": 3, "width": 40},
        {"projection": "gelu"},
        {"projection": "linear", "row_norm": "fixed"},
    ],
)
def test_the_projections_maps_are_those_of_the_module(more):
    overrides = [f"router.{name}={value}" for name, value in more.items()]
    config = load_config("demo", ["pipeline.embedding_size=24", *overrides])
    form = {"form" if name == "projection" else name: value for name, value in more.items()}
    projection = Projection(24, config.model.hidden_size, **form)
    assert sizes_of(config).projection == tuple(
        weight.numel() for weight in projection.parameters()
    )


def test_a_linear_router_has_a_row_for_each_expert():
    counts = sizes_of(load_config("demo", ["router.kind=linear"])).counts()
    assert counts["projection"] == 3 * 4 * 96


@pytest.mark.parametrize(
    ("recipe", "seed", "total", "active", "one_expert"),
    [("nexus-470m", "0.47", "1.3", "0.61", "0.13"), ("nexus-2.8b", "2.8", "9.1", "4.3", "1.6")],
)
def test_the_recipes_have_the_papers_totals(recipe, seed, total, active, one_expert):
    digits = len(active) - 2
    counts = sizes_of(load_config(recipe)).counts()
    dense = sizes_of(load_config(recipe, ["stage=seed"])).counts()["total"]
    assert f"{dense / 1e9:.{len(seed) - 2}f}" == seed
    assert f"{counts['total'] / 1e9:.1f}" == total
    assert f"{counts['active'] / 1e9:.{digits}f}" == active
    assert f"{counts['one_expert'] / 1e9:.{len(one_expert) - 2}f}" == one_expert


def test_the_small_recipes_active_parameters_are_within_half_a_percent_of_605_million():
    assert sizes_of(load_config("nexus-470m")).counts()["active"] == pytest.approx(605e6, rel=0.005)


def test_the_extension_has_the_new_experts_too():
    assert sizes_of(load_config("nexus-2.8b", ["stage=extend"])).experts == 5


def test_experts_without_a_list_of_domains_are_refused():
    with pytest.raises(
        ConfigError, match=r"no experts to plan for: give pipeline.domains=a,b,... or a checkpoint"
    ):
        sizes_of(load_config("own"))


def test_more_chosen_experts_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"router.top_k 5 is more than the 4 experts; lower it"):
        sizes_of(load_config("demo", ["router.top_k=5"]))


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        sizes_of(load_config("demo", [f"model.path={tmp_path / 'none'}"]))


def test_a_configuration_without_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 5}')
    with pytest.raises(
        CheckpointError,
        match=r"config.json: hidden_size is None, expected a number above 0; plan needs",
    ):
        sizes_of(load_config("demo", [f"model.path={tmp_path}"]))
