"""Layers that are read when they are called: the numbers of the whole model, in less memory."""

import shutil

import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRMSNorm

from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.streaming import LayerReader, _in_slices, streamed_model
from nexus_ds.checkpoint.tensors import TensorReader, write_tensors
from nexus_ds.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.test_qwen3_next import assert_streams_alike

CPU = torch.device("cpu")
KINDS = ("dense_dir", "nexus_dir", "context_dir", "plain_moe_dir", "uneven_moe_dir")


@pytest.fixture
def tokens():
    return torch.randint(2, 31, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_whole_model(kind, request, tokens):
    directory = request.getfixturevalue(kind)
    model = load_model(directory)
    streamed = streamed_model(directory, torch.float32, CPU, rows=2)
    with torch.inference_mode():
        assert_streams_alike(streamed, model, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_whole_model(kind, request, tokens):
    directory = request.getfixturevalue(kind)
    models = load_model(directory), streamed_model(directory, torch.float32, CPU)
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(tokens[:2], **asked) for model in models]
    assert torch.equal(*found) and found[0].shape[1] > 12


def test_no_module_is_given_more_sequences_than_asked_for(nexus_dir, tokens, monkeypatch):
    """The last norm neither: what waits for it may be more than a device holds."""
    forward, seen = Qwen2MoeRMSNorm.forward, []

    def watched(self, states):
        seen.append(len(states))
        return forward(self, states)

    monkeypatch.setattr(Qwen2MoeRMSNorm, "forward", watched)
    streamed = streamed_model(nexus_dir, torch.float32, CPU, rows=2)
    with torch.inference_mode():
        streamed.base_model(input_ids=tokens, use_cache=False)
    # two norms in each of two layers, and the last one
    assert seen == [2, 2, 2, 2, 1, 1] * 2 + [2, 2, 1]


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


@pytest.fixture
def changed(plain_moe_dir, tmp_path):
    """Return a function that copies a mixture with another tensor under a name; None: without."""

    def copy(name, shape):
        shutil.copytree(plain_moe_dir, tmp_path / "copy")
        reader = TensorReader(plain_moe_dir)
        tensors = {key: reader.read(key) for key in reader.names() if key != name}
        if shape is not None:
            tensors[name] = torch.ones(shape)
        write_tensors(tmp_path / "copy" / "model.safetensors", tensors)
        return tmp_path / "copy"

    return copy


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.1.input_layernorm.weight", None, "are missing"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, "are missing"),
        ("model.layers.1.odd.weight", (2,), "are not known"),
        ("model.odd.weight", (2,), "are not known"),
        ("model.layers.2.input_layernorm.weight", (16,), "are not known"),
        ("model.layers.0.mlp.experts.4.up_proj.weight", (24, 16), "are not known"),
        # a row for all rows of the stack, and an embedding that is too short
        ("model.layers.0.mlp.experts.1.gate_proj.weight", (1, 16), "have another shape"),
        ("model.embed_tokens.weight", (3, 16), "have another shape"),
    ],
)
def test_other_tensors_than_those_of_the_model_are_refused(changed, name, shape, said):
    """Before anything is computed, as where the model is loaded whole."""
    directory = changed(name, shape)
    with pytest.raises(CheckpointError):
        load_model(directory)
    with pytest.raises(CheckpointError, match=f"1 tensors {said}.*, the first: '{name}'; expected"):
        streamed_model(directory, torch.float32, CPU)


def test_frequencies_of_older_files_are_passed_over(changed, plain_moe_dir, tokens):
    directory = changed("model.layers.0.self_attn.rotary_emb.inv_freq", (4,))
    models = streamed_model(directory, torch.float32, CPU), load_model(plain_moe_dir)
    with torch.inference_mode():
        old, new = (model(input_ids=tokens).logits for model in models)
    assert torch.equal(old, new)


def test_a_layer_without_its_tensor_is_not_filled(nexus_dir):
    """A warm start fills layers without a model around them."""
    model = streamed_model(nexus_dir, torch.float32, CPU)
    block = model.model.layers[1]
    block.register_parameter("odd", torch.nn.Parameter(torch.ones(2)))
    reader = LayerReader(TensorReader(nexus_dir), model.config, torch.float32, CPU)
    with pytest.raises(CheckpointError, match="layer 1 lacks or should not have 'odd'"):
        reader.fill(block, 1)


def test_an_unknown_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 31, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' can't be run layer by layer; known: "):
        streamed_model(tmp_path, torch.float32, CPU)
