"""Language models inside of models that see: a text's logits are those of the whole model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nexus_ds.hf  # noqa: F401
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.wrappers import WRAPPERS, refuse_wrapper, text_config
from nexus_ds.errors import UnsupportedModelError
from nexus_ds.settings import Config
from nexus_ds.upcycling import average
from nexus_ds.upcycling.assessment import related
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import embeddings
from tests.checkpoint.test_qwen3_next import difference, tokens, trained_looking

TEXT = dict(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)
SIGHT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
QWEN_SIGHT = dict(depth=1, num_heads=2, hidden_size=16, intermediate_size=16, out_hidden_size=32)
MROPE = dict(rope_type="default", rope_theta=500.0, mrope_section=[1, 1, 2])
KINDS = {  # wrapper, its text_config, its vision_config, its own keys
    "mistral3": (
        "mistral3",
        dict(model_type="mistral", head_dim=12, sliding_window=None),
        dict(model_type="pixtral", num_attention_heads=2, patch_size=14, **SIGHT),
        dict(tie_word_embeddings=False),
    ),
    "mistral3-tied": (
        "mistral3",
        dict(model_type="mistral", sliding_window=None),
        dict(model_type="pixtral", num_attention_heads=2, patch_size=14, **SIGHT),
        {},
    ),
    "gemma3": (
        "gemma3",
        dict(head_dim=8, query_pre_attn_scalar=24, sliding_window=6, sliding_window_pattern=2),
        dict(model_type="siglip_vision_model", num_attention_heads=2, patch_size=14, **SIGHT),
        dict(mm_tokens_per_image=4),
    ),
    "llava": (
        "llava",
        dict(model_type="llama"),
        dict(model_type="clip_vision_model", num_attention_heads=2, patch_size=14, **SIGHT),
        {},
    ),
    "qwen2-vl": (
        "qwen2_vl",
        dict(rope_parameters=MROPE),
        dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2),
        {},
    ),
    "qwen2.5-vl": (
        "qwen2_5_vl",
        dict(rope_parameters=MROPE),
        QWEN_SIGHT,
        dict(tie_word_embeddings=True),
    ),
    "qwen3-vl": (
        "qwen3_vl",
        dict(head_dim=8, rope_parameters=MROPE | dict(mrope_interleaved=True)),
        QWEN_SIGHT | dict(deepstack_visual_indexes=[0]),
        {},
    ),
    "qwen3.5": (
        "qwen3_5",
        dict(
            head_dim=16,
            rope_parameters=MROPE | dict(mrope_interleaved=True, partial_rotary_factor=0.5),
            full_attention_interval=2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
        ),
        QWEN_SIGHT,
        {},
    ),
}


def changed_config(out, change):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(change(config)))


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory, dense_dir):
    """(kind, its folder, the model)."""
    kind, text, sight, keys = KINDS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "whole"
    config = CONFIG_MAPPING[kind](text_config=TEXT | text, vision_config=sight, **keys)
    model = AutoModelForImageTextToText.from_config(config).float()
    trained_looking(model, 0)
    model.save_pretrained(out)
    for file in dense_dir.glob("tokenizer*.json"):
        shutil.copy(file, out)
    return kind, out, AutoModelForImageTextToText.from_pretrained(out).eval()


def twice(source, out):
    """Write a mixture of a model twice, without a shared expert: it computes what that does."""
    config = Config()
    config.model.shared_expert, config.router.top_k = "none", 2
    out.mkdir()
    new = upcycled(source, {"a": source, "b": source}, embeddings(("a", "b")), config)
    new.write(out, None, config.router, 0)
    return AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()


@torch.no_grad()
def test_a_mixture_computes_the_whole_models_text(whole, tmp_path):
    kind, source, model = whole
    mixture, x = twice(source, tmp_path / "out"), tokens()
    expected = model(input_ids=x).logits
    assert difference(mixture(x).logits, expected) < 1e-5
    mixture.model.layers[-1].self_attn.v_proj.weight.data[:8] *= 2  # the comparison can fail
    assert difference(mixture(x).logits, expected) > 1e-3
    assert related(source, tmp_path / "out")["cosine"] == 1
    assert open_dense(source).family == WRAPPERS[kind].family


@torch.no_grad()
def test_the_text_is_saved_on_its_own(whole, tmp_path, monkeypatch):
    """As the refusal of training says."""
    # Qwen2's class takes every tokenizer for a byte-level one, which this one of words is not
    monkeypatch.setattr(average, "copy_tokenizer", lambda source, out: None)
    kind, source, model = whole
    with pytest.raises(UnsupportedModelError, match=f"a {kind} is a language model .* average_den"):
        refuse_wrapper(source)
    average.average_dense([source], tmp_path / "text")
    refuse_wrapper(tmp_path / "text")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert alone.config.model_type == WRAPPERS[kind].family
    assert difference(alone(tokens()).logits, model(input_ids=tokens()).logits) < 1e-5


def test_older_names_and_keys_are_the_same_text(whole, tmp_path):
    """Names as transformers 4 had them from 4.52 on; Qwen2-VL's keys beside vision_config."""
    kind, source, _ = whole
    out = shutil.copytree(source, tmp_path / "old")
    tensors = load_file(out / "model.safetensors")
    if kind.startswith("qwen"):

        def flat(config):
            text = config.pop("text_config")
            rope = text.pop("rope_parameters")
            rope = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": "mrope"}}
            return text | config | rope

        changed_config(out, flat)
    names = ("language_model.model.", "model.language_model."), ("language_model.lm_", "lm_")
    names += (("model.layers.", "model.language_model.layers."),)
    for name in list(tensors):
        for start, other in names:
            if name.startswith(start):
                tensors[other + name.removeprefix(start)] = tensors.pop(name)
                break
    save_file(tensors, out / "model.safetensors")
    now, then = open_dense(source), open_dense(out)
    assert now.settings == then.settings and now.reader.names() == then.reader.names()
    assert not any("vis" in name for name in then.reader.names())


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind):
    sizes = {key: value for key, value in TEXT.items() if key != "rms_norm_eps"}
    sizes = {
        key: value for key, value in sizes.items() if "num_key" not in key and "max_" not in key
    }
    sizes["num_attention_heads"], sizes["hidden_size"] = 32, 256
    inner = {} if WRAPPERS[kind].own else {"model_type": WRAPPERS[kind].family}
    own = CONFIG_MAPPING[kind](text_config=sizes | inner)
    found = settings(text_config({"model_type": kind, "text_config": sizes}))
    text = own.text_config
    assert (found.kv_heads, found.norm_eps) == (text.num_key_value_heads, text.rms_norm_eps)
    assert found.rope == text.rope_parameters
    assert found.tied_embeddings == own.tie_word_embeddings


def test_a_first_gemma_3_leaves_out_sizes_too():
    """As gemma-3-4b-it does."""
    text = dict(
        model_type="gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    )
    own = CONFIG_MAPPING["gemma3"](text_config=dict(text)).text_config
    found = settings(text_config({"model_type": "gemma3", "text_config": text}))
    assert found.rope == {
        kind: {key: value for key, value in rope.items() if key != "type"}
        for kind, rope in own.rope_parameters.items()
    }
    assert (found.heads, found.kv_heads, found.head_dim) == (8, 4, 256)
    assert (found.vocabulary, found.layer_types) == (own.vocab_size, tuple(own.layer_types))
    assert found.tied_embeddings and found.sliding_window == own.sliding_window == 1024


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(text_config=dict(TEXT, model_type="ministral3")), "'ministral3' can't .*llama_4_sca"),
        (dict(quantization_config={"bits": 4}), "quantization_config is set"),
    ],
)
def test_texts_that_can_not_be_read_are_refused_by_name(whole, tmp_path, keys, message):
    kind, source, _ = whole
    if WRAPPERS[kind].own:
        pytest.skip("its text is of one family")
    out = shutil.copytree(source, tmp_path / "odd")
    changed_config(out, lambda config: config | keys)
    with pytest.raises(UnsupportedModelError, match=message):
        open_dense(out)
