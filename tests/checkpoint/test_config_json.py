"""What a config.json may not ask for, whatever its family; test_dense.py tries it on models."""

import pytest

from nexus_ds.checkpoint.config_json import (
    number,
    positive,
    read_config,
    refuse_hooks,
    refuse_in_any_form,
)
from nexus_ds.errors import CheckpointError, UnsupportedModelError


@pytest.mark.parametrize("value", [True, 0, -1, 2.0, "3", None])
def test_sizes_are_numbers_above_0(value):
    with pytest.raises(CheckpointError, match=r"here: n is .*, expected a number above 0"):
        positive({"n": value}, "n", "here")


@pytest.mark.parametrize(
    "value", [True, 0, -1.0, "3", None, [1], float("inf"), float("nan"), 1e-31, 1e31, 10**400]
)
def test_numbers_are_those_that_fp32_has(value):
    with pytest.raises(
        CheckpointError, match=r"here: n is .*, expected a number from 0.5 to 1e\+30"
    ):
        number(value, "here: n", 0.5)
    assert type(number(1, "here: n")) is float


def test_code_is_refused_at_any_depth():
    with pytest.raises(UnsupportedModelError, match=r"a\.0\.auto_map .*never run"):
        refuse_hooks({"a": [{"auto_map": "evil.Model"}]}, "here")
    refuse_hooks({"auto_map": None, "attn_implementation": "sdpa"}, "here")


@pytest.mark.parametrize(
    "keys", [{"is_causal": False}, {"use_bidirectional_attention": True}, {"decoder": {}}]
)
def test_what_no_form_has_is_refused(keys):
    if keys == {"decoder": {}}:
        refuse_in_any_form(keys, "here")
        return
    with pytest.raises(UnsupportedModelError, match=next(iter(keys))):
        refuse_in_any_form(keys, "here")


def test_a_file_is_read_from_a_directory_only(tmp_path):
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        read_config(tmp_path / "meta-llama" / "Llama-2-7b")
