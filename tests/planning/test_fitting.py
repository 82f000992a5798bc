"""How a run is cut for the machine that it finds, and what is said where it does not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ds.config import load_config
from nexus_ds.errors import LayoutError
from nexus_ds.planning import choose, fitting
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.settings import ParallelConfig

CARDS = Machine(gpus=8, gpu_memory=24e9)
SERVER = Machine(gpus=8, gpu_memory=80e9)
Z3 = {"stage": 3}
SHIPPED = Path(__file__).parents[2] / "ds_configs"


def config(*words):
    return load_config("nexus-2.8b", ["stage=moe", *words])


def fitted(machine, zero, *words):
    used = config(*words)
    return fitting.fitted(sizes_of(used), machine, used, zero)


def refusal(machine, zero, *words):
    used = config(*words)
    sizes = sizes_of(used)
    found = fitting.fitted(sizes, machine, used, zero)
    assert not found.fits
    return fitting.refusal(sizes, machine, used, found)


def test_the_batch_is_cut_as_plan_cuts_it():
    used = config("parallel.expert=1")
    sizes = sizes_of(used)
    found = fitting.fitted(sizes, SERVER, used, Z3)
    # with 5% of the GPU spared
    same = [
        candidate
        for candidate in choose.candidates(sizes, replace(SERVER, gpu_memory=76e9), used)
        if candidate.layout.name == "ZeRO-3, expert parallel 1"
    ]
    assert [found] == same and found.fits
    # more of them would not fit, on a larger GPU they do
    assert found.layout.micro < fitted(replace(SERVER, gpu_memory=300e9), Z3).layout.micro


def test_checkpointing_is_turned_on_where_it_has_to_be_and_kept_where_it_is_set():
    small = fitted(CARDS, Z3, "stage=seed").layout
    assert small.checkpointing == "non_reentrant" and small.micro > 1
    assert fitted(SERVER, Z3, "stage=seed").layout.checkpointing == "none"
    for kind in ("none", "reentrant"):
        found = fitted(CARDS, Z3, "stage=seed", f"training.activation_checkpointing={kind}")
        assert found.layout.checkpointing == kind


def test_what_the_recipe_sets_stays():
    assert fitted(SERVER, Z3, "training.micro_batch_size=2").layout.micro == 2
    assert fitted(SERVER, Z3, "parallel.expert=2").layout.expert == 2
    assert fitted(SERVER, Z3).layout.expert == 4  # as many as experts, inside a node
    six_a_node = Machine(gpus=12, nodes=2, gpu_memory=80e9)
    assert fitted(six_a_node, Z3, "training.batch_size=96").layout.expert == 3
    with pytest.raises(LayoutError, match="does not divide over 7 GPUs"):
        fitted(Machine(gpus=7, gpu_memory=80e9), Z3)


def test_an_open_stage_takes_what_fits():
    found = fitted(CARDS, {}, "parallel.expert=1")
    assert found.fits and found.layout.offload != "none"
    assert fitted(SERVER, {}).layout.offload == "none"
    assert fitting.zero_of(config("parallel.zero_stage=1")) == {"stage": 1}
    assert fitting.zero_of(config("parallel.zero_stage=0")) == {}
    stages = {n: fitting.stage_of(ParallelConfig(zero_stage=n)) for n in (0, 1, 3)}
    assert stages == {0: 2, 1: 1, 3: 3}


def test_a_batch_is_cut_smaller_rather_than_fill_the_gpu():
    kept = "training.activation_checkpointing=none"
    needed = fitted(SERVER, Z3, "training.micro_batch_size=4", kept).memory.gpu_bytes
    # 5% of 1.05 times the memory: 1.04 lacks little
    assert fitted(replace(SERVER, gpu_memory=1.04 * needed), Z3, kept).layout.micro == 2
    assert fitted(replace(SERVER, gpu_memory=1.06 * needed), Z3, kept).layout.micro == 4


def test_the_spare_is_used_where_nothing_fits_without_it():
    words = ("training.micro_batch_size=2", "training.activation_checkpointing=none")
    needed = fitted(SERVER, Z3, *words).memory.gpu_bytes
    assert fitted(replace(SERVER, gpu_memory=1.01 * needed), Z3, *words).fits
    assert not fitted(replace(SERVER, gpu_memory=0.99 * needed), Z3, *words).fits


def test_memory_that_is_not_known_passes():
    unknown = Machine(gpus=8, gpu_memory=math.inf)
    assert fitted(unknown, Z3).fits


@pytest.mark.parametrize(
    ("name", "offload"),
    [("z1", "none"), ("z2", "none"), ("z3", "none"), ("z3_offload", "optimizer+parameters")],
)
def test_offload_is_read_off_the_json(name, offload):
    zero = json.loads((SHIPPED / f"{name}.json").read_text())["zero_optimization"]
    assert fitting.offload_of(zero) == offload


def test_an_offload_that_is_switched_off_is_none():
    assert fitting.offload_of({"offload_optimizer": {"device": "none"}}) == "none"
    assert fitting.offload_of({"offload_optimizer": None}) == "none"
    assert fitting.offload_of({"offload_optimizer": {"device": "cpu"}}) == "optimizer"
    assert fitting.offload_of({"offload_param": {"device": "cpu"}}) == "none"


def test_a_refusal_says_what_fits_instead():
    said = refusal(CARDS, Z3)
    assert said.startswith(
        "ZeRO-3, expert parallel 4, micro-batch 1, activation checkpointing non_reentrant: a rank "
        "is planned to need 29.3 GB of GPU memory, a GPU has 24 GB (optimizer states 13.9 GB, "
    )
    assert (
        "); what fits is ZeRO-3, expert parallel 1, optimizer on CPU with parallel.expert=1 "
        "training.micro_batch_size=" in said
    )
    assert said.endswith(
        "(nexus-ds plan --write ds.json writes its DeepSpeed JSON, for --deepspeed); "
        "parallel.check_memory=false starts all the same"
    )
    # a micro-batch that is set is what has to change
    said = refusal(SERVER, Z3, "training.micro_batch_size=64")
    assert "micro-batch 64" in said and "what fits is " in said


def test_a_refusal_names_the_parts_of_what_it_adds_up():
    said = refusal(CARDS, Z3)
    listed = said[said.index("has 24 GB (") + 11 : said.index("); what fits")]
    parts = {}
    for part in listed.split(", "):
        name, size, unit = part.rsplit(" ", 2)
        parts[name] = float(size) * {"GB": 1, "MB": 1e-3}[unit]
    assert {"weights", "gradients", "optimizer states"} < parts.keys()
    # those below a hundredth are left out
    assert sum(parts.values()) == pytest.approx(29.3, rel=0.02)
    assert list(parts.values()) == sorted(parts.values(), reverse=True)


def test_a_refusal_asks_for_main_memory_where_that_is_what_lacks():
    said = refusal(replace(CARDS, host_memory=100e9), {}, "parallel.expert=1")
    assert "of main memory are planned for a node, it has 100 GB (" in said
    assert "nothing fits 8 such GPUs; what fits is with " in said
    assert "B of main memory a node ZeRO-" in said and ", or on 16 GPUs ZeRO-" in said


def test_a_refusal_says_so_where_no_number_of_gpus_helps():
    tiny = Machine(gpus=1, gpu_memory=2e9)
    assert "nor 64 times as many; use GPUs with more memory, or lower data" in refusal(tiny, Z3)
