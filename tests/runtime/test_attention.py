"""Attention over whole windows: the numbers of transformers' own, and no questions."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, masking_utils

from nexus_ds.runtime.attention import WHOLE_WINDOWS, attend_whole_windows

TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["dense_dir", "nexus_dir"])
def model(request):
    directory = request.getfixturevalue(request.param)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_logits_are_those_of_transformers_and_nothing_is_asked(model, monkeypatch):
    asked = []
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils,
        "find_packed_sequence_indices",
        lambda positions: asked.append(1) or find(positions),
    )
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        assert asked  # else there would be nothing to leave out
        asked.clear()
        attend_whole_windows(model)
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, expected)
    assert not asked


def test_what_is_written_of_the_model_does_not_name_it(model):
    """A checkpoint with it could be opened by nobody else."""
    attend_whole_windows(model)
    assert model.config._attn_implementation == WHOLE_WINDOWS
    assert WHOLE_WINDOWS not in json.dumps(model.config.to_dict())
    assert WHOLE_WINDOWS not in model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize(("window", "attention"), [(4, "sdpa"), (None, "eager")])
def test_what_needs_a_mask_keeps_it(window, attention):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 31,
        "sliding_window": window,
    }
    model = MistralForCausalLM(MistralConfig(**sizes, attn_implementation=attention))
    attend_whole_windows(model)
    assert model.config._attn_implementation == attention
