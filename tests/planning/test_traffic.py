"""Arithmetic and bytes over links, by hand for a model of round numbers, and across layouts."""

from dataclasses import replace

import pytest

from nexus_ds.planning import assumptions
from nexus_ds.planning.layout import Layout, Machine
from nexus_ds.planning.sizes import Sizes
from nexus_ds.planning.traffic import (
    exposed_all_to_all,
    shared_seconds,
    step,
    token_flops,
    token_traffic,
    zero_traffic,
)

# 100 x 10 embedding; a layer: attention 4 x 100, FFN 3 x 200 shared and for each expert, P 10, two
# norms of 10; norm of 10
SIZES = Sizes(
    vocabulary=100,
    hidden=10,
    layers=1,
    heads=1,
    kv_heads=1,
    head_size=10,
    ffn=20,
    tied=True,
    experts=4,
    projection=(10,),
)
DENSE_PART, EXPERTS = 1000 + 400 + 600 + 10 + 20 + 10, 4 * 600
ONE_NODE = Machine(gpus=4, gpu_memory=1e9)
TWO_NODES = Machine(gpus=4, gpu_memory=1e9, nodes=2)


def layout(stage=2, expert=1, micro=2, accumulation=1, checkpointing="none", offload="none"):
    return Layout(
        stage=stage,
        offload=offload,
        expert=expert,
        world=4,
        micro=micro,
        accumulation=accumulation,
        checkpointing=checkpointing,
    )


def test_a_tokens_arithmetic_counts_active_weights_and_causal_attention():
    everything, routed = token_flops(SIZES, length=8)
    # of the finished checkpoint: rows and gate in place of P
    active = 1000 + 400 + 600 + 20 + 10 + 600 + 5 * 10
    assert everything == 6 * active + 6 * 10 * 8
    assert routed == 6 * 600
    untied, _ = token_flops(replace(SIZES, tied=False), length=8)
    assert untied == everything  # the embedding only looks up


@pytest.mark.parametrize(
    ("stage", "accumulation", "sends"),
    [(1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 3), (3, 4, 12)],
)
def test_how_often_parameters_travel(stage, accumulation, sends):
    sent, between = zero_traffic(SIZES, layout(stage, accumulation=accumulation), ONE_NODE, width=2)
    assert sent == pytest.approx(2 * sends * (DENSE_PART + EXPERTS) * 3 / 4)
    assert between == 0


def test_experts_travel_among_their_replicas_only():
    halves = zero_traffic(SIZES, layout(expert=2), ONE_NODE, width=2)[0]
    assert halves == pytest.approx(2 * 3 * (DENSE_PART * 3 / 4 + EXPERTS / 2 * 1 / 2))
    alone = zero_traffic(SIZES, layout(expert=4), ONE_NODE, width=2)[0]
    assert alone == pytest.approx(2 * 3 * DENSE_PART * 3 / 4)


def test_a_nodes_link_carries_the_rings_of_all_its_experts():
    inside, between = zero_traffic(SIZES, layout(expert=2), TWO_NODES, width=2)
    assert between == pytest.approx(2 * 3 * (DENSE_PART * 3 / 4 + 2 * EXPERTS / 2 * 1 / 2))
    # replicas of an expert sit on different nodes
    assert inside == pytest.approx(2 * 3 * DENSE_PART * 3 / 4)


def test_tokens_travel_to_experts_and_back_twice():
    assert token_traffic(SIZES, layout(expert=1), ONE_NODE, 2, 8) == (0, 0)
    sent, between = token_traffic(SIZES, layout(expert=4), ONE_NODE, 2, 8)
    assert (sent, between) == (pytest.approx(4 * 2 * 8 * 10 * 2 * 3 / 4), 0)
    again = token_traffic(SIZES, layout(expert=4, checkpointing="reentrant"), ONE_NODE, 2, 8)[0]
    assert again == pytest.approx(1.5 * sent)


def test_tokens_leave_the_node_only_where_a_group_spans_nodes():
    inside, between = token_traffic(SIZES, layout(expert=2), TWO_NODES, 2, 8)
    every = 4 * 2 * 8 * 10 * 2
    assert (inside, between) == (pytest.approx(every / 2), 0)
    inside, between = token_traffic(SIZES, layout(expert=4), TWO_NODES, 2, 8)
    assert (inside, between) == (pytest.approx(every / 4), pytest.approx(2 * every / 2))


def test_a_steps_seconds_add_up_and_give_tokens_a_second():
    found = step(SIZES, layout(expert=2), ONE_NODE, 2, 8)
    assert found.tokens == 4 * 2 * 8
    assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.tokens_per_second == pytest.approx(found.tokens / found.step_seconds)


def test_the_shared_expert_computes_six_operations_a_weight_and_token():
    everything = shared_seconds(SIZES, layout(), ONE_NODE, 8)
    assert everything == pytest.approx(2 * 8 * 6 * 600 / (ONE_NODE.tflops * 1e12 * assumptions.MFU))
    again = shared_seconds(SIZES, layout(checkpointing="reentrant"), ONE_NODE, 8)
    assert again == pytest.approx(everything * 4 / 3)
    assert shared_seconds(replace(SIZES, experts=0), layout(), ONE_NODE, 8) == 0


@pytest.mark.parametrize(
    ("sent", "shared", "seen"),
    [
        (6, 0, 6),  # nothing to hide behind
        (6, 3, 3),  # the link is the slower: all of the shared expert is used
        (6, 6, 1),  # the dispatch is hidden, the combine not quite: 3 - 6 / 3
        (6, 9, 0),
        (0, 3, 0),
    ],
)
def test_two_thirds_of_the_shared_expert_hide_the_dispatch_and_a_third_the_combine(
    sent, shared, seen
):
    assert exposed_all_to_all(sent, shared) == pytest.approx(seen)


def test_what_the_link_carries_for_tokens_hides_nothing_of_zero():
    found = step(SIZES, layout(stage=3, expert=4), TWO_NODES, 2, 8)
    inside, between = token_traffic(SIZES, layout(stage=3, expert=4), TWO_NODES, 2, 8)
    sent = (inside / TWO_NODES.gpu_link + between / TWO_NODES.link) / assumptions.LINK_EFFICIENCY
    seen = exposed_all_to_all(sent, shared_seconds(SIZES, layout(), TWO_NODES, 8))
    assert 0 < seen < sent
    assert found.seconds["all_to_all"] == pytest.approx(seen)
    inside, between = zero_traffic(SIZES, layout(stage=3, expert=4), TWO_NODES, 2)
    zero = (inside / TWO_NODES.gpu_link + between / TWO_NODES.link) / assumptions.LINK_EFFICIENCY
    hidden = max(0, assumptions.OVERLAP * found.seconds["computing"] - (sent - seen))
    assert found.seconds["exposed"] == pytest.approx(max(0, zero - hidden))


def test_slow_links_and_recomputation_cost_time_and_faster_gpus_save_it():
    big = replace(SIZES, hidden=1000, head_size=1000, ffn=4000, layers=10)
    usual = step(big, layout(stage=3), TWO_NODES, 2, 512).step_seconds
    slow = step(
        big, layout(stage=3), replace(TWO_NODES, link=TWO_NODES.link / 10), 2, 512
    ).step_seconds
    assert slow > 2 * usual
    recomputed = step(big, layout(stage=3, checkpointing="reentrant"), TWO_NODES, 2, 512)
    assert (
        recomputed.seconds["computing"]
        > step(big, layout(stage=3), TWO_NODES, 2, 512).seconds["computing"]
    )
    fast = step(big, layout(stage=3), replace(TWO_NODES, tflops=1000), 2, 512)
    assert fast.seconds["computing"] < usual


def test_offload_moves_states_and_updates_on_the_cpu():
    none = step(SIZES, layout(stage=3), ONE_NODE, 2, 8).seconds
    optimizer = step(SIZES, layout(stage=3, offload="optimizer"), ONE_NODE, 2, 8).seconds
    both = step(SIZES, layout(stage=3, offload="optimizer+parameters"), ONE_NODE, 2, 8).seconds
    assert "offload" not in none
    assert both["offload"] == pytest.approx(2 * optimizer["offload"])
    share = (DENSE_PART + EXPERTS) / 4
    assert optimizer["optimizer"] == pytest.approx(4 * share / assumptions.CPU_ADAM_PER_SECOND)
