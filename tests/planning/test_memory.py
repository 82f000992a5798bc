"""Planned bytes against real ranks, and against sums made by hand.

Model states are within 1% of what ranks allocate, activations within 8%.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from launch import finish, fork_ranks
from plan_models import LARGE, LENGTH, NAMES, OTHER, SMALL, make_model

from nexus_ds.planning import assumptions
from nexus_ds.planning.layout import Layout, deepspeed_json
from nexus_ds.planning.memory import activations, memory, model_states
from nexus_ds.planning.sizes import Sizes

WORKER = Path(__file__).parents[1] / "plan_worker.py"
WORLD, MICRO = 2, 6


@dataclass(frozen=True)
class Case:
    """One real run; `id` is its name in the report."""

    stage: int
    expert: int
    dtype: str
    sizes: Sizes = SMALL
    offload: str = "none"
    accumulation: int = 1
    checkpointing: str = "none"
    persistent: int = 0
    group: int = 0
    """Elements at which groups of experts are cut; 0: DeepSpeed's own number, far above these
    models."""
    gradients: str = "model"

    @property
    def id(self):
        parts = [f"z{self.stage}", f"ep{self.expert}", self.dtype, NAMES[self.sizes]]
        more = {
            "offload_": self.offload,
            "accumulate": self.accumulation,
            "": self.checkpointing,
            "group": self.group,
            "persist": self.persistent,
            "gradients_": self.gradients,
        }
        parts += [
            f"{name}{value}" for name, value in more.items() if value not in ("none", 0, 1, "model")
        ]
        return "-".join(parts)

    def layout(self):
        return Layout(
            stage=self.stage,
            offload=self.offload,
            expert=self.expert,
            world=WORLD,
            micro=MICRO,
            accumulation=self.accumulation,
            checkpointing=self.checkpointing,
            gradient_dtype=self.gradients,
        )


CASES = [Case(2, 1, "bf16", group=200_000), Case(3, 2, "fp32", sizes=OTHER)]
FULL = [
    Case(2, 2, "bf16", sizes=LARGE),
    Case(3, 2, "bf16", sizes=LARGE),
    Case(3, 1, "fp32", sizes=LARGE),
    Case(2, 1, "bf16"),
    Case(2, 2, "bf16", sizes=OTHER),
    Case(2, 1, "fp32", sizes=OTHER),
    Case(2, 2, "fp32"),
    Case(3, 1, "bf16"),
    Case(3, 2, "bf16", persistent=20_000),
    Case(3, 1, "fp32"),
    Case(1, 1, "bf16"),
    Case(1, 2, "fp32", checkpointing="non_reentrant"),
    Case(2, 2, "bf16", checkpointing="reentrant", accumulation=2),
    Case(2, 2, "bf16", offload="optimizer", accumulation=2),
    Case(2, 2, "bf16", accumulation=2, gradients="fp32"),
    Case(3, 2, "bf16", accumulation=2, gradients="fp32"),
    Case(1, 1, "fp32", offload="optimizer"),
    Case(3, 2, "bf16", offload="optimizer"),
    Case(3, 1, "bf16", offload="optimizer+parameters"),
]


def check(case, tmp_path, monkeypatch):
    # else weights this small are never cut
    monkeypatch.setattr(assumptions, "PERSISTENT_ELEMENTS", case.persistent)
    monkeypatch.setattr(assumptions, "BUCKET_ELEMENTS", 100_000)
    if case.group:
        monkeypatch.setattr(assumptions, "EXPERT_GROUP_ELEMENTS", case.group)
    checkpoint, layout = make_model(tmp_path / "model", case.sizes), case.layout()
    values = deepspeed_json(case.sizes, layout)
    for key in ("offload_optimizer", "offload_param"):
        if key in values["zero_optimization"]:
            # there is no device to pin it for
            values["zero_optimization"][key]["pin_memory"] = False
    words = [
        f"model.dtype={case.dtype}",
        f"parallel.grouped_mm={str(case.dtype == 'bf16').lower()}",
        f"parallel.expert={case.expert}",
        f"data.sequence_length={LENGTH}",
        f"training.batch_size={WORLD * MICRO * case.accumulation}",
        f"training.micro_batch_size={MICRO}",
        f"training.activation_checkpointing={case.checkpointing}",
        f"training.gradient_dtype={case.gradients}",
    ]
    options = [f"group={case.group}"] if case.group else []
    command = [WORKER, checkpoint, tmp_path / "out", json.dumps(values), *options, *words]
    finish(fork_ranks(command, WORLD))
    found = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(WORLD)]
    width = {"fp32": 4, "bf16": 2}[case.dtype]
    states = model_states(case.sizes, layout, width)
    allocated, planned = max(f["states"] for f in found), states.gpu + states.host
    print(
        f"{case.id}: model states planned {planned:,.0f}, allocated {allocated:,}: "
        f"{planned / allocated - 1:+.2%}"
    )
    assert allocated == pytest.approx(planned, rel=0.01), found
    if case.offload == "none":
        for part in ("weights", "gradients", "optimizer"):
            assert max(f[part] for f in found) == pytest.approx(getattr(states, part), rel=0.03), (
                part,
                found,
            )
    # under ZeRO-3 gathered weights are kept too, which the plan counts as buffers
    if case.stage < 3:
        tokens = layout.micro * LENGTH
        monkeypatch.setattr(assumptions, "ROUTING_IMBALANCE", 1.0)
        planned = activations(case.sizes, layout, width, tokens)
        kept = sum(f["activations"] - f["head"] for f in found) / WORLD
        assert kept == pytest.approx(planned, rel=0.08), found
        assert max(f["head"] for f in found) == width * case.sizes.vocabulary * case.sizes.hidden


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_real_ranks_allocate_what_was_planned(case, tmp_path, monkeypatch):
    check(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.id)
def test_real_ranks_allocate_what_was_planned_in_every_layout(case, tmp_path, monkeypatch):
    check(case, tmp_path, monkeypatch)


# By hand -----------------------------------------------------------------------------------------
# A model of 2 layers, hidden 1024, vocabulary 16,000, output layer of its own, 16 heads of 64 with
# 4 for keys and values, inner width 2048; as a mixture with 4 experts, top-1, P from 384 to
# 2 x 1024 and from 1024 to 1024. Elements:
WORDS = 16_384_000  # embedding, and output layer: 16,000 x 1024
# 2 x 16,384,000; a layer: 2 x 1024^2 (q, o), 2 x 256 x 1024 (k, v), 3 x 1024 x 2048 = 8,912,896
MATRICES = 50_593_792
VECTORS = 5_120  # 2 norms a layer and the last: 5 x 1024; the only ones below ZeRO-3's 100,000
ROUTER = 3_670_016  # 2 layers x (384 x 2048 + 1024^2)
LAYER = 8_912_896 + 2_048 + 1_835_008  # without routed experts: matrices, norms, P
# 2 layers x 4 experts x 6,291,456; a rank holds half of them under expert parallel 2
EXPERTS = 50_331_648
# in the checkpoint instead of P: 2 layers x 1024 x (4 experts + the shared expert's gate)
DENSE_MODEL, MIXTURE = 50_598_912, 104_600_576  # all that is trained
# A token's activations in one layer, bytes in bf16 (in fp32):
# - two norms, each an fp32 copy and two results: 2 x (4 + 2 x 2) x 1024 = 16,384 (24,576);
# - attention: q, output, k and v, 2 x 2 x (1024 + 256) + 4 a head = 5,184 (10,304);
# - feed-forward: gate, SiLU, up, product: 4 x 2 x 2048 = 16,384 (32,768);
# - a routed expert half of it and 2 x 2 x 1024 for its rows: 12,288 (24,576), 1.25 times as much
#   where the busiest rank has more;
# - scores and indices: 16 x 4 + 100.
# Outside the layers: (4 + 2 x 2) x 1024 = 8,192 (12,288).
# Logits: 8 bytes each, of at most 2^27 // 16,000 = 8,388 tokens.
HAND = Sizes(
    vocabulary=16_000,
    hidden=1_024,
    layers=2,
    heads=16,
    kv_heads=4,
    head_size=64,
    ffn=2_048,
    tied=False,
    experts=4,
    projection=(384 * 2_048, 1_024 * 1_024),
)
HAND_DENSE = replace(HAND, experts=0, projection=())
LOGITS = "logits and gradient of the output layer"
# what it is: sizes, layout, bytes of an element, bytes on a GPU by part, bytes of a rank in main
# memory
GOLDEN = {
    "ZeRO-1, dense": (
        HAND_DENSE,
        {"stage": 1, "micro": 32},
        2,
        {
            "weights": 2 * DENSE_MODEL,
            "gradients": 2 * DENSE_MODEL,
            "optimizer states": 12 * DENSE_MODEL / 4,
            "gradient buckets": 2 * 50_000_000,
            "activations": 16_384 * (2 * 37_952 + 8_192),
            LOGITS: 8 * 8_388 * 16_000 + 2 * WORDS,
        },
        0,
    ),
    "ZeRO-1, mixture, recomputed, fp32": (
        HAND,
        {"stage": 1, "micro": 32, "accumulation": 2, "checkpointing": "non_reentrant"},
        4,
        {
            "weights": 4 * MIXTURE,
            "gradients": 4 * MIXTURE,
            "optimizer states": 12 * MIXTURE / 4,
            "gradient buckets": 4 * 50_000_000,
            "activations": 16_384 * (2 * 4 * 1_024 + 12_288),  # the layers' inputs
            # once more, and half of it as gradients: above the logits
            "backward pass of a layer": 16_384 * 92_388 * 1.5,
        },
        0,
    ),
    "ZeRO-1 on one GPU: its update is the peak": (
        HAND_DENSE,
        {"stage": 1, "world": 1, "micro": 1},
        4,
        {
            "weights": 4 * DENSE_MODEL,
            "gradients": 4 * DENSE_MODEL,
            "optimizer states": 12 * DENSE_MODEL,
            "gradient buckets": 4 * 50_000_000,
            "gradients of the update": (4 + 4) * MATRICES,  # in fp32 and flat, of the largest group
        },
        0,
    ),
    "ZeRO-1, mixture, expert parallel, optimizer on the CPU": (
        HAND,
        {"stage": 1, "expert": 2, "offload": "optimizer"},
        2,
        {
            "weights": 2 * (MIXTURE - EXPERTS / 2),
            "gradients": 2 * (MIXTURE - EXPERTS / 2),
            "gradient buckets": 2 * 50_000_000,
            "offload buffer": 2 * WORDS,
            "activations": 1_024 * (2 * 53_476 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        # masters and moments, fp32 gradients, new weights: of a quarter of all but the experts, of
        # half of its own experts
        (12 + 4 + 2) * (54_268_928 / 4 + EXPERTS / 2 / 2),
    ),
    "ZeRO-2, dense": (
        HAND_DENSE,
        {"stage": 2},
        2,
        {
            "weights": 2 * DENSE_MODEL,
            # The second quarter of the matrices ends with layer 0 and begins amid the embedding,
            # which is kept whole; a quarter of the vectors lies in two of them.
            "gradients": 2 * (WORDS + 8_912_896 + 2 * 1_024),
            "optimizer states": 12 * DENSE_MODEL / 4,
            "gradient buckets": 2 * 2 * 50_000_000,  # one is filled while the other is reduced
            "gradients in transit": 2 * WORDS,
            "activations": 1_024 * (2 * 37_952 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        0,
    ),
    "ZeRO-2, mixture, expert parallel, accumulated": (
        HAND,
        {"stage": 2, "expert": 2, "accumulation": 2},
        2,
        {
            "weights": 2 * (MIXTURE - EXPERTS / 2),
            # The third quarter: layer 1 and the output layer, two vectors, both maps of P in layer
            # 1; half of 6 expert tensors of 2 x 2,097,152.
            "gradients": 2 * (8_912_896 + WORDS + 2 * 1_024 + 1_835_008 + 3 * 4_194_304),
            "optimizer states": 12 * (54_268_928 / 4 + EXPERTS / 2 / 2),
            "gradient buckets": 2 * 2 * 50_000_000,
            "gradients in transit": 2 * WORDS
            + 2 * (8_912_896 + WORDS + 2 * 1_024 + 1_835_008 + 3 * 4_194_304),
            "activations": 1_024 * (2 * 53_476 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        0,
    ),
    "ZeRO-2, mixture, optimizer on the CPU, accumulated": (
        HAND,
        {"stage": 2, "offload": "optimizer", "accumulation": 2},
        2,
        {
            "weights": 2 * MIXTURE,
            "gradient buckets": 2 * 2 * 50_000_000,
            "gradients in transit": 2 * WORDS,
            "offload buffer": 2 * WORDS,
            "activations": 1_024 * (2 * 50_404 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        # and the sum of the passes' gradients
        (12 + 4 + 2 + 2) * MIXTURE / 4,
    ),
    "ZeRO-3, dense": (
        HAND_DENSE,
        {"stage": 3},
        2,
        {
            "weights": 2 * (DENSE_MODEL / 4 + VECTORS),  # its shard, and what is kept whole
            "gradients": 2 * DENSE_MODEL / 4,
            "optimizer states": 12 * DENSE_MODEL / 4,
            "gradient buckets": 2 * 50_000_000,
            # in use and ahead, and the one that is gathered now
            "gathered parameters": 2 * (2 * 50_000_000 + WORDS),
            "gradients in transit": 2 * 2 * WORDS,
            "activations": 1_024 * (2 * 37_952 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        0,
    ),
    "ZeRO-3, mixture, fp32": (
        HAND,
        {"stage": 3},
        4,
        {
            "weights": 4 * (MIXTURE / 4 + VECTORS),
            "gradients": 4 * MIXTURE / 4,
            "optimizer states": 12 * MIXTURE / 4,
            "gradient buckets": 4 * 50_000_000,
            # a layer at once; of its gradients the experts' come together
            "gathered parameters": 4 * (2 * 50_000_000 + LAYER + 4 * 6_291_456),
            "gradients in transit": 2 * 4 * 4 * 6_291_456,
            "activations": 1_024 * (2 * 92_388 + 12_288),
            LOGITS: 8 * 1_024 * 16_000 + 4 * WORDS,
        },
        0,
    ),
    "ZeRO-3, mixture, expert parallel, optimizer on the CPU": (
        HAND,
        {"stage": 3, "expert": 2, "offload": "optimizer"},
        2,
        {
            "weights": 2 * (54_268_928 / 4 + EXPERTS / 2 / 2 + VECTORS),
            "gradient buckets": 2 * 50_000_000,
            # a layer with two experts is more than the words
            "gathered parameters": 2 * (2 * 50_000_000 + LAYER + 2 * 6_291_456),
            "gradients in transit": 2 * 2 * WORDS,
            "activations": 1_024 * (2 * 53_476 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        (12 + 4 + 2) * (54_268_928 / 4 + EXPERTS / 2 / 2),
    ),
    "ZeRO-3, mixture, all on the CPU": (
        HAND,
        {"stage": 3, "offload": "optimizer+parameters"},
        2,
        {
            "weights": 2 * VECTORS,
            "gradient buckets": 2 * 50_000_000,
            "gathered parameters": 2 * (2 * 50_000_000 + LAYER + 4 * 6_291_456),
            "gradients in transit": 2 * 2 * 4 * 6_291_456,
            "activations": 1_024 * (2 * 50_404 + 8_192),
            LOGITS: 8 * 1_024 * 16_000 + 2 * WORDS,
        },
        (12 + 4 + 2 + 2) * MIXTURE / 4,
    ),
}


# Bytes of a rank's model on its way to the GPU. ZeRO-1/2: the largest group, the matrices, and the
# flat copy of it; ZeRO-3: a dense model whole, of a mixture a layer and once more.
LAYER = 8_912_896 + 2 * 1_024 + 1_835_008  # without experts
LOADED = {
    "ZeRO-1, dense": 2 * 2 * MATRICES,
    "ZeRO-1, mixture, recomputed, fp32": 2 * 4 * MATRICES,
    "ZeRO-1 on one GPU: its update is the peak": 2 * 4 * MATRICES,
    "ZeRO-1, mixture, expert parallel, optimizer on the CPU": 2 * 2 * MATRICES,
    "ZeRO-2, dense": 2 * 2 * MATRICES,
    "ZeRO-2, mixture, expert parallel, accumulated": 2 * 2 * MATRICES,
    "ZeRO-2, mixture, optimizer on the CPU, accumulated": 2 * 2 * MATRICES,
    "ZeRO-3, dense": 2 * DENSE_MODEL,
    "ZeRO-3, mixture, fp32": 2 * 4 * (LAYER + 4 * 6_291_456),
    "ZeRO-3, mixture, expert parallel, optimizer on the CPU": 2 * 2 * (LAYER + 2 * 6_291_456),
    "ZeRO-3, mixture, all on the CPU": 2 * 2 * (LAYER + 4 * 6_291_456),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_plan_is_the_sum_that_is_made_by_hand(case):
    sizes, changes, width, gpu, rank = GOLDEN[case]
    given = {
        "offload": "none",
        "expert": 1,
        "world": 4,
        "micro": 2,
        "accumulation": 1,
        "checkpointing": "none",
    } | changes
    planned = memory(sizes, Layout(**given), width, length=512, local=given["world"])
    gpu = gpu | {
        "allocator (estimated)": 0.06 * sum(gpu.values()),
        "CUDA context (estimated)": 1.2e9,
    }
    start = given["world"] * LOADED[case]
    host = {"processes (estimated)": given["world"] * 4e9}
    # more than the check of the export, everywhere
    host |= {"model on its way to the GPU": start}
    if rank:
        host["states"] = given["world"] * rank * 1.15  # what pinned blocks lose
    assert planned.gpu == pytest.approx(gpu, rel=1e-9)
    assert planned.host == pytest.approx(host, rel=1e-9)
    assert planned.gpu_bytes == pytest.approx(sum(gpu.values()))
    assert planned.host_bytes == pytest.approx(sum(host.values()))


def test_the_larger_of_the_start_and_the_export_counts_and_a_new_model_is_drawn_in_fp32():
    def host(sizes, stage, width=2):
        layout = Layout(
            stage=stage,
            offload="none",
            expert=1,
            world=1,
            micro=1,
            accumulation=1,
            checkpointing="none",
        )
        return memory(sizes, layout, width, length=512, local=1).host

    new = replace(HAND_DENSE, new=True)
    assert host(new, 3)["model on its way to the GPU"] == 4 * DENSE_MODEL
    # the embedding, a tensor of its size, and six copies of the logits of 128 tokens
    check = 2 * 2 * WORDS + 6 * 4 * 128 * 16_000
    assert host(HAND_DENSE, 3)["check of the export"] == check
    # more layers make the check longer and not larger
    assert "check of the export" not in host(replace(HAND, layers=8), 3)
