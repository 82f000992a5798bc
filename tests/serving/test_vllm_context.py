"""vLLM's model for routers that read a running mean: what it computes, against transformers'.

Its gate alone stands on a made-up vLLM, whose attention is PyTorch's."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import vllm_cpu
from branches import edit_tensors, stock
from torch import nn

from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.model.context import context
from nexus_ds.serving.exporting import export_to
from nexus_ds.serving.targets import TARGETS
from tests.checkpoint import test_dense
from tests.checkpoint.test_older_stacks import make

MODULE = "nexus_ds.serving.vllm_context"
LENGTHS = (1, 2, 5, 33, 100, 150, 200, 40)
NEW = 20
PIECE = 64
"""Tokens of a step: longer prompts are read in pieces."""


# The gate on a made-up vLLM -----------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention of one text, as vLLM's is called."""

    def __init__(self, heads, width, scale, cache_config, prefix):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.window, self.prefix = cache_config.sliding_window, prefix

    def forward(self, q_Th, k_Th, v_Th):
        parts = [x.view(len(x), self.heads, -1).transpose(0, 1) for x in (q_Th, k_Th, v_Th)]
        out = F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale)
        return out.transpose(0, 1).reshape(q_Th.shape)


class GateLinear(nn.Linear):
    def __init__(self, hidden, experts, prefix):
        super().__init__(hidden, experts, bias=False)

    def forward(self, x_TH):
        return super().forward(x_TH), None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = None


class Model(nn.Module):
    """Two layers, of which the other rank of a pipeline has one."""

    def __init__(self, vllm_config, prefix):
        super().__init__()
        self.config = vllm_config.config
        self.layers = nn.ModuleList([Block(), nn.Identity()])


@pytest.fixture
def gates(monkeypatch):
    """What makes vLLM's model as one of `ranks` ranks makes it, with what all of them give."""
    ranks = SimpleNamespace(own=0, number=1, gathered=None)
    parts = {
        "vllm.config": dict(CacheConfig=None, VllmConfig=None),
        "vllm.distributed": dict(
            get_tensor_model_parallel_rank=lambda: ranks.own,
            get_tensor_model_parallel_world_size=lambda: ranks.number,
            tensor_model_parallel_all_gather=lambda part: ranks.gathered(part),
        ),
        "vllm.model_executor.layers.attention": dict(Attention=Attention),
        "vllm.model_executor.layers.fused_moe": dict(GateLinear=GateLinear),
        "vllm.model_executor.models.qwen2_moe": dict(
            Qwen2MoeForCausalLM=Model, Qwen2MoeSparseMoeBlock=Block
        ),
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE), ranks
    # made of what is made up
    del sys.modules[MODULE]


def model_of(gates):
    module, _ = gates
    sizes = SimpleNamespace(hidden_size=24, num_experts=5, num_attention_heads=4)
    given = SimpleNamespace(config=sizes, cache_config=SimpleNamespace(sliding_window=6))
    model = module.NexusMoeForCausalLM(vllm_config=given, prefix="m")
    gate = model.layers[0].gate
    nn.init.normal_(gate.mean)
    return given, gate


def test_a_gate_scores_by_the_running_mean(gates):
    given, gate = model_of(gates)
    x_TH = torch.randn(40, 24)
    logits_TE, bias = gate(x_TH)
    assert bias is None
    wanted_TE = context(x_TH, 40, gate.mean) @ gate.weight.T
    torch.testing.assert_close(logits_TE, wanted_TE)
    # its own attention sees all, that of the layer what the model says
    assert gate.attention.window is None and given.cache_config.sliding_window == 6
    assert gate.attention.prefix == "m.layers.0.gate.attention"
    # vLLM loads what the checkpoint names
    assert {"weight", "mean"} == set(gate.state_dict())


def test_ranks_average_their_heads_and_score_all_of_them(gates):
    _, ranks = gates
    _, whole = model_of(gates)
    x_TH = torch.randn(40, 24)
    wanted_TE, _ = whole(x_TH)
    mean_TH = x_TH.cumsum(0) / torch.arange(1, 41)[:, None]
    halves = mean_TH.chunk(2, dim=1)

    def gathered(half_Th):
        torch.testing.assert_close(half_Th, halves[ranks.own])
        return mean_TH

    ranks.number, ranks.gathered = 2, gathered
    for ranks.own in (0, 1):
        _, part = model_of(gates)
        part.load_state_dict(whole.state_dict())
        torch.testing.assert_close(part(x_TH)[0], wanted_TE)


# vLLM ---------------------------------------------------------------------------------------------


def with_means(tensors):
    """Give each router rows that tell texts apart, and a mean."""
    draw = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor.normal_(std=0.3, generator=draw)
        if name.endswith("mlp.gate.mean"):
            tensor.normal_(std=0.5, generator=draw)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What writes a mixture of wide heads for vLLM."""
    folder = tmp_path_factory.mktemp("context")
    train_tokenizer(iter(["the tree has a leaf and 12 roots. "] * 9), 300, folder / "tokenizer")
    words = ("router.input=context", "router.projection=linear", "router.row_norm=fixed")
    sizes = {"hidden_size": 128, "max_position_embeddings": 256}

    def write(kind):
        source, _ = make(folder, kind, 5, 2, *words)
        out = folder / f"{kind} for vLLM"
        [*_, said] = export_to(source, TARGETS["vllm"], out).notes
        assert "keeps two vectors" in said
        edit_tensors(out, with_means)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_dense, "SIZES", test_dense.SIZES | sizes)
        yield write


def prompts_of(vocabulary):
    """Return prompts of many lengths; two begin alike."""
    draw = torch.Generator().manual_seed(4)
    shapes = [(length,) for length in LENGTHS]
    drawn = [torch.randint(1, vocabulary, shape, generator=draw).tolist() for shape in shapes]
    drawn[4] = drawn[6][: LENGTHS[4]]
    return drawn


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama3-rope", "mistral-sliding"])
def test_vllm_computes_what_transformers_does(kind, exported, tmp_path):
    """Prompts together and in pieces, then tokens one by one, then from its cache."""
    importlib.import_module("nexus_ds.hf")
    out = exported(kind)
    model = stock(out)
    prompts = prompts_of(model.config.vocab_size)
    pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": PIECE}
    found = vllm_cpu.answers(out, prompts, NEW, tmp_path / "found", **pieces)
    equal = 0
    for number, prompt in enumerate(prompts):
        added = found[f"added.{number}"]
        ids = torch.tensor([prompt + added.tolist()])
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        greedy = wanted[len(prompt) - 1 :].argmax(-1)
        equal += int((greedy == added).sum())
        assert torch.equal(found[f"added_again.{number}"], added)
        torch.testing.assert_close(found[f"log_probs.{number}"], wanted, atol=1e-3, rtol=0)
    assert equal == NEW * len(prompts)
    # what was in its cache is in the means, too; of layers with windows it took nothing from there
    cached = max(int(found[f"cached.{number}"]) for number in range(len(prompts)))
    assert cached >= 128 or kind == "mistral-sliding"


@torch.no_grad()
def test_a_token_router_of_the_same_rows_gives_another_model(exported):
    """Else the comparison with vLLM would show nothing."""
    importlib.import_module("nexus_ds.hf")
    model = stock(exported("qwen2"))
    ids = torch.tensor(prompts_of(model.config.vocab_size)[5:6])
    read = model(ids, use_cache=False).logits
    for layer in model.model.layers:
        gate = layer.mlp.gate
        layer.mlp.gate.forward = lambda x_TH, gate=gate: super(type(gate), gate).forward(x_TH)
    assert (model(ids, use_cache=False).logits - read).abs().max() > 1
