"""nexus.json without torch: every entry of a lineage is written as it was read."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from nexus_ds.checkpoint.records import (
    SIDECAR,
    AdoptStep,
    ExtendStep,
    FitReport,
    OtherStep,
    RemoveStep,
    ReplaceStep,
    TrainStep,
    UpcycleStep,
    last_extension,
    manifest_json,
    read_manifest,
    step_of,
)
from nexus_ds.errors import CheckpointError
from nexus_ds.settings import RouterConfig

ROUTER = RouterConfig(init_norm=0.25)
FIT = FitReport(before=0.25, after=0.5, steps=30, nearest={"law": 0.5})
FIT_TEXT = (
    '{"before": 0.25, "after": 0.5, "steps": 30, "start": "label_fit", "nearest": {"law": 0.5}}'
)
UPCYCLED = (
    '{"verb": "upcycle", "seed_model": "seed", "family": "llama", "router": ROUTER, "seed": 3'
)
STEPS = [
    (UpcycleStep(seed_model="seed", family="llama", router=ROUTER, seed=3), UPCYCLED + "}"),
    (
        UpcycleStep(seed_model="seed", family="llama", router=ROUTER, seed=3, fit=FIT),
        UPCYCLED + ', "fit": FIT}',
    ),
    (
        TrainStep(stage="moe", steps=2, tokens=512, mixture={"a": 0.25, "b": 0.75}),
        '{"verb": "train", "stage": "moe", "steps": 2, "tokens": 512, '
        '"mixture": {"a": 0.25, "b": 0.75}}',
    ),
    (
        ExtendStep(
            checkpoint="moe", experts=["c"], share=0.25, linear_init=None, router=ROUTER, seed=3
        ),
        '{"verb": "extend", "checkpoint": "moe", "experts": ["c"], "lambda": 0.25, '
        '"linear_init": null, "router": ROUTER, "seed": 3}',
    ),
    (
        ReplaceStep(checkpoint="moe", experts=["c"], share=0.25, router=ROUTER, seed=3, fit=FIT),
        '{"verb": "extend", "checkpoint": "moe", "experts": ["c"], "replaced": true, '
        '"lambda": 0.25, "router": ROUTER, "seed": 3, "fit": FIT}',
    ),
    (
        RemoveStep(checkpoint="moe", experts=["c"]),
        '{"verb": "remove", "checkpoint": "moe", "experts": ["c"]}',
    ),
    (
        AdoptStep(checkpoint="moe", trained="tuned", row_error=[0.0, 1e-7], approximate=False),
        '{"verb": "adopt", "checkpoint": "moe", "trained": "tuned", "row_error": [0.0, 1e-07], '
        '"approximate": false}',
    ),
]
OTHERS = [
    '{"verb": "upcycle"}',
    '{"verb": "remove", "experts": ["c"], "checkpoint": "moe"}',
    '{"verb": "extend", "checkpoint": "moe", "experts": ["c"], "by": "hand"}',
    '{"verb": "train", "stage": "moe", "steps": 2, "tokens": 512, "mixture": {}, "fit": [1]}',
    '{"verb": "upcycle", "seed_model": "seed", "family": "llama", "router": [], "seed": 3}',
    '{"verb": "distil", "replaced": true}',
    "{}",
]


@pytest.mark.parametrize(("step", "text"), STEPS)
def test_a_step_is_written_and_read(step, text):
    text = text.replace("ROUTER", json.dumps(asdict(ROUTER))).replace("FIT", FIT_TEXT)
    assert json.dumps(step.entry()) == text
    assert step_of(json.loads(text)) == step


@pytest.mark.parametrize("text", OTHERS)
def test_a_step_with_other_keys_stays_as_it_is(text):
    step = step_of(json.loads(text))
    assert isinstance(step, OtherStep) and json.dumps(step.entry()) == text


def test_the_last_extension_tells_the_new_experts():
    removed, extended, replaced = STEPS[-1][0], STEPS[3][0], STEPS[4][0]
    assert [step.is_extension for step in (removed, extended, replaced)] == [False, True, True]
    older = step_of({"verb": "extend", "experts": ["old"]})
    assert last_extension([older, removed]) == ["old"]
    assert last_extension([older, extended, removed]) == ["c"]
    assert last_extension([removed]) == []
    with pytest.raises(CheckpointError, match="lists no experts; it is damaged"):
        last_extension([step_of({"verb": "extend"})])


def test_a_manifest_is_written_as_it_was_read(nexus_dir):
    assert manifest_json(read_manifest(nexus_dir)) == json.loads((nexus_dir / SIDECAR).read_text())


def test_reading_needs_no_torch(nexus_dir):
    code = (
        "import sys; from pathlib import Path; from nexus_ds.checkpoint.records import *; "
        f"read_manifest(Path({str(nexus_dir)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
