"""Layers that are read when they are called: the numbers of the whole model, in less memory."""

import shutil

import pytest
import torch

from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.streaming import LayerReader, _in_slices, streamed_model
from nexus_ds.checkpoint.tensors import TensorReader, write_tensors
from nexus_ds.errors import CheckpointError, UnsupportedModelError

CPU = torch.device("cpu")
KINDS = ("dense_dir", "nexus_dir", "context_dir", "plain_moe_dir")


@pytest.fixture
def tokens():
    return torch.randint(2, 31, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_whole_model(kind, request, tokens):
    directory = request.getfixturevalue(kind)
    model = load_model(directory)
    streamed = streamed_model(directory, torch.float32, CPU, rows=2)
    with torch.inference_mode():
        whole = torch.cat([model(input_ids=part).logits for part in tokens.split(2)])
        # all at once: the layers cut them
        assert torch.equal(streamed(input_ids=tokens, use_cache=False).logits, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_whole_model(kind, request, tokens):
    directory = request.getfixturevalue(kind)
    models = load_model(directory), streamed_model(directory, torch.float32, CPU)
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(tokens[:2], **asked) for model in models]
    assert torch.equal(*found) and found[0].shape[1] > 12


def test_padding_is_known_to_the_slices(context_dir, tokens):
    """Masks and positions differ from sequence to sequence: each slice gets its own."""
    mask = torch.ones_like(tokens)
    mask[3, :4] = 0
    models = load_model(context_dir), streamed_model(context_dir, torch.float32, CPU, rows=2)
    with torch.inference_mode():
        whole, cut = (
            model(input_ids=tokens, attention_mask=mask, use_cache=False).logits for model in models
        )
    assert torch.allclose(whole[3, 4:], cut[3, 4:], atol=1e-6)
    assert torch.allclose(whole[:3], cut[:3], atol=1e-6)


def test_only_what_is_of_sequences_is_cut():
    """As many sequences as tokens: a vector of tokens stays whole, and so do masks for all."""
    seen = []

    def layer(hidden_BSH, **kwargs):
        seen.append({name: value.shape for name, value in kwargs.items()})
        return hidden_BSH

    each, shared = torch.ones(4, 4, 2), torch.ones(1, 4, 2)
    cut = _in_slices(layer, 3, CPU)
    assert torch.equal(cut(each, tokens=torch.ones(4), rotary=shared, mask=each), each)
    assert seen == [
        {"tokens": (4,), "rotary": (1, 4, 2), "mask": (count, 4, 2)} for count in (3, 1)
    ]


def test_a_layer_is_in_memory_only_while_it_computes(nexus_dir, tokens, monkeypatch):
    model = streamed_model(nexus_dir, torch.float32, CPU)
    seen = []

    def watched(self, block, layer):
        full = [not weight.is_meta for other in model.model.layers for weight in other.parameters()]
        seen.append((layer, any(full)))
        fill(self, block, layer)

    fill = LayerReader.fill
    monkeypatch.setattr(LayerReader, "fill", watched)
    with torch.inference_mode():
        model(input_ids=tokens)
    assert seen == [(0, False), (1, False)]
    assert all(weight.is_meta for weight in model.model.layers.parameters())


def test_the_stored_precision_and_generation_settings_are_kept(nexus_dir, tmp_path, tokens):
    model = load_model(nexus_dir).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    streamed = streamed_model(tmp_path, None, CPU)
    assert streamed.dtype == torch.bfloat16 and streamed.generation_config.max_new_tokens == 3
    with torch.inference_mode():
        whole = load_model(tmp_path, "stored")(input_ids=tokens).logits
        assert torch.equal(streamed(input_ids=tokens).logits, whole)


def test_a_missing_and_a_surplus_tensor_are_named(nexus_dir, tmp_path, tokens):
    shutil.copytree(nexus_dir, tmp_path / "copy")
    reader = TensorReader(nexus_dir)
    tensors = {name: reader.read(name) for name in reader.names()}
    name = "model.layers.1.input_layernorm.weight"
    for old, new in ((name, None), (None, "model.layers.1.odd.weight")):
        changed = {key: value for key, value in tensors.items() if key != old}
        if new:
            changed[new] = tensors[name]
        write_tensors(tmp_path / "copy" / "model.safetensors", changed)
        model = streamed_model(tmp_path / "copy", torch.float32, CPU)
        odd = (old or new).removeprefix("model.layers.1.")
        with pytest.raises(CheckpointError, match=f"layer 1 lacks or should not have '{odd}'"):
            model(input_ids=tokens)


def test_an_unknown_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 31, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' can't be run layer by layer; known: "):
        streamed_model(tmp_path, torch.float32, CPU)
