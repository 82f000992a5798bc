"""Tiny checkpoints and text for tests: made once a session, never written to by a test."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

LONG = (
    "test_end_to_end",
    "test_compare",
    "test_train",
    "test_readme",
    "test_states_layouts",
    "test_states_kills",
    "test_states",
    "test_parity",
    "test_injection",
    "test_preflight",
    "test_memory",
    "test_discover",
    "test_upcycle",
)
DOMAINS = ("alpha", "beta", "gamma")
WORDS = {  # three domains that a unigram could tell apart
    "alpha": "tree leaf root branch bark moss fern soil rain seed",
    "beta": "sum proof lemma graph prime root field ring limit axiom",
    "gamma": "ship sail wind port mast rope tide wave harbour rain",
}


@pytest.hookimpl(trylast=True)  # after options that name files from where pytest was started
def pytest_configure(config):
    """Go where nothing of the caller is found, a demo's `runs` or a cache, before tests are
    imported; HOME too is empty."""
    if getattr(config.option, "numprocesses", None):
        return  # its workers do; they start from where this process is
    root, start = Path(tempfile.mkdtemp(prefix="nexus-ds-tests-")), Path.cwd()
    for name in [
        n for n in os.environ if n.startswith(("HF_", "XDG_", "MPL")) and n != "HF_HUB_OFFLINE"
    ]:
        del os.environ[name]
    for name in ("home", "folder"):
        (root / name).mkdir()
    os.environ["HOME"] = str(root / "home")
    os.chdir(root / "folder")
    config.add_cleanup(lambda: (os.chdir(start), shutil.rmtree(root, ignore_errors=True)))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Start each test in an empty folder of its own; a test that needs the repository takes it from
    __file__."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that of several workers none ends long after the
    others."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def sentences(domain, count, seed, words_of=WORDS):
    """Return documents of ten sentences each of a domain's words."""
    generator = torch.Generator().manual_seed(seed)
    words = words_of[domain].split()
    documents = []
    for _ in range(count):
        picks = torch.randint(len(words), (10, 7), generator=generator).tolist()
        documents.append(" ".join(" ".join(words[i] for i in line) + "." for line in picks))
    return documents


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder of three domains, {train,validation}.jsonl."""
    root = tmp_path_factory.mktemp("text")
    for index, domain in enumerate(DOMAINS):
        (root / domain).mkdir()
        for offset, (split, count) in enumerate((("train", 60), ("validation", 30))):
            lines = [
                json.dumps({"text": text, "meta": {}})
                for text in sentences(domain, count, 10 * index + offset)
            ]
            (root / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def save_tokenizer(out: Path, words=WORDS):
    """Save a word tokenizer over the domains' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [
        "<|endoftext|>",
        "<unk>",
        *sorted({w for text in words.values() for w in text.split()}),
        ".",
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(out)
    return len(known)


def save_encoder(out: Path) -> Path:
    """Save a sentence encoder with random weights: a Bert of one layer, its mean, a Dense of 8."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel

    base = out.with_name("bert")
    sizes = dict(vocab_size=save_tokenizer(base), hidden_size=16, intermediate_size=24)
    heads = dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<unk>"}))
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, **heads)).save_pretrained(base)
    modules = [Transformer(str(base)), Pooling(16, "mean"), Dense(16, 8)]
    SentenceTransformer(modules=modules).save_pretrained(str(out))
    return out


def add_token(directory: Path):
    """Let a text end with a token beyond a checkpoint's 31 rows, which tokenizer_config.json alone
    knows."""
    path = directory / "tokenizer_config.json"
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    token = {"content": "<|im_end|>", "special": True, **flags}
    more = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"31": token}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory):
    """A random Llama with its tokenizer: 2 layers, hidden 16, vocabulary 31."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("models") / "dense"
    vocabulary = save_tokenizer(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def moe_model(vocabulary, seed=0, experts=3, top_k=1, **form):
    """Return a random stock Qwen2-MoE of the form that a Nexus checkpoint has, but for `form`."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=64,
        tie_word_embeddings=True,
        qkv_bias=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings | form))


def repeat_head(directory: Path):
    """Store the tied embeddings of a saved model as its output layer, too, as Nexus checkpoints
    do."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_running_means(directory: Path, seed=0):
    """Turn a saved stock model into one whose routers read running means less a random vector."""
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "nexus_moe", "architectures": ["NexusMoeForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.mlp.gate.mean"] = torch.randn(
            config["hidden_size"], generator=generator
        )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def balanced_projection(
    inputs_EM, hidden, seed=0, layer=0, depth=2, width=0, form="swiglu", row_norm="free"
):
    """Return the P that a new mixture gets, as torch's module; its inputs are torch's, too."""
    from nexus_ds.checkpoint.projection_module import from_state
    from nexus_ds.checkpoint.records import RouterRecord
    from nexus_ds.upcycling.new_router import layer_draws, new_state

    router = RouterRecord("nexus", depth, width, form, row_norm, "token", True, 1)
    draws = layer_draws(seed, layer)
    return from_state(router, new_state(router, inputs_EM.numpy(), hidden, "balanced", 0.5, draws))


def make_nexus(out: Path, seed=0, names=DOMAINS, top_k=1, router_input="token", row_norm="free"):
    """Save a random Nexus checkpoint with one expert for each of `names`, rows P(D), and its
    sidecar."""
    from nexus_ds.checkpoint.expert_rows import centre_of, condition
    from nexus_ds.checkpoint.projection_module import expert_embeddings
    from nexus_ds.checkpoint.qwen2_moe import SHARED_GATE_FILL
    from nexus_ds.checkpoint.records import (
        EncoderRecord,
        ExpertRecord,
        RouterRecord,
        step_of,
    )
    from nexus_ds.checkpoint.sidecar import Sidecar, write_sidecar
    from nexus_ds.upcycling.new_router import layer_draws, new_state

    model = moe_model(save_tokenizer(out), seed, len(names), top_k)
    vectors = torch.randn(len(names), 8, generator=torch.Generator().manual_seed(seed)).numpy()
    centre = centre_of(vectors)
    router = RouterRecord(
        kind="nexus",
        depth=2,
        width=0,
        projection="swiglu",
        row_norm=row_norm,
        input=router_input,
        centre=True,
        top_k=top_k,
    )
    inputs = condition(vectors, centre)
    states = [
        new_state(router, inputs, 16, "balanced", 0.5, layer_draws(seed, layer))
        for layer in range(2)
    ]
    sidecar = Sidecar(
        experts=[
            ExpertRecord(name=d, domain=d, source=f"branches/{d}", sha256="0" * 64) for d in names
        ],
        router=router,
        encoder=EncoderRecord(
            name="tiny", revision="1" * 64, dimension=8, documents=5, normalised=True
        ),
        lineage=[step_of({"verb": "upcycle", "seed": "seed"})],
        versions={"nexus_ds": "0"},
        vectors=vectors,
        centre=centre,
        projections=states,
    )
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.weight.data = expert_embeddings(sidecar, layer, torch.float32)
        block.mlp.shared_expert_gate.weight.data.fill_(SHARED_GATE_FILL)
    model.save_pretrained(out)
    if router_input == "token":
        repeat_head(out)
    if router_input == "context":
        read_running_means(out, seed)
    write_sidecar(out, sidecar)
    return out


def make_linear(out: Path, **form):
    """Save a random Nexus checkpoint with a linear router: free rows, no projection."""
    from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar

    sidecar = read_sidecar(make_nexus(out, **form))
    sidecar.router.kind, sidecar.projections = "linear", []
    write_sidecar(out, sidecar)
    return out


def shaken(tensors, seed):
    """Return a model's tensors with noise of half their size: those of a branch of it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            t.float() + 0.5 * t.float().abs().mean() * torch.randn(t.shape, generator=generator)
        ).to(t.dtype)
        for name, t in tensors.items()
    }


def of_another_origin(directory: Path, seed=99):
    """Give a saved model random matrices of the same size: nothing but sizes and tokenizer is left
    in common."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: t.float().std() * torch.randn(t.shape, generator=generator) if t.ndim == 2 else t
        for name, t in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def train_shared_gates(directory: Path):
    """Leave in the shared experts' gates of a saved mixture what training elsewhere leaves
    there."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for name in (n for n in tensors if n.endswith("shared_expert_gate.weight")):
        tensors[name] = tensors[name] - 0.01
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def save_branch(checkpoint: Path, out: Path, seed=0, dtype=torch.float32):
    """Save a dense branch that could become an expert of a Nexus checkpoint: its first expert,
    shaken."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from nexus_ds.checkpoint.dense_settings import settings
    from nexus_ds.checkpoint.qwen2_moe import Role, open_moe, stored
    from nexus_ds.checkpoint.tensors import TensorReader
    from nexus_ds.checkpoint.tokenizer import copy_tokenizer

    config, _ = open_moe(checkpoint)
    reader = TensorReader(checkpoint)
    out.mkdir()
    tensors = {
        entry.dense_name: reader.read(name)
        for name, entry in stored(config).items()
        if entry.role is Role.DENSE or (entry.role is Role.ROUTED and entry.expert == 0)
    }
    tensors = {name: tensor.to(dtype) for name, tensor in shaken(tensors, seed).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    own = {"model_type", "architectures", "intermediate_size"}
    alike = {key: config[key] for key in (LlamaConfig().to_dict().keys() & config.keys()) - own}
    dense = LlamaConfig(
        architectures=["LlamaForCausalLM"], intermediate_size=settings(config).ffn_size, **alike
    )
    (out / "config.json").write_text(json.dumps(dense.to_dict()))
    copy_tokenizer(checkpoint, out)
    return out


@pytest.fixture(scope="session")
def nexus_dir(tmp_path_factory):
    """A random Nexus checkpoint: experts alpha, beta, gamma; 2 layers, hidden 16."""
    return make_nexus(tmp_path_factory.mktemp("models") / "nexus")


@pytest.fixture(scope="session")
def context_dir(tmp_path_factory):
    """A random Nexus checkpoint whose routers read running means; otherwise as `nexus_dir`, with
    rows of one length."""
    out = tmp_path_factory.mktemp("models") / "context"
    return make_nexus(out, router_input="context", row_norm="fixed")


@pytest.fixture(scope="session")
def uneven_moe_dir(tmp_path_factory):
    """A stock Qwen2-MoE with a dense layer, wider than all experts of the other."""
    out = tmp_path_factory.mktemp("models") / "uneven"
    form = {"mlp_only_layers": [0], "intermediate_size": 120, "shared_expert_intermediate_size": 32}
    moe_model(save_tokenizer(out), experts=4, top_k=2, **form).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def plain_moe_dir(tmp_path_factory):
    """A stock Qwen2-MoE without sidecar, 4 experts, top-2."""
    out = tmp_path_factory.mktemp("models") / "plain"
    moe_model(save_tokenizer(out), seed=1, experts=4, top_k=2).save_pretrained(out)
    return out
