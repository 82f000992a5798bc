"""Who may import whom: docs/architecture.md states it once, and every import is held to it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nexus_ds"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floors():
    """Return each room's floor, the lowest is 1; a room is a folder or a file of nexus_ds/."""
    page = (ROOT / "docs/architecture.md").read_text()
    [drawing] = re.findall(r"```floors\n(.*?)```", page, re.S)
    names = [re.split(r"\s{2,}", line.strip())[0].split() for line in drawing.splitlines()]
    return {room.rstrip("/"): len(names) - i for i, line in enumerate(names) for room in line}


def room_of(module):
    return [*module.split("."), "__init__"][1]


def names_in(node):
    """Return the modules and members that a statement or call imports, if it does."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__"):
            return [node.args[0].value]
    return []


def imports(path):
    """Yield line and name of every import, deferred ones and those by function too."""
    for node in ast.walk(ast.parse(path.read_text())):
        for name in names_in(node):
            yield node.lineno, name


def imported(path):
    """Yield line and module of every import of the package's own."""
    for line, name in imports(path):
        if name.split(".")[0] == "nexus_ds":
            # "from nexus_ds.runtime import states" is an import of states
            yield line, name if name in MODULES else name.rpartition(".")[0]


ARROWS = {
    (module, target): f"{path.relative_to(ROOT)}:{line}: imports {target}"
    for module, path in MODULES.items()
    for line, target in imported(path)
}


def test_every_room_has_its_floor():
    assert set(floors()) == {room_of(module) for module in MODULES} - {"__init__"}


def test_no_import_leads_up_or_sideways_into_another_room():
    floor = floors() | {"__init__": 0}
    wrong = [
        text
        for (module, target), text in ARROWS.items()
        if room_of(module) != room_of(target) and floor[room_of(module)] <= floor[room_of(target)]
    ]
    assert wrong == []


def test_no_circle_within_a_room():
    below = {module: {b for a, b in ARROWS if a == module} for module in MODULES}
    done = set()
    while ready := {module for module in below if module not in done and below[module] <= done}:
        done |= ready
    assert set(MODULES) - done == set(), "these import each other in a circle, or what does"


def test_only_one_module_imports_deepspeed():
    wrong = [
        f"{module}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in imports(path)
        if name.split(".")[0] == "deepspeed" and module != "nexus_ds.runtime.deepspeed_internals"
    ]
    assert wrong == []


def test_files_are_copied_by_one_function_alone():
    """What `shutil` says of a full disk names what was read, and neither need nor room."""
    wrong = [
        f"{module}: {found}"
        for module, path in MODULES.items()
        for found in re.findall(
            r"shutil\.(?:copy\w*|move)|import copy(?:file|2|tree)", path.read_text()
        )
    ]
    assert wrong == []


def is_private(name):
    """Return whether a dotted name has a part with one underscore: _name, _Class, _CONSTANT."""
    return any(re.match(r"_[A-Za-z]", part) for part in name.split("."))


def test_names_of_private_things_stay_in_their_module():
    private = [
        f"{module}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in imports(path)
        if name.startswith("nexus_ds.") and is_private(name)
    ]
    assert private == []


def test_every_kind_of_import_is_seen(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import nexus_ds.words\n"
        "from nexus_ds.runtime import _Held, states\n"
        "def late():\n"
        "    import deepspeed.ops\n"
        '    importlib.import_module("nexus_ds.config")\n'
        '    return __import__("deepspeed"), import_module("nexus_ds.errors"), int("3")\n'
    )
    found = [name for _, name in imports(module)]
    assert sorted(found) == [
        "deepspeed",
        "deepspeed.ops",
        "nexus_ds.config",
        "nexus_ds.errors",
        "nexus_ds.runtime._Held",
        "nexus_ds.runtime.states",
        "nexus_ds.words",
    ]
    assert [name for name in found if is_private(name)] == ["nexus_ds.runtime._Held"]
    assert {name for _, name in imported(module)} >= {"nexus_ds.runtime.states", "nexus_ds.config"}
