"""What another program has trained computes the same as a Nexus checkpoint, bit for bit, or is
refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from branches import edit_config, edit_tensors, stock
from conftest import make_linear, make_nexus, of_another_origin, save_branch
from safetensors.torch import load_file

import nexus_ds.hf  # noqa: F401  makes transformers load routers that read running means
from nexus_ds.__main__ import main
from nexus_ds.checkpoint.hashes import differences, recorded
from nexus_ds.checkpoint.qwen2_moe import open_moe
from nexus_ds.checkpoint.records import AdoptStep
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.config import load_config
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, IncompatibleModelsError, UnsupportedModelError
from nexus_ds.settings import RouterConfig
from nexus_ds.upcycling.adopt import adopted
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.verification import verify
from tests.checkpoint import test_native, test_qwen3_5, test_qwen3_next

TOKENS = torch.arange(60).remainder(29).view(3, 20)


def trained(nexus, out, frozen=("shared_expert_gate",), dtype=torch.float32, steps=3):
    """Train a mixture as stock transformers has it, balancing loss on, and save it."""
    model = stock(nexus).to(dtype).train()
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.01
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return out


def adopt(directory, nexus, out, **options):
    found = adopted(directory, nexus, **options)
    out.mkdir()
    found.model.write(out, None, RouterConfig(), 0)
    return found


def logits(directory):
    with torch.no_grad():
        return stock(directory)(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def tuned_dir(tmp_path_factory, nexus_dir):
    return trained(nexus_dir, tmp_path_factory.mktemp("tuned") / "tuned")


def test_the_weights_stay_as_they_were_trained_and_p_gives_the_rows(tmp_path, nexus_dir, tuned_dir):
    found = adopt(tuned_dir, nexus_dir, tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (tuned_dir, tmp_path / "out"))
    # tied embeddings are written as the output layer too, as in every checkpoint
    assert after.keys() == before.keys() | {"lm_head.weight"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(tmp_path / "out"), logits(tuned_dir))
    start = load_file(nexus_dir / "model.safetensors")
    for layer, report in enumerate(found.layers):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert not torch.equal(start[gate], before[gate])
        assert report.rows == "kept" and report.row_error < 1e-6
        assert 0 < report.moved < 1 and report.gate == 0
    verify_expert_embeddings(tmp_path / "out")
    found = verify(tmp_path / "out")
    assert not found.problems
    assert not differences(tmp_path / "out", recorded(tmp_path / "out")).problems


def test_what_is_known_of_it_is_that_of_the_first_with_one_step_more(
    tmp_path, nexus_dir, tuned_dir
):
    found = adopt(tuned_dir, nexus_dir, tmp_path / "out")
    before, after = read_sidecar(nexus_dir), read_sidecar(tmp_path / "out")
    assert after.experts == before.experts and after.encoder == before.encoder
    assert np.array_equal(after.vectors, before.vectors)
    assert np.array_equal(after.centre, before.centre)
    assert after.lineage[:-1] == before.lineage
    errors = [layer.row_error for layer in found.layers]
    expected = AdoptStep(checkpoint="nexus", trained="tuned", row_error=errors, approximate=False)
    assert after.lineage[-1] == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    start = json.loads((nexus_dir / "config.json").read_text())
    # the balancing loss was for the training, not for who serves it
    assert {key: config[key] for key in start} == start
    assert (tmp_path / "out" / "tokenizer.json").is_file(), "of the first, as none was saved"


def test_it_can_be_extended_again(tmp_path, nexus_dir, tuned_dir):
    adopt(tuned_dir, nexus_dir, tmp_path / "out")
    new = save_branch(tmp_path / "out", tmp_path / "delta")
    vectors = torch.randn(1, 8, generator=torch.Generator().manual_seed(9)).numpy()
    embeddings = DomainEmbeddings(
        ["delta"], vectors, "tiny", "1" * 64, 16, 4, {"delta": 5}, 0, "data"
    )
    config = load_config("demo", ["stage=extend"])
    wider = extended(tmp_path / "out", {"delta": new}, embeddings, config)
    (tmp_path / "wider").mkdir()
    wider.write(tmp_path / "wider", None, config.router, 0)
    rows = [load_file(tmp_path / d / "model.safetensors") for d in ("out", "wider")]
    for layer in range(2):
        old, new = (of[f"model.layers.{layer}.mlp.gate.weight"] for of in rows)
        assert torch.equal(new[:3], old) and len(new) == 4


def test_a_frozen_router_keeps_every_bit_of_p(tmp_path, nexus_dir):
    tuned = trained(nexus_dir, tmp_path / "tuned", ("shared_expert_gate", "mlp.gate."))
    adopt(tuned, nexus_dir, tmp_path / "out")
    before, after = read_sidecar(nexus_dir), read_sidecar(tmp_path / "out")
    for old, new in zip(before.projections, after.projections, strict=True):
        assert all(np.array_equal(new[name], weight) for name, weight in old.items())


def test_other_routers_and_dtypes(tmp_path, nexus_dir, context_dir):
    linear = make_linear(tmp_path / "linear")
    for nexus, dtype in (
        (linear, torch.float32),
        (context_dir, torch.float32),
        (nexus_dir, torch.bfloat16),
    ):
        name = f"{nexus.name}-{dtype}"
        tuned = trained(nexus, tmp_path / f"{name}-tuned", dtype=dtype)
        found = adopt(tuned, nexus, tmp_path / name)
        assert {layer.rows for layer in found.layers} == {"kept"}
        assert torch.equal(logits(tmp_path / name), logits(tuned))
        assert not verify(tmp_path / name).problems
        kept = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {dtype}


def test_an_untied_head_and_new_tokens_come_along(tmp_path, nexus_dir):
    model = stock(nexus_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    adopt(tmp_path / "tuned", nexus_dir, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "tuned"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 40 and config["tie_word_embeddings"] is False


@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "lm_head")], ids=["none", "head"])
def test_a_qwen3_5_is_adopted_with_all_that_was_trained(tmp_path, dense_dir, frozen):
    """Norms and gates of the attention too: nothing of them is rescaled."""
    keys = test_qwen3_5.SIZES | test_qwen3_5.KINDS["qwen3.5-tied"]
    test_qwen3_next.mixture(tmp_path, dense_dir, "qwen3_5_text", keys, "fp32", 2)
    nexus = tmp_path / "out"
    tuned = trained(nexus, tmp_path / "tuned", ("shared_expert_gate", *frozen))
    adopt(tuned, nexus, tmp_path / "adopted")
    assert torch.equal(logits(tmp_path / "adopted"), logits(tuned))
    assert not verify(tmp_path / "adopted").problems
    config, _ = open_moe(tmp_path / "adopted")
    assert config["nexus_source"]["tie_word_embeddings"] == bool(frozen)
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    # beside a norm of zeros, to which its class adds 1
    norm = "model.layers.1.post_attention_layernorm.weight"

    def odd(tensors):
        tensors[name].fill_(1e-3)
        tensors[norm].zero_()

    edit_tensors(tuned, odd)
    with pytest.raises(CheckpointError, match="shared expert's gate was trained"):
        adopted(tuned, nexus)


@pytest.mark.parametrize("trained_too", ["nothing else", "the head"])
def test_a_qwen3_next_is_translated_by_the_norms_of_the_first(tmp_path, dense_dir, trained_too):
    keys = {**test_qwen3_next.SIZES, "tie_word_embeddings": True}
    test_qwen3_next.mixture(tmp_path, dense_dir, "qwen3", keys, "fp32", 2)
    nexus = tmp_path / "out"
    frozen = ["shared_expert_gate", "norm", "q_proj"]
    if trained_too == "nothing else":
        frozen += ["embed_tokens", "lm_head"]
    tuned = trained(nexus, tmp_path / "tuned", frozen)
    adopt(tuned, nexus, tmp_path / "adopted")
    assert torch.equal(logits(tmp_path / "adopted"), logits(tuned))
    assert not verify(tmp_path / "adopted").problems
    config, _ = open_moe(tmp_path / "adopted")
    assert config["nexus_source"]["tie_word_embeddings"] == (trained_too == "nothing else")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_proj", "the output gate in model.layers.0.self_attn.q_proj.weight is not zero"),
        ("input_layernorm", "model.layers.0.input_layernorm.weight is not that of nexus/nexus_s"),
    ],
)
def test_what_a_qwen3_next_must_keep(tmp_path, dense_dir, name, message):
    keys = {**test_qwen3_next.SIZES, "tie_word_embeddings": True}
    test_qwen3_next.mixture(tmp_path, dense_dir, "qwen3", keys, "fp32", 2)
    frozen = {"shared_expert_gate", "norm", "q_proj"} - {"norm" if "norm" in name else name}
    tuned = trained(tmp_path / "out", tmp_path / "tuned", frozen)
    out = tmp_path / "adopted"
    with pytest.raises(CheckpointError, match=message):
        adopt(tuned, tmp_path / "out", out)


# What must not move -------------------------------------------------------------------------------


def test_a_trained_gate_is_refused_and_set_back_on_request(tmp_path, nexus_dir):
    tuned = trained(nexus_dir, tmp_path / "tuned", ())
    with pytest.raises(CheckpointError) as refused:
        adopted(tuned, nexus_dir)
    for part in (
        "layer 0: the shared expert's gate was trained, its weights are up to 3.0e-02",
        "layer 1: the shared expert's gate was trained",
        "Keep shared_expert_gate frozen in the training (peft: exclude_modules)",
        "--approximate does it all the same",
    ):
        assert part in str(refused.value)
    found = adopt(tuned, nexus_dir, tmp_path / "out", approximate=True)
    assert read_sidecar(tmp_path / "out").lineage[-1].approximate
    assert all(0.01 < layer.gate < 0.5 for layer in found.layers)
    assert "shared expert's gate set back, it was within" in found.text()
    gates = load_file(tmp_path / "out" / "model.safetensors")
    assert float(gates["model.layers.0.mlp.shared_expert_gate.weight"].max()) == 2.0**-60


def test_what_a_gate_lets_through_is_within_what_is_said(tmp_path, nexus_dir):
    """Each layer's gate on the tokens, against the bound that no token can pass."""
    tuned = trained(nexus_dir, tmp_path / "tuned", (), steps=2)
    found = adopted(tuned, nexus_dir, approximate=True)
    model, seen = stock(tuned), {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.shared_expert_gate.register_forward_hook(
            lambda _, __, out, number=number: seen.setdefault(number, out.sigmoid())
        )
    with torch.no_grad():
        model(input_ids=TOKENS)
    for number, report in enumerate(found.layers):
        worst = float((seen[number] - 0.5).abs().max())
        assert 0.1 * report.gate < worst <= report.gate


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1.5e-9), (torch.bfloat16, 1e-4), (torch.float16, 1e-5)],
)
def test_a_gate_that_rounds_to_a_half_is_folded_exactly(tmp_path, nexus_dir, dtype, size):
    stock(nexus_dir).to(dtype).save_pretrained(tmp_path / "tuned")

    def nudge(tensors):
        for name in [name for name in tensors if "shared_expert_gate" in name]:
            tensors[name] = torch.full_like(tensors[name], -size)

    edit_tensors(tmp_path / "tuned", nudge)
    found = adopt(tmp_path / "tuned", nexus_dir, tmp_path / "out")
    assert all(0 < layer.gate < 2e-3 for layer in found.layers)
    with torch.no_grad():
        a, b = (
            stock(tmp_path / name).to(dtype)(input_ids=TOKENS).logits for name in ("tuned", "out")
        )
    assert torch.equal(a, b)
    assert not read_sidecar(tmp_path / "out").lineage[-1].approximate


def test_without_a_shared_expert_the_gate_does_not_matter_and_its_zeros_do(tmp_path, nexus_dir):
    nexus = shutil.copytree(nexus_dir, tmp_path / "nexus")
    sidecar = json.loads((nexus / "nexus.json").read_text()) | {"shared_expert": "none"}
    (nexus / "nexus.json").write_text(json.dumps(sidecar))

    def emptied(tensors):
        for name in [name for name in tensors if ".shared_expert." in name]:
            tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(nexus, emptied)
    tuned = trained(nexus, tmp_path / "tuned", ())
    edit_tensors(tuned, lambda tensors: [t.add_(0.1) for n, t in tensors.items() if "gate.w" in n])
    adopt(tuned, nexus, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tuned))

    def one(tensors):
        tensors["model.layers.1.mlp.shared_expert.up_proj.weight"][3, 3] = 1.0

    edit_tensors(tuned, one)
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight was trained, but the mixture has no"
    ):
        adopted(tuned, nexus)


def test_rows_that_no_p_gives(tmp_path):
    nexus = make_nexus(tmp_path / "nexus", names=[f"e{number}" for number in range(12)])
    sidecar = read_sidecar(nexus)
    # twelve experts of two domains: P gives two rows
    sidecar.vectors = np.tile(sidecar.vectors[:2], (6, 1))
    from nexus_ds.checkpoint.projection_module import expert_embeddings
    from nexus_ds.checkpoint.sidecar import write_sidecar

    write_sidecar(nexus, sidecar)

    def rows(tensors):
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.gate.weight"
            tensors[name] = expert_embeddings(sidecar, layer, torch.float32)

    edit_tensors(nexus, rows)
    tuned = trained(nexus, tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"layer 0: no P gives the trained rows: the nearest"):
        adopted(tuned, nexus)
    found = adopt(tuned, nexus, tmp_path / "out", approximate=True)
    assert {layer.rows for layer in found.layers} == {"replaced"}
    assert not verify(tmp_path / "out").problems


# Others -------------------------------------------------------------------------------------------


def test_another_checkpoint(tmp_path, nexus_dir, tuned_dir, dense_dir):
    more = make_nexus(tmp_path / "more", names=list("abcd"))
    with pytest.raises(
        CheckpointError, match=r"num_experts is 3, .*more has 4: it was not trained"
    ):
        adopted(tuned_dir, more)
    with pytest.raises(CheckpointError, match=r"model_type is 'llama', .*nexus has 'qwen2_moe'"):
        adopted(dense_dir, nexus_dir)
    with pytest.raises(CheckpointError, match=r"has no nexus.json"):
        adopted(tuned_dir, tuned_dir)
    other = shutil.copytree(tuned_dir, tmp_path / "other")
    of_another_origin(other)
    with pytest.raises(IncompatibleModelsError, match=r"unrelated to those of .*cosine 0.0"):
        adopted(other, nexus_dir)


def test_what_computes_something_else(tmp_path, nexus_dir, tuned_dir):
    other = shutil.copytree(tuned_dir, tmp_path / "other")
    edit_config(other, rms_norm_eps=1e-3)
    with pytest.raises(IncompatibleModelsError, match=r"norm_eps +1e-06 +0.001"):
        adopted(other, nexus_dir)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: {n: x.double() for n, x in t.items()},
            "weights are F64; save the model in fp32",
        ),
        (
            lambda t: {n: x.bfloat16() if "norm" in n else x for n, x in t.items()},
            "weights of several dtypes",
        ),
    ],
)
def test_dtypes_that_are_refused(tmp_path, nexus_dir, tuned_dir, edit, message):
    other = shutil.copytree(tuned_dir, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors.update(edit(tensors)))
    with pytest.raises(UnsupportedModelError, match=message):
        adopted(other, nexus_dir)


def test_an_adapter_is_to_be_merged_first(tmp_path, nexus_dir, tuned_dir):
    other = shutil.copytree(tuned_dir, tmp_path / "other")
    (other / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match=r"merge_and_unload"):
        adopted(other, nexus_dir)


# Who names the verb -------------------------------------------------------------------------------


def test_extend_and_inspect_name_the_verb(tmp_path, nexus_dir, tuned_dir, capsys):
    verb = "a mixture that was trained elsewhere becomes one by nexus-ds adopt DIR --from NEXUS"
    with_sidecar = shutil.copytree(tuned_dir, tmp_path / "with sidecar")
    shutil.copytree(nexus_dir / "nexus", with_sidecar / "nexus")
    shutil.copy(nexus_dir / "nexus.json", with_sidecar)
    for directory in (tuned_dir, with_sidecar):
        words = ["--checkpoint", str(directory), "--expert", f"d={tmp_path}", "--domains", "none"]
        with pytest.raises(CheckpointError, match=verb):
            extended(directory, {"d": tmp_path}, None, load_config("demo", ["stage=extend"]))
        assert words and main(["inspect", str(directory)]) == 0
        assert verb in capsys.readouterr().out
    assert main(["verify", str(with_sidecar)]) == 1
    assert verb in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["olmo-2", "olmo-3", "smollm3", "glm-4-0414"])
def test_a_native_form_comes_back_as_it_was_trained(tmp_path, dense_dir, kind):
    family, keys, _ = test_native.KINDS[kind]
    test_native.mixture(tmp_path, dense_dir, family, test_native.SIZES | keys, "fp32", 1)
    nexus = tmp_path / "out"
    tuned = trained(nexus, tmp_path / "tuned")
    adopt(tuned, nexus, tmp_path / "adopted")
    assert not torch.equal(logits(nexus), logits(tuned))
    assert torch.equal(logits(tmp_path / "adopted"), logits(tuned))
    assert not verify(tmp_path / "adopted").problems
    with_gate = trained(nexus, tmp_path / "gate", ())
    with pytest.raises(CheckpointError, match="layer 0: the shared expert's gate was trained"):
        adopted(with_gate, nexus)


def test_no_bound_is_claimed_where_no_norm_stands_before_the_gate(tmp_path, dense_dir):
    """What OLMo 2's gates read grows with the text: however small a gate is, it is not folded."""
    family, keys, _ = test_native.KINDS["olmo-2"]
    test_native.mixture(tmp_path, dense_dir, family, test_native.SIZES | keys, "fp32", 1)
    stock(tmp_path / "out").save_pretrained(tmp_path / "tuned")
    gate = "model.layers.0.mlp.shared_expert_gate.weight"
    edit_tensors(tmp_path / "tuned", lambda t: t[gate].fill_(1.5e-9))
    # of the norm behind attention, in whose place other families have that before the gate
    norm = "model.layers.0.post_attention_layernorm.weight"
    edit_tensors(tmp_path / "tuned", lambda t: t[norm].mul_(0.01))
    with pytest.raises(CheckpointError, match="layer 0: the shared expert's gate was trained"):
        adopted(tmp_path / "tuned", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "part"), [("gemma-2", "pre_feedforward_layernorm"), ("cohere-2", "input_layernorm")]
)
def test_a_gate_is_bound_by_the_norm_that_it_reads(tmp_path, dense_dir, kind, part):
    """Of Gemma 2 not the one behind its attention, and with the 1 that its class adds."""
    family, keys, _ = test_native.KINDS[kind]
    test_native.mixture(tmp_path, dense_dir, family, test_native.SIZES | keys, "fp32", 1)
    stock(tmp_path / "out").save_pretrained(tmp_path / "tuned")
    gate = "model.layers.0.mlp.shared_expert_gate.weight"
    norm = f"model.layers.0.{part}.weight"

    def small(tensors):
        tensors[gate].fill_(1.5e-9)
        # what it reads is all zeros then
        tensors[norm].fill_(-1.0 if family == "gemma2" else 0.0)

    edit_tensors(tmp_path / "tuned", small)
    adopted(tmp_path / "tuned", tmp_path / "out")
    edit_tensors(tmp_path / "tuned", lambda t: t[norm].add_(9.0))
    with pytest.raises(CheckpointError, match="layer 0: the shared expert's gate was trained"):
        adopted(tmp_path / "tuned", tmp_path / "out")
