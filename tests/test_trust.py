"""What the package may do that could run foreign code or reach another machine: named, one by one.

SECURITY.md promises it. A new use of any of these is a line here, with its reason, or a failure;
tests/faults/test_audit.py watches the same while verbs run.
"""

import ast

import pytest
from test_architecture import MODULES

# Modules that unpickle, run code or programs, or open connections, at whatever depth of a name.
WATCHED = {
    *("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy"),
    *("subprocess", "pty", "multiprocessing", "ctypes", "cffi"),
    *("socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "telnetlib"),
    *("requests", "httpx", "aiohttp", "huggingface_hub", "webbrowser", "xmlrpc", "zipfile"),
    *("tarfile", "torch.hub", "torch.package", "torch.utils.cpp_extension", "asyncio"),
    "torch.multiprocessing",
}
# Functions, by the end of their name.
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.load", "numpy.load", "fromfile"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("load_dataset", "load_dataset_builder", "snapshot_download", "hf_hub_download"),
    *("create_server", "create_connection", "import_module", "ProcessPoolExecutor"),
}
STARTS = ("os.exec", "os.spawn", "os.posix_spawn", "os.fork")

CHILDREN = "starts this project's own programs, as lists of words"
BY_NAME = "imports a module of the project by a name that stands in the code"
ALLOWED = {
    ("nexus_ds.__main__", "import_module"): BY_NAME,
    ("nexus_ds.children", "ctypes"): "asks the kernel to end a child with its parent",
    ("nexus_ds.children", "os.execvp"): "becomes the child, by a list of words",
    ("nexus_ds.commands.demo", "subprocess"): CHILDREN,
    ("nexus_ds.commands.stage", "os.execv"): "becomes the launcher of a stage, by a list of words",
    ("nexus_ds.commands.status", "subprocess"): "asks squeue and sacct, by a list of words",
    ("nexus_ds.checkpoint.loading", "huggingface_hub"): "the error that a config.json can raise",
    ("nexus_ds.data.offline", "huggingface_hub"): "tells it to stay offline",
    (
        "nexus_ds.data.sentence_encoder",
        "import_module",
    ): "an encoder of the table ENCODERS",
    (
        "nexus_ds.data.sentence_encoder",
        "huggingface_hub",
    ): "an encoder that was downloaded; online on request",
    ("nexus_ds.data.sentence_encoder", "snapshot_download"): "the same",
    (
        "nexus_ds.data.encoding",
        "multiprocessing",
    ): "pipes to tokenisers, this process's own children",
    ("nexus_ds.data.encoding", "subprocess"): CHILDREN,
    ("nexus_ds.data.hub", "load_dataset_builder"): "text on the hub, of a source that says hub:",
    (
        "nexus_ds.experiments.benchmarks.assembly_speed",
        "runpy",
    ): "runs nexus-ds itself, in a process that measures what it takes",
    ("nexus_ds.experiments.benchmarks.assembly_speed", "subprocess"): CHILDREN,
    ("nexus_ds.experiments.benchmarks.gpu", "subprocess"): CHILDREN,
    (
        "nexus_ds.experiments.benchmarks.network",
        "subprocess",
    ): "slow links in a namespace (bench links)",
    ("nexus_ds.experiments.comparison.jobs", "import_module"): BY_NAME,
    ("nexus_ds.experiments.comparison.jobs", "multiprocessing"): CHILDREN,
    ("nexus_ds.launch", "socket"): "looks for a free port on loopback",
    ("nexus_ds.local_runner", "subprocess"): CHILDREN,
    ("nexus_ds.outputs", "socket"): "the name of this machine, for a lock",
    ("nexus_ds.runtime.deepspeed_internals", "ctypes"): "malloc_trim of the C library",
    ("nexus_ds.runtime.deepspeed_internals", "import_module"): "modules of DeepSpeed, by name",
    ("nexus_ds.runtime.ranks", "socket"): "learns by which address it reaches rank 0",
    ("nexus_ds.runtime.ranks", "create_connection"): "the same",
    ("nexus_ds.runtime.watchdog", "socket"): "ranks tell rank 0 how far they are, as JSON",
    ("nexus_ds.runtime.watchdog", "create_connection"): "the same",
    ("nexus_ds.runtime.watchdog", "create_server"): "the same",
}


ALL_CORES = "ProcessPoolExecutor"


def dotted(node):
    """Return the name that an expression spells, '' for none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else f"?.{node.attr}"
    return ""


def watched(name):
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in (1, 2, 3) if ".".join(parts[:n]) in WATCHED), None)


def imported(tree):
    """Return what local names stand for: `y` of `import yaml as y`, `load` of `from torch import
    load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def uses(source):
    """Yield line and name of whatever is watched in a module's source."""
    tree = ast.parse(source)
    stands_for = imported(tree)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, found) for found in map(watched, names) if found)
        called = [name for name in names if name.startswith(STARTS)]
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = dotted(node).partition(".")
            called.append(stands_for.get(first, first) + dot + rest)
        for name in called:
            if name.startswith(STARTS):
                yield node.lineno, name
            # a bare name, or the end of a dotted one: `model.eval()` is no eval
            last = name.rpartition(".")[2]
            if name in CALLS or (last in CALLS and last not in BUILTINS):
                yield node.lineno, name if name in CALLS else last


BUILTINS = {"eval", "exec", "compile", "__import__"}


def keywords(source, name):
    """Yield line and value of a keyword argument wherever it is given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == name:
            yield node.value.lineno, ast.unparse(node.value)


SOURCES = {module: path.read_text() for module, path in MODULES.items()}


def test_whatever_could_run_foreign_code_or_reach_out_is_named_with_its_reason():
    found = {}
    for module, source in SOURCES.items():
        for line, name in uses(source):
            found.setdefault((module, name), line)
    new = {f"{module}:{found[module, name]}: {name}" for module, name in set(found) - set(ALLOWED)}
    assert new == set(), "name it in ALLOWED with its reason, or do without"
    assert set(ALLOWED) - set(found) == set(), "these are gone: so should the lines in ALLOWED"


def test_no_shell_and_no_code_of_a_checkpoint():
    for module, source in SOURCES.items():
        for name, only in (
            ("shell", "False"),
            ("trust_remote_code", "False"),
            ("allow_pickle", "False"),
            ("weights_only", "True"),
        ):
            wrong = [(line, value) for line, value in keywords(source, name) if value != only]
            assert wrong == [], f"{module}: {name}"


def test_one_line_of_shell_and_it_is_a_constant():
    """`sh -c` with words of a user would run what stands in them."""
    shells = {
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.List | ast.Tuple)
        for item in node.elts
        if isinstance(item, ast.Constant) and item.value in ("sh", "bash", "/bin/sh", "/bin/bash")
    }
    # whether links can be limited here is tried in a namespace that goes at once
    assert shells == {"nexus_ds.experiments.benchmarks.network"}


def test_what_transformers_loads_is_local_and_without_code():
    for module, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("local_files_only") == "True", f"{module}:{node.lineno}"
                # a generation config has no code
                if "GenerationConfig" not in dotted(node.func):
                    assert given.get("trust_remote_code") == "False", f"{module}:{node.lineno}"


def test_imports_by_a_name_that_is_computed_are_few():
    """Where a module's name comes from a variable, the variable comes from a table in the code."""
    computed = {
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and dotted(node.func).endswith("import_module")
        and not isinstance(node.args[0], ast.Constant)
    }
    assert computed == {
        "nexus_ds.__main__",
        "nexus_ds.data.sentence_encoder",
        "nexus_ds.experiments.comparison.jobs",
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import torch.hub", "torch.hub"),
        ("from torch import hub", "torch.hub"),
        ("import os\nos.system('id')", "os.system"),
        ("from os import execv", "os.execv"),
        ("run = eval\nrun('1')", "eval"),
        ("exec(text)", "exec"),
        ("torch.load(path)", "torch.load"),
        ("dist.broadcast_object_list([x])", "broadcast_object_list"),
        ("from urllib.request import urlopen", "urllib"),
        ("from os import system\nsystem('id')", "os.system"),
        ("import os as o\no.system('id')", "os.system"),
        ("from torch import load\nload(path)", "torch.load"),
        ("from yaml import load\nload(text)", "yaml.load"),
        ("import yaml as y\ny.load(text)", "yaml.load"),
        ("import torch.multiprocessing", "torch.multiprocessing"),
        ("from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor()", ALL_CORES),
    ],
)
def test_the_watch_sees(source, name):
    assert name in [found for _, found in uses(source)]


def test_the_watch_lets_the_usual_pass():
    source = "model.eval()\nre.compile('a')\ntorch.compile(f)\nos.environ\nopen('x')"
    assert list(uses(source)) == []
