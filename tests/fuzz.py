"""Hostile files for everything that reads one from outside, made out of sound ones.

    python tests/fuzz.py TARGET SECONDS [SEED]     as many inputs as there is time for; or `all`
    python tests/fuzz.py TARGET --examples 50      as many inputs, the same ones at every start
    python tests/fuzz.py TARGET --replay FILE      what a finding was written to

What is promised of each input: it is read, or refused by a NexusError that names the file (or the
key, where there is no file), within SECONDS_EACH of processor time and with at most MEMORY more
than before. Whatever else happens is a finding: it is made smaller and written to
build/fuzz/TARGET/. The exit code is 1 if there was one. Files lie in memory where there is
/dev/shm: a disk that others use is slower than most readers.

Random; tests/guided.py draws the same, guided by coverage. What is mutated is the meaning (keys,
values, types, sizes, nesting) more than bytes, which a parser refuses at once.
"""

import argparse
import copy
import gzip
import importlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import drawing as st
import numpy as np
import torch
import yaml
import zstandard
from conftest import WORDS, make_nexus, save_encoder, save_tokenizer, sentences
from safetensors.torch import save_file

from nexus_ds.errors import NexusError

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "fuzz"
SECONDS_EACH = 10.0
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
MEMORY = 1 << 30  # bytes of address space, which is more than what is touched of it

# What is put in place of values ------------------------------------------------------------------

NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**18,
    10**30,
    int(1e30),
    10**40,
    10**400,
    1.5,
    -0.0,
    1e308,
    5e-324,
]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "a", "x" * 300, "x" * 5000, "../x", "/etc/passwd", "/dev/zero", "a\0b", "\n"]
TEXTS += ["\ud800", "é", "\u202e", "\x1b[2J", "'", "$(id)", "%s%n{0}", "-", "--help", "1e-5"]
TEXTS += ["three", "nan", "true", "null", "F32", "I64", "BOOL", "F8_E4M3"]
# digits to str.isdigit() that int() refuses, more than int() reads, patterns that take for ever
TEXTS += [
    "\u00b2",
    "9" * 5000,
    "(a|a)*!",
    "([a-z_.0-9]+)+!",
    "a{99999999999}",
    '"""',
    '"\nADAPTER /x',
]
GROUPS = [[], [[]], {}, {"a": {}}, [None], [1], [-1], [10**20], ["a"], [{}], {"": 0}, [0] * 50]
GROUPS += [[2**40, 2**40], {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, {"content": None}]
GROUPS += [[2**62] * 5000, ["a"] * 5000, {"9" * 5000: {"content": "x"}}]
HOSTILE = [None, True, False, *NUMBERS, *TEXTS, *GROUPS]
PIECES = [b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b":", b","]
PIECES += [b"\n", b"\r", b"\\u0000", b"\\ud800", b"1e999", b"NaN", b"1" * 5000, b"[" * 2000]
PIECES += [b'{"a":' * 1500, b"!!python/object/apply:os.system ['id']\n", b"&a [*a]", b"*a", b"? "]
PIECES += [b"- ", b"---\n", b"!!binary ", b"!!set {a}", b"2001-01-01", b"2024-13-45", b"0x1F"]
PIECES += [b"1_000", b"190:20:30", b"\t", b"%YAML 9.9\n", b"~", b"\x80\x04", b"PK\x03\x04"]
PIECES += [b"-1", b"99999999999999999999", b"null", b"[]", b"{}", b'"x"', b"1e5", b"true"]
PIECES += [b"!!bool maybe", b"!!timestamp x", b"!!int ''", b"!!map [a]", b"{}," * 3000, b"\xc2\xb2"]
LENGTHS = [0, 1, 2, 7, 2**32, 2**63, 2**64 - 1, 100_000_000, 100_000_001]


def places(value):
    """Yield the path of every value in `value`; of a list those of the first six."""
    # Without recursion: what is nested deeply may be nested again.
    waiting = [((), value)]
    while waiting:
        path, inner = waiting.pop()
        yield path
        keys = list(inner) if isinstance(inner, dict) else []
        if isinstance(inner, list):
            keys = list(range(min(len(inner), 6)))
        waiting += [((*path, key), inner[key]) for key in reversed(keys)]


def at(value, path):
    for key in path:
        value = value[key]
    return value


def nested(depth, as_list):
    value = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def change(draw, value):
    """Return `value` with one of its inner values replaced, gone, renamed, doubled or moved."""
    path = draw(st.sampled_from(list(places(value))))
    hostile = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    if not path:
        if not isinstance(value, dict) or draw(st.integers(0, 9)) == 0:
            return hostile
        key = draw(st.sampled_from(["x", "", "__metadata__", "__class__", "format", "base"]))
        return {**value, key: hostile}
    parent, key = at(value, path[:-1]), path[-1]
    kind = draw(st.integers(0, 9))
    if kind <= 5:
        parent[key] = hostile
    elif kind == 6:
        del parent[key]
    elif kind == 7 and isinstance(parent, dict):
        parent[str(hostile)[: draw(st.sampled_from([50, 50, 6000]))]] = parent.pop(key)
    elif kind == 8:
        parent[key] = nested(draw(st.sampled_from([50, 300, 900])), draw(st.booleans()))
    else:
        other = draw(st.sampled_from(list(places(value))))
        if other and other[: len(path)] != path:
            parent[key] = copy.deepcopy(at(value, other))
    return value


def changed(value):
    """Draw `value`, which JSON can hold, with one to three changes."""
    # the fastest way to a copy of what is nested
    kept = pickle.dumps(value)

    def make(chance):
        result = pickle.loads(kept)
        for _ in range(1 + chance.below(3)):
            result = change(lambda strategy: strategy.make(chance), result)
        return result

    return st.Strategy(make)


@st.composite
def changed_bytes(draw, content):
    """Draw `content` with one to four slips of bytes, most of them near its beginning."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        last = len(found) if draw(st.booleans()) else min(len(found), 300)
        where = draw(st.integers(0, last))
        kind = draw(st.integers(0, 6))
        if kind == 0 and where < len(found):
            found[where] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            found[where:where] = draw(st.sampled_from(PIECES))
        elif kind == 2:
            del found[where : where + draw(st.sampled_from([1, 2, 8, 64, 1000]))]
        elif kind == 3:
            del found[where:]
        elif kind == 4:
            found[where : where + 8] = draw(st.binary(max_size=8))
        elif kind == 5:
            found[:8] = draw(st.sampled_from([*LENGTHS, len(found)])).to_bytes(8, "little")
        else:
            start = draw(st.integers(0, len(found)))
            found[where:where] = found[start : start + draw(st.integers(0, 200))]
    return bytes(found)


def as_json(value):
    return json.dumps(value).encode()


@st.composite
def json_text(draw, value):
    """Draw the text of a changed JSON value, one time in eight with slips of bytes."""
    text = as_json(draw(changed(value)))
    return draw(changed_bytes(text)) if draw(st.integers(0, 7)) == 0 else text


def parts(content):
    """Return the header and the data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(text, data):
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def tensors(draw, content, few=8):
    """Draw a safetensors file: slips, a changed header, or sound tensors of other forms."""
    header, data = parts(content)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(changed_bytes(content))
    if kind == 1:
        return with_header(draw(json_text(header)), data)
    if kind == 2:
        names = list(header)[:few]
        return with_header(draw(json_text({name: header[name] for name in names})), data)
    other, position = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype = list(entry["shape"]), entry["dtype"]
        if draw(st.integers(0, 3)) == 0:
            forms = [[], [0], [1], [3], [0, 0], [3, 0], [0, 8], shape[::-1], [*shape, 1]]
            shape = draw(st.sampled_from(forms))
        if draw(st.integers(0, 5)) == 0:
            dtype = draw(st.sampled_from(["F64", "I64", "BOOL", "F8_E5M2", "BF16", "F16"]))
        width = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        size = math.prod(shape) * width
        other[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return with_header(as_json(other), (data * 8)[:position].ljust(position, b"\0"))


# Targets -----------------------------------------------------------------------------------------


@dataclass
class Target:
    """What is read, and by whom."""

    inputs: dict[str, st.Strategy]
    """By file name."""
    readers: list[Callable[[], object]]
    box: Path
    named: list[str] = field(default_factory=list)
    """Words one of which an error has to name; the box always counts."""

    def put(self, name, content):
        (self.box / name).write_bytes(content)

    @contextmanager
    def holding(self, name, content):
        """Let the file `name` of the box hold `content` for a while."""
        path = self.box / name
        before = path.read_bytes() if path.is_file() else None
        self.put(name, content)
        try:
            yield
        finally:
            path.unlink() if before is None else path.write_bytes(before)


TARGETS: dict[str, Callable[[Path], Target]] = {}


def target(make):
    TARGETS[make.__name__] = make
    return make


def text_of(box, name):
    return (box / name).read_bytes()


def json_file(box, name, more=None):
    return json_text(json.loads(text_of(box, name)) | (more or {}))


def sealed_file(box, name):
    """Draw a changed manifest, most times with the hash of what it says now."""
    from nexus_ds.sealed import SEAL, seal

    sound = json.loads(text_of(box, name))
    del sound[SEAL]
    values = changed(sound).filter(lambda value: type(value) is dict)
    right = values.map(seal).map(str.encode)
    return st.one_of(right, right, right, json_file(box, name))


def make_dense(out, shards=""):
    """Save a random Llama with its tokenizer, of two layers and hidden 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = save_tokenizer(out)
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    ends = dict(tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends))
    model.save_pretrained(out, **({"max_shard_size": shards} if shards else {}))
    return out


def read_all(directory):
    """Read every tensor, whole and by rows."""
    from nexus_ds.checkpoint.tensors import TensorReader

    reader = TensorReader(directory)
    for name in reader.names()[:20]:
        reader.read(name)
        if reader.info(name).shape and reader.info(name).shape[0]:
            reader.read_rows(name, 0, 1)


def inspect(directory):
    from nexus_ds.checkpoint.inspection import describe
    from nexus_ds.commands.inspect_model import describe_text

    found = describe(directory)
    return describe_text(found), json.dumps(found)


@target
def header(box):
    make_dense(box)
    name = "model.safetensors"
    return Target({name: tensors(text_of(box, name))}, [lambda: read_all(box)], box)


@target
def index(box):
    make_dense(box, shards="5KB")
    name = "model.safetensors.index.json"
    return Target({name: json_file(box, name)}, [lambda: read_all(box)], box)


# Keys that a config.json may have, with values that some family has a meaning for.
ODD = {
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
    "sliding_window": 16,
    "layer_types": ["full_attention", "full_attention"],
    "head_dim": 8,
    "quantization_config": {"quant_method": "gptq"},
    "text_config": {},
    "auto_map": {"AutoConfig": "x.y"},
    "num_experts": 4,
    "dtype": "bfloat16",
}


@target
def config(box):
    from nexus_ds.checkpoint.dense import open_dense
    from nexus_ds.checkpoint.families.table import FAMILIES
    from nexus_ds.planning.stored_model import read_model

    make_dense(box)
    sound = json.loads(text_of(box, "config.json"))
    names = [*FAMILIES, "qwen2_moe", "nexus_moe"]
    kinds = st.sampled_from(names).map(lambda name: {"model_type": name})
    some = st.sets(st.sampled_from(list(ODD)), max_size=2).map(
        lambda keys: {k: ODD[k] for k in keys}
    )
    values = st.tuples(kinds, some).flatmap(lambda more: json_text(sound | more[0] | more[1]))
    readers = [lambda: open_dense(box), lambda: inspect(box), lambda: read_model(box)]
    return Target({"config.json": st.one_of(json_text(sound), values)}, readers, box)


@target
def mixture_config(box):
    from nexus_ds.checkpoint.forms import MIXTURES
    from nexus_ds.checkpoint.qwen2_moe import open_moe
    from nexus_ds.checkpoint.sidecar import read_sidecar
    from nexus_ds.config import dump, load_config
    from nexus_ds.planning.stored_model import read_model

    make_nexus(box)
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    source = {"model_type": "qwen3", "head_dim": 8}
    next_form = {"model_type": "qwen3_next", "nexus_source": source, "head_dim": 8}
    others = [{}, windows, next_form, *({"model_type": name} for name in MIXTURES)]
    texts = st.sampled_from(others).flatmap(lambda more: json_file(box, "config.json", more))
    # what the sequence length is taken from
    training = dump(load_config("demo", ["stage=seed"])).encode()
    (box / "training.yaml").write_bytes(training)
    inputs = {
        "config.json": texts,
        "training.yaml": st.one_of(
            changed_bytes(training), changed(yaml.safe_load(training)).map(as_yaml)
        ),
    }
    readers = [lambda: open_moe(box), lambda: read_sidecar(box), lambda: inspect(box)]
    return Target(inputs, [*readers, lambda: read_model(box)], box)


@target
def loaded_model(box):
    """Whole, for training, and layer by layer."""
    from nexus_ds.checkpoint.build import empty_skeleton, load_stock
    from nexus_ds.checkpoint.loading import load_model, verified
    from nexus_ds.checkpoint.qwen2_moe import open_moe
    from nexus_ds.checkpoint.streaming import streamed_model

    make_nexus(box)
    dtype, place = torch.float32, torch.device("cpu")

    def streamed():
        verified(box)
        streamed_model(box, dtype, place)

    readers = [
        lambda: load_model(box),
        lambda: load_stock(box, dtype),
        lambda: empty_skeleton(box, open_moe(box)[0], dtype),
        streamed,
    ]
    inputs = {
        "config.json": json_file(box, "config.json"),
        "generation_config.json": json_file(box, "generation_config.json"),
        "model.safetensors": tensors(text_of(box, "model.safetensors")),
    }
    return Target(inputs, readers, box)


@target
def sidecar(box):
    from nexus_ds.checkpoint.hashes import differences, record_hashes, recorded
    from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
    from nexus_ds.pipeline import checkpoint_domains

    make_nexus(box)
    [path] = (box / "nexus").iterdir()
    router = str(path.relative_to(box))
    record_hashes(box)
    inputs = {
        "nexus.json": json_file(box, "nexus.json"),
        router: tensors(text_of(box, router)),
    }
    readers = [
        lambda: read_sidecar(box),
        lambda: verify_expert_embeddings(box),
        lambda: checkpoint_domains(str(box)),
        lambda: inspect(box),
        lambda: differences(box, recorded(box) or {}),
    ]
    return Target(inputs, readers, box, ["nexus.json"])


def make_embeddings(path):
    from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings

    vectors_DM = np.random.default_rng(0).normal(size=(2, 8)).astype("float32")
    about = ("tiny", "1" * 64, 128, 2, {"alpha": 5, "beta": 5}, 0, "data")
    made = DomainEmbeddings(["alpha", "beta"], vectors_DM, *about)
    write_domain_embeddings(path, made)
    return made


@target
def domains(box):
    from nexus_ds.data import domains as module

    path = box / "domains.safetensors"
    make_embeddings(path)
    header, data = parts(path.read_bytes())
    key = module.METADATA_KEY

    def within(text):
        facts = text.decode("utf-8", "replace")
        return with_header(as_json(header | {"__metadata__": {key: facts}}), data)

    def use():
        found = module.read_domain_embeddings(path)
        module.near_duplicates(found)
        return module.cosine_table(found), sum(found.documents.values()), found.encoder + found.data

    facts = json_text(json.loads(header["__metadata__"][key])).map(within)
    return Target({path.name: st.one_of(facts, tensors(path.read_bytes()))}, [use], box)


@target
def card(box):
    from nexus_ds.checkpoint.cards import CARD, card_of, embeddings_of, read_cards, write_card
    from nexus_ds.checkpoint.model_card import MODEL_CARD, metadata_of, stated_license

    made = make_embeddings(box / "d.safetensors")
    write_card(box, card_of(made, {"alpha": 1.0}, "alpha", "mit"))
    text = "---\nlicense: mit\nbase_model:\n- a/b\ntags: [x]\n---\n# A\n"
    readers = [
        lambda: embeddings_of(read_cards({"law": box})),
        lambda: stated_license(box),
        lambda: metadata_of(box),
    ]
    inputs = {CARD: json_file(box, CARD), MODEL_CARD: changed_bytes(text.encode())}
    return Target(inputs, readers, box)


@target
def adapter(box):
    from nexus_ds.checkpoint.adapters import ADAPTER_WEIGHTS, describe_merge, open_branch
    from nexus_ds.checkpoint.config_json import ADAPTER
    from nexus_ds.checkpoint.tensors import TensorReader

    base = make_dense(box.with_name("base"))
    made = {}
    for name, (rows, width) in {"q_proj": (16, 16), "o_proj": (16, 16)}.items():
        module = f"base_model.model.model.layers.0.self_attn.{name}"
        made[f"{module}.lora_A.weight"] = torch.ones(4, width)
        made[f"{module}.lora_B.weight"] = torch.ones(rows, 4)
    save_file(made, box / ADAPTER_WEIGHTS)
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 6}
    facts |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "use_rslora": False}
    facts |= {"modules_to_save": None, "target_modules": ["q_proj"], "bias": "none"}
    (box / ADAPTER).write_text(json.dumps(facts))
    inputs = {
        ADAPTER: json_file(box, ADAPTER),
        ADAPTER_WEIGHTS: tensors(text_of(box, ADAPTER_WEIGHTS)),
    }

    def use():
        model = open_branch(box)
        reader = TensorReader.of(model.reader)
        for name in reader.names():
            reader.read(name)
        return describe_merge(model)

    # A base that the adapter names is another directory.
    return Target(inputs, [use], box, ["base_model_name_or_path", "base"])


@target
def tokenizer(box):
    from nexus_ds.checkpoint.tokenizer import chat_templates, check_tokenizer, read_tokenizer
    from nexus_ds.checkpoint.vocabulary import read_vocabulary
    from nexus_ds.data.encoding import load_tokenizer

    make_dense(box)
    texts = {
        name: json.loads(text_of(box, name)) for name in ("tokenizer.json", "tokenizer_config.json")
    }
    texts["tokenizer_config.json"] |= {"chat_template": "{{ messages }}"}
    texts["added_tokens.json"] = {"<new>": 31}
    texts["special_tokens_map.json"] = {"eos_token": {"content": "<|endoftext|>"}}
    readers = [
        lambda: read_tokenizer(box),
        lambda: check_tokenizer(box, 31),
        lambda: read_vocabulary(box),
        lambda: chat_templates(box),
        lambda: load_tokenizer(box),
        lambda: load_tokenizer(box).backend().encode("tree leaf"),
    ]
    return Target({name: json_text(value) for name, value in texts.items()}, readers, box)


@target
def encoder(box):
    """A sentence encoder's folder, one whose last module has weights of its own."""
    from nexus_ds.data.encoder_files import is_language_model, weights_hash
    from nexus_ds.data.sentence_encoder import SentenceEncoder

    save_encoder(box)
    files = [str(path.relative_to(box)) for path in sorted(box.rglob("*"))]
    inputs = {
        name: json_text(json.loads(text_of(box, name))) for name in files if name.endswith(".json")
    }
    inputs |= {name: tensors(text_of(box, name)) for name in files if name.endswith(".safetensors")}

    def use():
        found = SentenceEncoder(str(box))
        texts = [window for text in ("tree", "leaf " * 100) for window in found.windows(text, 2)]
        found.encode(texts)

    return Target(inputs, [lambda: is_language_model(box), lambda: weights_hash(box), use], box)


TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "{% macro one(m) %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{%- for m in messages -%}{{ one(m) }}{% set x = loop.index % 2 %}{%- endfor -%}",
]


@target
def chat_template(box):
    """What a checkpoint's author has chats rendered by."""
    from nexus_ds.data.chat import labelled
    from nexus_ds.data.encoding import load_tokenizer
    from nexus_ds.data.tokenizer import open_tokenizer
    from nexus_ds.generation.prompts import tokenised

    make_dense(box)
    path = box / "chat_template.jinja"
    path.write_text(TEMPLATES[0])
    chat = ({"role": "user", "content": "tree"}, {"role": "assistant", "content": "leaf"})

    def learn():
        found = load_tokenizer(box, chat=True)
        labelled(found.backend(), found.chat, found.end, chat)

    # Filters and calls that are there, put where a template has others.
    parts = ["dictsort", "list", "join", "tojson", "xmlattr", "first", "items", "one(m)", "x / 0"]
    parts += ["{{ one(one) }}", "{% include 'a' %}", "messages", "loop", "cycler()", "range(3)"]
    words = [part.encode() for part in ["m.role", "m.content", "trim", "eos_token", "m"]]
    texts = [text.encode() for text in TEMPLATES]
    swaps = st.tuples(*map(st.sampled_from, (texts, words, [part.encode() for part in parts])))
    swapped = swaps.map(lambda found: found[0].replace(*found[1:]))
    slips = st.sampled_from(texts).flatmap(changed_bytes)
    readers = [learn, lambda: tokenised(open_tokenizer(box), "tree", "it", chat=True)]
    inputs = {path.name: st.one_of(swapped, slips)}
    # Where chats are read, the row is named before that.
    named = ["the tokenizer's chat template", "it: the", "message 2", "no answer", "one token"]
    return Target(inputs, readers, box, named)


@target
def sentencepiece(box):
    from sentencepiece import SentencePieceTrainer

    from nexus_ds.checkpoint.vocabulary import read_vocabulary

    text = (line for words in WORDS.values() for line in words.split() * 20)
    SentencePieceTrainer.train(
        sentence_iterator=text,
        model_prefix=str(box / "tokenizer"),
        vocab_size=45,
        minloglevel=9,
    )
    (box / "tokenizer.vocab").unlink()
    inputs = {"tokenizer.model": changed_bytes(text_of(box, "tokenizer.model"))}
    return Target(inputs, [lambda: read_vocabulary(box)], box)


def recipe_texts():
    from nexus_ds.config import RECIPES

    return [path.read_bytes() for path in sorted(RECIPES.rglob("*.yaml"))]


def as_yaml(value):
    with suppress(yaml.YAMLError, RecursionError):
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    return b"["


def sections():
    """Return words one of which an error about a recipe names: a key stands in no file alone."""
    from nexus_ds.settings import SETTINGS

    names = {word for key in SETTINGS for word in key.split(".")}
    return sorted({*names, "recipe", "stages", "unknown", "compare", "base"})


def use_config(config):
    """Do with a configuration what a launch does before anything is read."""
    from nexus_ds.config import dump
    from nexus_ds.pipeline import check_domains, resolve, steps
    from nexus_ds.runtime.schedule import learning_rate, total_steps

    dump(config)
    check_domains(config)
    config = resolve(config)
    last = max(total_steps(config.training, config.data) - 1, 0)
    for step in (0, last):
        learning_rate(step, config.training, config.data)
    return steps(config, "r", [], 1)


@target
def recipe(box):
    from nexus_ds.config import load_config

    path = box / "recipe.yaml"
    texts = st.sampled_from(recipe_texts())
    path.write_bytes(recipe_texts()[0])
    values = texts.map(yaml.safe_load).flatmap(changed).map(as_yaml)
    inputs = {path.name: st.one_of(texts.flatmap(changed_bytes), values)}
    return Target(inputs, [lambda: use_config(load_config(path))], box, sections())


@target
def override(box):
    from nexus_ds.config import load_config
    from nexus_ds.settings import SETTINGS

    path = box / "word"
    path.write_text("training.lr=0.001")
    keys = ["stages.moe.training.lr", "", ".", "a.b.c", "stages", "base", "training..lr"]
    values = st.sampled_from(HOSTILE).map(lambda value: json.dumps(value).encode())
    pairs = st.tuples(st.sampled_from([*SETTINGS, *keys]).map(str.encode), values)
    words = pairs.map(b"=".join)

    def use():
        load_config("demo", [path.read_bytes().decode("utf-8", "replace")])

    inputs = {path.name: st.one_of(words, words.flatmap(changed_bytes))}
    return Target(inputs, [use], box, [*sections(), "override"])


def make_text(folder, domains=("alpha",)):
    for domain in domains:
        (folder / domain).mkdir(parents=True)
        for split, count in (("train", 20), ("validation", 10)):
            rows = [json.dumps({"text": text}) for text in sentences(domain, count, 3)]
            (folder / domain / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@target
def rows(box):
    from nexus_ds.data.rows import BadRows, read_rows

    sound = {"text": "abc é", "meta": {"a": 1}}
    lines = st.lists(json_text(sound), min_size=1, max_size=3).map(b"\n".join)
    one = st.one_of(lines, changed_bytes(as_json(sound) + b"\n" + as_json(sound)))
    inputs = {
        "a.jsonl": one,
        "a.jsonl.gz": one.map(gzip.compress).flatmap(changed_bytes),
        "a.jsonl.zst": one.map(zstandard.compress).flatmap(changed_bytes),
    }

    def use(on_bad_row):
        for name in inputs:
            path = box / name
            for document in read_rows(path, on_bad_row, BadRows()) if path.is_file() else ():
                document.text.encode()

    return Target(inputs, [lambda: use("error"), lambda: use("skip")], box)


@target
def prompts(box):
    from nexus_ds.generation.prompts import read_prompts

    sound = [{"prompt": "abc é"}, {"messages": [{"role": "user", "content": "x"}]}]
    lines = st.lists(json_text(sound[0]) | json_text(sound[1]), min_size=1, max_size=3)
    inputs = {"a.jsonl": lines.map(b"\n".join), "a.txt": changed_bytes("a\nbc é".encode())}

    def use():
        for name in inputs:
            if (box / name).is_file():
                read_prompts(box / name)

    return Target(inputs, [use], box)


@target
def token_cache(box):
    from nexus_ds.data import corpora, sources

    source = sources.open_source(str(make_text(box / "text")))
    model = make_dense(box / "model")
    found = corpora.token_files(source, ["alpha"], "train", model, box / "c", workers=1)["alpha"]
    ids = found.path.relative_to(box)
    # One load of the tokenizer for all inputs.
    tokenizer = corpora.load_tokenizer(model)
    corpora.load_tokenizer = lambda *_: tokenizer

    def use():
        made = corpora.token_files(source, ["alpha"], "train", model, box / "c", workers=1)
        tokens = corpora.windows(made["alpha"], 2, 16)
        assert tokens.min() >= 0 and tokens.max() < 31, "an id beyond the vocabulary"
        assert made["alpha"].tokens == found.tokens, "another number of tokens"

    inputs = {
        str(ids): changed_bytes(found.path.read_bytes()),
        str(ids.with_suffix(".json")): sealed_file(box, ids.with_suffix(".json")),
    }
    return Target(inputs, [use], box)


@target
def hub_tables(box):
    """Tables of `hub:`, as the library opens them: other columns, types, lengths and bytes."""
    import datasets
    import pyarrow as pa

    from nexus_ds.checkpoint.json_files import parse_json_object
    from nexus_ds.data import hub
    from nexus_ds.data.rows import BadRows

    # its other pools hold address space that they don't use
    pa.set_memory_pool(pa.system_memory_pool())
    path = box / "table.json"
    kinds = ["law", "art", None, "law"]
    sound = {"text": ["a", "b é", "c", "d"], "kind": kinds, "meta": [{"x": v} for v in kinds]}
    sound["told"] = [json.dumps({"x": value}) for value in kinds]
    path.write_bytes(as_json(sound))
    column = pa.array

    def bytes_as_text(values):
        data = column([str(value).encode("latin-1", "ignore") for value in values], pa.binary())
        return pa.StringArray.from_buffers(len(values), *data.buffers()[1:])

    def table():
        # a type in a type, 300 times, takes arrow gigabytes to make
        found = parse_json_object(path.read_bytes(), str(path))
        rows = min((len(values) for values in found.values() if type(values) is list), default=0)
        cut = {name: values[:rows] for name, values in found.items() if name != "raw"}
        arrays = {name: column(values) for name, values in cut.items()}
        if found.get("raw"):
            arrays["text"] = bytes_as_text(found["raw"][:rows])
        return pa.table(arrays)

    def opened(*_):
        # what arrow can't hold is no table: refused where the library reads files
        try:
            data = datasets.Dataset(table()).to_iterable_dataset()
        except NexusError:
            raise
        except Exception as error:
            raise NexusError(f"{path}: {error}") from error
        return hub.Opened({"train": data}, "same", {"train": 9})

    hub._open = opened

    def use(column, on_bad_row):
        source = hub.HubSource(str(path), str(path), column)
        domains = source.domains()[:3]
        counted = {name: BadRows() for name in domains}
        for _, document in source.stream(domains, "train", on_bad_row, 0, counted):
            document.text.encode()

    ways = [("kind", "error"), ("kind", "skip"), ("meta.x", "skip"), ("told.x", "skip")]
    raw = sound | {"raw": ["a", "\xff", "\xc3\xa9", "d"]}
    inputs = {path.name: st.sampled_from([sound, raw]).flatmap(json_text)}
    return Target(inputs, [lambda way=way: use(*way) for way in ways], box)


def write_state(folder):
    """Write a training state of one rank and one parameter."""
    import hashlib

    from nexus_ds.runtime.states import FORMAT, MANIFEST
    from nexus_ds.sealed import seal

    folder.mkdir()
    made = {f"{kind}:0:w": torch.arange(8.0) for kind in ("fp32", "exp_avg", "exp_avg_sq")}
    made["rng:cpu"] = torch.arange(8, dtype=torch.uint8)
    path = folder / "rank_00000.safetensors"
    save_file(made, path)
    content = path.read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": FORMAT, "step": 4, "optimizer_step": 4, "layout": "1 rank"}
    manifest |= {"config": {"seed": 0}, "parameters": {"w": [8]}, "files": {path.name: entry}}
    (folder / MANIFEST).write_text(seal(manifest))
    return path


@target
def state(box):
    from nexus_ds.runtime.portable_state import StateFiles
    from nexus_ds.runtime.states import MANIFEST, damage, read_manifest

    folder = box / "step_4"
    path = write_state(folder)

    def use():
        if problem := damage(folder):
            assert "step" in problem or MANIFEST in problem or path.name in problem, problem
            return
        manifest = read_manifest(folder)
        # of one that was sealed anew, the types
        assert type(manifest["optimizer_step"]) is int and type(manifest["config"]) is dict
        [math.prod(shape) for shape in manifest["parameters"].values()]

    def read_files():
        files = StateFiles(folder, [path.name])
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            files.fill(kind, "w", 0, torch.empty(8))
        files.random_states(path.name)

    inputs = {
        f"step_4/{MANIFEST}": sealed_file(box, f"step_4/{MANIFEST}"),
        f"step_4/{path.name}": tensors(path.read_bytes()),
    }
    return Target(inputs, [use, read_files], box)


@target
def deepspeed_json(box):
    from nexus_ds.config import load_config
    from nexus_ds.runtime.engine import check_layout, read_deepspeed_json
    from nexus_ds.runtime.node_checks import read_zero

    path = box / "ds.json"
    config = load_config("demo")
    sound = [json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))]

    path.write_bytes(as_json(sound[0]))

    def use():
        check_layout(read_deepspeed_json(path, config.parallel), config, 2, 2, 4)

    inputs = {path.name: st.sampled_from(sound).flatmap(json_text)}
    readers = [use, lambda: read_zero(config, str(path))]
    return Target(inputs, readers, box, ["zero_optimization", "ZeRO", "offload", "micro_batch"])


@target
def run_folder(box):
    """What `status` and a repeated stage read of a run."""
    from nexus_ds.commands.status import survey
    from nexus_ds.config import dump
    from nexus_ds.pipeline import Step, check_made, trained_config

    folder = box / "seed.training"
    for made in (box / "logs", folder, box / "seed"):
        made.mkdir()
    plan = [Step("seed", box / "seed", [])]
    saved = dump(trained_config(plan[0], "demo", [])).encode()
    (folder / "config.yaml").write_bytes(saved)
    (box / "seed" / "training.yaml").write_bytes(saved)
    row = {"kind": "train", "step": 3, "time": 1.0, "loss": 2.5}
    rows = st.lists(json_text(row), min_size=1, max_size=3).map(b"\n".join)
    values = changed(yaml.safe_load(saved)).map(as_yaml)
    texts = st.one_of(changed_bytes(saved), values)
    inputs = {
        "seed.training/metrics.jsonl": rows,
        "seed.training/config.yaml": texts,
        "seed/training.yaml": texts,
        "logs/jobs.txt": changed_bytes(b"12 upcycle\n12_3 dense_branch\n"),
        "logs/upcycle-12.log": changed_bytes(b"Error: no space left on device\n"),
    }
    readers = [lambda: survey(box), lambda: check_made(plan, "demo", [])]
    return Target(inputs, readers, box, sections())


def measured(routed):
    """Return one model's part of an evaluation of two domains."""
    from nexus_ds.evaluation.perplexity import Cosines, Routing, Scores
    from nexus_ds.report.summary import Measured

    names, share = ["a", "b"], np.array([[[0.8, 0.2], [0.1, 0.9]]])
    routing = Routing(names, names, names, [0], share, np.full((1, 2), 0.6)) if routed else None
    info = {"kind": "Nexus", "family": "x", "dtype": "F32", "routed_experts": 2 * routed}
    info |= {"parameters": {"total": 10, "active": 5}, "top_k": 1, "lineage": [{"verb": "x"}]}
    windows = {name: np.array([2.0, 2.5, 3.0]) for name in names}
    one = np.eye(2)
    cosines = Cosines(names, one, one, one[None], one[None]) if routed else None
    return Measured(info, Scores(windows, dict.fromkeys(names, 8), 1.0, routing), cosines)


@target
def summary_json(box):
    """What `demo` and `compare` read of an evaluation."""
    from nexus_ds.commands import compare, demo
    from nexus_ds.config import load_config
    from nexus_ds.experiments.comparison import results
    from nexus_ds.experiments.comparison.job_graph import Made
    from nexus_ds.report import page
    from nexus_ds.report.summary import MeasureEntry, OverDocuments, Setup, summarise

    folder = box / "report"
    folder.mkdir()
    words = [f"pipeline.run={box}", "pipeline.domains=[a, b]", "pipeline.new_domains=[]"]
    config = load_config("demo", words)
    names = {name: name != demo.SEED_MODEL for name in (demo.SEED_MODEL, demo.AVERAGE, demo.NEXUS)}
    found = summarise(
        {name: measured(routed) for name, routed in names.items()},
        Setup("demo", ["a", "b"], 3, 4),
        demo.SEED_MODEL,
    )
    content = found.to_json() | {"seconds": 1.0}
    part = {"group": "g", "metric": "acc", "score": 50.0, "stderr": None, "shots": 0}
    tasks = {
        "mean": 50.0,
        "groups": {"g": 50.0},
        "not_run": {},
        "tasks": {"t": part | {"examples": 5}},
    }
    bits = MeasureEntry({"m": {"a": OverDocuments([1.0, 2.0], [3.0, 1.0])}})
    content |= {"tasks": {"m": tasks}, "measures": {"bits": bits.to_json()}}
    demo.places = lambda config: type("Places", (), {"report": folder, "run": box})
    # they were drawn by `evaluate`
    page._figure = lambda *_: ""
    (folder / "summary.json").write_text(json.dumps(content))
    made = Made(tasks=folder, measures=folder)
    method = type("Method", (), {"label": "m"})
    comparison = type("Comparison", (), {"contenders": {"": (method, {0: made})}})
    sound = (folder / "summary.json").read_bytes()
    args = type("Args", (), {"config": "demo", "overrides": []})

    def use_demo():
        before = (folder / "summary.json").read_bytes()
        demo.report(config, args, 0.0)
        # it writes its own words into the file
        (folder / "summary.json").write_bytes(before)

    def use_measures():
        entries = results._measured(comparison, 0)
        for entry in entries.values():
            for domains in entry.models.values():
                [(part.mean, part.error) for part in domains.values()]

    readers = [use_demo, use_measures, lambda: results._task_scores(made)]
    readers.append(lambda: compare._entry(folder, demo.NEXUS))
    return Target({"report/summary.json": json_text(json.loads(sound))}, readers, box)


@target
def comparison_files(box):
    """What `compare` reads of its trainings' logs, of a score, and of an earlier result."""
    from nexus_ds.commands import compare
    from nexus_ds.experiments.comparison import results
    from nexus_ds.experiments.comparison.job_graph import Made

    model, scores = box / "m", box / "scores.json"
    log = box / "m.training" / "metrics.jsonl"
    log.parent.mkdir()
    shares = {"a": {"a": 0.8, "c": 0.2}, "c": {"a": 0.1, "c": 0.9}}
    scored = {"kind": "validation", "step": 0, "time": 1.0, "loss": {"a": 2.0, "c": 3.0}}
    scored |= {"own_share": 0.85, "routing": shares, "perplexity": {"a": 7.4, "c": 20.0}}
    logged = {"kind": "train", "step": 1, "time": 2.0, "loss": 2.5, "router": {"gate": 0.6}}
    rows = [scored, logged, scored | {"step": 2}]
    log.write_bytes(b"\n".join(map(as_json, rows)))
    scores.write_bytes(as_json({"loss": {"a": 2.0}}))
    (box / "results.json").write_bytes(as_json({"seconds": 3.5, "recipe": "demo"}))
    made = Made(model=model, experts=["c"], steps={0: 0, 2: 100}, turns={"b": model, "c": model})
    readers = [
        lambda: results.trained(model),
        lambda: results.budgets(made, ["a"]),
        lambda: results.turns(made),
        lambda: results._seconds(model),
        lambda: results._scores(Made(scores=scores)),
        lambda: compare._earlier_seconds(box),
    ]
    lines = st.lists(st.sampled_from(rows).flatmap(json_text), min_size=1, max_size=3)
    inputs = {
        "m.training/metrics.jsonl": st.one_of(
            lines.map(b"\n".join), changed_bytes(log.read_bytes())
        ),
        "scores.json": json_file(box, "scores.json"),
        "results.json": json_file(box, "results.json"),
    }
    return Target(inputs, readers, box)


@target
def launcher(box):
    """Variables of torchrun, deepspeed, srun and sbatch, as JSON in a file of its own."""
    from nexus_ds import launch

    path = box / "environment.json"
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    torchrun |= {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    srun |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_NODES": "2"}
    srun |= {"SLURM_LOCALID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    srun |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "1000", "SLURM_GPU_BIND": "single:1"}

    def environment():
        value = json.loads(path.read_text())
        # The system's strings: never a NUL.
        return {str(k): str(v).replace("\0", "") for k, v in value.items() if v is not None}

    def use():
        env = environment()
        here = launch.position(env)
        launch.meeting_point(here, env)
        launch.device_number(2, env)

    def others():
        env = environment()
        launch.first_rank(env), launch.rank_name(env), launch.array_task(env)
        launch.has_own_gpu(env), launch.allotted_gpus(env), launch.allotted_memory(env)

    path.write_bytes(as_json(torchrun))
    values = st.sampled_from([torchrun, srun]).flatmap(changed).filter(lambda v: type(v) is dict)
    inputs = {path.name: values.map(as_json)}
    named = [*torchrun, *srun, "srun", "ranks"]
    return Target(inputs, [use, others], box, named)


@target
def gpu_json(box):
    from nexus_ds.experiments.benchmarks.gpu import read_report, table

    path = box / "gpu.json"
    step = {"name": "tests", "state": "ok", "code": 0, "seconds": 1.0, "limit": 9.0}
    step |= {"figures": {"tokens": 1.5, "parts": {"a": 1}}, "tail": ["passed"]}
    report = {"date": "2026-11-01", "small": True, "seconds": 9.0, "steps": [step]}
    path.write_bytes(as_json(report))
    return Target(
        {path.name: json_text(report)}, [lambda: table(read_report(path))], box, ["gpu.json"]
    )


@target
def trained(box):
    """A mixture as stock transformers saves it, taken up again by `adopt`."""
    from nexus_ds.upcycling.adopt import adopted

    nexus = box.with_name("nexus")
    make_nexus(nexus)
    shutil.copytree(nexus, box, ignore=shutil.ignore_patterns("nexus*"), dirs_exist_ok=True)
    inputs = {
        "model.safetensors": tensors(text_of(box, "model.safetensors")),
        **{name: json_file(box, name) for name in ("config.json", "tokenizer.json")},
    }
    # two directories are compared: by their options
    named = ["the models differ where they must agree"]
    return Target(inputs, [lambda: adopted(box, nexus, approximate=True)], box, named)


@target
def exported(box):
    """A mixture of a stranger, written for other programs."""
    from nexus_ds.serving.exporting import export_to
    from nexus_ds.serving.modelfile import modelfile
    from nexus_ds.serving.targets import TARGETS

    make_nexus(box)
    (box / "chat_template.jinja").write_text(TEMPLATES[0])
    out = box.with_name("out")

    def write(name):
        try:
            export_to(box, TARGETS[name], out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    files = ("config.json", "nexus.json", "tokenizer_config.json", "generation_config.json")
    inputs = {name: json_file(box, name) for name in files}
    inputs["chat_template.jinja"] = changed_bytes(TEMPLATES[0].encode())
    ways = [lambda name=name: write(name) for name in ("transformers4", "vllm", "hub")]
    return Target(
        inputs, [*ways, lambda: modelfile(box)], box, ["chat template", "of the checkpoint holds"]
    )


HEAVY = ["nexus_ds.runtime.engine", "nexus_ds.data.corpora", "nexus_ds.checkpoint.loading"]
HEAVY += ["transformers.models.llama.modeling_llama", "sklearn.cluster", "datasets"]
HEAVY += ["transformers.models.qwen2_moe.modeling_qwen2_moe", "nexus_ds.commands.status"]
HEAVY += ["sentence_transformers"]

# Running -----------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """More processor time than is promised; no `except Exception` swallows it."""


def _too_slow(*_):
    raise TooSlow(f"more than {SECONDS_EACH} s of processor time")


def complaint(target, name, content):
    """Return how often the input was refused, and what was wrong with that as (signature, text)."""
    refused = 0
    with target.holding(name, content):
        for reader in target.readers:
            signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
            try:
                reader()
            except NexusError as error:
                refused += 1
                text = str(error)
                if not any(word in text for word in [str(target.box), *target.named]):
                    return refused, (f"unnamed-{signature(error)}", text)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                return refused, (signature(error), "".join(traceback.format_exception(error)))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    return refused, None


def signature(error):
    """Return what tells findings apart: the kind and the innermost function of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}nexus_ds{os.sep}" in frame.filename] or frames
    # The folder of the package may be below another of the same name.
    return f"{type(error).__name__}-{Path(own[-1].filename).stem}-{own[-1].name}".strip("<>")


@dataclass
class Tally:
    """What one target's inputs came to."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    found: dict[str, tuple[str, bytes, str]] = field(default_factory=dict)
    """By signature: file name, smallest content, traceback."""

    def keep(self, target, name, content):
        """Try an input, count it, and keep the smallest of each kind of finding."""
        start = time.process_time()
        refused, problem = complaint(target, name, content)
        self.inputs += 1
        self.refused += bool(refused)
        self.slowest = max(self.slowest, time.process_time() - start)
        if problem is None:
            return
        mark, text = problem
        known = self.found.get(mark)
        if known is None:
            content, text = smaller(target, name, content, mark, text)
        if known is None or len(content) < len(known[1]):
            self.found[mark] = (name, content, text)


def smaller(target, name, content, mark, text):
    """Return a finding without what it does not need, and its traceback, of some tries."""
    until = time.process_time() + 3 * SECONDS_EACH
    width = len(content) // 2
    while width:
        start = 0
        while start < len(content) and time.process_time() < until:
            less = content[:start] + content[start + width :]
            _, problem = complaint(target, name, less)
            if problem and problem[0] == mark:
                content, text = less, problem[1]
            else:
                start += width
        width //= 2
    return content, text


def hunt(target, tally, number, count, until):
    """Try `count` inputs of seed `number`, or as many as there is time for."""
    chance = st.Chance(number)
    names = sorted(target.inputs)
    for _ in range(count):
        if time.monotonic() > until:
            return
        name = names[chance.below(len(names))]
        # where nested values are nested again; what readers raise is a finding
        with suppress(st.Unusable, RecursionError):
            content = target.inputs[name].make(chance)
            tally.keep(target, name, content)


@contextmanager
def opened(name):
    """Make a target in a folder of its own, and hold this process to its memory."""
    # An input that aborts the process stays there.
    root = Path(tempfile.mkdtemp(prefix=f"nexus-ds-fuzz-{name}-", dir=MEMORY_DISK))
    box = root / "box"
    box.mkdir()
    torch.set_num_threads(1)
    found = TARGETS[name](box)
    for reader in found.readers:  # the sound files; and what is imported late is no input's
        reader()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _too_slow)
    yield found
    shutil.rmtree(root)


def fuzz(name, seconds, count, number):
    """Run one target; print what came of it, and return whether nothing was found."""
    tally, start = Tally(), time.monotonic()
    with opened(name) as found, open(os.devnull, "w") as null:
        until = start + seconds if seconds else math.inf
        with redirect_stdout(null), redirect_stderr(null):
            if not seconds:
                hunt(found, tally, number, count, until)
            while seconds and time.monotonic() < until:
                hunt(found, tally, number, 200, until)
                number += 1
    return report(name, tally, time.monotonic() - start)


def report(name, tally, seconds):
    """Print what came of a target and keep its findings; return whether there was none."""
    print(
        f"{name}: {tally.inputs} inputs in {seconds:.0f} s, "
        f"{tally.refused} refused, slowest {tally.slowest:.1f} s, {len(tally.found)} findings",
        flush=True,
    )
    for mark, (file, content, text) in tally.found.items():
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{mark}--{file.replace('/', '--')}"
        (folder / stem).write_bytes(content)
        (folder / f"{stem}.txt").write_text(text, errors="replace")
        print(f"  {mark}: {content[:200]!r}; {folder / stem}", flush=True)
    return not tally.found


def replay(name, file):
    """Read the input in `file`, named as `fuzz` names it; show what is wrong with it."""
    with opened(name) as found:
        inside = file.name.partition("--")[2].replace("--", "/")
        refused, problem = complaint(found, inside, file.read_bytes())
    print(problem[1] if problem else f"refused {refused} times" if refused else "read")
    return problem is None


def alone(name, args):
    """Run one target in a fork: its limits are its own, and an abort leaves the others alone."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = 0 if fuzz(name, args.seconds, args.examples, args.seed) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def each(args):
    """Run every target."""
    for module in HEAVY:  # once, not in every fork
        importlib.import_module(module)
    codes = {name: alone(name, args) for name in TARGETS}
    for name, code in codes.items():
        if code not in (0, 1):
            where = Path(MEMORY_DISK or tempfile.gettempdir()) / f"nexus-ds-fuzz-{name}-*" / "box"
            print(f"{name}: ended by {code}; its input lies in {where}", flush=True)
    return not any(codes.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("seconds", nargs="?", type=float, default=0.0)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--replay", type=Path)
    args = parser.parse_args()
    if args.target == "all":
        return 0 if each(args) else 1
    if args.replay:
        return 0 if replay(args.target, args.replay) else 1
    return 0 if fuzz(args.target, args.seconds, args.examples, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
