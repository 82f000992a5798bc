"""The chunked cross-entropy against the plain one: losses, every gradient, and what is kept for the
backward pass."""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import moe_model
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.errors import ConfigError
from nexus_ds.experiments.benchmarks.scaling import Memory
from nexus_ds.model import chunks, head
from nexus_ds.model.head import Finish, LossHead, next_token_loss, unmarked, use_loss_head
from nexus_ds.model.scoring import _losses_and_gradient, score

VOCABULARY = 50


def windows(sequences=3, length=21):
    return torch.randint(
        VOCABULARY, (sequences, length + 1), generator=torch.Generator().manual_seed(0)
    )


def pair(dtype, tied=True):
    """Return two equal models, the second with the chunked loss."""
    plain, chunked = (moe_model(VOCABULARY).to(dtype).train() for _ in range(2))
    if not tied:
        for model in (plain, chunked):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    use_loss_head(chunked)
    assert isinstance(chunked.lm_head, LossHead) and not isinstance(plain.lm_head, LossHead)
    return plain, chunked


def gradients(model, scale):
    mean, losses = next_token_loss(model, windows())
    (mean * scale).backward()
    assert not losses.requires_grad and losses.dtype == mean.dtype == torch.float32
    return (
        mean.detach(),
        losses,
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 21, 1000])
def test_loss_and_gradients_equal_the_plain_ones(monkeypatch, chunk, tied):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    expected, found = (gradients(model, 0.25) for model in pair(torch.float32, tied))
    assert float(abs(found[0] - expected[0])) <= 1e-6 * float(expected[0])
    assert torch.allclose(found[1], expected[1], rtol=1e-6, atol=0)
    assert found[2].keys() == expected[2].keys() and ("lm_head.weight" in found[2]) != tied
    for name, gradient in expected[2].items():
        assert float((found[2][name] - gradient).norm() / gradient.norm()) <= 1e-6, name


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("headless", [False, True])
def test_labels_that_are_not_learned_add_nothing(monkeypatch, chunk, headless):
    """Against the sum that plain PyTorch makes of the others, with ignore_index."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    plain, chunked = pair(torch.float32)
    tokens = windows()
    learned = torch.rand(3, 21, generator=torch.Generator().manual_seed(1)) < 0.4
    learned[1] = False
    targets = torch.where(learned, tokens[:, 1:], -100)
    logits = plain(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    (expected / learned.sum()).backward()
    reference = {name: p.grad.clone() for name, p in plain.named_parameters()}
    plain.zero_grad()
    model = plain if headless else chunked
    mean, losses = next_token_loss(model, tokens, learned)
    total = float(mean.detach()) * learned.numel()
    assert total == pytest.approx(float(expected.detach()), rel=1e-6)
    assert not losses[~learned].any() and (losses[learned] > 0).all()
    (mean * (learned.numel() / learned.sum())).backward()
    for name, parameter in model.named_parameters():
        error = float((parameter.grad - reference[name]).norm() / reference[name].norm())
        assert error <= 1e-5, name


def test_marked_windows_have_their_ids_back():
    tokens = torch.tensor([[3, ~4, ~0, 0]])
    assert unmarked(tokens).tolist() == [[3, 4, 0, 0]]


def test_bf16_gradients_are_as_near_to_fp32_as_the_plain_ones(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    exact = gradients(pair(torch.bfloat16)[0].float(), 1.0)[2]
    plain, chunked = (gradients(model, 1.0)[2] for model in pair(torch.bfloat16))
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.shared_expert.down_proj.weight",
    ):
        distance = [
            float((g[name].float() - exact[name]).norm() / exact[name].norm())
            for g in (plain, chunked)
        ]
        assert distance[1] <= 1.3 * distance[0] < 0.05, (name, distance)


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_tokens():
    shapes = []
    _, model = pair(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        next_token_loss(model, windows())
    wide = [shape for shape in shapes if shape and shape[-1] == VOCABULARY]
    assert not wide and (VOCABULARY, 16) in shapes  # the weight's gradient is there already


def test_outside_of_scoring_there_are_logits_and_without_gradients_none_are_made(monkeypatch):
    plain, model = pair(torch.float32)
    inputs = windows()[:, :-1]
    assert torch.equal(model(input_ids=inputs).logits, plain(input_ids=inputs).logits)
    with torch.no_grad():
        mean, losses = next_token_loss(model, windows())
    assert not mean.requires_grad and torch.allclose(
        losses, next_token_loss(plain, windows())[1], rtol=1e-6
    )
    assert model(input_ids=inputs).logits.shape == (3, 21, VOCABULARY)


def test_a_compiled_kernel_takes_longer_chunks_and_gives_the_same(monkeypatch):
    """2 bytes a logit where the plain way takes 8: four times the tokens, in the same memory."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    plain, model = pair(torch.bfloat16)
    model.lm_head.kernel = "compiled"
    asked, lengths = [], []

    def in_place(logits_cV, targets_c, learn):
        assert learn
        lengths.append(len(logits_cV))
        return _losses_and_gradient(logits_cV, targets_c), logits_cV

    def compiled(*sizes):
        asked.append(sizes)
        return in_place

    monkeypatch.setattr(head, "compiled_score", compiled)
    expected, found = gradients(plain, 1.0), gradients(model, 1.0)
    assert asked == [(16, VOCABULARY, torch.bfloat16, torch.device("cpu"), None)]
    assert lengths == [16, 16, 16, 15]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[2].items():
        assert float((found[2][name] - gradient).norm() / gradient.norm()) <= 2e-2, name


class OnGPU:
    """What the head asks of hidden states, as a GPU's would answer."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __len__(self):
        return 4

    def element_size(self):
        return 2


def test_a_compiler_that_fails_is_said_and_only_what_asks_for_it_stops(monkeypatch):
    asked = []

    def failing(*sizes):
        asked.append(sizes)
        raise ConfigError("training.loss_kernel: torch.compile failed: no Triton")

    monkeypatch.setattr(head, "compiled_score", failing)
    weight_VH = torch.nn.Parameter(torch.zeros(head.COMPILED_FROM, 2))
    on_cpu = LossHead(weight_VH)
    assert on_cpu._score(torch.zeros(4, 2))[0].func is score
    # too few words to be worth compiling
    small = LossHead(torch.nn.Parameter(torch.zeros(head.COMPILED_FROM - 1, 2)))
    assert small._score(OnGPU())[0].func is score
    assert not asked
    with pytest.warns(UserWarning, match="no Triton; until then the loss is slower"):
        chosen = LossHead(weight_VH)._score(OnGPU())
    assert chosen[0].func is score
    assert chosen[1] == chunks.chunk_tokens(head.COMPILED_FROM)
    with pytest.raises(ConfigError, match="no Triton"):
        LossHead(weight_VH, "compiled")._score(OnGPU())


FINISHED = {  # families that do something to what their output layer returns
    "granite": dict(logits_scaling=6.0),
    "cohere2": dict(logit_scale=0.7, head_dim=8),
    "gemma2": dict(final_logit_softcapping=1.5, head_dim=8),
    "gemma3_text": dict(final_logit_softcapping=1.5, head_dim=8),
}


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("family", FINISHED)
def test_a_familys_loss_is_of_its_own_logits(family, chunk, monkeypatch):
    """The model divides or caps what its output layer returns; inside `scoring` that is a loss."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * 31)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        **FINISHED[family],
    )
    plain, chunked = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    chunked.load_state_dict(plain.state_dict())
    use_loss_head(chunked)
    tokens = torch.randint(31, (2, 9))
    found = []
    for model in (plain, chunked):
        loss, losses = next_token_loss(model, tokens)
        loss.backward()
        assert torch.allclose(losses.mean(), loss)
        found.append((loss, {name: weight.grad for name, weight in model.named_parameters()}))
    (expected, gradients), (loss, own) = found
    assert torch.allclose(loss, expected, rtol=1e-6)
    for name, gradient in gradients.items():
        assert float((own[name] - gradient).abs().max() / gradient.abs().max()) < 1e-5, name
    assert torch.equal(plain(tokens).logits, chunked(tokens).logits)
    # without the divisor it is another one
    chunked.lm_head.finish = Finish()
    assert abs(next_token_loss(chunked, tokens)[0] - expected) > 0.1


def test_an_output_layer_with_a_bias_is_left_alone():
    model = moe_model(VOCABULARY)
    model.lm_head = torch.nn.Linear(16, VOCABULARY)
    use_loss_head(model)
    assert isinstance(model.lm_head, torch.nn.Linear)


class Plain(torch.nn.Module):
    """A stock output layer with all logits in memory, called as `next_token_loss` calls a model."""

    config = SimpleNamespace(model_type="none")

    def __init__(self, weight, hidden):
        super().__init__()
        self.lm_head, self.hidden = torch.nn.Linear(1, 1, bias=False), hidden
        self.lm_head.weight = weight

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.lm_head(self.hidden))


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("vocabulary", [65536, 262144])
def test_peak_memory_and_time_at_large_vocabularies(vocabulary, capsys):
    """2^28 logits, 1 GiB in fp32: two chunks."""
    tokens, hidden_size = 2**28 // vocabulary, 128
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden_size) / 16)
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    windows = torch.randint(vocabulary, (1, tokens + 1))
    found = {}
    for name in ("plain", "chunked"):
        model = Plain(weight, hidden)
        if name == "chunked":
            use_loss_head(model)
        seconds = []
        with Memory(torch.device("cpu")) as memory:
            for _ in range(3):
                weight.grad = hidden.grad = None
                started = time.process_time()
                mean, _ = next_token_loss(model, windows)
                mean.backward()
                seconds.append(time.process_time() - started)
        found[name] = (
            memory.bytes,
            statistics.median(seconds),
            mean.detach(),
            weight.grad,
            hidden.grad,
        )
        weight.grad = hidden.grad = None
    plain, chunked = found["plain"], found["chunked"]
    with capsys.disabled():
        print(
            f"\nvocabulary {vocabulary}, {tokens} tokens, hidden {hidden_size}: "
            f"peak {plain[0] / 1e6:,.0f} MB plain, {chunked[0] / 1e6:,.0f} MB chunked; "
            f"{plain[1]:.2f} and {chunked[1]:.2f} CPU seconds ({chunked[1] / plain[1]:.2f})"
        )
    for a, b in zip(chunked[2:], plain[2:], strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-6
    assert chunked[0] < 0.42 * plain[0] and chunked[1] < 1.2 * plain[1]
