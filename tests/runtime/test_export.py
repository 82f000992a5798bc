"""What is judged before an export counts: the logits of the reloaded model against the engine's."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nexus_ds.config import RouterConfig
from nexus_ds.errors import CheckpointError
from nexus_ds.model.build import load_nexus, load_stock
from nexus_ds.model.moe import Placement
from nexus_ds.model.tensorfile import TensorReader
from nexus_ds.runtime.export import _plan, _Sink, _verify, _write_config

TOKENS = torch.arange(40).remainder(29).view(2, 20)


def logits(directory, dtype):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def moved(found, tokens, by):
    """Return the logits with those of the first `tokens` tokens off by `by` of the largest."""
    changed = found.clone()
    changed.view(-1, found.shape[-1])[:tokens, 0] += by * found.abs().max()
    return changed


def test_in_fp32_no_token_may_differ(nexus_dir):
    expected = logits(nexus_dir, torch.float32)
    assert _verify(nexus_dir, torch.float32, TOKENS, expected) <= 1e-6
    assert _verify(nexus_dir, torch.float32, TOKENS, moved(expected, 1, 5e-6)) == pytest.approx(5e-6, rel=0.2)
    message = "does not compute what was trained: logits differ by .* of the largest, expected at most 1e-05; nothing"
    with pytest.raises(CheckpointError, match=message):
        _verify(nexus_dir, torch.float32, TOKENS, moved(expected, 1, 3e-5))


def test_in_bf16_one_token_in_ten_may_take_another_way_and_no_more(nexus_dir):
    expected = logits(nexus_dir, torch.bfloat16)
    assert _verify(nexus_dir, torch.bfloat16, TOKENS, moved(expected, 3, 0.5)) == pytest.approx(0.5, rel=0.2)
    with pytest.raises(CheckpointError, match="expected at most 2e-02"):
        _verify(nexus_dir, torch.bfloat16, TOKENS, moved(expected, 6, 0.5))
    with pytest.raises(CheckpointError, match="expected at most 2e-02"):
        _verify(nexus_dir, torch.bfloat16, TOKENS, moved(expected, 40, 0.05))


def test_logits_that_are_no_numbers_are_no_agreement(nexus_dir):
    with pytest.raises(CheckpointError, match="logits differ by nan"):
        _verify(nexus_dir, torch.float32, TOKENS, torch.full_like(logits(nexus_dir, torch.float32), float("nan")))


@pytest.mark.parametrize("kind", ["nexus_dir", "context_dir", "dense_dir"])
def test_the_plan_has_the_tensors_of_the_checkpoint_and_their_shapes(request, kind):
    directory = request.getfixturevalue(kind)
    if kind == "dense_dir":
        model = load_stock(directory, torch.float32)
    else:
        model = load_nexus(directory, torch.float32, Placement(3), RouterConfig(), False)
    stored = TensorReader(directory)
    assert _plan(model, torch.bfloat16) == {name: ("BF16", stored.info(name).shape) for name in stored.names()}


def test_the_configuration_is_the_sources_in_the_working_precision(tmp_path, nexus_dir):
    before = json.loads((nexus_dir / "config.json").read_text())
    _write_config(None, nexus_dir, torch.bfloat16, tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == before | {"dtype": "bfloat16"}
    generation = (nexus_dir / "generation_config.json").read_bytes()
    assert (tmp_path / "generation_config.json").read_bytes() == generation


def test_a_failed_write_is_told_at_the_end_and_not_on_the_way(tmp_path):
    """The other ranks gather along: who stops in the middle leaves them waiting for ever."""
    sink = _Sink(tmp_path, {"a": ("F32", (2,)), "b": ("F32", (2,))}, torch.float32)
    sink.write("a", torch.zeros(3))
    sink.write("b", torch.zeros(2))
    with pytest.raises(CheckpointError, match="a"):
        sink.close()
