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


def imported(path):
    """Yield line and module of every import of the package's own, deferred ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # "from nexus_ds.runtime import states" is an import of states
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "nexus_ds":
                yield node.lineno, name


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


def test_only_the_runtime_imports_deepspeed():
    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            if any(name.split(".")[0] == "deepspeed" for name in names):
                wrong += [f"{module}:{node.lineno}"] * (room_of(module) != "runtime")
    assert wrong == []


def test_names_of_private_things_stay_in_their_module():
    private = [
        f"{module}:{node.lineno}: {alias.name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nexus_ds")
        for alias in node.names
        if re.match(r"_[a-z]", alias.name)
    ]
    assert private == []
