"""The page of promises is the table's, and every test that it names exists."""

import ast
import json

import promises
import pytest
from promises import ONE, PROMISES, TESTS, by_file, functions, named, outcomes, page, result, to_run


def test_every_promise_is_there_once():
    names = [promise.name for promise in PROMISES]
    assert names == [f"T{n}" for n in range(1, 37)] + [f"S{n}" for n in range(1, 14)]


@pytest.mark.parametrize("test", named())
def test_a_test_that_is_named_exists(test):
    file, _, function = test.partition("::")
    assert function in functions(TESTS / file)


def test_the_tests_of_a_file_run_in_its_order():
    """Some share one launch, each going on where the one before has left it."""
    tests = by_file(named())
    assert sorted(tests) == sorted(named())
    files = [test.partition("::")[0] for test in tests]
    assert files == sorted(files)
    ours = [test for test in tests if test.startswith(ONE)]
    text = (TESTS / "faults" / "test_one_run.py").read_text()
    places = [text.index(f"def {test.removeprefix(ONE)}(") for test in ours]
    assert len(places) == 7 and places == sorted(places)


def test_what_is_run_is_the_table_and_this_folder():
    *files, folder = to_run()
    assert folder == TESTS / "faults"
    given = {str(path.relative_to(TESTS)) for path in files}
    assert not any(test.startswith("faults/") for test in given)
    assert given | {test for test in named() if test.startswith("faults/")} == set(named())


def test_the_page_is_the_tables():
    expected = page(json.loads(promises.RESULTS.read_text()))
    assert promises.PAGE.read_text() == expected, "make test-faults or tests/promises.py page"


def test_promises_without_a_test_are_said():
    without = [promise.name for promise in PROMISES if not promise.tests]
    text = promises.PAGE.read_text()
    assert text.count("| **none** |") == len(without)


REPORT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_x" name="test_a[1]"/>
<testcase classname="tests.faults.test_x" name="test_a[2]"><failure/></testcase>
<testcase classname="tests.test_y" name="test_b"><skipped/></testcase>
</testsuite></testsuites>"""


def test_results_are_counted_by_test(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = outcomes(tmp_path / "report.xml")
    assert found == {
        "faults/test_x.py::test_a": {"passed": 1, "failed": 1},
        "test_y.py::test_b": {"skipped": 1},
    }
    kept = {test: counts | {"on": "2026-02-03"} for test, counts in found.items()}
    assert result("faults/test_x.py::test_a", kept) == "1 passed, 1 failed (2026-02-03)"
    assert result("test_y.py::test_b", kept) == "1 skipped (2026-02-03)"
    assert result("test_y.py::test_c", kept) == "not run"


def words_of(path):
    """Return all names, attributes and imported modules of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                found |= {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom(module=str()):
                found |= {node.module.split(".")[0], *(alias.name for alias in node.names)}
            case ast.Name():
                found.add(node.id)
            case ast.Attribute():
                found.add(node.attr)
    return found


def test_nothing_in_the_package_opens_archives(tmp_path):
    openers = {"tarfile", "zipfile", "unpack_archive", "ZipFile", "zipimport"}
    (tmp_path / "x.py").write_text("from zipfile import ZipFile as Z")
    assert words_of(tmp_path / "x.py") & openers == {"zipfile", "ZipFile"}
    for path in (TESTS.parent / "nexus_ds").rglob("*.py"):
        assert not words_of(path) & openers, path
