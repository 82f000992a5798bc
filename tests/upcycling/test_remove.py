"""What a reduced mixture consists of."""

import json

import pytest
import torch
from conftest import make_linear
from safetensors.torch import load_file

from nexus_ds.checkpoint.qwen2_moe import Role, expert_name, stored
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.upcycling.remove import reduced


def test_those_that_stay_keep_their_weights_and_rows(tmp_path):
    """Nothing recomputes free rows: no check of the sidecar would see the wrong ones."""
    checkpoint = make_linear(tmp_path / "nexus", names=list("abcd"))
    new = reduced(checkpoint, ["c", "a"])
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, load_config("demo", []).router, 0)
    before, after = (
        load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "out")
    )
    for name, entry in stored(new.config).items():
        if entry.role is Role.ROUTER:
            assert torch.equal(after[name], before[name][[1, 3]])
        elif entry.role is Role.ROUTED:
            old = expert_name(entry.layer, (1, 3)[entry.expert], entry.part)
            assert torch.equal(after[name], before[old])
        else:
            assert torch.equal(after[name], before[name])
    assert after.keys() == stored(new.config).keys() | {"lm_head.weight"}
    assert [expert.name for expert in read_sidecar(tmp_path / "out").experts] == ["b", "d"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["delta"], "--expert delta: the checkpoint has alpha, beta, gamma; name one of these"),
        (["alpha", "beta", "gamma"], "0 experts would be left, but each token goes to 1"),
    ],
)
def test_names_that_cannot_go(nexus_dir, names, message):
    with pytest.raises(ConfigError, match=message):
        reduced(nexus_dir, names)
