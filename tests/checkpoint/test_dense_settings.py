"""config.json in one normal form, held to what transformers' own classes read in the same file."""

import copy
import json
import subprocess
import sys

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nexus_ds.checkpoint.dense_settings import filled, settings
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.errors import CheckpointError, UnsupportedModelError

SIZES = dict(
    hidden_size=64, intermediate_size=40, num_hidden_layers=4, num_attention_heads=8, vocab_size=31
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
SPELLINGS = {  # of one config.json; what a family does not know it leaves out of account
    "nothing but sizes": {},
    "new": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "old": dict(rope_theta=500.0),
    "old, scaled": dict(rope_theta=9.0, rope_scaling=dict(type="linear", factor=2.0)),
    "both": dict(rope_parameters=dict(rope_type="default", rope_theta=5.0), rope_scaling=YARN),
    "null": dict(rope_theta=500.0, rope_scaling=None, rope_parameters=None),
    "base in two places": dict(rope_theta=7.0, rope_parameters=dict(rope_theta=500.0)),
    "positions outside": dict(rope_scaling=YARN, original_max_position_embeddings=16),
    "positions missing": dict(
        rope_scaling=dict(type="longrope", short_factor=[1.5] * 4, long_factor=[2.5] * 4),
        head_dim=8,
    ),
    "heads": dict(num_key_value_heads=2, head_dim=16),
    "no head_dim": dict(num_key_value_heads=2),
    "no key-value heads": dict(num_key_value_heads=None),
    "tied": dict(tie_word_embeddings=True),
    "a window": dict(sliding_window=6),
    "a window in use": dict(sliding_window=6, use_sliding_window=True, max_window_layers=2),
    "no window": dict(sliding_window=None, use_sliding_window=True),
    "null head_dim": dict(head_dim=None),
    "whole numbers": dict(rope_theta=500),
    "a whole epsilon": dict(rms_norm_eps=1, layer_norm_eps=1),
    "by kinds of layers": dict(
        rope_parameters=dict(full_attention=YARN | dict(rope_theta=5.0), sliding_attention=None)
    ),
    "windows by a pattern": dict(sliding_window=6, sliding_window_pattern=3),
    "a base for windows": dict(rope_theta=500.0, rope_local_base_freq=90.0),
    "caps": dict(final_logit_softcapping=9.0, attn_logit_softcapping=7.0, query_pre_attn_scalar=24),
    "no caps": dict(final_logit_softcapping=None, attn_logit_softcapping=None),
    "an older name of GELU": dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"),
    "layers without RoPE": dict(no_rope_layers=[1, 0, 0, 1], no_rope_layer_interval=2),
}
SET = ("qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "phi3", "granite", "glm", "ministral")
GEMMAS = ("gemma3_text", "gemma2", "gemma")
OWN_SET = ("olmo2", "olmo3", "smollm3", "exaone4", "glm4", "hunyuan_v1_dense", *GEMMAS, "cohere2")
BY_KIND = ("olmo3", "gemma3_text")
REFUSED = {  # what transformers refuses, or can't compute with
    "a whole epsilon": (*FAMILIES, "qwen2_moe"),
    "no key-value heads": (
        "mistral",
        "qwen2_moe",
        "glm",
        "ministral",
        "exaone4",
        "glm4",
        "qwen3_5_text",
        *GEMMAS,
    ),
    "no window": ("qwen2_moe", "olmo3", "exaone4", *GEMMAS[:2], "cohere2"),
    "null head_dim": (*SET, *OWN_SET),
    "old, scaled": ("phi3", "glm"),
    "both": ("phi3", "glm", *BY_KIND),
    "positions outside": ("phi3", "glm"),
    "positions missing": ("glm", "glm4", "qwen3_5_text"),
    "by kinds of layers": (*(name for name in FAMILIES if name not in BY_KIND), "qwen2_moe"),
}
NEEDED = {"ministral": dict(head_dim=8), "hunyuan_v1_dense": dict(head_dim=8)}
"""What a family's class does not do without."""
TOGETHER = (
    *("sliding_window", "num_key_value_heads", "head_dim", "rope_theta"),
    *("sliding_window_pattern", "no_rope_layers", "rope_local_base_freq"),
)
"""Keys that `settings` answers, of several together."""
NOT_A_QWEN2_MOE = ("old, scaled", "both", "positions outside", "by kinds of layers")
"""Of these, what transformers' own class computes with, and the mixture's can't."""


def own_config(config):
    """Return what transformers makes of a config.json; models are built from RoPE standardised once
    more."""
    values = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    found = CONFIG_MAPPING[config["model_type"]](**values)
    found.standardize_rope_params()
    return found


def without_type(rope):
    return {key: value for key, value in rope.items() if key != "type"}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_a_configuration_means_what_transformers_reads_in_it(family, spelling):
    config = dict(model_type=family, **SIZES, **NEEDED.get(family, {})) | SPELLINGS[spelling]
    if family == "qwen2_moe":
        config["moe_intermediate_size"] = 40
    if family in REFUSED.get(spelling, ()):
        other = UnsupportedModelError if spelling in NOT_A_QWEN2_MOE else CheckpointError
        with pytest.raises((CheckpointError, other)):
            settings(config)
        return
    own, found = own_config(config), settings(config)
    assert found.hidden_size == own.hidden_size and found.layers == own.num_hidden_layers
    assert found.kv_heads == own.num_key_value_heads
    assert found.head_dim == (getattr(own, "head_dim", None) or own.hidden_size // 8)
    record = FAMILIES.get(family, FAMILIES["llama"])
    assert found.norm_eps == getattr(own, record.eps_key)
    assert found.tied_embeddings is (own.tie_word_embeddings and not record.multipliers)
    rope = without_type(own.rope_parameters)
    part = rope.get("partial_rotary_factor", 1.0)
    if part == 1.0:
        rope.pop("partial_rotary_factor", None)
    if record.rope_bases:
        assert found.rope == {kind: without_type(rope[kind]) for kind in record.rope_bases}
    elif part == 1.0 or record.mixture != "qwen2_moe":
        assert found.rope == rope
    else:
        assert found.rope["rope_theta"] == rope["rope_theta"]
    if spelling != "an older name of GELU" or family == "gemma":
        assert found.activation == getattr(own, record.activation_key)
    assert found.factors == {key: getattr(own, key) for key in found.factors}
    if family == "smollm3":
        assert found.turned_layers == tuple(map(bool, own.no_rope_layers))
    if found.rope_positions is not None:
        assert found.rope_positions == own.max_position_embeddings
    types = getattr(own, "layer_types", None)
    if family in ("mistral", "phi3"):
        types = ["full_attention" if own.sliding_window is None else "sliding_attention"] * 4
    assert list(found.layer_types) == (types or ["full_attention"] * 4)
    slides = "sliding_attention" in found.layer_types
    assert found.sliding_window == (own.sliding_window if slides else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(family):
    config = dict(model_type=family, **SIZES)
    own, found = own_config(config), filled(config)
    assert FAMILIES[family].defaults.keys() <= found.keys()
    for key, value in found.items():
        if key == "partial_rotary_factor":
            assert own.rope_parameters[key] == value
        # its class has none
        elif (family, key) == ("ernie4_5", "attention_dropout"):
            assert value == 0.0
        elif key not in TOGETHER:
            assert getattr(own, key) == value, key
    rope = own.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == found["rope_theta"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(rms_norm_eps=1), "rms_norm_eps is 1, expected a fraction above 0"),
        (dict(num_key_value_heads="x"), "num_key_value_heads is 'x', expected a number above 0"),
        (
            dict(rope_scaling=dict(type="llama3", factor=2.0)),
            "m: RoPE of type 'llama3' needs low_freq_factor, high_freq_factor; mend",
        ),
        (
            dict(rope_theta=float("inf")),
            r"m: rope_theta is inf, expected a number from 2 to 1e\+30",
        ),
        (dict(rms_norm_eps=float("inf")), "m: rms_norm_eps is inf, expected a number from 1e-30"),
        (
            dict(rope_scaling=YARN | dict(attention_factor="x")),
            "m: RoPE: attention_factor is 'x', expected a number from 1e-30",
        ),
        (
            dict(rope_scaling=YARN, original_max_position_embeddings=[1]),
            r"m: RoPE: original_max_position_embeddings is \[1\], expected a whole number of at",
        ),
        (
            dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[1.0] * 4)),
            r"m: RoPE: short_factor is \[1.0\], expected 4 numbers, one for each pair of channels",
        ),
    ],
)
def test_what_transformers_can_not_read_is_named(keys, message):
    with pytest.raises(CheckpointError, match=message):
        settings(dict(model_type="llama", **SIZES, **keys), "m")


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        (
            "gemma3_text",
            dict(rope_parameters=dict(full_attention="x")),
            "m: rope_parameters.full_attention is x, expected an object that names its rope_type",
        ),
        (
            "olmo3",
            dict(rope_parameters=dict(full_attention=dict(rope_type=[1]))),
            r"m: rope_parameters.full_attention is .*\[1\].*, expected an object that names its",
        ),
        (
            "gemma3_text",
            dict(rope_local_base_freq=float("inf")),
            "m: rope_theta is inf, expected a",
        ),
        (
            "granite",
            dict(residual_multiplier=1e-200),
            "m: residual_multiplier is 1e-200, expected a number from 1e-30",
        ),
        (
            "qwen2",
            dict(max_window_layers=None, use_sliding_window=True),
            "m: layer_types is missing, expected a kind of attention for each layer",
        ),
        (
            "qwen2_moe",
            dict(max_window_layers=None, use_sliding_window=True),
            "m: layer_types is missing, expected a kind of attention for each layer",
        ),
        (
            "smollm3",
            dict(no_rope_layer_interval=0),
            "m: layer_types is missing, expected a kind of attention for each layer",
        ),
        (
            "smollm3",
            dict(no_rope_layers=5, layer_types=["full_attention"] * 4),
            "m: no_rope_layers and no_rope_layer_interval say of 0 layers .*, expected 4: 0 or 1",
        ),
    ],
)
def test_what_a_family_can_not_compute_with_is_named(family, keys, message):
    needed = dict(moe_intermediate_size=8) if family == "qwen2_moe" else {}
    settings(dict(model_type=family, **SIZES, **needed), "m")
    with pytest.raises(CheckpointError, match=message):
        settings(dict(model_type=family, **SIZES, **needed, **keys), "m")


def test_a_longrope_without_a_share_reads_as_many_factors_as_its_class():
    # Qwen3-Next's class turns a part of the head itself
    rope = dict(rope_type="longrope", short_factor=[1.0], long_factor=[2.0])
    keys = dict(model_type="qwen3_5_text", **SIZES, head_dim=8, partial_rotary_factor=0.25)
    found = settings(keys | dict(rope_parameters=rope), "m").rope
    assert found["short_factor"] == [1.0] and found["partial_rotary_factor"] == 0.25
    with pytest.raises(CheckpointError, match=r"short_factor is .*, expected 1 numbers, one for"):
        settings(keys | dict(rope_parameters=rope | dict(short_factor=[1.0] * 4)), "m")


def test_a_dense_model_is_planned_without_torch(dense_dir):
    said = (
        "import json, sys; from pathlib import Path\n"
        "from nexus_ds.planning.stored_model import read_model\n"
        f"model = read_model(Path({str(dense_dir)!r}))\n"
        "heavy = sorted({'torch', 'transformers'} & sys.modules.keys())\n"
        "print(json.dumps([model.dense.hidden_size, heavy]))"
    )
    run = [sys.executable, "-c", said]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout) == [16, []], done.stderr
