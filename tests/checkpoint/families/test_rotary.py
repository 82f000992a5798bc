"""RoPE of part of a head, said for a whole one: the frequencies that transformers makes of it."""

import pytest
import torch
from transformers import Qwen2MoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding

from nexus_ds.checkpoint.families.rotary import attention_factor, over_the_whole_head
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
        (
            LONG,
            64,
            CheckpointError,
            "m: short_factor is .*, expected 32 numbers above 0, one for each pair of channels",
        ),
    ],
)
def test_what_can_not_be_said_is_named(keys, turned, error, message):
    with pytest.raises(error, match=message):
        over_the_whole_head(dict(rope_theta=1e4, **keys), SIZES | {"head_dim": 128}, turned, "m")
