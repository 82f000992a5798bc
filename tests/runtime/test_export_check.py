"""The check of an export: other kernels pass it at any depth, and each kind of mistake in what was
written is refused by both of its halves."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_models import OTHER, make_model
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import (
    expert_name,
    gate_name,
    open_moe,
    shared_name,
    stored,
)
from nexus_ds.checkpoint.records import TrainStep
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import TensorReader, overwrite
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime import export as exporting
from nexus_ds.runtime import watchdog
from nexus_ds.runtime.export import export
from nexus_ds.runtime.export_check import (
    BOUNDS,
    PROBE_TOKENS,
    Seen,
    _Comparison,
    _cores_for,
    bytes_at_once,
    check_computes,
    check_written,
    held_hashes,
    observe,
)
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.settings import Config, RouterConfig

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "float32", BF16: "bfloat16"}
SIZES = replace(OTHER, hidden=64, heads=2, kv_heads=2, ffn=96, experts=4, top_k=1, tied=True)
WORKER = Path(__file__).parents[1] / "export_worker.py"
LAYER = 1  # in which the mistakes are made


class Engine:
    """What an export asks of DeepSpeed's engine."""

    def __init__(self, model):
        self.module = model

    def __call__(self, **inputs):
        return self.module(**inputs)


def deep(out, layers, dtype):
    """Save a random mixture whose layers add as much as they are given, with norms that differ."""
    make_model(out, replace(SIZES, layers=layers))
    tensors, generator = load_file(out / "model.safetensors"), torch.Generator().manual_seed(1)
    sidecar = read_sidecar(out)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor *= tensor.shape[1] ** -0.5 / 0.02
        if "norm" in name:
            tensor.uniform_(0.7, 1.3, generator=generator)
    tensors |= {gate_name(i): expert_embeddings(sidecar, i, dtype) for i in range(layers)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"dtype": NAMES[dtype]}
    (out / "config.json").write_text(json.dumps(config))
    return out


def engine_of(directory, dtype):
    return Engine(load_nexus(directory, dtype, Placement(4), RouterConfig(), False).eval())


def probe():
    return torch.randint(900, (2, 200), generator=torch.Generator().manual_seed(2))


def table(directory):
    return stored(open_moe(directory)[0])


# What may be wrong -------------------------------------------------------------------------------
# Each returns the tensors that stand in other places, by name.


def one_expert_swapped(read):
    names = [
        [expert_name(LAYER, e, part) for part in ("gate_proj", "up_proj", "down_proj")]
        for e in (0, 1)
    ]
    pairs = [*zip(*names, strict=True), *zip(*reversed(names), strict=True)]
    return {name: read(other) for name, other in pairs}


def one_row_of_a_router_moved(read):
    return {gate_name(LAYER): read(gate_name(LAYER))[[1, 0, 2, 3]]}


def a_shared_down_proj_not_doubled(read):
    name = shared_name(LAYER, "down_proj")
    return {name: read(name) / 2}


def a_norm_of_another_layer(read):
    name = "model.layers.{}.post_attention_layernorm.weight"
    return {name.format(LAYER): read(name.format(LAYER - 1))}


FAULTS = (
    one_expert_swapped,
    one_row_of_a_router_moved,
    a_shared_down_proj_not_doubled,
    a_norm_of_another_layer,
)
by_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
by_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def with_fault(directory, out, fault):
    """Copy a checkpoint and make one mistake in the copy."""
    shutil.copytree(directory, out)
    reader = TensorReader(out)
    for name, tensor in fault(TensorReader(directory).read).items():
        overwrite(reader.info(name), tensor)
    return out


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Mixtures of 4 layers by dtype."""
    root = tmp_path_factory.mktemp("mixtures")
    return {dtype: deep(root / NAMES[dtype], 4, dtype) for dtype in (FP32, BF16)}


# Bit by bit --------------------------------------------------------------------------------------


@by_dtype
def test_what_is_written_as_it_was_held_passes(alone, mixtures, dtype):
    directory = mixtures[dtype]
    held = held_hashes(engine_of(directory, dtype).module, table(directory), dtype)
    # P of two maps and what it reads, in each layer, in place of the rows
    assert len(held) == len(TensorReader(directory).names()) + 4 * (2 + 1 - 1)
    check_written(directory, dtype, held)


@by_fault
@by_dtype
def test_every_mistake_is_a_difference_of_bits(alone, tmp_path, mixtures, fault, dtype):
    directory = mixtures[dtype]
    held = held_hashes(engine_of(directory, dtype).module, table(directory), dtype)
    wrong = with_fault(directory, tmp_path / "wrong", fault)
    first = min(fault(TensorReader(directory).read))
    with pytest.raises(CheckpointError) as refusal:
        check_written(wrong, dtype, held)
    said = str(refusal.value)
    assert f"tensors on disk are not what was trained; the first, '{first}', holds" in said
    assert "expected the engine's bits; nothing was exported, the training state is kept" in said
    if fault is one_expert_swapped:
        assert f"holds what belongs under '{expert_name(LAYER, 1, 'down_proj')}'" in said


def test_a_sidecar_with_domains_in_another_order_is_refused(alone, tmp_path, mixtures):
    """Rows that follow it are P(D) all the same: only the engine knows the order."""
    directory = shutil.copytree(mixtures[BF16], tmp_path / "wrong")
    held = held_hashes(engine_of(directory, BF16).module, table(directory), BF16)
    sidecar = read_sidecar(directory)
    write_sidecar(directory, replace(sidecar, vectors=sidecar.vectors[[1, 0, 2, 3]]))
    reader = TensorReader(directory)
    for layer in range(4):
        overwrite(
            reader.info(gate_name(layer)), expert_embeddings(read_sidecar(directory), layer, BF16)
        )
    with pytest.raises(CheckpointError, match="domain embeddings of the sidecar, layer 0"):
        check_written(directory, BF16, held)


def test_a_dense_model_is_compared_too(alone, tmp_path, dense_dir):
    directory = shutil.copytree(dense_dir, tmp_path / "dense")
    engine = Engine(load_stock(directory, FP32).eval())
    held = held_hashes(engine.module, {}, FP32)
    check_written(directory, FP32, held)
    seen = observe(engine, torch.arange(20)[None])
    assert check_computes(directory, FP32, seen).flips == 0
    reader = TensorReader(directory)
    name = "model.layers.0.self_attn.{}_proj.weight"
    overwrite(reader.info(name.format("q")), reader.read(name.format("k")))
    with pytest.raises(CheckpointError, match=r"holds what belongs under .*k_proj"):
        check_written(directory, FP32, held)
    with pytest.raises(CheckpointError, match="layer 0 differs"):
        check_computes(directory, FP32, seen)


# What it computes --------------------------------------------------------------------------------


@by_dtype
def test_the_engines_own_checkpoint_computes_what_it_did(mixtures, dtype):
    seen = observe(engine_of(mixtures[dtype], dtype), probe())
    assert len(seen.tokens_1S[0]) == PROBE_TOKENS == len(seen.states[-1])
    found = check_computes(mixtures[dtype], dtype, seen)
    assert found.tokens == PROBE_TOKENS and found.device == "cpu"
    assert found.logits <= (1e-6 if dtype == FP32 else 2e-2)
    assert "all tensors are the engine's bit by bit; 128 tokens on cpu" in found.describe()


def test_no_graph_keeps_the_layers_that_were_read(mixtures, monkeypatch):
    judge, given = _Comparison.judge_logits, []
    monkeypatch.setattr(
        _Comparison, "judge_logits", lambda self, x_2SV: given.append(x_2SV) or judge(self, x_2SV)
    )
    check_computes(mixtures[FP32], FP32, observe(engine_of(mixtures[FP32], FP32), probe()))
    [logits_2SV] = given
    assert logits_2SV.grad_fn is None


@by_fault
def test_in_fp32_every_mistake_computes_something_else(tmp_path, mixtures, fault):
    seen = observe(engine_of(mixtures[FP32], FP32), probe())
    wrong = with_fault(mixtures[FP32], tmp_path / "wrong", fault)
    with pytest.raises(CheckpointError, match="does not compute what was trained: given the"):
        check_computes(wrong, FP32, seen)


def test_another_configuration_computes_something_else(tmp_path, mixtures):
    """No tensor shows it: the second half is there for this, too."""
    seen = observe(engine_of(mixtures[BF16], BF16), probe())
    wrong = shutil.copytree(mixtures[BF16], tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    for key, value, said in (
        ("rms_norm_eps", 0.5, "of layer 0"),
        ("norm_topk_prob", True, "layer 0 differs"),
        ("hidden_act", "gelu", "layer 0 differs"),
        ("num_experts", 5, "tensors are missing"),
    ):
        (wrong / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=said):
            check_computes(wrong, BF16, seen)


def test_the_device_is_asked_for_a_layers_room_when_training_has_let_go_of_it(
    monkeypatch, mixtures
):
    seen, asked = observe(engine_of(mixtures[BF16], BF16), probe()), []
    monkeypatch.setattr(internals, "empty_cache", lambda: asked.append("freed"))
    monkeypatch.setattr(
        internals, "device_with_room", lambda size: asked.append(size) or torch.device("cpu")
    )
    check_computes(mixtures[BF16], BF16, seen)
    room = bytes_at_once(TensorReader(mixtures[BF16]), 4 * seen.logits_SV.numel())
    assert asked == ["freed", room]
    whole = sum(path.stat().st_size for path in mixtures[BF16].glob("*.safetensors"))
    assert room - 4 * seen.logits_SV.numel() < 0.6 * whole  # of 4 layers and the embedding


def test_a_pass_that_had_to_leave_the_gpu_has_half_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    cpu, gpu, before = torch.device("cpu"), torch.device("cuda"), torch.get_num_threads()
    with _cores_for(cpu, gpu):
        assert torch.get_num_threads() == max(before, 3)
    for device, engine in ((cpu, cpu), (gpu, gpu)):
        with _cores_for(device, engine):
            assert torch.get_num_threads() == before


def kernels_differ():
    return "avx512f" in Path("/proc/cpuinfo").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not kernels_differ(), reason="this CPU has one set of kernels")
def test_other_kernels_pass_at_any_depth_and_each_mistake_is_refused_under_them(tmp_path):
    """The engine computes with this CPU's kernels, the check with those of AVX2. The 0.9
    quantile of the logits' differences was judged once: it went beyond its bound of 0.02 on an
    AVX-512 machine with nothing wrong."""
    directories = [deep(tmp_path / str(layers), layers, BF16) for layers in (18, 36)]
    passes = {path.name: vars(observe(engine_of(path, BF16), probe())) for path in directories}
    torch.save(passes, tmp_path / "seen.pt")
    for fault in FAULTS:
        directories.append(with_fault(tmp_path / "18", tmp_path / f"18-{fault.__name__}", fault))
    avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, WORKER, tmp_path / "seen.pt", tmp_path / "found.json", *directories]
    subprocess.run(command, env=os.environ | avx2, check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    for layers in ("18", "36"):
        print(layers, found[layers])
        assert found[layers]["refused"] == ""
        assert found[layers]["layer"] < 0.5
    for fault in FAULTS:
        said = found[f"18-{fault.__name__}"]["refused"]
        print(fault.__name__, said)
        assert f"layer {LAYER} " in said


# Bounds ------------------------------------------------------------------------------------------


def moved(found_SV, tokens, by):
    """Return the logits with those of the first `tokens` tokens off by `by` of the largest."""
    changed_SV = found_SV.clone()
    changed_SV[:tokens, 0] += by * found_SV.abs().max()
    return changed_SV


def test_in_fp32_no_token_may_differ(mixtures):
    seen = observe(engine_of(mixtures[FP32], FP32), probe())
    near = replace(seen, logits_SV=moved(seen.logits_SV, 1, 5e-6))
    assert check_computes(mixtures[FP32], FP32, near).logits == pytest.approx(5e-6, rel=0.2)
    message = "logits differ by .* of the largest, expected at most 1e-05; nothing"
    with pytest.raises(CheckpointError, match=message):
        far = replace(seen, logits_SV=moved(seen.logits_SV, 1, 3e-5))
        check_computes(mixtures[FP32], FP32, far)


def test_what_is_no_number_is_no_agreement(mixtures):
    seen = observe(engine_of(mixtures[FP32], FP32), probe())
    with pytest.raises(CheckpointError, match="logits differ by nan"):
        check_computes(
            mixtures[FP32],
            FP32,
            replace(seen, logits_SV=torch.full_like(seen.logits_SV, torch.nan)),
        )
    states = [*seen.states[:2], torch.full_like(seen.states[2], torch.nan), *seen.states[3:]]
    with pytest.raises(CheckpointError, match="layer 1 differs nan times"):
        check_computes(mixtures[FP32], FP32, replace(seen, states=states))
    with pytest.raises(CheckpointError, match="embeddings of the probe's tokens"):
        check_computes(mixtures[FP32], FP32, replace(seen, states=[states[1], *states[1:]]))


@pytest.fixture
def comparison():
    """Of 8 tokens, vocabulary 3."""
    tokens_1S = torch.zeros(1, 8, dtype=torch.int64)
    return _Comparison(Seen(tokens_1S, [], [], torch.randn(8, 3)), BOUNDS[BF16])


def test_the_checkpoints_own_way_is_judged_where_routes_agree(comparison):
    engine_SV = comparison.seen.logits_SV
    own_SV = moved(engine_SV, 3, 0.06)
    comparison.judge_logits(torch.stack([engine_SV, own_SV]))
    comparison.same_S[3:] = False
    with pytest.raises(CheckpointError, match="expected at most 5e-02"):
        comparison.judge_logits(torch.stack([engine_SV, own_SV]))
    comparison.same_S = ~comparison.same_S
    found = comparison.judge_logits(torch.stack([engine_SV, own_SV]))
    assert found.logits == 0 and found.flips == 3 and found.tokens == 8


def test_the_mean_loss_has_its_bound(comparison):
    engine_SV = comparison.seen.logits_SV
    comparison.same_S[:] = False  # whatever way a token took
    with pytest.raises(
        CheckpointError, match=r"the mean loss differs by .*, expected at most 5e-02"
    ):
        comparison.judge_logits(torch.stack([engine_SV, moved(engine_SV, 8, 0.2)]))


def route(*experts):
    return torch.nn.functional.one_hot(torch.tensor(experts), 3).bool()


def test_another_expert_is_taken_near_a_tie_alone_and_by_half_of_the_tokens_at_most(comparison):
    logits_SE = torch.tensor(
        [[1.0, 0.95, -1.0], [1.0, 0.5, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    )
    comparison._judge_routes(7, logits_SE, route(0, 0, 0, 1), route(1, 0, 0, 1))
    assert comparison.judged_S.tolist() == [False, True, True, True]
    message = (
        "the router of layer 7 sends 1 of 4 tokens to other experts, 1 of them with logits apart "
        "by more than 1e-01 of their size, up to .*; expected none of these, and at most 50% near a"
    )
    with pytest.raises(CheckpointError, match=message):
        comparison._judge_routes(7, logits_SE, route(0, 0, 0, 1), route(0, 1, 0, 1))
    tied_SE = torch.ones(4, 3)
    with pytest.raises(CheckpointError, match="sends 3 of 4 tokens to other experts, 0 of them"):
        comparison._judge_routes(7, tied_SE, route(0, 0, 0, 1), route(1, 1, 1, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_router_logits_that_are_no_numbers_are_refused(comparison, value):
    """All comparisons with NaN are false: no route would be far, though none was compared."""
    logits_SE = torch.ones(4, 3)
    logits_SE[2, 1] = value
    same_SE = route(0, 0, 0, 1)
    with pytest.raises(CheckpointError, match="the router of layer 7 sends 0 of 4 tokens"):
        comparison._judge_routes(7, logits_SE, same_SE, same_SE)


def test_the_last_norm_and_output_layer_have_their_own_bound(comparison):
    """2% of the largest logit in bf16, given the engine's states."""
    engine_SV = comparison.seen.logits_SV
    comparison.judge_logits(torch.stack([moved(engine_SV, 1, 0.019), engine_SV]))
    with pytest.raises(CheckpointError, match=r"logits differ by 2.1e-02 .*at most 2e-02"):
        comparison.judge_logits(torch.stack([moved(engine_SV, 1, 0.021), engine_SV]))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_layer_that_adds_little_may_round_the_sum_once_more(dtype):
    """Next to a token's own size what the layer adds is nothing, and so is a share of it."""
    given_SH = torch.ones(4, 16, dtype=dtype)
    # one digit more or less of the sum, in one of 16 places
    ulp = torch.finfo(dtype).eps
    seen = Seen(torch.zeros(1, 4, dtype=torch.int64), [given_SH, given_SH], [], torch.zeros(4, 3))
    comparison = _Comparison(seen, BOUNDS[dtype])
    comparison.given_2SH = torch.stack([given_SH, given_SH])
    judge = comparison._layer_judge(0)

    def other(digits, places):
        states_2SH = torch.stack([given_SH, given_SH])
        states_2SH[0, 2, :places] += digits * ulp
        return states_2SH

    judge(None, None, other(1, 1))
    assert 0 < comparison.found.layer <= 1
    with pytest.raises(CheckpointError, match=r"layer 0 differs .* and .* of the sum"):
        judge(None, None, other(8, 16))
    # what a layer adds has its own bound, of all that it adds
    seen.states[1] = given_SH + 1
    comparison.given_2SH = torch.stack([given_SH, given_SH])
    moved_2SH = torch.stack([seen.states[1], given_SH])
    moved_2SH[0] += 0.5 * BOUNDS[dtype].layer
    judge(None, None, moved_2SH)


# The whole export --------------------------------------------------------------------------------


def exported(directory, out, dtype, engine=None):
    config = Config()
    config.model.path = str(directory)
    step = TrainStep(stage="moe", steps=1, tokens=0, mixture={})
    engine = engine or engine_of(directory, dtype)
    return export(engine, config, dtype, out, probe(), step)


@pytest.fixture
def whole(mixtures, tmp_path, nexus_dir):
    """A checkpoint with the files of a tokenizer."""
    directory = shutil.copytree(mixtures[BF16], tmp_path / "whole")
    for path in nexus_dir.glob("*token*"):
        shutil.copyfile(path, directory / path.name)
    return directory


def test_an_export_says_how_near_it_is(alone, tmp_path, whole, monkeypatch):
    at, minutes = watchdog.at, {}

    def note(phase, step=0, **more):
        minutes[phase] = more["minutes"]
        at(phase, step, **more)

    monkeypatch.setattr(watchdog, "at", note)
    found = exported(whole, tmp_path / "out", BF16)
    check_places(minutes, TensorReader(whole))
    assert found.tokens == PROBE_TOKENS and found.loss <= 1e-3
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(
        TensorReader(whole).names()
    )


def test_the_engine_is_looked_at_without_dropout(alone, tmp_path, whole):
    """It comes out of training, where attention drops what the checkpoint will not drop."""
    engine = engine_of(whole, BF16)
    for layer in engine.module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    engine.module.train()
    assert exported(whole, tmp_path / "out", BF16, engine).loss <= 1e-3


def check_places(minutes, reader):
    """Each layer, in writing, hashing, reading and computing, is a place of its own, and none but
    the small files may take longer than a layer."""
    long = {phase for phase, most in minutes.items() if most > watchdog.LAYER}
    assert long == {"the export's other files, and hashes"}
    for layer in range(2):
        for phase in ("the writing of experts", "the hashes of experts", "the check of what it"):
            assert any(said.startswith(phase) and f"layer {layer}" in said for said in minutes)
    assert {f"the reading of {name}" for name in reader.names()} <= minutes.keys()
    shared = "model.layers.1.mlp.shared_expert.down_proj.weight"
    dense = "model.layers.1.self_attn.q_proj.weight"
    assert {f"the hash of {shared}", f"the hash of {dense}"} <= minutes.keys()
    assert f"the writing of {dense}" in minutes


@by_fault
def test_a_mistake_in_gathering_is_refused_and_nothing_stays(
    alone, tmp_path, monkeypatch, whole, fault
):
    wrong = fault(TensorReader(whole).read)
    write = exporting._Sink.write
    monkeypatch.setattr(
        exporting._Sink,
        "write",
        lambda sink, name, tensor: write(sink, name, wrong.get(name, tensor)),
    )
    with pytest.raises(CheckpointError, match="not what was trained"):
        exported(whole, tmp_path / "out", BF16)
    # and by the other half alone
    monkeypatch.setattr(exporting, "check_written", lambda *_: None)
    with pytest.raises(CheckpointError, match="does not compute what was trained"):
        exported(whole, tmp_path / "out", BF16)
    assert not list(tmp_path.glob("*out*"))
