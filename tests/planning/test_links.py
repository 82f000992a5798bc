"""Which way is faster on which link, where that changes, and what it means for layouts' times."""

from dataclasses import replace

import pytest

from nexus_ds.config import load_config
from nexus_ds.planning import choose, traffic
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.links import SHARP, SPEEDS, WAYS, LinkAdvice, at_speed
from nexus_ds.planning.sizes import sizes_of

NODES = Machine(gpus=8, nodes=2, gpu_memory=80e9, link=25e9 / 8)


@pytest.fixture(scope="module")
def recipe():
    config = load_config("nexus-470m")
    return sizes_of(config), config


@pytest.fixture(scope="module")
def advice(recipe):
    return LinkAdvice(recipe[0], NODES, recipe[1])


def test_slow_links_want_expert_parallelism_and_fast_ones_zero_alone(advice):
    assert advice.better(SPEEDS[0]) == "expert_parallel"
    assert advice.better(SPEEDS[-1]) == "zero_only"
    flips = advice.flips()
    assert flips[0].on_faster_links == flips[-1].on_faster_links == "zero_only"
    below = "expert_parallel"
    for flip in flips:
        assert SPEEDS[0] < flip.link < SPEEDS[-1]
        assert advice.better(flip.link) == below != flip.on_faster_links
        assert advice.better(flip.link * SHARP) == flip.on_faster_links
        below = flip.on_faster_links


def test_at_the_flip_both_ways_take_the_same_time(advice):
    speed = advice.flips()[0].link
    parallel, alone = (advice.fastest(way, speed)[0] for way in WAYS)
    assert parallel == pytest.approx(alone, rel=0.01)


def test_the_advice_agrees_with_the_layouts_own_times(advice, recipe):
    told, found = advice.to_json(), choose.candidates(recipe[0], NODES, recipe[1])
    for way, parallel in WAYS.items():
        fastest = min(
            c.step.step_seconds for c in found if c.fits and (c.layout.expert > 1) == parallel
        )
        assert told[way]["step_seconds"] == pytest.approx(fastest)
    assert told["use"] == min(WAYS, key=lambda way: told[way]["step_seconds"])
    assert (told["link"], told["between"]) == (NODES.link, "nodes")


def test_the_flip_is_the_same_whatever_the_machines_own_link(advice, recipe):
    told = advice.to_json()
    assert told["use"] == "zero_only"
    slower = replace(NODES, link=told["flips"][0]["link"] / 2)
    slow = LinkAdvice(recipe[0], slower, recipe[1]).to_json()
    assert slow["use"] == "expert_parallel" and slow["flips"] == told["flips"]


def test_on_one_node_the_link_is_that_of_its_gpus(recipe):
    sizes, config = recipe
    alone = replace(NODES, nodes=1)
    assert at_speed(alone, 7.0).gpu_link == 7.0 and at_speed(NODES, 7.0).link == 7.0
    told = LinkAdvice(sizes, alone, config).to_json()
    assert (told["link"], told["between"]) == (alone.gpu_link, "GPUs")


def test_one_gpu_leaves_no_choice(recipe):
    sizes, config = recipe
    single = Machine(gpus=1, gpu_memory=80e9)
    assert LinkAdvice(sizes, single, config).to_json() is None
    # nothing fits
    assert LinkAdvice(sizes, replace(NODES, gpu_memory=1e9), config).to_json() is None


def test_overlap_moves_the_flip_to_faster_links(advice, monkeypatch):
    overlapped = advice.flips()[0].link
    monkeypatch.setattr(traffic, "shared_seconds", lambda *_: 0.0)
    assert advice.flips()[0].link < overlapped
