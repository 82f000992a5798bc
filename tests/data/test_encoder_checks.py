"""What an encoder's files may not say."""

import json
import os
from pathlib import Path

import pytest

from nexus_ds.data.encoder_checks import check_encoder, transformer_of
from nexus_ds.errors import ConfigError
from tests.conftest import save_encoder

SETTINGS = "sentence_bert_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "small")


@pytest.fixture
def encoder(saved: Path, tmp_path: Path) -> Path:
    """Return links to the files of an encoder, which a test may replace."""
    out = tmp_path / "encoder"
    for file in saved.rglob("*"):
        if file.is_file():
            place = out / file.relative_to(saved)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return out


def test_the_bytes_of_the_weights_are_returned(encoder: Path):
    weights = [encoder / "model.safetensors", encoder / "2_Dense/model.safetensors"]
    assert check_encoder(encoder) == sum(file.stat().st_size for file in weights)
    assert transformer_of(encoder) == encoder


def test_where_a_transformer_lies(encoder: Path):
    modules = json.loads((encoder / "modules.json").read_text())
    (encoder / "modules.json").unlink()
    assert transformer_of(encoder) == encoder
    (encoder / "modules.json").write_text(json.dumps([modules[0] | {"path": "0_Transformer"}]))
    assert transformer_of(encoder) == encoder / "0_Transformer"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"num_hidden_layers": 10**12},
            "found 10{12} layers or the like, expected at",
        ),
        (
            "config.json",
            {"text_config": {"depths": [2, 201]}},
            "found 201 layers .* at most 200 for weights of 25 ",
        ),
        ("config.json", {"num_labels": 10**6}, "found 1000000 labels, expected at most 100000;"),
        (
            "config.json",
            {"_attn_implementation_internal": "someone/kernel"},
            "_attn_implementation_internal = 'someone/kernel' is not read, since it may name other",
        ),
        ("config.json", {"transformers_weights": "/x"}, "transformers_weights = '/x' is not read"),
        (
            SETTINGS,
            {"model_kwargs": {"attn_implementation": "someone/kernel"}},
            "model_kwargs.attn_implementation = 'someone/kernel' is not read",
        ),
        (SETTINGS, {"tokenizer_name_or_path": "/x"}, "tokenizer_name_or_path = '/x' is not read"),
        (SETTINGS, {"processor_name": "/x"}, "processor_name = '/x' is not read"),
        (
            SETTINGS,
            {"model_args": {"ignore_mismatched_sizes": True, "dtype": "float32"}},
            "model_args = .*ignore_mismatched_sizes.* is not read",
        ),
        (SETTINGS, {"config_args": {"max_position_embeddings": 9}}, "config_args = .* is not read"),
        (SETTINGS, {"config_kwargs": "x"}, "config_kwargs = 'x' is not read"),
        (SETTINGS, {"processing_kwargs": {"text": {}}}, "processing_kwargs = .* is not read"),
        (SETTINGS, {"transformer_task": "retrieval"}, "transformer_task = 'retrieval' is not read"),
        (
            SETTINGS,
            {"modality_config": {"text": {"method": "save_pretrained"}}},
            "modality_config.text.method = 'save_pretrained' is not read",
        ),
        (
            "config_sentence_transformers.json",
            {"model_type": "CrossEncoder"},
            "model_type = 'CrossEncoder' is not read",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 60_000, "out_features": 60_000},
            "sizes of 60000 and 60000, but the weights have",
        ),
        ("2_Dense/config.json", {"in_features": 10**9, "out_features": None}, "sizes of 10{9}, b"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.utils.model_dump.__main__.X"},
            "activation_function = 'torch.utils.model_dump.__main__.X' is not read",
        ),
    ],
)
def test_what_is_refused(encoder: Path, file: str, changes: dict, message: str):
    config = json.loads((encoder / file).read_text()) | changes
    (encoder / file).unlink()
    (encoder / file).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"{file}: {message}"):
        check_encoder(encoder)


def test_what_may_be_said(encoder: Path):
    config = json.loads((encoder / "config.json").read_text())
    # nothing is done for them where code is not trusted
    config |= {"auto_map": {"AutoModel": "code.Model"}, "_attn_implementation": "sdpa"}
    (encoder / "config.json").unlink()
    (encoder / "config.json").write_text(json.dumps(config))
    options = {"max_seq_length": 32, "do_lower_case": False, "tokenizer_args": None}
    options["model_args"] = {"add_pooling_layer": False, "trust_remote_code": True}
    (encoder / "sentence_bert_config.json").unlink()
    (encoder / "sentence_bert_config.json").write_text(json.dumps(options))
    check_encoder(encoder)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"path": "../other"}, r"path = '\.\./other' leads out of the encoder"),
        ({"path": "/other"}, "path = '/other' leads out of the encoder"),
        (
            {"type": "sentence_transformers.base.modules.router.Router"},
            r"type = 'sentence_transformers\..*Router', expected a module of sentence-transformers",
        ),
        ({"type": "os.system"}, "type = 'os.system', expected a module"),
        ({}, "4 modules in 3 folders; expected one transformer, and at most 19 others behind it"),
        (
            {"path": "9", "type": "sentence_transformers.models.Transformer"},
            "2 of 4 modules are transformers; expected one transformer",
        ),
        ({"name": None}, r"modules\[3\].name: found 'None', expected text"),
    ],
)
def test_modules_elsewhere_or_of_other_kinds(encoder: Path, module: dict, message: str):
    modules = json.loads((encoder / "modules.json").read_text())
    (encoder / "modules.json").unlink()
    (encoder / "modules.json").write_text(json.dumps([*modules, modules[-1] | module]))
    with pytest.raises(ConfigError, match=rf"modules\.json: {message}"):
        check_encoder(encoder)


def test_an_adapter_is_no_encoder(encoder: Path):
    (encoder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: an adapter's vectors depend on"):
        check_encoder(encoder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: Expecting .*; fetch or save"),
        ("[]", r"config\.json: expected a JSON object; fetch or save"),
        (None, "has 200,000,000 bytes"),
    ],
)
def test_files_that_are_damaged_or_too_large(encoder: Path, content: str | None, message: str):
    path = encoder / "2_Dense/config.json"
    path.unlink()
    with path.open("w") as stream:
        stream.write(content) if content else stream.truncate(200_000_000)
    with pytest.raises(ConfigError, match=message):
        check_encoder(encoder)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(encoder: Path, name: str):
    (encoder / name).unlink(missing_ok=True)
    os.mkfifo(encoder / name)
    with pytest.raises(ConfigError, match=rf"{name} is a pipe, socket or device, expected a file"):
        check_encoder(encoder)


@pytest.mark.parametrize("shard", ["../other/a.safetensors", "/a.safetensors", "a.weights", 1])
def test_shards_lie_beside_their_index_and_are_no_pickles(encoder: Path, shard: object):
    index = encoder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    check_encoder(encoder)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": shard}}))
    with pytest.raises(ConfigError, match=rf"index\.json: '{shard}' in weight_map is not read"):
        check_encoder(encoder)
