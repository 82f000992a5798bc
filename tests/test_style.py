"""The code is held to the measures that tests/style.py prints."""

import pytest
import style


@pytest.fixture(scope="module")
def measured():
    return style.table(style.measure(style.ROOT / "nexus_ds"))


@pytest.mark.parametrize("name", style.GOALS)
def test_a_measure_is_within_its_goal(measured, name):
    goal = style.GOALS[name]
    # as the table shows it
    assert goal.least <= round(measured[name], 1) <= goal.most


def test_the_measures_count(tmp_path):
    (tmp_path / "x.py").write_text(
        '"""A module."""\n\n\n'
        "# why\n"
        "def double(a: int, b) -> Any:\n"
        '    """Docstring."""\n'
        "    from nexus_ds import errors\n\n"
        "    return a if b and a else [c for c in b if c]\n"
    )
    found = style.table(style.measure(tmp_path))
    assert found["function lines, median"] == 5 and found["code lines"] == 3
    assert found["decisions per 100 code lines"] == pytest.approx(100 * (1 + 1 + 2) / 3)
    assert found["comment lines per 100 code lines"] == pytest.approx(100 / 3)
    assert found["arguments and results without type"] == 1 and found["Any"] == 1
    assert found["imports of the package inside functions"] == 1
    assert found["tokens per code line"] == pytest.approx((13 + 4 + 15) / 3)
    assert found["modules without a test at the mirrored path"] == 1
