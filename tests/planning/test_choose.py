"""The order of the candidates, what fits, and the plan's arithmetic at the recipes' sizes."""

from dataclasses import replace

import pytest

from nexus_ds.config import load_config
from nexus_ds.planning import assumptions, choose
from nexus_ds.planning.layout import OFFLOADS, Layout, Machine
from nexus_ds.planning.memory import (
    activations,
    disk,
    groups,
    kept_gradients,
    layer_activations,
    memory,
    model_states,
)
from nexus_ds.planning.sizes import Parameter, sizes_of

CARDS = Machine(gpus=16, gpu_memory=24e9, nodes=4, host_memory=256e9, link=25e9 / 8)


@pytest.fixture(scope="module")
def large():
    return load_config("nexus-2.8b")


@pytest.fixture(scope="module")
def on_cards(large):
    return choose.candidates(sizes_of(large), CARDS, large)


def test_those_that_fit_come_first_and_the_fastest_of_them_leads(on_cards):
    fits = [c.fits for c in on_cards]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    seconds = [c.step.step_seconds for c in on_cards if c.fits]
    assert seconds == sorted(seconds)
    for candidate in on_cards:
        within = (
            candidate.memory.gpu_bytes <= CARDS.gpu_memory
            and candidate.memory.host_bytes <= CARDS.host_memory
        )
        assert candidate.fits == within


def test_24_gb_cards_hold_the_large_model_under_zero_3_and_not_under_zero_1(on_cards):
    assert any(c.fits and c.layout.stage == 3 for c in on_cards)
    assert not any(c.fits and c.layout.stage == 1 for c in on_cards)


def test_a_small_main_memory_rules_offload_out(large):
    little = replace(CARDS, host_memory=60e9)
    found = choose.candidates(sizes_of(large), little, large)
    assert {c.layout.offload for c in found if c.fits} == {"none"}


def test_states_shrink_with_the_stage_and_move_to_the_host_with_offload(on_cards, large):
    sizes = sizes_of(large)
    layouts = {
        (c.layout.stage, c.layout.offload): c.layout for c in on_cards if c.layout.expert == 1
    }
    states = {key: model_states(sizes, layout, 2) for key, layout in layouts.items()}
    assert states[1, "none"].gpu > states[2, "none"].gpu > states[3, "none"].gpu
    for stage in (1, 2, 3):
        assert states[stage, "optimizer"].gpu < states[stage, "none"].gpu
        assert states[stage, "optimizer"].host > 0 == states[stage, "none"].host
    assert states[3, OFFLOADS[2]].gpu < states[3, "optimizer"].gpu
    exact = 16 * sizes.counts()["trained"] / CARDS.gpus
    assert states[3, "none"].gpu == pytest.approx(exact, rel=0.01)


def test_a_gradient_stays_whole_where_a_partitions_edge_cuts_it():
    # three shares of 4: two edges cut the first and the second
    sizes = [Parameter("matrices", n, 0) for n in (6, 4, 2)]
    layout = Layout(
        stage=2, offload="none", expert=1, world=3, micro=1, accumulation=1, checkpointing="none"
    )
    assert kept_gradients(sizes, layout) == 6 + 4
    assert kept_gradients(sizes, replace(layout, world=1)) == 12


def test_zero_2_keeps_the_gradients_of_large_experts_whole(on_cards, large):
    sizes = sizes_of(large)
    layout = next(c.layout for c in on_cards if c.layout.stage == 2 and c.layout.expert == 1)
    own = list(sizes.parameters(layout.slots(sizes)))
    experts = [p for p in own if p.kind == "experts"]
    # Two of these would be more than DeepSpeed puts into a group, so that every share cuts every
    # one of them.
    assert all(
        len(group) == 1
        for group in groups(own, assumptions.EXPERT_GROUP_ELEMENTS)
        if group[0].kind == "experts"
    )
    assert kept_gradients(own, layout) > sum(p.elements for p in experts)


def test_longer_sequences_and_larger_micro_batches_need_more_and_checkpointing_less(
    on_cards, large
):
    sizes, layout = sizes_of(large), on_cards[0].layout

    def peak(length=2048, **changes):
        return memory(sizes, replace(layout, **changes), 2, length, CARDS.local).gpu_bytes

    assert peak(length=4096) > peak() and peak(micro=2 * layout.micro) > peak()
    none, some = (replace(layout, checkpointing=kind) for kind in ("none", "reentrant"))
    assert activations(sizes, some, 2, 2048) < activations(sizes, none, 2, 2048) / 10


def test_a_dense_layer_keeps_less_than_one_with_experts(large):
    sizes = sizes_of(large)
    assert layer_activations(replace(sizes, experts=0), 2) < layer_activations(sizes, 2)


def test_one_more_expert_can_tip_a_run_over(large):
    sizes, machine = sizes_of(large), Machine(gpus=8, gpu_memory=80e9)
    best = choose.candidates(sizes, machine, large)[0]
    more = choose.one_more_expert(sizes, machine, large, best)
    assert best.fits and more.memory.gpu_bytes > best.memory.gpu_bytes
    roomy = replace(machine, gpu_memory=(best.memory.gpu_bytes + more.memory.gpu_bytes) / 2)
    assert not choose.one_more_expert(sizes, roomy, large, best).fits


def test_the_disk_holds_a_state_more_than_are_kept_and_the_checkpoint(large):
    sizes = sizes_of(large)
    counts, found = sizes.counts(), disk(sizes, 2, keep_last=2)
    assert found["state"] == 12 * counts["trained"]
    assert found["states"] == 3 * found["state"]  # one is written before the oldest goes
    assert found["total"] == found["states"] + found["export"]
