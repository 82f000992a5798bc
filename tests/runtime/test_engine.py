"""Layouts: what is judged before anything is loaded, and how a batch is cut."""

import json

import pytest
import torch

from nexus_ds.config import Config
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.model.build import load_nexus, new_dense
from nexus_ds.model.moe import Placement
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import (
    Batch,
    check_layout,
    deepspeed_config,
    parameter_groups,
    placement,
    read_deepspeed_json,
)


def config(expert=1, batch=8, micro=0, stage=2):
    made = Config()
    made.parallel.expert, made.parallel.zero_stage = expert, stage
    made.training.batch_size, made.training.micro_batch_size = batch, micro
    return made


def test_a_layout_that_runs_is_cut_evenly():
    assert check_layout({}, config(), 4, 4, 4) == (2, Batch(2, 1))
    assert check_layout({"zero_optimization": {"stage": 3}}, config(micro=1, expert=2), 2, 2, 3) == (3, Batch(1, 4))
    assert check_layout({}, config(expert=3), 2, 2, 0)[0] == 2  # a dense model has no experts to spread


@pytest.mark.parametrize(
    ("zero", "changes", "world", "message"),
    [
        ({"stage": 0}, {}, 2, "ZeRO stage 0 clips wrongly with expert layers and keeps no masters; use ds_configs/z1"),
        ({"stage": 2}, {"expert": 3}, 4, "parallel.expert 3 does not divide 4 ranks; use a divisor of 4, or 0 for auto"),
        ({"stage": 2}, {"batch": 6}, 4, "training.batch_size 6 does not divide over 4 ranks; use a multiple of 4"),
        ({"stage": 2}, {"micro": 3}, 1, "a rank's 8 sequences a step are not a multiple of training.micro_batch_size 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, 2, "offload_param needs ZeRO stage 3, this is stage 2; use"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, 2, "offload_optimizer.device: nvme is not supported"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, {}, 2, "zero_hpz_partition_size: 2 is not supported: DeepSpeed's exp"),
        ({"stage": 3, "zero_quantized_gradients": True}, {}, 2, "zero_quantized_gradients: True is not supported: Deep"),
        ({"stage": 2, "round_robin_gradients": True}, {}, 2, "round_robin_gradients: True is not supported: DeepSpeed th"),
        ({"stage": 1, "contiguous_gradients": False}, {}, 2, "contiguous_gradients: False is not supported: DeepSpeed's"),
        ({"stage": 1, "reduce_scatter": False}, {}, 2, "reduce_scatter: False is not supported: DeepSpeed's expert laye"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_run_is_refused_in_one_sentence(zero, changes, world, message):
    with pytest.raises(LayoutError) as found:
        check_layout({"zero_optimization": zero}, config(**changes), world, world, 4)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_misspelt_keys_are_found_at_both_levels(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key zero_optimization.overlap_com, did you mean overlap_comm\?"):
        check_layout({"zero_optimization": {"stage": 2, "overlap_com": True}}, config(), 2, 2, 4)
    with pytest.raises(ConfigError, match="zero_optimization: "):
        check_layout({"zero_optimization": {"stage": "two"}}, config(), 2, 2, 4)
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    with pytest.raises(ConfigError, match=r"unknown key zero_optimisation, did you mean zero_optimization\?"):
        read_deepspeed_json(path, Config().parallel)


@pytest.mark.parametrize("experts", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_expert_has_one_slot_and_vacant_ones_are_spread(experts, size):
    ranks = [Placement(experts, size, rank) for rank in range(size)]
    held = [expert for rank in ranks for expert in rank.local_experts()]
    assert len(held) == ranks[0].slots
    assert sorted(e for e in held if e is not None) == list(range(experts))
    assert [held[ranks[0].slot(e)] for e in range(experts)] == list(range(experts))
    counts = [sum(e is not None for e in rank.local_experts()) for rank in ranks]
    assert max(counts) - min(counts) <= 1


def test_automatic_expert_parallelism_stays_within_a_node():
    parallel = Config().parallel
    parallel.expert = 0
    assert placement(parallel, 4, 5, 16, 8).ep_size == 4
    assert placement(parallel, 8, 5, 16, 4).ep_size == 4
    assert placement(parallel, 3, 0, 4, 4).ep_size == 2


def test_a_partitioned_matrix_is_still_decayed():
    model = torch.nn.Linear(4, 3)
    model.weight.ds_shape = model.weight.shape
    model.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    groups = {group["name"]: group for group in parameter_groups(model, Config().training, 1.0)}
    assert groups["matrices"]["params"] == [model.weight]
    assert groups["vectors"]["weight_decay"] == 0.0


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_adamw_is_fused_wherever_the_gpu_does_the_update(monkeypatch, cpu, offload):
    monkeypatch.setattr(internals, "on_cpu", lambda: cpu)
    zero = {"stage": 2, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    adam = deepspeed_config({"zero_optimization": zero}, config(), Batch(1, 1))["optimizer"]["params"]
    assert adam.get("fused", False) == (not cpu and not offload) and adam["torch_adam"]


def test_attention_is_torchs_scaled_dot_product_by_default(nexus_dir):
    nexus = load_nexus(nexus_dir, torch.float32, Placement(3), Config().router, False)
    assert nexus.config._attn_implementation == "sdpa"
    assert new_dense(Config().model, 50, 0, 0).config._attn_implementation == "sdpa"
