"""Mistakes told at once."""

import pytest

from nexus_ds.checkpoint.problems import Problems
from nexus_ds.errors import CheckpointError, ConfigError, UnsupportedModelError


def collect(*errors):
    problems = Problems()
    for error in errors:
        with problems.collected():
            raise error
    return problems


def test_none_is_no_error_and_one_stays_as_it_is():
    Problems().refuse()
    with pytest.raises(ConfigError, match=r"^lower it$"):
        collect(ConfigError("lower it")).refuse()


def test_several_are_one_list_and_a_list_within_a_list_is_taken_apart():
    inner = collect(CheckpointError("one"), UnsupportedModelError("two"))
    outer = Problems()
    for refuse in (inner.refuse, collect(ConfigError("three")).refuse):
        with outer.collected():
            refuse()
    said = r"^3 things to mend; nothing was written:\n1\. one\n2\. two\n3\. three$"
    with pytest.raises(CheckpointError, match=said):
        outer.refuse()


def test_one_that_is_found_twice_is_told_once():
    assert len(collect(ConfigError("lower it"), ConfigError("lower it")).found) == 1


def test_a_fault_of_the_program_is_no_mistake():
    with pytest.raises(RuntimeError), Problems().collected():
        raise RuntimeError
