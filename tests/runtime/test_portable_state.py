"""Training states without ranks: stacks cut at experts' borders, elements gathered over files."""

import re

import pytest
import torch
from safetensors.torch import save_file

from nexus_ds.errors import CheckpointError
from nexus_ds.runtime.deepspeed_internals import Fragment
from nexus_ds.runtime.portable_state import StateFiles, _cut, _Stack


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [
        # all three slots, the middle one vacant
        (0, 12, [("a", 0, range(0, 4)), ("c", 0, range(8, 12))]),
        (2, 8, [("a", 2, range(2, 4)), ("c", 0, range(8, 10))]),
        (5, 2, []),
        (9, 1, [("c", 1, range(9, 10))]),
    ],
)
def test_a_fragment_of_a_stack_is_cut_at_the_borders_of_its_slots(start, count, expected):
    values = {
        kind: torch.arange(12.0)[start : start + count] + offset
        for kind, offset in (("fp32", 0), ("exp_avg", 100))
    }
    found = list(_cut(Fragment(torch.nn.Linear(1, 1), start, values), _Stack(["a", None, "c"], 4)))
    assert [(piece.name, piece.start) for piece in found] == [
        (name, first) for name, first, _ in expected
    ]
    for piece, (_, _, elements) in zip(found, expected, strict=True):
        assert piece.values["fp32"].tolist() == list(elements)
        assert piece.values["exp_avg"].tolist() == [100 + element for element in elements]
        piece.values["fp32"].fill_(-1)  # a view: it writes the optimizer
    assert int((values["fp32"] == -1).sum()) == sum(len(elements) for _, _, elements in expected)


@pytest.fixture
def files(tmp_path):
    """A state of two files: elements 0-3 and 8-9 of w in one, 4-7 in the other; two experts'
    moments."""
    w = torch.arange(10.0)
    first = {
        "fp32:0:w": w[:4].clone(),
        "fp32:8:w": w[8:].clone(),
        "rng:cpu": torch.arange(3, dtype=torch.uint8),
    }
    second = {"fp32:4:w": w[4:8].clone()}
    for number, expert in enumerate((first, second)):
        for kind in ("exp_avg", "exp_avg_sq"):
            expert[f"{kind}:0:model.layers.0.mlp.experts.{number}.up_proj.weight"] = torch.full(
                (4,), 1.0 + 2 * number
            )
            expert[f"{kind}:0:model.layers.0.mlp.experts.{number}.down_proj.weight"] = torch.full(
                (4,), 50.0
            )
    save_file(first, tmp_path / "rank_00000.safetensors")
    save_file(second, tmp_path / "rank_00001.safetensors")
    return StateFiles(tmp_path, ["rank_00000.safetensors", "rank_00001.safetensors"])


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (2, 9), (4, 8), (3, 5), (8, 10), (0, 1)])
def test_elements_come_from_whichever_file_has_them(files, start, stop):
    target = torch.full((stop - start,), -1.0)
    files.fill("fp32", "w", start, target)
    assert target.tolist() == list(range(start, stop))


def test_elements_beyond_the_end_and_of_unknown_parameters_are_named(files):
    with pytest.raises(CheckpointError, match="element 10 of fp32 of w is in no file"):
        files.fill("fp32", "w", 7, torch.empty(4))
    with pytest.raises(CheckpointError, match="element 0 of exp_avg of w is in no file"):
        files.fill("exp_avg", "w", 0, torch.empty(4))
    assert files.random_states("rank_00000.safetensors")["cpu"].tolist() == [0, 1, 2]
    assert files.random_states("rank_00001.safetensors") == {}


@pytest.mark.parametrize("name", ["model.norm.weight", "fp32:²:w", f"fp32:{'9' * 5000}:w"])
def test_a_tensor_of_another_kind_of_file_is_refused(tmp_path, name):
    save_file({name: torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"tensor '{re.escape(name)}' belongs to no training state"
    ):
        StateFiles(tmp_path, ["a.safetensors"])
