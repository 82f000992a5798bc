"""Layouts: what is judged before anything is loaded, and how a batch is cut."""

import json
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from conftest import make_linear

from nexus_ds.checkpoint.build import load_stock, new_dense
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import engine as engine_module
from nexus_ds.runtime.engine import (
    Batch,
    check_layout,
    deepspeed_config,
    moe_layers,
    parameter_groups,
    placement,
    read_deepspeed_json,
    set_learning_rate,
    split_batch,
    start_engine,
    wants_compiled,
)
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config


def config(expert=1, batch=8, micro=0, stage=2):
    made = Config()
    made.parallel.expert, made.parallel.zero_stage = expert, stage
    made.training.batch_size, made.training.micro_batch_size = batch, micro
    return made


def test_a_layout_that_runs_is_cut_evenly():
    assert check_layout({}, config(), 4, 4, 4) == (2, Batch(2, 1))
    assert check_layout(
        {"zero_optimization": {"stage": 3}}, config(micro=1, expert=2), 2, 2, 3
    ) == (3, Batch(1, 4))
    # a dense model has no experts to spread
    assert check_layout({}, config(expert=3), 2, 2, 0)[0] == 2


@pytest.mark.parametrize(
    ("zero", "changes", "world", "message"),
    [
        (
            {"stage": 0},
            {},
            2,
            "ZeRO stage 0 clips wrongly with expert layers and keeps no masters; use ds_configs/z1",
        ),
        (
            {"stage": 2},
            {"expert": 3},
            4,
            "parallel.expert 3 does not divide 4 ranks; use a divisor of 4, or 0 for auto",
        ),
        (
            {"stage": 2},
            {"batch": 6},
            4,
            "training.batch_size 6 does not divide over 4 ranks; use a multiple of 4",
        ),
        (
            {"stage": 2},
            {"micro": 3},
            1,
            "a rank's 8 sequences a step are not a multiple of training.micro_batch_size 3",
        ),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            {},
            2,
            "offload_param needs ZeRO stage 3, this is stage 2; use",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            {},
            2,
            "offload_optimizer.device: nvme is not supported",
        ),
        (
            {"stage": 3, "zero_hpz_partition_size": 2},
            {},
            2,
            "zero_hpz_partition_size: 2 is not supported: DeepSpeed's exp",
        ),
        (
            {"stage": 3, "zero_quantized_gradients": True},
            {},
            2,
            "zero_quantized_gradients: True is not supported: Deep",
        ),
        (
            {"stage": 2, "round_robin_gradients": True},
            {},
            2,
            "round_robin_gradients: True is not supported: DeepSpeed th",
        ),
        (
            {"stage": 1, "contiguous_gradients": False},
            {},
            2,
            "contiguous_gradients: False is not supported: DeepSpeed's",
        ),
        (
            {"stage": 1, "reduce_scatter": False},
            {},
            2,
            "reduce_scatter: False is not supported: DeepSpeed's expert laye",
        ),
    ],
)
def test_a_layout_that_cannot_run_is_refused_in_one_sentence(zero, changes, world, message):
    with pytest.raises(LayoutError) as found:
        check_layout({"zero_optimization": zero}, config(**changes), world, world, 4)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 1}, r"gradient_dtype fp32 needs ZeRO stage 2 or 3, this is stage 1; use ds_con"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            r"fp32 is not supported with zero_optimization\.offload_optimizer; remove one of them",
        ),
    ],
)
def test_fp32_gradients_are_refused_where_deepspeed_does_not_sum_them_so(zero, message):
    asked = config()
    asked.training.gradient_dtype = "fp32"
    with pytest.raises(LayoutError, match=message):
        check_layout({"zero_optimization": zero}, asked, 2, 2, 4)


def test_the_json_leaves_the_gradients_dtype_to_the_recipe(tmp_path):
    for dtype, expected in (("model", None), ("fp32", "fp32")):
        asked = config()
        asked.training.gradient_dtype = dtype
        complete = deepspeed_config({"zero_optimization": {"stage": 2}}, asked, Batch(1, 1))
        assert complete["data_types"] == {"grad_accum_dtype": expected}
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"data_types": {"grad_accum_dtype": "fp32"}}))
    with pytest.raises(ConfigError, match=r"data_types is set by the recipe \(training\.gradient_"):
        read_deepspeed_json(path, Config().parallel)


@pytest.mark.parametrize(("stage", "room", "expected"), [(3, 10**8, 2), (3, 10, 0), (2, 10**8, 0)])
def test_zero_3_gathers_small_layers_at_once(stage, room, expected, dense_dir, monkeypatch):
    model = load_stock(dense_dir, torch.float32)
    found = []
    monkeypatch.setattr("nexus_ds.runtime.engine.leaf_elements", lambda: room)
    monkeypatch.setattr(internals, "gather_at_once", found.append)
    monkeypatch.setattr(internals, "initialize", lambda model, *_: model)
    start_engine(model, {"zero_optimization": {"stage": stage}}, config(), Batch(1, 1))
    assert found == list(model.model.layers)[:expected]


def test_misspelt_keys_are_found_at_both_levels(tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown key zero_optimization.overlap_com, did you mean overlap_comm\?"
    ):
        check_layout({"zero_optimization": {"stage": 2, "overlap_com": True}}, config(), 2, 2, 4)
    with pytest.raises(ConfigError, match="zero_optimization: "):
        check_layout({"zero_optimization": {"stage": "two"}}, config(), 2, 2, 4)
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    with pytest.raises(
        ConfigError, match=r"unknown key zero_optimisation, did you mean zero_optimization\?"
    ):
        read_deepspeed_json(path, Config().parallel)


def test_automatic_expert_parallelism_stays_within_a_node():
    parallel = Config().parallel
    parallel.expert = 0
    assert placement(parallel, 4, 5, 16, 8).ep_size == 4
    assert placement(parallel, 8, 5, 16, 4).ep_size == 4
    assert placement(parallel, 3, 0, 4, 4).ep_size == 2
    # 4 divides the ranks, but a group of 4 would have ranks on both nodes
    assert placement(parallel, 4, 0, 12, 6).ep_size == 3
    assert placement(parallel, 4, 0, 6, 4).ep_size == 2, "4 ranks on one node, 2 on the other"


def names_of(model, groups):
    """Return name, decay and scale of each group, and the names of its parameters."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        g["name"]: (g["weight_decay"], g["lr_scale"], sorted(known[id(p)] for p in g["params"]))
        for g in groups
    }


BLOCK = [
    "experts.w1",
    "experts.w2",
    "experts.w3",
    *(f"shared_experts.{part}_proj.weight" for part in ("down", "gate", "up")),
]
MATRICES = sorted(
    [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in BLOCK]
    + [
        f"model.layers.{layer}.self_attn.{part}_proj.weight"
        for layer in range(2)
        for part in "qkvo"
    ]
    + ["model.embed_tokens.weight"]
)
VECTORS = [
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
]
ROUTERS = {
    "nexus": ["projection.maps.0.weight", "projection.maps.1.weight"],
    "context": [
        "mean",
        "projection.log_norm",
        *(f"projection.{name}.weight" for name in ("maps.0", "maps.1", "out")),
    ],
    "linear": ["gate.weight"],
}


def started(monkeypatch, directory, experts, accumulation=1, lr_scale=0.3):
    """Return a model, and what start_engine hands to DeepSpeed for it."""
    given, used = {}, config()
    used.training.weight_decay, used.router.lr_scale, used.model.dtype = 0.2, lr_scale, "fp32"
    monkeypatch.setattr(
        deepspeed, "initialize", lambda **values: given.update(values) or (object(),)
    )
    model = load_nexus(directory, torch.float32, Placement(experts), used.router, False)
    start_engine(model, {"zero_optimization": {"stage": 2}}, used, Batch(1, accumulation))
    return model, given


@pytest.mark.parametrize("kind", ROUTERS)
def test_each_parameter_is_in_its_group_by_name(
    monkeypatch, tmp_path, nexus_dir, context_dir, kind
):
    """P has no decay and a rate of its own; free rows are a layer like others and have the model's
    rate."""
    directory = {"nexus": nexus_dir, "context": context_dir}.get(kind) or make_linear(
        tmp_path / "linear"
    )
    model, given = started(monkeypatch, directory, 3)
    router = sorted(
        f"model.layers.{layer}.mlp.router.{name}" for layer in range(2) for name in ROUTERS[kind]
    )
    assert names_of(model, given["model_parameters"]) == {
        "matrices": (0.2, 1.0, MATRICES),
        "vectors": (0.0, 1.0, VECTORS),
        "router": (0.0, 1.0 if kind == "linear" else 0.3, router),
    }


def test_a_dense_model_has_no_router_group_and_each_parameter_once(dense_dir):
    model = load_stock(dense_dir, torch.float32)
    found = names_of(model, parameter_groups(model, Config().training, 0.05))
    assert list(found) == ["matrices", "vectors"]
    assert sorted(found["matrices"][2] + found["vectors"][2]) == sorted(
        name for name, _ in model.named_parameters()
    )
    assert all(
        ("norm" in name) == (name in found["vectors"][2]) for name, _ in model.named_parameters()
    )


def test_the_backbone_and_shared_experts_learn_at_rates_of_their_own(nexus_dir):
    """Every parameter once; what keeps the model's rate stays in the groups that it had."""
    training = Config().training
    training.backbone_lr_scale = 0.0
    training.shared_lr_scale = 0.25
    model = load_nexus(nexus_dir, torch.float32, Placement(3), Config().router, False)
    found = names_of(model, parameter_groups(model, training, 0.05))
    shared = [name for name in MATRICES if ".shared_experts." in name]
    routed = [name for name in MATRICES if ".experts." in name]
    assert len(shared) == 6 and len(routed) == 6
    decay = training.weight_decay
    router = found.pop("router")
    assert router[1] == 0.05
    assert found == {
        "matrices": (decay, 1.0, routed),
        "matrices of shared": (decay, 0.25, shared),
        "matrices of backbone": (decay, 0.0, sorted(set(MATRICES) - {*shared, *routed})),
        "vectors of backbone": (0.0, 0.0, sorted(VECTORS)),
    }


def test_a_branch_may_train_its_feed_forward_networks_alone(dense_dir):
    training = Config().training
    training.backbone_lr_scale = 0.0
    model = load_stock(dense_dir, torch.float32)
    found = names_of(model, parameter_groups(model, training, 0.05))
    assert {name: group[1] for name, group in found.items()} == {
        "matrices": 1.0,
        "matrices of backbone": 0.0,
        "vectors of backbone": 0.0,
    }
    assert all(".mlp." in name for name in found["matrices"][2])
    assert len(found["matrices"][2]) == 6
    assert not any(".mlp." in name for name in found["matrices of backbone"][2])


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_backbone_without_a_rate_keeps_every_bit_and_all_else_learns(kind, dense_dir, nexus_dir):
    """By steps of AdamW with decay, as the loop sets its rates; gradients are large everywhere."""
    training = Config().training
    training.backbone_lr_scale = 0.0
    training.weight_decay = 0.2
    if kind == "dense":
        model = load_stock(dense_dir, torch.float32)
    else:
        model = load_nexus(nexus_dir, torch.float32, Placement(3), Config().router, False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, training, 0.05), lr=1.0)
    for lr in (1e-2, 2e-2):
        set_learning_rate(SimpleNamespace(optimizer=optimizer), lr)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            moved.add(name)
    assert moved == {name for name in before if ".mlp." in name}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_routers_losses_are_scaled_as_the_main_loss_is(monkeypatch, nexus_dir, accumulation):
    model, _ = started(monkeypatch, nexus_dir, 3, accumulation)
    assert [layer.router.loss_scale for layer in moe_layers(model)] == [1 / accumulation] * 2


@pytest.mark.parametrize("kind", ["auto", "none", "reentrant", "non_reentrant"])
def test_activation_checkpointing_is_of_the_kind_that_is_asked_for(monkeypatch, nexus_dir, kind):
    given, used = {}, config()
    used.training.activation_checkpointing = kind
    monkeypatch.setattr(deepspeed, "initialize", lambda **values: (object(),))
    model = load_nexus(nexus_dir, torch.float32, Placement(3), used.router, False)
    monkeypatch.setattr(
        model, "gradient_checkpointing_enable", lambda **values: given.update(values)
    )
    start_engine(model, {"zero_optimization": {"stage": 2}}, used, split_batch(used.training, 8))
    wanted = {"gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    assert given == ({} if kind in ("auto", "none") else wanted)


def test_the_recipes_training_reaches_deepspeed():
    used = config()
    used.training.beta1, used.training.beta2, used.training.weight_decay, used.training.lr = (
        0.8,
        0.97,
        0.3,
        4e-3,
    )
    used.training.clip = 0.25
    values = deepspeed_config({"zero_optimization": {"stage": 2}}, used, Batch(3, 4))
    adam = values["optimizer"]["params"]
    assert values["optimizer"]["type"] == "AdamW"
    assert (adam["lr"], adam["betas"], adam["eps"], adam["weight_decay"]) == (
        4e-3,
        [0.8, 0.97],
        1e-8,
        0.3,
    )
    assert values["gradient_clipping"] == 0.25
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (
        3,
        4,
    )
    for dtype in ("fp32", "bf16"):
        used.model.dtype = dtype
        assert deepspeed_config({"zero_optimization": {"stage": 2}}, used, Batch(1, 1))["bf16"][
            "enabled"
        ] == (dtype == "bf16")


def test_a_rate_reaches_every_group_times_its_scale():
    groups = [{"lr": 9.0}, {"lr": 9.0, "lr_scale": 0.05}, {"lr": 9.0, "lr_scale": 1.0}]
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 2e-3)
    assert [group["lr"] for group in groups] == [2e-3, pytest.approx(1e-4), 2e-3]


def test_a_partitioned_matrix_is_still_decayed():
    model = torch.nn.Linear(4, 3)
    model.weight.ds_shape = model.weight.shape
    model.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    groups = {group["name"]: group for group in parameter_groups(model, Config().training, 1.0)}
    assert groups["matrices"]["params"] == [model.weight]
    assert groups["vectors"]["weight_decay"] == 0.0


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_adamw_is_fused_but_on_cpus_that_train(monkeypatch, cpu, offload):
    monkeypatch.setattr(internals, "on_cpu", lambda: cpu)
    zero = {"stage": 2, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    adam = deepspeed_config({"zero_optimization": zero}, config(), Batch(1, 1))["optimizer"][
        "params"
    ]
    assert adam.get("fused", False) == (offload or not cpu) and adam["torch_adam"]


def test_attention_is_torchs_scaled_dot_product_by_default(nexus_dir):
    nexus = load_nexus(nexus_dir, torch.float32, Placement(3), Config().router, False)
    assert nexus.config._attn_implementation == "sdpa"
    assert new_dense(Config().model, 50, 0, 0).config._attn_implementation == "sdpa"


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kernels", "stage", "device", "width", "expected"),
    [
        ("auto", 2, CPU, 2048, False),
        ("auto", 1, GPU, 2048, True),
        ("auto", 1, GPU, 2047, False),
        ("auto", 3, GPU, 2048, False),
        ("eager", 2, GPU, 2048, False),
        ("compiled", 2, CPU, 16, True),
    ],
)
def test_which_layers_are_compiled(kernels, stage, device, width, expected, monkeypatch):
    monkeypatch.setattr(engine_module, "check_compiler", lambda *_: None)
    assert wants_compiled(kernels, stage, device, width) is expected


def test_compiled_layers_are_not_for_zero_3():
    expected = r"^training\.layer_kernels: found compiled and ZeRO stage 3; expected stage 1 or 2"
    with pytest.raises(LayoutError, match=expected):
        wants_compiled("compiled", 3, GPU, 1024)


def test_one_rank_without_a_compiler_is_enough(monkeypatch):
    monkeypatch.setattr(engine_module, "check_compiler", lambda *_: None)
    monkeypatch.setattr(engine_module, "together", lambda action: [action(), "no Triton there"])
    with pytest.warns(UserWarning, match="^no Triton there; until then a step is slower"):
        assert wants_compiled("auto", 2, GPU, 2048) is False


def test_without_a_compiler_auto_warns_and_only_what_asks_for_it_stops(monkeypatch):
    def failing(device, setting):
        raise ConfigError(f"{setting}: torch.compile failed")

    monkeypatch.setattr(engine_module, "check_compiler", failing)
    with pytest.warns(UserWarning, match="layer_kernels: .*; until then a step is slower"):
        assert wants_compiled("auto", 2, GPU, 2048) is False
    with pytest.raises(ConfigError, match=r"layer_kernels: torch\.compile failed"):
        wants_compiled("compiled", 2, CPU, 1024)
