"""Layers that are read when they are called, on a pretend GPU: states wait on the host, a few
sequences at a time are on the device, and text and scores are the CPU's."""

from unittest.mock import patch

import pytest
import torch
from conftest import make_nexus
from pretend import GPU, gpu, module_to_gpu, on_device

from nexus_ds.checkpoint.streaming import LayerReader, _in_slices, _placed, streamed_model

CPU = torch.device("cpu")


@pytest.fixture
def seen():
    return []


def layer_of(seen):
    """Return a layer that notes how many sequences it is given, and that all is on the device."""

    def layer(hidden_BSH, mask=None, rotary=(), **kwargs):
        tensors = [hidden_BSH, mask, *rotary]
        assert all(on_device(tensor) for tensor in tensors if tensor is not None)
        seen.append([len(tensor) for tensor in tensors if tensor is not None])
        return hidden_BSH * mask[:, :, None] + rotary[0]

    return layer


@pytest.mark.parametrize("cached", [False, True])
def test_a_layer_gets_its_part_on_the_device_and_gives_it_back(seen, cached):
    hidden, mask = torch.randn(5, 4, 2), torch.rand(5, 4)
    shared = torch.randn(1, 4, 2)
    sliced = _in_slices(layer_of(seen), 2, GPU)
    with gpu() as watch:
        found = sliced(
            hidden, mask=mask, rotary=(shared,), past_key_values=object() if cached else None
        )
    assert not on_device(found)
    torch.testing.assert_close(found, hidden * mask[:, :, None] + shared)
    # what is the same for all sequences has one row; a cache keeps all of them together
    assert seen == ([[5, 5, 1]] if cached else [[2, 2, 1], [2, 2, 1], [1, 1, 1]])
    slices = len(seen)
    assert sorted(watch.waits.values()) == [slices, slices, 2 * slices]


def test_what_lies_on_the_device_comes_and_goes_there(seen):
    """Such as the states behind embeddings that are there: nothing passes through the host."""
    sliced = _in_slices(layer_of(seen), 2, GPU)
    with gpu() as watch:
        parts = [torch.randn(3, *rest).to(GPU) for rest in ((4, 2), (4,))]
        shared = torch.randn(1, 4, 2).to(GPU)
        watch.waits.clear()
        found = sliced(parts[0], mask=parts[1], rotary=(shared,))
    assert on_device(found) and not watch.waits


def moved(module, place):
    """Move a module as a GPU would have it moved; its own way forgets values on `meta`."""
    return module_to_gpu(module)


def test_the_output_layer_works_there_for_states_in_main_memory():
    head = torch.nn.Linear(3, 5)
    states = torch.randn(2, 3)
    expected = head(states).detach()
    with patch.object(torch.nn.Module, "to", moved):
        _placed(head, GPU)
    assert on_device(head.weight)
    with gpu() as watch, torch.no_grad():
        found = head(states)
    assert not on_device(found) and sorted(watch.waits.values()) == [1, 1]
    torch.testing.assert_close(found, expected)


def test_without_a_device_nothing_is_moved():
    head = torch.nn.Linear(3, 5)
    before = head.forward
    _placed(head, CPU)
    assert head.forward == before


@pytest.mark.parametrize("form", ["dense", "token", "context"])
def test_a_whole_model(form, dense_dir, tmp_path, monkeypatch):
    """Scores of several sequences and greedy text; embeddings stay on the host, layers don't."""
    context = {"router_input": "context", "row_norm": "fixed"} if form == "context" else {}
    folder = dense_dir if form == "dense" else make_nexus(tmp_path / "nexus", **context)
    tokens = torch.randint(2, 31, (5, 7), generator=torch.Generator().manual_seed(0))
    here = streamed_model(folder, torch.float32, CPU, rows=2)
    to = torch.nn.Module.to
    fill = LayerReader.fill
    filled = []

    def there(module, place):
        # a layer that is done is dropped: as the word, where a device is a device
        return module if place == "meta" else moved(module, place)

    def fill_there(reader, block, layer):
        reader.place = CPU
        # as at first: the pretended device is the one that layers are dropped to
        for part in block.modules():
            for name, weight in part.named_parameters(recurse=False):
                empty = torch.empty(weight.shape, device="meta")
                part._parameters[name] = torch.nn.Parameter(empty)
        fill(reader, block, layer)
        module_to_gpu(block)
        filled.append(all(on_device(weight) for weight in block.parameters()))

    monkeypatch.setattr(torch.nn.Module, "to", there)
    model = streamed_model(folder, torch.float32, GPU, rows=2)
    monkeypatch.setattr(LayerReader, "fill", fill_there)
    assert on_device(model.lm_head.weight) and on_device(model.model.norm.weight)
    assert not on_device(model.model.embed_tokens.weight)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with gpu():
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        text = model.generate(tokens[:2], **asked)
    assert not on_device(logits) and filled and all(filled)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(LayerReader, "fill", fill)
    with torch.no_grad():
        torch.testing.assert_close(logits, here(input_ids=tokens, use_cache=False).logits)
    assert torch.equal(text, here.generate(tokens[:2], **asked))
