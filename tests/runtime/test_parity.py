"""DeepSpeed against plain PyTorch (oracle.py): losses over ten AdamW steps, and every gradient of
the first step.

The oracle is one process with all experts; DeepSpeed runs in real ranks (gloo). Gradients are
compared because AdamW hides their scale. Persistence is off under ZeRO-3, else weights this small
are never partitioned.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch
from conftest import make_nexus
from large import make_large
from launch import finish, fork_ranks
from parity import STEPS, batches, settings

from nexus_ds.checkpoint.projection_module import expert_embeddings
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.sidecar import read_sidecar, write_sidecar
from nexus_ds.checkpoint.tensors import TensorReader, overwrite

WORKER = Path(__file__).parents[1] / "parity.py"
BATCH = 8


@dataclass(frozen=True)
class Case:
    """One layout; `id` is its name in the report."""

    stage: int
    world: int
    expert: int
    experts: int = 4
    top_k: int = 1
    accumulation: int = 1
    checkpointing: str = "none"
    grouped: bool = False
    offload: str = ""
    dtype: str = "fp32"
    steps: int = STEPS
    router_input: str = "token"

    @property
    def id(self):
        parts = [
            f"z{self.stage}",
            f"world{self.world}",
            f"ep{self.expert}",
            f"{self.experts}experts",
        ]
        parts += [f"top{self.top_k}"] * (self.top_k > 1) + [f"accumulate{self.accumulation}"] * (
            self.accumulation > 1
        )
        parts += [self.checkpointing] * (self.checkpointing != "none") + ["grouped"] * self.grouped
        parts += [f"offload_{self.offload}"] * bool(self.offload) + [self.dtype] * (
            self.dtype != "fp32"
        )
        return "-".join(parts + [self.router_input] * (self.router_input != "token"))


CASES = [  # a trimmed matrix: two whole layouts, then each other feature once, combined
    Case(3, 2, 2),
    Case(2, 2, 2),
    Case(1, 2, 1, top_k=2, accumulation=2),
    Case(3, 2, 2, experts=3, checkpointing="reentrant", accumulation=2),
    Case(3, 2, 1, checkpointing="non_reentrant", grouped=True),
    Case(3, 2, 2, checkpointing="reentrant", accumulation=2, router_input="context"),
]
FULL = (
    [
        Case(stage, world, expert, experts=experts, top_k=top_k)
        for stage in (1, 2, 3)
        for world, expert in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
        for experts, top_k in ((4, 1), (3, 2), (5, 1))
    ]
    + [Case(stage, 4, expert, experts=7, top_k=2) for stage in (1, 2, 3) for expert in (2, 4)]
    + [
        Case(
            stage,
            2,
            2,
            experts=experts,
            checkpointing=checkpointing,
            accumulation=accumulation,
            grouped=grouped,
        )
        for stage in (1, 2, 3)
        for experts, checkpointing, accumulation, grouped in (
            (3, "reentrant", 2, True),
            (4, "non_reentrant", 4, False),
            (4, "reentrant", 1, False),
        )
    ]
    + [Case(stage, 2, 2, experts=3, offload="optimizer", accumulation=stage) for stage in (1, 2)]
    + [
        Case(3, 2, 2, offload=offload, experts=experts)
        for offload in ("optimizer", "parameters")
        for experts in (3, 4)
    ]
    + [Case(stage, 2, expert, experts=3, dtype="bf16") for stage in (1, 2, 3) for expert in (1, 2)]
    + [
        Case(
            3,
            4,
            4,
            experts=5,
            top_k=2,
            dtype="bf16",
            checkpointing="reentrant",
            offload="parameters",
        )
    ]
    + [
        Case(stage, 2, ep, dtype=dtype, router_input="context")
        for stage, ep, dtype in ((1, 1, "fp32"), (2, 2, "fp32"), (3, 1, "bf16"))
    ]
)


def launch(cases, folder, checkpoint_of):
    """Run cases of one number of ranks in one launch; return losses, norms and first gradients of
    each."""
    runs = [
        {
            "checkpoint": str(checkpoint_of(case)),
            "out": str(folder / case.id),
            "words": [
                f"stage={case.stage}",
                f"accumulation={case.accumulation}",
                f"offload={case.offload}",
                f"steps={case.steps}",
                f"model.dtype={case.dtype}",
                f"parallel.expert={case.expert}",
                f"training.batch_size={BATCH}",
                f"parallel.grouped_mm={str(case.grouped).lower()}",
                f"training.activation_checkpointing={case.checkpointing}",
            ],
        }
        for case in cases
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    finish(fork_ranks([WORKER, folder / "runs.json"], cases[0].world))
    return {
        case: (
            json.loads(Path(f"{run['out']}.json").read_text()),
            torch.load(f"{run['out']}.pt", weights_only=True),
        )
        for case, run in zip(cases, runs, strict=True)
    }


def reference(checkpoint, case):
    """Train the oracle on the very same batches, rank by rank and part by part in one process.

    In bf16 AdamW works on fp32 masters, and the working weights are those rounded, as under
    DeepSpeed.
    """
    config = settings([f"training.batch_size={BATCH}"])
    model = oracle.load(checkpoint, oracle.DTYPES[case.dtype], config.router).train()
    working = dict(model.named_parameters())
    masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in working.items()}
    optimizer = oracle.adamw(masters, config.training, config.router.lr_scale)
    chunks = case.world * case.accumulation
    for layer in model.model.layers:
        layer.mlp.loss_scale = 0.0  # its losses are added below
    losses, norms, first = [], [], None
    for step, batch in enumerate(batches(model.config.vocab_size, BATCH)[: case.steps]):
        total = 0.0
        model.zero_grad()
        for part in batch.chunk(chunks):
            loss, auxiliary = oracle.losses(model, part)
            total += float(loss.detach()) / chunks
            ((loss + auxiliary) / chunks).backward()
        for name, parameter in working.items():
            masters[name].grad = parameter.grad.float()
        if step == 0:
            first = {name: p.grad.clone() for name, p in masters.items()}
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), config.training.clip)))
        optimizer.step()
        for name, parameter in working.items():
            parameter.data.copy_(masters[name].data)
    return {"losses": losses, "norms": norms}, first


# dtype: largest difference of a loss, of the first norm (relative), of a gradient (relative to its
# tensor's largest)
TOLERANCE = {"fp32": (1e-5, 1e-4, 1e-5), "bf16": (2e-2, 2e-2, 5e-2)}


def check(case, checkpoint, found, gradients):
    expected, expected_gradients = reference(checkpoint, case)
    of_loss, of_norm, of_gradient = TOLERANCE[case.dtype]
    assert len(found["losses"]) == case.steps
    for a, b in zip(found["losses"], expected["losses"], strict=True):
        assert abs(a - b) <= of_loss
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=of_norm)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        scale = expected_gradient.abs().max()
        assert scale > 0, name
        assert float((gradients[name] - expected_gradient).abs().max() / scale) <= of_gradient, name
    return expected_gradients


class Launches:
    """Runs all cases of a list that share ZeRO stage and number of ranks when the first of them is
    asked for."""

    def __init__(self, folder):
        self.folder, self.found = folder, {}

    def checkpoint(self, case):
        out = self.folder / f"nexus-{case.experts}-{case.top_k}-{case.router_input}"
        form = {
            "router_input": case.router_input,
            "row_norm": "fixed" if case.router_input == "context" else "free",
        }
        names = [f"domain{i}" for i in range(case.experts)]
        return out if out.exists() else make_nexus(out, names=names, top_k=case.top_k, **form)

    def __call__(self, case, cases):
        if case not in self.found:
            alike = [c for c in cases if (c.stage, c.world) == (case.stage, case.world)]
            folder = self.folder / f"launch-{len(self.found)}"
            folder.mkdir()
            self.found |= launch(alike, folder, self.checkpoint)
        return self.checkpoint(case), *self.found[case]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("parity"))


def test_the_oracle_shares_nothing_with_what_it_judges():
    tree = ast.parse(Path(oracle.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [
        getattr(node, "module", None) or alias.name for node in imports for alias in node.names
    ]
    assert sorted({name.split(".")[0] for name in modules}) == [
        "json",
        "pathlib",
        "safetensors",
        "torch",
        "transformers",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_losses_and_gradients_equal_the_reference(case, launches):
    check(case, *launches(case, CASES))


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.id)
def test_losses_and_gradients_equal_the_reference_in_every_layout(case, launches):
    check(case, *launches(case, FULL))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_many_passes_are_summed_in_fp32_where_asked_for(stage, tmp_path):
    """32 passes over one window: their mean is the gradient of one pass, bit by bit in fp32.

    In bf16 what each pass adds is rounded to the sum's resolution.
    """
    checkpoint = make_nexus(tmp_path / "nexus", names=[f"domain{i}" for i in range(4)])
    layouts = {"once": ("model", 1), "model": ("model", 32), "fp32": ("fp32", 32)}
    runs = [
        {
            "checkpoint": str(checkpoint),
            "out": str(tmp_path / name),
            "words": [
                "same=1",
                "steps=1",
                f"stage={stage}",
                f"accumulation={passes}",
                f"training.batch_size={2 * passes}",
                f"training.gradient_dtype={dtype}",
                "model.dtype=bf16",
            ],
        }
        for name, (dtype, passes) in layouts.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    finish(fork_ranks([WORKER, tmp_path / "runs.json"], 2))
    found = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in layouts}
    worst = {"model": 0.0, "fp32": 0.0}
    for name, once in found["once"].items():
        for dtype in worst:
            distance = float((found[dtype][name] - once).norm() / once.norm())
            worst[dtype] = max(worst[dtype], distance)
    print(f"ZeRO-{stage}: largest distance of a summed gradient {worst}")
    assert worst["fp32"] < 1e-6 < 5e-3 < worst["model"]


def starve(checkpoint):
    """Give all experts one and the same domain embedding: every token ties, and all go to the same
    experts for ever."""
    sidecar = read_sidecar(checkpoint)
    sidecar.router.centre = False
    sidecar.vectors[:] = sidecar.vectors[0]
    sidecar.centre[:] = 0
    write_sidecar(checkpoint, sidecar)
    reader = TensorReader(checkpoint)
    for layer in range(len(sidecar.projections)):
        overwrite(reader.info(gate_name(layer)), expert_embeddings(sidecar, layer, torch.float32))
    return checkpoint


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    "case", [Case(2, 2, 2), Case(3, 2, 2, experts=3), Case(3, 4, 4)], ids=lambda case: case.id
)
def test_experts_that_get_no_token_for_many_steps(case, tmp_path):
    checkpoint = starve(
        make_nexus(tmp_path / "nexus", names=[f"domain{i}" for i in range(case.experts)])
    )
    gradients = check(case, checkpoint, *launch([case], tmp_path, lambda case: checkpoint)[case])
    idle = gradients["model.layers.0.mlp.experts.w1"].abs().amax(dim=(1, 2)) == 0
    assert int(idle.sum()) == case.experts - 1


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_more_than_a_hundred_thousand_router_elements(checkpointing, tmp_path):
    case = Case(3, 2, 2, experts=208, checkpointing=checkpointing, steps=3)
    large = tmp_path / "large"
    make_large(
        large, hidden=512, ffn=8, layers=1, experts=case.experts, vocabulary=64, dtype=torch.float32
    )
    gradients = check(case, large, *launch([case], tmp_path, lambda case: large)[case])
    assert gradients["model.layers.0.mlp.experts.w1"].shape[0] * 512 > 100_000
