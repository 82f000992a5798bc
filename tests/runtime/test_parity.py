"""DeepSpeed against the plain PyTorch reference: losses over ten AdamW steps, and every gradient of the first step.

The reference is one process with all experts; DeepSpeed runs in real ranks (gloo). Gradients are compared because
AdamW hides their scale. Persistence is off under ZeRO-3, else weights this small are never partitioned.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_nexus
from parity import STEPS, batches, settings

from nexus_ds.model.build import load_reference
from nexus_ds.pipeline import LAUNCH_VARIABLES, free_port
from nexus_ds.runtime.engine import parameter_groups, token_losses

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
    offload: bool = False

    @property
    def id(self):
        parts = [f"z{self.stage}", f"world{self.world}", f"ep{self.expert}", f"{self.experts}experts"]
        parts += [f"top{self.top_k}"] * (self.top_k > 1) + [f"accumulate{self.accumulation}"] * (self.accumulation > 1)
        parts += [self.checkpointing] * (self.checkpointing != "none") + ["grouped"] * self.grouped
        return "-".join(parts + ["offload"] * self.offload)


CASES = [  # a trimmed matrix: the two layouts, then each other feature once, combined
    Case(3, 2, 2),
    Case(2, 2, 2),
    Case(1, 2, 1, top_k=2, accumulation=2),
    Case(3, 2, 2, experts=3, checkpointing="reentrant", accumulation=2),
    Case(3, 2, 1, checkpointing="non_reentrant", grouped=True),
]
FULL = [
    Case(stage, world, expert, experts=experts, top_k=top_k)
    for stage in (1, 2, 3)
    for world, expert in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
    for experts, top_k in ((4, 1), (3, 2), (5, 1))
] + [Case(3, 2, 2, offload=True), Case(2, 2, 2, offload=True, experts=3)]


def launch(checkpoint, out, case, *words):
    """Run the worker on `case.world` ranks; return its losses, norms and first gradients."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    kept |= {"WORLD_SIZE": str(case.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    kept["OMP_NUM_THREADS"] = "1"
    words = [
        f"stage={case.stage}", f"accumulation={case.accumulation}", f"offload={int(case.offload)}",
        f"parallel.expert={case.expert}", f"training.batch_size={BATCH}", f"parallel.grouped_mm={str(case.grouped).lower()}",
        f"training.activation_checkpointing={case.checkpointing}", *words,
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(checkpoint), str(out), *words],
            env=kept | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(case.world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    return json.loads(Path(f"{out}.json").read_text()), torch.load(f"{out}.pt", weights_only=True)


def reference(checkpoint, case):
    """Train the plain reference on the very same batches, rank by rank and part by part in one process."""
    config = settings([f"training.batch_size={BATCH}"])
    model = load_reference(checkpoint, torch.float32, config.router)
    groups = parameter_groups(model, config.training, config.router.lr_scale)
    for group in groups:
        group["lr"] = config.training.lr * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=(config.training.beta1, config.training.beta2), eps=1e-8)
    chunks = case.world * case.accumulation
    for layer in model.model.layers:
        layer.mlp.loss_scale = 1.0 / chunks  # the router's losses are scaled as the main loss is
    losses, norms, first = [], [], None
    for step, batch in enumerate(batches(model.config.vocab_size, BATCH)):
        total = 0.0
        optimizer.zero_grad()
        for part in batch.chunk(chunks):
            loss = token_losses(model, part).mean()
            total += float(loss) / chunks
            (loss / chunks).backward()
        if step == 0:
            first = {name: p.grad.clone() for name, p in model.named_parameters()}
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.clip)))
        optimizer.step()
    return {"losses": losses, "norms": norms}, first


def check(case, tmp_path):
    checkpoint = make_nexus(tmp_path / "nexus", names=[f"domain{i}" for i in range(case.experts)], top_k=case.top_k)
    found, gradients = launch(checkpoint, tmp_path / "out", case)
    expected, expected_gradients = reference(checkpoint, case)
    assert len(found["losses"]) == STEPS
    for a, b in zip(found["losses"], expected["losses"], strict=True):
        assert abs(a - b) <= 1e-5
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        scale = expected_gradient.abs().max()
        assert scale > 0, name
        assert float((gradients[name] - expected_gradient).abs().max() / scale) <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_losses_and_gradients_equal_the_reference(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.id)
def test_losses_and_gradients_equal_the_reference_in_every_layout(case, tmp_path):
    check(case, tmp_path)
