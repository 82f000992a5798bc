"""Continuations of many prompts: those of each alone, opened and cut as they should be."""

import pytest
import torch
from held_out_text import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ds.generation import samples
from nexus_ds.generation.samples import Sampler

TEXTS = ["bamotiru kelo", "nopi", "susa dage feli vonu " * 20, "kelokelo bamo. tiru", "vonu"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "bytes")


@torch.no_grad()
def drawn(model, ids, count, seed):
    """Return `count` tokens drawn one by one, each from a pass over all before it."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, generator=generator, dtype=torch.float64)
    ids = list(ids)
    added = []
    for number in numbers:
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
        sums_V = logits_V.double().softmax(-1).cumsum(-1)
        token = int((sums_V > number).nonzero()[0])
        if token == model.config.eos_token_id:
            break
        ids.append(token)
        added.append(token)
    return added


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_continuations_are_draws_of_the_model(directory, batch):
    sampler = Sampler(directory, length=24, seed=5, batch=batch)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    expected = []
    for place, text in enumerate(TEXTS):
        # prompts get half of the length, their end if they are longer
        ids = tokenizer(text).input_ids[-12:]
        expected.append(tokenizer.decode([*ids, *drawn(model, ids, 12, 5 + place)]))
        expected[-1] = expected[-1].removeprefix(tokenizer.decode(ids))
    assert sampler.continued(TEXTS) == expected


def test_prompts_open_as_in_training(directory, monkeypatch):
    real = samples.load_tokenizer

    def with_begin(directory, bos):
        import dataclasses

        return dataclasses.replace(real(directory, bos), begin=(7,) if bos else ())

    monkeypatch.setattr(samples, "load_tokenizer", with_begin)
    (opened,) = Sampler(directory, length=24).prompts([TEXTS[2]])
    (plain,) = Sampler(directory, length=24, bos=False).prompts([TEXTS[2]])
    assert len(opened.ids) == len(plain.ids) == 12
    assert opened.ids == [7, *plain.ids[1:]]


def test_what_was_done_before_memory_ran_out_stays_done(directory, monkeypatch):
    expected = Sampler(directory, length=24, batch=2).continued(TEXTS)
    real = samples.continue_prompts
    counts = []

    def failing(model, tokenizer, prompts, asked):
        counts.append(len(prompts))
        if len(counts) == 2:
            raise torch.OutOfMemoryError("full")
        return real(model, tokenizer, prompts, asked)

    monkeypatch.setattr(samples, "continue_prompts", failing)
    assert Sampler(directory, length=24, batch=2).continued(TEXTS) == expected
    assert counts == [2, 2, 1, 1, 1]
