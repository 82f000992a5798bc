"""What is told of a new checkpoint, and the one that it is made of."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from branches import (
    LAYERS,
    NAMES,
    edit_config,
    edit_tensors,
    make_parts,
    stock,
    tensors_of,
    upcycle,
)
from conftest import save_branch
from safetensors.torch import save_file

from nexus_ds.checkpoint.families.record import FFN_PARTS, dense_ffn_name
from nexus_ds.checkpoint.headers import sha256_of_tensors
from nexus_ds.checkpoint.qwen2_moe import expert_name
from nexus_ds.checkpoint.records import ExpertRecord, FitReport
from nexus_ds.checkpoint.sidecar import (
    ROUTER,
    ROUTER_BEFORE,
    read_sidecar,
    verify_expert_embeddings,
)
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.config import load_config
from nexus_ds.errors import CheckpointError
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.new_checkpoint import NewModel, open_old
from nexus_ds.upcycling.remove import reduced
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.verification import verify, verify_sources
from tests.checkpoint.test_dense import embeddings


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def test_experts_of_another_dtype_are_cast_to_the_seeds_and_named(parts):
    for name in ("seed", "beta"):
        tensors = {n: t.bfloat16() for n, t in tensors_of(parts / name).items()}
        save_file(tensors, parts / name / "model.safetensors", metadata={"format": "pt"})
    new = upcycle(parts)
    said = new.describe(parts / "out", None)
    assert (
        f"expert alpha: weights cast from float32 to bfloat16, the dtype of {parts / 'seed'}"
        in said
    )
    assert "expert gamma: weights cast" in said and "expert beta: weights" not in said
    out, experts = tensors_of(parts / "out"), {name: tensors_of(parts / name) for name in NAMES}
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    for index, name in enumerate(NAMES):
        for part in FFN_PARTS:
            assert torch.equal(
                out[expert_name(1, index, part)], experts[name][dense_ffn_name(1, part)].bfloat16()
            )
        reader = TensorReader(parts / name)
        ffn = [dense_ffn_name(layer, part) for layer in range(LAYERS) for part in FFN_PARTS]
        # of what was given
        assert read_sidecar(parts / "out").experts[index].sha256 == sha256_of_tensors(reader, ffn)
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = sum(expert[name].double() for expert in experts.values()) / 3
    assert ((out[name].double() - mean).abs() <= mean.abs() * (2**-8 + 1e-6)).all()
    verify_expert_embeddings(parts / "out")
    assert torch.isfinite(stock(parts / "out")(torch.arange(5)[None]).logits).all()
    assert new.summary(parts / "out", None)["cast"] == {"alpha": "float32", "gamma": "float32"}


def test_a_mixture_in_fp16_is_one_through_all_that_is_made_of_it(parts):
    """Copies stay the bytes that they were, whoever saved the constant gate as the zero of fp16."""
    for name in ("seed", *NAMES):
        stock(parts / name).half().save_pretrained(parts / name)
    upcycle(parts)
    edit_tensors(
        parts / "out", lambda t: t.update({n: x.half() for n, x in t.items() if "_gate" in n})
    )
    config, source = load_config("demo", []), parts / "out"
    delta, beta = ({name: parts / "alpha"} for name in ("delta", "beta"))
    made = {
        "extended": lambda: extended(source, delta, embeddings(["delta"]), config),
        "replaced": lambda: replaced(source, beta, embeddings(["beta"]), config),
        "removed": lambda: reduced(source, ["beta"]),
    }
    alpha = tensors_of(parts / "alpha")
    for name, make in made.items():
        new = make()
        with new_directory(parts / name) as directory:
            new.write(directory, None, config.router, 0)
        assert new.summary(parts / name, None)["dtype"] == "float16"
        out = tensors_of(parts / name)
        kinds = {"gate" if "shared_expert_gate" in n else "": x.dtype for n, x in out.items()}
        assert kinds == {"": torch.float16, "gate": torch.float32}
        for part in FFN_PARTS:
            first = out[expert_name(1, 0, part)]
            assert torch.equal(first, alpha[dense_ffn_name(1, part)])
        assert not verify(parts / name).problems
        assert not verify_sources(parts / name, {}).problems
        assert torch.isfinite(stock(parts / name).half()(torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize(("long", "said"), [([2.0] * 4, True), ([1.5] * 4, False)])
def test_a_rope_that_changes_with_the_length_is_told_of(parts, long, said):
    rope = dict(rope_type="longrope", short_factor=[1.5] * 4, long_factor=long)
    for name in ("seed", *NAMES):
        edit_config(parts / name, rope_parameters=rope, original_max_position_embeddings=16)
    new = upcycle(parts)
    line = "note: generation beyond 16 tokens is right with use_cache=False alone: a cache keeps"
    assert (line in new.describe(parts / "out", None)) is said
    assert new.summary(parts / "out", None)["cached_positions"] == (16 if said else None)


def test_a_warm_start_is_described_with_the_domains_that_p_hardly_knows(parts):
    new = upcycle(parts)
    report = FitReport(0.25, 0.75, 12, "label_fit", {"alpha": 0.39, "beta": 0.41})
    lines = new.describe(Path("out"), report).splitlines()
    assert lines[1] == (
        "label fit, 12 steps: share of tokens at their own domain's expert 0.25 -> 0.75"
    )
    assert lines[2].endswith("0.39: P has seen nothing like it, its row may not find its text")
    assert lines[3].endswith("0.41")


def test_the_domain_of_an_expert_is_its_cards_and_not_its_name():
    experts = [ExpertRecord("a", "law", "", ""), ExpertRecord("b", "b", "", "")]
    model = SimpleNamespace(sidecar=SimpleNamespace(experts=experts))
    assert NewModel.domains_of(model, ["a"]) == ["law"]


def test_an_old_mixture_is_the_same_with_another_number_of_experts(nexus_dir):
    mixture = open_old(nexus_dir)
    stored = json.loads((nexus_dir / "config.json").read_text())
    target = mixture.target(7)
    assert mixture.dtype == "F32" and target["num_experts"] == 7
    kept = {key for key in stored if key not in ("num_experts", "dtype", "rope_parameters")}
    assert {key: target[key] for key in kept} == {key: stored[key] for key in kept}


def test_a_dense_model_is_no_old_mixture(dense_dir):
    with pytest.raises(CheckpointError, match="model_type is 'llama', a Nexus checkpoint has"):
        open_old(dense_dir)


def as_first_written(directory):
    """Give a checkpoint the form of the first ones: RoPE in one spelling, embeddings once, and the
    router's file beside the model's."""
    config = json.loads((directory / "config.json").read_text())
    kept = {key: v for key, v in config.items() if key not in ("rope_theta", "rope_scaling")}
    (directory / "config.json").write_text(json.dumps(kept))
    tensors = tensors_of(directory)
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.move(directory / ROUTER, directory / ROUTER_BEFORE)
    (directory / ROUTER).parent.rmdir()


@pytest.mark.parametrize("verb", ["extend", "replace", "remove"])
def test_a_checkpoint_of_the_first_form_becomes_one_of_todays(tmp_path, nexus_dir, verb):
    old = shutil.copytree(nexus_dir, tmp_path / "old")
    as_first_written(old)
    save_branch(old, tmp_path / "branch")
    config = load_config("demo", [])
    results = []
    for source in (old, nexus_dir):
        if verb == "remove":
            new = reduced(source, ["beta"])
        else:
            name = "delta" if verb == "extend" else "beta"
            make = extended if verb == "extend" else replaced
            given = embeddings([name])
            new = make(source, {name: tmp_path / "branch"}, given, config)
        out = tmp_path / f"out of {source.name}"
        out.mkdir()
        new.write(out, None, config.router, 0)
        results.append(out)
    first, second = map(tensors_of, results)
    assert first.keys() == second.keys() and "lm_head.weight" in first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (results[0] / ROUTER).read_bytes() == (results[1] / ROUTER).read_bytes()
    assert not (results[0] / ROUTER_BEFORE).exists()
    said = json.loads((results[0] / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"]
