"""A checkpoint against what it was made of: upcycled, extended, replaced; each kind of damage."""

import json
import shutil

import pytest
import torch
from branches import NAMES, edit_tensors, embed, grow, make_parts, upcycle
from conftest import train_shared_gates

from nexus_ds.checkpoint.adapters import open_branch
from nexus_ds.checkpoint.cards import Packages, ffn_sha256
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.qwen2_moe import expert_name, gate_name, shared_name
from nexus_ds.checkpoint.records import OtherStep, TrainStep
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import DTYPES
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import ConfigError
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.compatible import Waived
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.verification import verify, verify_sources
from tests.checkpoint.test_adapters import FFN, save_adapter


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A seed, three branches, domain embeddings and a recipe."""
    return make_parts(tmp_path, dense_dir, text_folder)


def save_in(parts, dtype):
    for name in ("seed", *NAMES):

        def cast(tensors):
            tensors.update({key: t.to(DTYPES[dtype]) for key, t in tensors.items()})

        edit_tensors(parts / name, cast)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_an_upcycled_checkpoint_is_sound(parts, dtype):
    save_in(parts, dtype)
    upcycle(parts)
    found = verify(parts / "out")
    assert not found.problems and not found.notes and len(found.checked) == 4
    found = verify_sources(parts / "out", {})
    assert not found.problems
    assert found.checked == [
        "24 tensors that are copies, byte by byte",
        f"{2 * 6 + 2} averages, computed again",
    ]


def test_the_last_place_of_small_numbers_in_fp16_is_no_damage(parts):
    """0.7 and 0.3 of a few times 2^-24 often lie midway between two numbers of fp16."""
    save_in(parts, "F16")
    name = "model.layers.1.self_attn.k_proj.weight"

    def fill(tensors, seed):
        draws = torch.Generator().manual_seed(seed)
        steps = torch.randint(-60, 60, tensors[name].shape, generator=draws)
        tensors[name] = (steps * 2.0**-24).half()

    for model in ("seed", *NAMES):
        edit_tensors(parts / model, lambda tensors: fill(tensors, 0))
    upcycle(parts)
    edit_tensors(parts / "alpha", lambda tensors: fill(tensors, 1))
    embed(parts / "more.safetensors", ("delta",), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    config = load_config(str(parts / "recipe.yaml"))
    new = extended(parts / "out", {"delta": parts / "alpha"}, embeddings, config, share=0.3)
    with new_directory(parts / "wider") as directory:
        new.write(directory, None, config.router, 0)
    assert not verify_sources(parts / "wider", {}).problems


def test_rows_of_an_aligned_vocabulary_are_compared_with_the_models_that_gave_them(parts):
    """alpha has a token in what is padding to gamma; alone they would be no average of all."""
    grow(parts / "alpha", ["<new>"], rows=40)
    grow(parts / "gamma", [], rows=40)
    upcycle(parts, waived=Waived(vocabulary=True))
    [step] = read_sidecar(parts / "out").lineage
    assert step.aligned == {"31:32": ["alpha"], "32:40": ["alpha", "gamma"]}
    assert not verify(parts / "out").problems
    assert not verify_sources(parts / "out", {}).problems

    def edit(tensors):
        # The head repeats them.
        for name in (EMBEDDING, HEAD):
            tensors[name][[31, 39]] += 0.01

    edit_tensors(parts / "out", edit)
    [problem] = verify_sources(parts / "out", {}).problems
    assert problem.startswith(f"{EMBEDDING} is not the average of its sources: 32 values")


def test_rows_of_a_seed_that_is_kept_are_compared_with_it(parts):
    grow(parts / "alpha", ["<new>"])
    upcycle(parts, "model.merge=seed", waived=Waived(vocabulary=True))
    [step] = read_sidecar(parts / "out").lineage
    assert step.aligned == {"0:31": ["the seed"], "31:32": ["alpha"]}
    assert not verify_sources(parts / "out", {}).problems

    def edit(tensors):
        # The head repeats them.
        for name in (EMBEDDING, HEAD):
            tensors[name][[3, 31]] += 0.01

    edit_tensors(parts / "out", edit)
    [problem] = verify_sources(parts / "out", {}).problems
    assert problem.startswith(f"{EMBEDDING} is not the bytes of its source: 32 values")


@pytest.mark.parametrize("name", ["seed", "checkpoint", "base"])
def test_an_expert_may_be_called_as_what_it_is_put_beside(name, parts):
    """Its FFNs, and rows that it alone has, are not taken for the seed's or the checkpoint's."""
    go = "model.task_scale=2.0"
    embed(parts / "domains.safetensors", (name, *NAMES), "gone", seed=3)
    upcycle(parts, go, experts={name: parts / "gamma", "beta": parts / "beta"})
    assert not verify_sources(parts / "out", {}).problems
    shutil.rmtree(parts / "out")
    upcycle(parts)
    grow(parts / "alpha", ["<new>"])
    with new_directory(parts / "wider") as directory:
        extended(
            parts / "out",
            {name: parts / "alpha"},
            read_domain_embeddings(parts / "domains.safetensors"),
            load_config(str(parts / "recipe.yaml")),
            share=0.5,
            waived=Waived(vocabulary=True),
        ).write(directory, None, load_config("demo").router, 0)
    assert read_sidecar(parts / "wider").lineage[-1].aligned == {"31:32": [name]}
    assert not verify_sources(parts / "wider", {}).problems


@pytest.mark.parametrize("old", ["checkpoint", "the checkpoint"])
def test_rows_of_the_extended_checkpoint_are_known_by_either_word(old, parts):
    grow(parts / "gamma", ["<new>"], rows=40)
    upcycle(parts, waived=Waived(vocabulary=True))
    embed(parts / "more.safetensors", ("delta",), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    config = load_config(str(parts / "recipe.yaml"))
    waived = Waived(vocabulary=True)
    new = extended(parts / "out", {"delta": parts / "alpha"}, embeddings, config, waived=waived)
    with new_directory(parts / "wider") as directory:
        new.write(directory, None, config.router, 0)
    path = parts / "wider" / "nexus.json"
    assert path.read_text().count('"the checkpoint"') == 1
    path.write_text(path.read_text().replace('"the checkpoint"', f'"{old}"'))
    assert not verify_sources(parts / "wider", {}).problems


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_extension_whose_vocabulary_grew_is_sound(parts, share):
    upcycle(parts)
    grow(parts / "alpha", ["<new>"])
    embed(parts / "more.safetensors", ("delta",), "gone", seed=3)
    config = load_config(str(parts / "recipe.yaml"))
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    new = extended(
        parts / "out",
        {"delta": parts / "alpha"},
        embeddings,
        config,
        share=share,
        waived=Waived(vocabulary=True),
    )
    with new_directory(parts / "wider") as directory:
        new.write(directory, None, config.router, 0)
    assert read_sidecar(parts / "wider").lineage[-1].aligned == {"31:32": ["delta"]}
    assert not verify_sources(parts / "wider", {}).problems


@pytest.mark.parametrize(
    "aligned",
    [
        {"30:99": ["alpha"]},
        {"-1:3": ["alpha"]},
        {"3:3": ["alpha"]},
        {"a": ["alpha"]},
        {"0:3": ["delta"]},
        {"0:3": []},
        {"0:9": ["alpha"], "8:12": ["beta"]},
    ],
)
def test_a_record_of_rows_that_are_not_there_is_refused(parts, aligned):
    upcycle(parts)
    path = parts / "out" / "nexus.json"
    value = json.loads(path.read_text())
    value["lineage"][-1]["aligned"] = aligned
    path.write_text(json.dumps(value))
    [problem] = verify_sources(parts / "out", {}).problems
    assert "under 'aligned' are none of embeddings of 31 rows out of alpha, beta, gamma" in problem


@pytest.mark.parametrize("replace", [False, True])
def test_an_extended_checkpoint_is_sound(parts, replace):
    upcycle(parts)
    config = load_config(str(parts / "recipe.yaml"))
    embed(parts / "more.safetensors", ("delta", "beta"), "gone", seed=3)
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    experts = {"beta" if replace else "delta": parts / "alpha"}
    make = replaced if replace else extended
    with new_directory(parts / "wider") as directory:
        make(parts / "out", experts, embeddings, config).write(directory, None, config.router, 0)
    assert not verify(parts / "wider").problems
    assert not verify_sources(parts / "wider", {}).problems
    edit_tensors(parts / "wider", lambda t: t[expert_name(1, 2, "up_proj")].add_(1))
    [problem] = verify_sources(parts / "wider", {}).problems
    assert problem.startswith("model.layers.1.mlp.experts.2.up_proj.weight is not the bytes of")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (expert_name(0, 1, "up_proj"), "is not the bytes of its source: 1 values differ"),
        (shared_name(1, "down_proj"), "is not the bytes of its source: 1 values differ"),
        ("model.norm.weight", "is not the average of its sources: 1 values differ"),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_changed_value_is_named_by_tensor(parts, name, said, dtype):
    if dtype == "BF16":
        save_in(parts, "BF16")
    upcycle(parts)
    edit_tensors(parts / "out", lambda t: t[name].view(-1)[:1].mul_(1.05))
    assert verify(parts / "out").problems == [f"1 tensors were changed: {name}"]
    [problem] = verify_sources(parts / "out", {}).problems
    assert problem.startswith(f"{name} {said}")


def test_rows_and_gates_without_any_hashes(parts):
    """What a foreign tool leaves: peft's merged gates, rows of another training."""
    upcycle(parts)
    write_sidecar(parts / "out", read_sidecar(parts / "out"))
    train_shared_gates(parts / "out")
    edit_tensors(parts / "out", lambda t: t[gate_name(1)][:1].add_(0.3))
    found = verify(parts / "out")
    assert found.notes == ["nexus.json has no hashes: it was written by an older version"]
    gates, rows = found.problems
    assert "the shared expert's gate has weights" in rows + gates
    assert "layer 1: the router's rows differ from P(D) by" in rows + gates


def test_a_missing_tensor(parts):
    upcycle(parts)
    edit_tensors(parts / "out", lambda t: t.pop("model.norm.weight"))
    hashes, names = verify(parts / "out").problems
    assert hashes == "1 tensors are missing: model.norm.weight"
    assert "1 missing: model.norm.weight" in names


def test_a_linear_router(parts):
    upcycle(parts, "router.kind=linear")
    found = verify(parts / "out")
    assert not found.problems and "a linear router has free rows" in found.notes[0]
    assert not verify_sources(parts / "out", {}).problems


def test_no_shared_expert(parts):
    upcycle(parts, "model.shared_expert=none")
    assert not verify_sources(parts / "out", {}).problems


def test_sources_that_are_gone_or_others(parts):
    upcycle(parts)
    (parts / "moved").mkdir()
    shutil.move(parts / "seed", parts / "moved" / "seed")
    edit_tensors(parts / "beta", lambda t: t["model.layers.0.mlp.up_proj.weight"].add_(1))
    first, second = verify_sources(parts / "out", {}).problems
    assert "expert beta: " in first and "it is another model, or was trained since" in first
    assert "the source of seed is not at seed: give it with --sources seed=DIR" in second
    where = {"seed": parts / "moved" / "seed", "beta": parts / "alpha"}
    [problem] = verify_sources(parts / "out", where).problems
    assert f"expert beta: {parts / 'alpha'} has feed-forward networks of sha256" in problem
    with pytest.raises(ConfigError, match="--sources delta: expected one of alpha, beta, gamma"):
        verify_sources(parts / "out", {"delta": parts / "alpha"})


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (TrainStep(stage="moe", steps=1, tokens=2, mixture={}), "trained since"),
        (OtherStep(verb="distil", written={"verb": "distil"}), r"its last step (distil) put no"),
    ],
)
def test_steps_that_leave_no_sources(parts, step, said):
    upcycle(parts)
    sidecar = read_sidecar(parts / "out")
    sidecar.lineage.append(step)
    write_sidecar(parts / "out", sidecar)
    found = verify_sources(parts / "out", {})
    assert said in found.notes[0] and not found.problems and not found.checked


def test_zero_in_an_average_is_no_excuse(parts):
    upcycle(parts)
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(parts / "out", lambda t: t[name].copy_(torch.zeros_like(t[name])))
    [problem] = verify_sources(parts / "out", {}).problems
    assert problem.startswith(f"{name} is not the average of its sources: 256 values")


def test_an_adapter_that_was_merged_into_the_seed_is_found_there(parts):
    """By the seed's name, as upcycle does; what helps elsewhere is said in this verb's words."""
    settings = {"base_model_name_or_path": "meta/seed"}
    save_adapter(parts / "law", parts / "seed", FFN, settings)
    upcycle(parts, experts={"alpha": parts / "law", "beta": parts / "beta"})
    assert not verify_sources(parts / "out", {}).problems
    shutil.move(parts / "seed", parts / "moved")
    problems = verify_sources(parts / "out", {"seed": parts / "moved"}).problems
    assert len(problems) == 1 and "give --sources base=DIR, the model that it is to" in problems[0]
    moved = {"seed": parts / "moved", "base": parts / "moved"}
    assert not verify_sources(parts / "out", moved).problems
    [problem] = verify_sources(parts / "out", {**moved, "base": parts / "beta"}).problems
    assert "or its adapter was merged into another base: give that with --sources base" in problem
    first, second = verify_sources(parts / "out", {}).problems
    assert "is no directory here: give --sources base=DIR" in first
    assert "the source of seed is not at seed: give it with --sources seed=DIR" in second


@pytest.mark.parametrize("named", ["meta/seed", "gamma"])
@pytest.mark.parametrize("replace", [False, True])
def test_where_the_seed_is_given_an_adapter_keeps_the_base_that_it_names(parts, named, replace):
    upcycle(parts, "model.task_scale=2")
    embed(parts / "more.safetensors", ("delta", "beta"), "gone", seed=3)
    base = parts / "gamma" if named == "gamma" else parts / "seed"
    at = str(base) if named == "gamma" else named
    save_adapter(parts / "law", base, FFN, {"base_model_name_or_path": at})
    new = (replaced if replace else extended)(
        parts / "out",
        {"beta" if replace else "delta": parts / "law"},
        read_domain_embeddings(parts / "more.safetensors"),
        load_config(str(parts / "recipe.yaml")),
        packages=Packages(base=parts / "seed"),
    )
    with new_directory(parts / "wider") as directory:
        new.write(directory, None, load_config("demo").router, 0)
    [hash_of_law] = [e.sha256 for e in read_sidecar(parts / "wider").experts if e.source == "law"]
    assert hash_of_law == ffn_sha256(open_branch(parts / "law", base))
    assert not verify_sources(parts / "wider", {}).problems
