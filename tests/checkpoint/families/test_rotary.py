"""RoPE of part of a head, said for a whole one: the frequencies that transformers makes of it."""

import pytest
import torch
from transformers import Qwen2MoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding

from nexus_ds.checkpoint.families.rotary import attention_factor, check_rope, over_the_whole_head
from nexus_ds.errors import CheckpointError, UnsupportedModelError

SIZES = dict(hidden_size=256, num_attention_heads=2, max_position_embeddings=131072)
LONG = dict(
    rope_type="longrope",
    original_max_position_embeddings=4096,
    short_factor=[1.0 + i / 40 for i in range(48)],
    long_factor=[1.0 + i * i / 9 for i in range(48)],
)
# of Phi-4-mini, of GLM-4, and one that no model has
KINDS = {
    "longrope": (0.75, LONG),
    "default": (0.5, dict(rope_type="default")),
    "odd": (0.25, dict(rope_type="default")),
}


@pytest.mark.parametrize("theta", [10000.0, 1.5e6])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_turn_keep_their_frequency_and_others_stand_still(kind, theta):
    part, keys = KINDS[kind]
    rope, turned = dict(rope_theta=theta, **keys), int(128 * part)
    own = CONFIG_MAPPING["phi3"](rope_parameters=rope | {"partial_rotary_factor": part}, **SIZES)
    whole = over_the_whole_head(rope, SIZES | {"head_dim": 128}, turned, "m")
    mixture = Qwen2MoeConfig(head_dim=128, rope_parameters=whole, **SIZES)
    expected, found = Phi3RotaryEmbedding(own), Qwen2MoeRotaryEmbedding(mixture)
    factor = attention_factor(rope, SIZES)
    assert factor == expected.attention_scaling and found.attention_scaling == 1.0
    # below and above the positions of the first training: two lists of factors
    for positions in (64, 5000):
        x, numbers = torch.zeros(1), torch.arange(positions)[None]
        cos, sin = expected(x, numbers)
        cos_whole, sin_whole = found(x, numbers)
        pairs = turned // 2
        assert (found.inv_freq[:pairs] / expected.inv_freq - 1).abs().max() < 1.2e-7
        assert int((found.inv_freq[:pairs] != expected.inv_freq).sum()) <= pairs // 5
        assert (factor * cos_whole[..., :pairs] - cos[..., :pairs]).abs().max() < 1e-3
        assert (factor * sin_whole[..., :pairs] - sin[..., :pairs]).abs().max() < 1e-3
        still = slice(pairs, 64)
        assert torch.equal(
            cos_whole[..., still], torch.full_like(cos_whole[..., still], cos_whole[0, 0, 0])
        )
        assert sin_whole[..., still].abs().max() < 1e-20


@pytest.mark.parametrize(
    ("keys", "turned", "error", "message"),
    [
        (dict(rope_type="yarn"), 64, UnsupportedModelError, "m: RoPE of type 'yarn' for 64 of 128"),
        (dict(rope_type="default"), 33, UnsupportedModelError, "for 33 of 128 channels of a head"),
    ],
)
def test_what_can_not_be_said_is_named(keys, turned, error, message):
    with pytest.raises(error, match=message):
        over_the_whole_head(dict(rope_theta=1e4, **keys), SIZES | {"head_dim": 128}, turned, "m")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(attention_factor="x"), "m: attention_factor is 'x', expected a number from 1e-30"),
        (dict(factor=float("inf")), "m: factor is inf, expected a number from 1e-30 to 1e.30"),
        (dict(beta_fast=[32]), r"m: beta_fast is \[32\], expected a number"),
        (dict(mscale=float("nan")), "m: mscale is nan, expected a number"),
        (
            dict(original_max_position_embeddings=0),
            "m: original_max_position_embeddings is 0, expected a whole number of at least 2",
        ),
        (dict(original_max_position_embeddings=1), "_embeddings is 1, expected a whole number of"),
        (dict(original_max_position_embeddings="x"), "_embeddings is 'x', expected a whole number"),
        (dict(original_max_position_embeddings=None), "_embeddings is None, expected a whole"),
        (dict(short_factor="x"), "m: short_factor is x, expected 48 numbers, one for each pair"),
        (
            dict(long_factor=[1.0] * 47),
            r"m: long_factor is \[.*, expected 48 numbers, one for each",
        ),
        (
            dict(long_factor=[1.0] * 47 + [1e308]),
            r"m: long_factor\[47\] is 1e\+308, expected a number from 1e-30 to 1e\+30",
        ),
        (dict(long_factor=[None] * 48), r"m: long_factor\[0\] is None, expected a number from"),
    ],
)
def test_numbers_of_a_longrope_that_can_not_be_computed_with_are_named(keys, message):
    needed = ("short_factor", "long_factor", "original_max_position_embeddings")
    check_rope(LONG | dict(factor=None, mscale=0, beta_fast=0), needed, 48, "m")
    with pytest.raises(CheckpointError, match=message):
        check_rope(LONG | keys, needed, 48, "m")


@pytest.mark.parametrize("high", [4.0, 1])
def test_a_llama3_has_its_high_frequencies_above_its_low_ones(high):
    rope = dict(factor=2.0, low_freq_factor=4.0, high_freq_factor=high)
    with pytest.raises(
        CheckpointError,
        match=f"m: high_freq_factor is {high}, expected a number above low_freq_factor, 4.0",
    ):
        check_rope(rope, ("factor", "low_freq_factor", "high_freq_factor"), 8, "m")


@pytest.mark.parametrize("theta", [2.0, 1e30])
def test_pairs_slower_than_fp32_tells_stand_still(theta):
    rope = dict(LONG, rope_theta=theta, short_factor=[1e30] * 48, long_factor=[1e-30] * 48)
    whole = over_the_whole_head(rope, SIZES | {"head_dim": 128}, 96, "m")
    assert whole["short_factor"] == [1e30] * 64 and whole["long_factor"][48:] == [1e30] * 16
    # written and read again
    check_rope(whole, ("short_factor", "long_factor"), 64, "m")


def test_a_default_rope_does_not_read_the_factors_of_a_longrope():
    plain = dict(rope_type="default", rope_theta=1e4)
    sizes = SIZES | {"head_dim": 128}
    found = over_the_whole_head(plain | dict(short_factor="x", long_factor=None), sizes, 96, "m")
    factors = over_the_whole_head(plain, sizes, 96, "m")["short_factor"]
    assert found["short_factor"] == found["long_factor"] == factors


@pytest.mark.parametrize(("width", "turned"), [(2**40, 2**39), (64, 2**40)])
def test_heads_wider_than_any_models_take_no_memory(width, turned):
    """Found by tests/guided.py: a MemoryError, of a head of a trillion channels."""
    plain = {"rope_type": "default", "rope_theta": 1e4}
    said = rf"m: RoPE of type 'default' for {turned} of {width} channels .* at most 16384"
    with pytest.raises(UnsupportedModelError, match=said):
        over_the_whole_head(plain, SIZES | {"head_dim": width}, turned, "m")
