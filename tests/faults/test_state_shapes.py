"""A state's file whose tensors are no flat pieces; found by tests/fuzz.py as an IndexError."""

import pytest
import torch
from safetensors.torch import save_file

from nexus_ds.errors import CheckpointError
from nexus_ds.runtime.portable_state import StateFiles


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_a_tensor_that_is_no_piece_of_a_parameter(tmp_path, shape):
    save_file({"fp32:0:w": torch.zeros(shape)}, tmp_path / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="'fp32:0:w' belongs to no training state"):
        StateFiles(tmp_path, ["rank_00000.safetensors"])
