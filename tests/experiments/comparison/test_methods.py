"""The tables of methods and extensions, and how a recipe chooses among them."""

import pytest

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.experiments.comparison.methods import (
    EXTENSIONS,
    METHODS,
    chosen_extensions,
    chosen_methods,
)


def test_names_stand_once_and_extensions_start_from_contenders():
    names = [c.name for c in METHODS]
    assert len(set(names)) == len(names) and len({e.name for e in EXTENSIONS}) == len(EXTENSIONS)
    assert all(e.starts_from in names for e in EXTENSIONS)


@pytest.mark.parametrize("row", [*METHODS, *EXTENSIONS], ids=lambda row: row.name)
def test_the_settings_of_each_are_settings(row):
    load_config("compare-tiny", row.settings)


def test_no_name_means_all_and_their_order_is_the_table_s():
    assert chosen_methods([]) == METHODS and chosen_extensions([]) == EXTENSIONS
    found = chosen_methods(["nexus", "btx", "seed"])
    assert [method.name for method in found] == ["seed", "btx", "nexus"]


def test_an_extension_routes_as_the_mixture_that_it_starts_from():
    """Free rows can't be added to a projection, nor P to free rows."""
    kinds = {method.name: set(method.settings) & {"router.kind=linear"} for method in METHODS}
    for extension in EXTENSIONS:
        own = set(extension.settings) & {"router.kind=linear"}
        assert own == kinds[extension.starts_from], extension.name


def test_an_unknown_name_is_told_with_its_neighbour():
    message = "compare.contenders: unknown name 'bxt', did you mean btx"
    with pytest.raises(ConfigError, match=message):
        chosen_methods(["bxt"])
    message = "compare.extensions: unknown name 'linear_rest', did you mean linear_reset"
    with pytest.raises(ConfigError, match=message):
        chosen_extensions(["linear_rest"])
