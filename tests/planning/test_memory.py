"""Planned bytes against real ranks: model states within 1%, activations within 8%."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import finish, start_ranks
from plan_models import LARGE, LENGTH, NAMES, OTHER, SMALL, make_model

from nexus_ds.planning import assumptions
from nexus_ds.planning.layout import Layout, deepspeed_json
from nexus_ds.planning.memory import activations, model_states
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
    """Elements at which groups of experts are cut; 0: DeepSpeed's own number, far above these models."""

    @property
    def id(self):
        parts = [f"z{self.stage}", f"ep{self.expert}", self.dtype, NAMES[self.sizes]]
        more = {"offload_": self.offload, "accumulate": self.accumulation, "": self.checkpointing, "group": self.group,
                "persist": self.persistent}  # fmt: skip
        parts += [f"{name}{value}" for name, value in more.items() if value not in ("none", 0, 1)]
        return "-".join(parts)

    def layout(self):
        return Layout(stage=self.stage, offload=self.offload, expert=self.expert, world=WORLD, micro=MICRO,
                      accumulation=self.accumulation, checkpointing=self.checkpointing)  # fmt: skip


CASES = [Case(2, 1, "bf16", group=200_000), Case(3, 2, "fp32", sizes=OTHER)]
FULL = [
    Case(2, 2, "bf16", sizes=LARGE), Case(3, 2, "bf16", sizes=LARGE), Case(3, 1, "fp32", sizes=LARGE),
    Case(2, 1, "bf16"), Case(2, 2, "bf16", sizes=OTHER), Case(2, 1, "fp32", sizes=OTHER), Case(2, 2, "fp32"),
    Case(3, 1, "bf16"), Case(3, 2, "bf16", persistent=20_000), Case(3, 1, "fp32"),
    Case(1, 1, "bf16"), Case(1, 2, "fp32", checkpointing="non_reentrant"),
    Case(2, 2, "bf16", checkpointing="reentrant", accumulation=2),
    Case(2, 2, "bf16", offload="optimizer", accumulation=2), Case(1, 1, "fp32", offload="optimizer"),
    Case(3, 2, "bf16", offload="optimizer"), Case(3, 1, "bf16", offload="optimizer+parameters"),
]  # fmt: skip


def check(case, tmp_path, monkeypatch):
    monkeypatch.setattr(assumptions, "PERSISTENT_ELEMENTS", case.persistent)  # else weights this small are never cut
    monkeypatch.setattr(assumptions, "BUCKET_ELEMENTS", 100_000)
    if case.group:
        monkeypatch.setattr(assumptions, "EXPERT_GROUP_ELEMENTS", case.group)
    checkpoint, layout = make_model(tmp_path / "model", case.sizes), case.layout()
    values = deepspeed_json(case.sizes, layout)
    for key in ("offload_optimizer", "offload_param"):
        if key in values["zero_optimization"]:
            values["zero_optimization"][key]["pin_memory"] = False  # there is no device to pin it for
    words = [
        f"model.dtype={case.dtype}", f"parallel.grouped_mm={str(case.dtype == 'bf16').lower()}", f"parallel.expert={case.expert}", f"data.sequence_length={LENGTH}",
        f"training.batch_size={WORLD * MICRO * case.accumulation}", f"training.micro_batch_size={MICRO}",
        f"training.activation_checkpointing={case.checkpointing}",
    ]  # fmt: skip
    options = [f"group={case.group}"] if case.group else []
    finish(start_ranks([WORKER, checkpoint, tmp_path / "out", json.dumps(values), *options, *words], WORLD))
    found = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(WORLD)]
    width = {"fp32": 4, "bf16": 2}[case.dtype]
    states = model_states(case.sizes, layout, width)
    allocated, planned = max(f["states"] for f in found), states.gpu + states.host
    print(f"{case.id}: model states planned {planned:,.0f}, allocated {allocated:,}: {planned / allocated - 1:+.2%}")
    assert allocated == pytest.approx(planned, rel=0.01), found
    if case.offload == "none":
        for part in ("weights", "gradients", "optimizer"):
            assert max(f[part] for f in found) == pytest.approx(getattr(states, part), rel=0.03), (part, found)
    if case.stage < 3:  # under ZeRO-3 gathered weights are kept too, which the plan counts as buffers
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
