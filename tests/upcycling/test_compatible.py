"""What is found before models are put together: all of it, with what to do about it."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from branches import (
    NAMES,
    edit_config,
    edit_tensors,
    left_over,
    make_parts,
    stock,
    tensors_of,
    upcycle,
)
from conftest import of_another_origin
from safetensors.torch import save_file

from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.values import SAMPLE_VALUES, SAMPLES
from nexus_ds.errors import CheckpointError, IncompatibleModelsError
from nexus_ds.upcycling import compatible


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def test_all_differences_stand_in_one_table(parts):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(parts / "beta")
    other = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(other).to(torch.bfloat16).save_pretrained(parts / "beta")
    edit_config(parts / "gamma", model_type="mistral", sliding_window=8)
    with pytest.raises(IncompatibleModelsError) as caught:
        upcycle(parts)
    message = str(caught.value)
    header = next(i for i, line in enumerate(message.splitlines()) if line.startswith("  "))
    lines = {line.split()[0]: line.split()[1:] for line in message.splitlines()[header + 1 :]}
    assert message.splitlines()[header].split() == ["seed", *NAMES]
    assert lines["hidden_size"] == ["16", "16", "12", "16"] and "dtype" not in lines
    assert lines["rope.rope_theta"] == ["10000.0", "10000.0", "500000.0", "10000.0"]
    assert lines["rope.factor"] == ["-", "-", "2.0", "-"] and lines["rope.rope_type"][2] == "linear"
    assert lines["family"] == ["llama", "llama", "llama", "mistral"]
    assert lines["sliding_window"] == ["None", "None", "None", "8"]
    wanted = [
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn_size",
        "vocabulary",
        "norm_eps",
        "tied_embeddings",
    ]
    assert set(wanted) <= set(lines) and "qkv_bias" not in lines
    assert not left_over(parts)


def test_branches_of_another_origin_are_named(parts):
    """Of the seed's sizes and tokenizer, but of another random start: their average with the others
    is noise."""
    of_another_origin(parts / "beta")
    with pytest.raises(IncompatibleModelsError) as caught:
        upcycle(parts)
    said = str(caught.value)
    assert (
        f"unrelated to those of the seed {parts / 'seed'}: expert beta ({parts / 'beta'}): cosine "
        in said
    )
    assert (
        "alpha" not in said.replace(str(parts), "")
        and "give branches that were trained from that model" in said
    )
    assert abs(float(re.search(r"cosine (-?\d\.\d\d)", said)[1])) < 0.1
    assert not left_over(parts)


def test_a_seed_of_another_origin_is_unrelated_to_all(parts):
    of_another_origin(parts / "seed")
    with pytest.raises(
        IncompatibleModelsError,
        match=r"expert alpha .*expert beta .*expert gamma .*the one that these",
    ):
        upcycle(parts)


def test_every_setting_has_a_remedy(parts):
    from nexus_ds.checkpoint.dense import open_dense

    assert set(compatible.REMEDIES) == set(compatible.traits(open_dense(parts / "seed")))


def test_numbers_that_a_class_computes_with_have_to_agree():
    config = dict(model_type="gemma2", hidden_size=32, intermediate_size=40, vocab_size=31)
    config |= dict(num_hidden_layers=2, num_attention_heads=4)
    models = {
        name: vars(settings(config | dict(final_logit_softcapping=cap)))
        for name, cap in (("a", 30.0), ("b", None))
    }
    said = "factors.final_logit_softcapping +30.0 +None\n.*train with the seed's numbers"
    with pytest.raises(IncompatibleModelsError, match=re.compile(said, re.DOTALL)):
        compatible.check_alike(models)
    compatible.check_alike({"a": models["a"], "b": models["a"]})


def test_remedies_stand_below_the_table(parts):
    edit_config(parts / "beta", rms_norm_eps=1e-3, tie_word_embeddings=True, rope_theta=5.0)
    edit_config(parts / "beta", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(IncompatibleModelsError) as caught:
        upcycle(parts)
    said = str(caught.value)
    assert "\nrope.rope_theta: train with the seed's RoPE; where only config.json" in said
    assert "\nnorm_eps: rms_norm_eps changes what is computed" in said and "heads:" not in said


def test_all_mistakes_of_all_models_are_told_at_once(parts, capsys):
    """Of settings, weights, tokenizers, files, origin, options and domains."""
    edit_config(parts / "alpha", rms_norm_eps=1e-3)
    of_another_origin(parts / "alpha")
    (parts / "alpha" / "tokenizer.json").unlink()
    edit_tensors(
        parts / "beta",
        lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[:3].fill_(torch.nan),
    )
    edit_tensors(parts / "beta", lambda t: t["model.layers.0.self_attn.v_proj.weight"].zero_())
    edit_tensors(parts / "gamma", lambda t: t.pop("model.norm.weight"))
    (parts / "seed" / "generation_config.json").write_text('{"custom_generate": "x"}')
    experts = {name: parts / name for name in NAMES} | {"delta": parts / "gone"}
    with pytest.raises(Exception) as caught:
        upcycle(parts, "router.top_k=9", experts=experts)
    said = str(caught.value)
    for expected in (
        "no embedding of the domain 'delta'",
        "router.top_k is 9, but there are 4 experts",
        f"{parts / 'gone'} is not a directory",
        "1 missing: model.norm.weight",
        "norm_eps  ",
        "unrelated to those of the seed",
        "tensor model.layers.0.self_attn.v_proj.weight has only zeros; "
        "tensor model.layers.1.mlp.up_proj.weight has 3 values that are NaN or infinite",
        "generation_config.json: custom_generate",
        "alpha: no tokenizer that can be loaded",
    ):
        assert expected in said, expected
    assert said.startswith("9 things to mend; nothing was written:\n1. ")
    assert not left_over(parts)


def test_unrelated_branches_are_averaged_where_that_is_wanted(parts, capsys):
    of_another_origin(parts / "beta")
    upcycle(parts, waived=compatible.Waived(unrelated=True))
    assert "note: weights that are unrelated to those of the seed" in capsys.readouterr().err
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(tensors_of(parts / branch)[name] for branch in NAMES) / 3
    torch.testing.assert_close(tensors_of(parts / "out")[name], mean)


def test_what_differs_without_harm_is_a_note(parts, capsys):
    edit_config(parts / "beta", max_position_embeddings=32)
    upcycle(parts)
    said = capsys.readouterr().err
    assert "note: expert beta: max_position_embeddings is 32, the new checkpoint has 64" in said


def test_a_branch_whose_ffns_are_the_seeds_is_told_of(parts, capsys):
    """As an adapter on the attention leaves them. The seed as an expert is meant so."""
    shutil.copy(parts / "seed" / "model.safetensors", parts / "beta" / "model.safetensors")
    edit_tensors(parts / "beta", lambda t: t["model.layers.0.self_attn.q_proj.weight"].mul_(1.1))
    experts = {"alpha": parts / "alpha", "beta": parts / "beta", "gamma": parts / "seed"}
    upcycle(parts, experts=experts)
    said = capsys.readouterr().err
    assert "note: expert beta" in said and said.count("its feed-forward networks are the seed") == 1
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(parts / "beta", lambda t: t[name].mul_(1.1))
    shutil.rmtree(parts / "out")
    upcycle(parts, experts=experts)
    assert "feed-forward networks are" not in capsys.readouterr().err


def test_a_head_beside_tied_embeddings_is_carried_with_a_word(parts, capsys):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    for name in ("seed", *NAMES):
        edit_tensors(parts / name, add_head)
    upcycle(parts)
    said = capsys.readouterr().err
    assert "note: expert beta: config.json ties the embeddings, but" in said
    assert "has a head of its own: it is taken, as transformers does" in said
    model = stock(parts / "out")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_one_that_is_tied_and_one_that_is_not_are_refused(parts):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    edit_tensors(parts / "beta", add_head)
    with pytest.raises(
        IncompatibleModelsError, match=r"tied_embeddings .*(\n.*)*lm_head.weight\), or"
    ):
        upcycle(parts)


def test_damage_outside_of_the_sample_is_counted_once_some_is_inside(tmp_path):
    count = 10 * SAMPLES * SAMPLE_VALUES
    x = torch.ones(count)
    x[0] = x[SAMPLE_VALUES + 1] = torch.inf
    zeros = torch.zeros(count)
    zeros[SAMPLE_VALUES + 1] = 1
    tensors = {"x.weight": x, "late.weight": zeros, "ids": torch.arange(3)}
    tensors |= {"zero.bias": torch.zeros(3), "zero.weight": torch.zeros(count)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = Headers(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"^model m .*: tensor x.weight has 2 values that are NaN or infinite; "
        r"tensor zero.weight has only zeros; expected finite",
    ):
        compatible.check_sample("model m", reader, list(tensors))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(parts, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(compatible.shutil, "disk_usage", disk_usage)
    size = (parts / "seed" / "model.safetensors").stat().st_size
    with pytest.raises(
        CheckpointError, match=r"not enough space: need [\d,]+ bytes, free 1,000"
    ) as caught:
        upcycle(parts, out=parts / "a" / "b" / "out")
    assert asked == [parts] and not left_over(parts)
    assert int(re.search(r"need ([\d,]+)", str(caught.value))[1].replace(",", "")) > size
