"""A mixture's config.json, whatever its form, tells of the dense family that it was made of."""

import pytest

from nexus_ds.checkpoint.dense_settings import family_of, settings
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES, NATIVE, as_source, native_class, native_family
from nexus_ds.checkpoint.qwen2_moe import moe_config
from nexus_ds.errors import CheckpointError

YARN = dict(rope_type="yarn", rope_theta=9.0, factor=4.0, original_max_position_embeddings=8)
SIZES = dict(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters=YARN,
)


PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=9.0))
OWN = {  # what a family's own class can't do otherwise
    "phi3": PLAIN_ROPE | dict(partial_rotary_factor=0.75, hidden_size=64),
    "glm": PLAIN_ROPE,
    "granite": dict(residual_multiplier=0.22, rms_norm_eps=1e-5),
    "ministral": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_computes_what_its_dense_family_says(family):
    dense = dict(model_type=family, **SIZES) | OWN.get(family, {})
    mixture = moe_config(dense, 3, 2)
    assert mixture["model_type"] in MIXTURES and mixture["num_experts"] == 3
    found, expected = vars(settings(mixture)), vars(settings(dense))
    assert found == expected
    if FAMILIES[family].mixture != "qwen2_moe":
        assert family_of(mixture) is FAMILIES[family]


def test_a_native_form_is_its_family_with_experts():
    config = dict(model_type=NATIVE + "qwen3", num_experts=3, **SIZES)
    assert as_source(config) == config | {"model_type": "qwen3"}
    assert [native_family(name) for name in ("nexus_qwen3", "nexus_moe", "qwen3", None)] == [
        "qwen3",
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("olmo2", "NexusOlmo2ForCausalLM"),
        ("hunyuan_v1_dense", "NexusHunyuanV1DenseForCausalLM"),
    ],
)
def test_a_native_form_has_a_class_that_no_other_program_has(family, name):
    """In words: files that are there name it, and the dense family's own is another."""
    assert native_class(family) == name


@pytest.mark.parametrize("source", [None, {}, {"model_type": "gpt2"}, "qwen3"])
def test_a_qwen3_next_says_what_it_was_made_of(source):
    with pytest.raises(CheckpointError, match="here: a Qwen3-Next whose nexus_source is"):
        as_source({"model_type": "qwen3_next", "nexus_source": source}, "here")
