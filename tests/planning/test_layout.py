"""Which layouts there are, and that the DeepSpeed JSON of each is one that `train` takes."""

import pytest
from plan_models import OTHER, SMALL

from nexus_ds.config import load_config
from nexus_ds.errors import LayoutError
from nexus_ds.planning import assumptions
from nexus_ds.planning.layout import (
    Layout,
    Machine,
    deepspeed_json,
    expert_parallel,
    largest_gathered,
    largest_module,
    layouts,
)
from nexus_ds.planning.sizes import Sizes
from nexus_ds.runtime.engine import check_layout
from nexus_ds.settings import ParallelConfig, TrainingConfig

DENSE = Sizes(
    vocabulary=100, hidden=32, layers=2, heads=4, kv_heads=4, head_size=8, ffn=64, tied=True
)


def all_layouts(sizes, world=4, **training):
    return [
        way
        for ways in layouts(sizes, TrainingConfig(batch_size=16, **training), world)
        for way in ways
    ]


def test_every_stage_offload_and_expert_parallel_size_is_there():
    found = {(w.stage, w.offload, w.expert) for w in all_layouts(SMALL)}
    kinds = {(1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer")}
    kinds |= {(3, "none"), (3, "optimizer"), (3, "optimizer+parameters")}
    assert found == {(stage, offload, expert) for stage, offload in kinds for expert in (1, 2, 4)}


def test_a_dense_model_has_no_expert_parallelism_and_experts_bound_it():
    assert {w.expert for w in all_layouts(DENSE)} == {1}
    assert {w.expert for w in all_layouts(OTHER)} == {1, 2}  # three experts


def test_automatic_groups_of_experts_divide_a_node():
    sizes = {local: expert_parallel(ParallelConfig(expert=0), 4, local) for local in (1, 4, 6, 8)}
    assert sizes == {1: 1, 4: 4, 6: 3, 8: 4}
    assert expert_parallel(ParallelConfig(expert=0), 0, 8) == 1, "a dense model"
    assert expert_parallel(ParallelConfig(expert=8), 4, 4) == 8


def test_batches_are_cut_evenly_and_settings_of_the_recipe_stay():
    assert {(w.micro, w.accumulation) for w in all_layouts(SMALL)} == {(1, 4), (2, 2), (4, 1)}
    assert {w.checkpointing for w in all_layouts(SMALL)} == {"none", "non_reentrant"}
    kept = all_layouts(SMALL, micro_batch_size=2, activation_checkpointing="reentrant")
    assert {(w.micro, w.checkpointing) for w in kept} == {(2, "reentrant")}


def test_fp32_gradients_are_planned_where_train_takes_them():
    found = all_layouts(SMALL, gradient_dtype="fp32")
    assert {(w.stage, w.offload, w.gradient_dtype) for w in found} == {
        (2, "none", "fp32"),
        (3, "none", "fp32"),
    }


@pytest.mark.parametrize(
    "layout", all_layouts(SMALL), ids=lambda w: f"{w.name} micro {w.micro} {w.checkpointing}"
)
def test_train_takes_every_layouts_json_and_overrides(layout):
    config = load_config("demo", ["training.batch_size=16", *layout.overrides])
    stage, batch = check_layout(
        deepspeed_json(SMALL, layout), config, layout.world, layout.world, SMALL.experts
    )
    assert (stage, batch.micro, batch.accumulation) == (
        layout.stage,
        layout.micro,
        layout.accumulation,
    )


def test_a_layers_experts_are_gathered_together_unless_a_rank_holds_them_alone(monkeypatch):
    def layout(expert):
        return Layout(
            stage=3,
            offload="none",
            expert=expert,
            world=4,
            micro=1,
            accumulation=1,
            checkpointing="none",
        )

    assert largest_module(SMALL, layout(1)) == 4 * SMALL.expert
    assert largest_module(SMALL, layout(2)) == 2 * SMALL.expert
    assert largest_module(SMALL, layout(4)) == SMALL.vocabulary * SMALL.hidden
    # all of a layer at once, where that is little: attention, norms, P, experts, the shared one
    layer = 4 * 128**2 + 2 * 128 + sum(SMALL.projection) + 5 * SMALL.expert
    assert largest_gathered(SMALL, layout(1)) == layer
    monkeypatch.setattr(assumptions, "PREFETCH_ELEMENTS", layer // 2 - 1)
    assert largest_gathered(SMALL, layout(1)) == 4 * SMALL.expert


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(
        LayoutError, match=r"batch_size 16 does not divide over 6 GPUs; use a multiple of 6, .*=18"
    ):
        all_layouts(SMALL, world=6)
    with pytest.raises(
        LayoutError, match=r"a rank's 4 sequences a step are not a multiple of .*micro_batch_size 3"
    ):
        all_layouts(SMALL, micro_batch_size=3)
    with pytest.raises(LayoutError, match=r"batch_size 16 does not divide over 32 GPUs; .*=32"):
        all_layouts(SMALL, world=32)


def test_gpus_that_do_not_spread_over_the_nodes_are_refused():
    with pytest.raises(
        LayoutError,
        match=r"6 GPUs don't spread evenly over 4 nodes; --gpus counts those of all nodes",
    ):
        Machine(gpus=6, gpu_memory=1, nodes=4)
    assert Machine(gpus=8, gpu_memory=1, nodes=4).local == 2
