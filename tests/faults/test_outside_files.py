"""Whatever stands in a file from outside: it is read, or refused in one sentence that names it.

Every value of every key is replaced by what a slip, a damaged disk or malice could put there. Found
by fuzzing at first: numbers as words, objects as numbers, brackets in brackets, a thousand digits.
"""

import copy
import json
import shutil

import numpy as np
import pytest

from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.qwen2_moe import open_moe
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.commands.inspect_model import describe_text
from nexus_ds.commands.status import survey
from nexus_ds.config import dump, load_config
from nexus_ds.data.domains import (
    METADATA_KEY,
    DomainEmbeddings,
    cosine_table,
    read_domain_embeddings,
    write_domain_embeddings,
)
from nexus_ds.errors import ConfigError, NexusError
from nexus_ds.pipeline import Step, check_made
from nexus_ds.runtime.engine import check_layout, read_deepspeed_json

pytestmark = pytest.mark.slow  # thousands of files

DEEP = 0
for _ in range(200):
    DEEP = [DEEP]
HOSTILE = [
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**9, 10**18, 2**63, 10**400),
    *("", "three", "a\0b", "../x", "\ud800", "x" * 5000),
    *([], {}, [None], [[]], {"a": {}}, [-1], [10**20], DEEP),
]


def texts(value):
    """Yield JSON texts in which one value of `value`, at any depth, is another, or gone."""

    def places(inner, path=()):
        if isinstance(inner, dict | list):
            for key in inner if isinstance(inner, dict) else range(min(len(inner), 2)):
                yield (*path, key)
                yield from places(inner[key], (*path, key))

    for path in places(value):
        for other in [*HOSTILE, ...]:
            changed = copy.deepcopy(value)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if other is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = other
            yield json.dumps(changed)


WHOLE = ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\0"]


def read_all(path, contents, actions, names):
    """Put each content into the file; every action reads it, or raises an error that names it."""
    refused = 0
    for content in contents:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for action in actions:
            try:
                action()
            except NexusError as error:
                refused += 1
                assert any(str(name) in str(error) for name in names), (content[:300], error)
                assert "\n" not in str(error).strip() or path.suffix == ".yaml"
            # anything else is a failure that the test shows with its traceback
    return refused


@pytest.fixture
def dense(dense_dir, tmp_path):
    return shutil.copytree(dense_dir, tmp_path / "dense")


@pytest.fixture
def nexus(nexus_dir, tmp_path):
    return shutil.copytree(nexus_dir, tmp_path / "nexus")


def inspect(directory):
    return describe_text(describe(directory))


def test_a_dense_config(dense):
    path = dense / "config.json"
    value = json.loads(path.read_text())
    odd = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "layer_types": ["full_attention"]}
    contents = [*WHOLE, *texts(value), *texts(value | odd)]
    actions = [lambda: open_dense(dense), lambda: inspect(dense)]
    assert read_all(path, contents, actions, [dense]) > 200


def test_a_mixtures_config(nexus):
    path = nexus / "config.json"
    value = json.loads(path.read_text())
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    listed = value | windows
    listed.pop("layer_types", None)
    contents = [*WHOLE, *texts(value), *list(texts(listed))[-len(windows) * len(HOSTILE) :]]
    actions = [lambda: open_moe(nexus), lambda: inspect(nexus)]
    assert read_all(path, contents, actions, [nexus]) > 200


def test_numbers_of_layers_and_experts_that_would_fill_the_memory(nexus):
    """They are refused before a table with a name for each is made: in no time."""
    path = nexus / "config.json"
    value = json.loads(path.read_text())
    for key, message in {
        "num_hidden_layers": r"num_experts is 3 in 9999 layers, but the model has \d+ tensors; ",
        "num_experts": r"num_experts is 9999 in 2 layers, but the model has \d+ tensors; ",
    }.items():
        path.write_text(json.dumps(value | {key: 9999}))
        with pytest.raises(NexusError, match=message):
            open_moe(nexus)


def test_a_sidecar(nexus):
    path = nexus / "nexus.json"
    contents = [*WHOLE, *texts(json.loads(path.read_text()))]
    actions = [lambda: read_sidecar(nexus), lambda: inspect(nexus)]
    # "nexus" stands for messages about both of the sidecar's files
    assert read_all(path, contents, actions, [nexus, "nexus.json"]) > 200


def test_the_projections_form_is_held_to_its_weights_before_it_is_built(nexus):
    path = nexus / "nexus.json"
    value = json.loads(path.read_text())
    for key in ("depth", "width"):
        path.write_text(json.dumps(value | {"router": value["router"] | {key: 10**8}}))
        with pytest.raises(NexusError, match=r"P of layer 0 has the weights .* is not the form"):
            read_sidecar(nexus)


def headers(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    few = dict(list(header.items())[:3])
    for text in [*WHOLE, *texts(few)]:
        content = text.encode()
        yield len(content).to_bytes(8, "little") + content + data[8 + size :]
    for length in (0, 7, 2**32, 2**63, 2**64 - 1):
        yield length.to_bytes(8, "little") + data[8:]


def test_the_header_of_a_weight_file(dense):
    path = dense / "model.safetensors"
    contents = [b"", b"\x80\x04", *headers(path)]
    assert read_all(path, contents, [lambda: TensorReader(dense)], [dense]) > 50


def test_an_embeddings_file(tmp_path):
    path = tmp_path / "domains.safetensors"
    vectors_DM = np.random.default_rng(0).normal(size=(2, 8)).astype("float32")
    about = ("tiny", "1" * 64, 128, 2, {"alpha": 5, "beta": 5}, 0, "data")
    write_domain_embeddings(path, DomainEmbeddings(["alpha", "beta"], vectors_DM, *about))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = json.loads(header["__metadata__"][METADATA_KEY])

    def contents():
        for text in [*WHOLE, *texts(facts)]:
            changed = json.dumps(header | {"__metadata__": {METADATA_KEY: text}}).encode()
            yield len(changed).to_bytes(8, "little") + changed + data[8 + size :]
        for dtype in ("BF16", "F8_E4M3", "I64", "BOOL"):
            entry = header["vectors"] | {"dtype": dtype}
            changed = json.dumps(header | {"vectors": entry}).encode()
            yield len(changed).to_bytes(8, "little") + changed + data[8 + size :]
        yield from headers(path)

    def use():
        found = read_domain_embeddings(path)
        return cosine_table(found), sum(found.documents.values()), found.encoder + found.revision

    assert read_all(path, list(contents()), [use], [path]) > 100


def test_a_deepspeed_json(tmp_path):
    path = tmp_path / "ds.json"
    config = load_config("demo")
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True}
    twice = '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}'
    contents = [*WHOLE, twice, b"\xff", *texts({"zero_optimization": zero, "steps_per_print": 5})]

    def use():
        check_layout(read_deepspeed_json(path, config.parallel), config, 2, 2, 4)

    # what is known of a key says which key, for the file stands on the command line
    assert read_all(path, contents, [use], [path, "zero_optimization", "ZeRO stage 0"]) > 50
    path.write_text(twice)
    with pytest.raises(ConfigError, match="the name 'zero_optimization' stands twice"):
        use()


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    value = {"training": {"lr": 1e-3, "steps": 5}, "seed": 1, "data": {"domains": ["a"]}}
    words = ["name: a: b", "a: \x0b", "[" * 400, "a: &a [*a]", b"\xff", "seed: -1", "\0"]
    keys = ["recipe", "training", "data", "seed", "stage", "unknown key"]
    assert read_all(path, [*words, *WHOLE, *texts(value)], [lambda: load_config(path)], keys) > 50
    for text in ("name: a: b", "a: \x0b", "[" * 400):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{path}: not a valid recipe: "):
            load_config(path)


@pytest.mark.parametrize("word", ["name=a: b: c", "training.lr=\x0b", "seed=" + "[" * 400])
def test_an_override(word):
    with pytest.raises(ConfigError, match=r"^override \S+: not a valid recipe: "):
        load_config("demo", [word])


@pytest.mark.parametrize("word", ["seed=-1", "seed=" + "9" * 400, "training.lr=" + "9" * 400])
def test_a_number_that_is_none_of_a_setting(word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        load_config("demo", [word])


def test_the_log_of_a_training(tmp_path):
    folder = tmp_path / "seed.training"
    folder.mkdir()
    (tmp_path / "logs").mkdir()
    (folder / "config.yaml").write_text(dump(load_config("demo", ["stage=seed"])))
    path = folder / "metrics.jsonl"
    row = {"kind": "train", "step": 3, "time": 1.0, "loss": 2.5}
    sound = json.dumps(row | {"step": 4, "time": 2.0})
    contents = [f"{sound}\n{text}" for text in [*WHOLE, *texts(row)]]
    contents += [f"{text}\n{sound}" for text in texts(row)]
    assert read_all(path, contents, [lambda: survey(tmp_path)], [path]) == 0


def test_the_settings_beside_a_trained_model(tmp_path):
    path = tmp_path / "training.yaml"
    contents = [b"\xff\xfe", *WHOLE, "a: \x0b", "stage: [1]", "seed: {}"]
    plan = [Step("seed", tmp_path, [])]
    refused = read_all(path, contents, [lambda: check_made(plan, "demo", [])], [path, tmp_path])
    assert refused == len(contents)


def test_a_model_that_transformers_can_not_build(dense):
    path = dense / "config.json"
    value = json.loads(path.read_text())
    for key in ("pad_token_id", "num_attention_heads", "hidden_size"):
        path.write_text(json.dumps(value | {key: 10**9}))
        with pytest.raises(NexusError, match=f"^{dense}"):
            load_model(dense)
