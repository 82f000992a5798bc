"""What an encoder's files may not say."""

import json
from pathlib import Path

import pytest

from nexus_ds.data.encoder_checks import check_encoder, transformer_of
from nexus_ds.errors import ConfigError
from tests.conftest import save_encoder


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
    (encoder / "modules.json").write_text(json.dumps(modules[1:]))
    assert transformer_of(encoder) is None


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**12}, "10{12} layers, but the weights have 25 "),
        ("config.json", {"text_config": {"n_layer": 26}}, "26 layers, but the weights have 25 "),
        (
            "config.json",
            {"_attn_implementation_internal": "someone/kernel"},
            "_attn_implementation_internal = 'someone/kernel' asks for code or files",
        ),
        ("config.json", {"transformers_weights": "/x.bin"}, "transformers_weights = '/x.bin' asks"),
        (
            "sentence_bert_config.json",
            {"model_kwargs": {"attn_implementation": "someone/kernel"}},
            "model_kwargs.attn_implementation = 'someone/kernel' asks for code or files",
        ),
        (
            "sentence_bert_config.json",
            {"tokenizer_name_or_path": "/elsewhere"},
            "tokenizer_name_or_path = '/elsewhere' asks for code or files",
        ),
        (
            "sentence_bert_config.json",
            {"model_args": {"ignore_mismatched_sizes": True, "dtype": "float32"}},
            "model_args has 'ignore_mismatched_sizes', which is not handed on; expected some of",
        ),
        ("sentence_bert_config.json", {"config_kwargs": "x"}, "config_kwargs has 'x', which is"),
        (
            "2_Dense/config.json",
            {"in_features": 60_000, "out_features": 60_000},
            "sizes of 60000 and 60000, but the weights have",
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
    options = {"model_args": {"add_pooling_layer": False}, "tokenizer_args": None}
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
    [("{", r"config\.json: Expecting .*; fetch or save"), (None, "has 200,000,000 bytes")],
)
def test_files_that_are_damaged_or_too_large(encoder: Path, content: str | None, message: str):
    path = encoder / "2_Dense/config.json"
    path.unlink()
    with path.open("w") as stream:
        stream.write(content) if content else stream.truncate(200_000_000)
    with pytest.raises(ConfigError, match=message):
        check_encoder(encoder)
