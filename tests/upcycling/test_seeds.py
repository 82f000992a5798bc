"""The seed is told from its branches; what can't be told is said."""

import shutil

import pytest
from branches import branch, edit_config, edit_tensors, embed, make_parts, upcycle

from nexus_ds.checkpoint.cards import Packages, ffn_sha256
from nexus_ds.checkpoint.dense import open_dense
from nexus_ds.checkpoint.records import UpcycleStep
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.config import load_config
from nexus_ds.data.domains import read_domain_embeddings
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.extend import extended
from nexus_ds.upcycling.replace import replaced
from nexus_ds.upcycling.seeds import check_seed
from nexus_ds.upcycling.verification import verify_sources


@pytest.fixture
def parts(tmp_path, dense_dir, text_folder):
    """A mixture whose experts go further from the seed than their branches."""
    make_parts(tmp_path, dense_dir, text_folder)
    embed(tmp_path / "more.safetensors", ("delta", "beta"), "gone", seed=3)
    upcycle(tmp_path, "model.task_scale=2")
    branch(tmp_path / "seed", tmp_path / "delta", 7)
    return tmp_path


def put(parts, base, make=extended):
    """Write the mixture with delta, that goes on from `base`, to `wider`."""
    embeddings = read_domain_embeddings(parts / "more.safetensors")
    config = load_config(str(parts / "recipe.yaml"))
    experts = {"beta" if make is replaced else "delta": parts / "delta"}
    packages = Packages(base=parts / base)
    new = make(parts / "out", experts, embeddings, config, packages=packages)
    with new_directory(parts / "wider") as directory:
        new.write(directory, None, config.router, 0)


@pytest.mark.parametrize("make", [extended, replaced])
def test_a_branch_is_not_taken_for_the_seed(parts, make):
    seed, other = (ffn_sha256(open_dense(parts / name)) for name in ("seed", "alpha"))
    said = rf"alpha is not the seed: .* {other[:12]}, those of the seed \S+ had {seed[:12]}; exp"
    with pytest.raises(IncompatibleModelsError, match=said):
        put(parts, "alpha", make)
    assert not (parts / "wider").exists()
    # wherever it lies now
    shutil.copytree(parts / "seed", parts / "elsewhere")
    put(parts, "elsewhere", make)
    assert not verify_sources(parts / "wider", {}).problems
    [problem] = verify_sources(parts / "wider", {"seed": parts / "alpha"}).problems
    assert f"{parts / 'alpha'} is not the seed: its feed-forward networks have sha256" in problem


def test_a_seed_of_another_dtype_is_taken_and_said(parts, capsys):
    shutil.copytree(parts / "seed", parts / "short")
    edit_tensors(
        parts / "short",
        lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}),
    )
    edit_config(parts / "short", dtype="bfloat16")
    put(parts, "short")
    said = "short is BF16, the seed seed was F32: whether it is the seed can't be told; give it as"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("base", ["seed", "alpha"])
def test_of_an_older_checkpoint_the_name_alone_is_known(parts, base, capsys):
    sidecar = read_sidecar(parts / "out")
    [step] = sidecar.lineage
    sidecar.lineage = [
        UpcycleStep(
            seed_model=step.seed_model,
            family=step.family,
            router=step.router,
            seed=step.seed,
            scales=step.scales,
        )
    ]
    write_sidecar(parts / "out", sidecar)
    assert "seed_sha256" not in (parts / "out" / "nexus.json").read_text()
    put(parts, base)
    said = "alpha is called alpha, the seed seed, and the checkpoint has no hash of it (an older"
    assert (said in capsys.readouterr().err) == (base == "alpha")


def test_where_no_seed_is_needed_none_is_hashed(parts):
    shutil.rmtree(parts / "out")
    upcycle(parts)
    [step] = read_sidecar(parts / "out").lineage
    assert step.seed_sha256 == {}
    assert check_seed([], open_dense(parts / "alpha")) == ""
