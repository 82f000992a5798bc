"""The command line itself: what every verb waits for before it does anything."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nexus_ds import __main__
from nexus_ds.__main__ import VERBS
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.errors import BadBatchesError, DataError
from nexus_ds.experiments.benchmarks.assembly_speed import make_inputs
from tests.checkpoint.test_qwen3_next import SIZES, mixture

# Prints, as the last line, the exit code and the modules that were imported.
MODULES = """
import json, sys
from nexus_ds.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:  # --help
    code = ended.code
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""
# Each takes a second or more.
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "scipy", "sklearn"}


def imported(folder, *words):
    """Return the modules that are there once the verb is done."""
    program = [sys.executable, "-c", MODULES, *words]
    done = subprocess.run(program, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    return set(modules)


def test_the_table_names_a_module_for_every_verb_and_help_alone_imports_none(tmp_path):
    modules = imported(tmp_path, "--help")
    ours = {name for name in modules if name.startswith("nexus_ds.")}
    light = ("__main__", "console", "errors", "launch", "outputs", "words")
    assert ours == {f"nexus_ds.{name}" for name in light}
    assert not HEAVY & modules


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_one_verb_and_nothing_heavy(verb, tmp_path):
    modules = imported(tmp_path, verb, "--help")
    verbs = {f"nexus_ds.{entry.module}" for entry in VERBS.values()}
    assert verbs & modules == {f"nexus_ds.{VERBS[verb].module}"}
    assert not HEAVY & modules


@pytest.mark.parametrize("what", ["train", "growth", "data", "links", "gpu"])
def test_help_of_what_bench_measures_imports_nothing_heavy(what, tmp_path):
    assert not HEAVY & imported(tmp_path, "bench", what, "--help")


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--help"],
        ["status", "RUN"],
        # what SLURM's templates ask, several times a job
        ["stage", "--show=output", "moe", "pipeline.run=RUN"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_looks_at_files_alone_waits_for_no_numpy_either(words, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "recipe.yaml").write_text("base: demo\n")
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    assert not (HEAVY | {"numpy"}) & imported(tmp_path, *words)


@pytest.mark.parametrize("more", [[], ["stage=extend", "pipeline.new_domains=news"]])
def test_a_recipe_is_planned_without_torch(more, tmp_path):
    words = ["plan", "--gpus", "8", "--gpu-memory", "80GB", "--write", "ds.json", *more]
    assert not HEAVY & imported(tmp_path, *words)
    assert (tmp_path / "ds.json").is_file()


def test_checkpoints_are_planned_without_torch(nexus_dir, context_dir, tmp_path):
    for directory in (nexus_dir, context_dir):
        words = ["--gpus", "2", "--gpu-memory", "8GB", f"model.path={directory}"]
        assert not HEAVY & imported(tmp_path, "plan", *words)


def test_checkpoints_are_inspected_without_torch(nexus_dir, dense_dir, tmp_path):
    for words in ([str(nexus_dir)], [str(nexus_dir), str(dense_dir), "--json"]):
        assert not HEAVY & imported(tmp_path, "inspect", *words)
    assert not HEAVY & imported(tmp_path, "verify", str(nexus_dir))


def test_a_form_that_is_translated_is_looked_at_without_torch_too(dense_dir, tmp_path):
    """A Qwen3-Next alone, beside a model that it was made of, and against all of these."""
    mixture(tmp_path, dense_dir, "qwen3", SIZES, "bf16", 1)
    for words in (["inspect", "out"], ["inspect", "out", "a"], ["verify", "out", "--sources"]):
        assert not HEAVY & imported(tmp_path, *words)


def test_models_are_exported_without_torch(tmp_path):
    """As a directory: the weights are copied. What writes GGUF is looked at without its package."""
    make_inputs(tmp_path, "tiny", "bf16", 1 << 30)
    words = ["upcycle", "--seed=seed", "--expert=alpha=alpha", "--out=a", "--no-warm-start"]
    assert not HEAVY & imported(tmp_path, *words, "--domains=domains.safetensors")
    for program in ("transformers4", "vllm", "sglang", "hub"):
        words = ["export", "--checkpoint=a", f"--for={program}", f"--out={program}"]
        modules = imported(tmp_path, *words)
        assert "nexus_ds.serving.gguf_file" in modules and not HEAVY & modules, program


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_models_are_put_together_without_torch(family, tmp_path):
    """Upcycled, extended, replaced and reduced: where nothing reads text, and tokenizers are of
    the plain class; of a form that translates weights too."""
    make_inputs(tmp_path, "tiny", "bf16", 1 << 30, family)
    alpha, beta, gamma = (f"--expert={name}={name}" for name in ("alpha", "beta", "gamma"))
    domains = "--domains=domains.safetensors"
    for words in (
        ["upcycle", "--seed=seed", alpha, beta, "--out=a", domains, "--no-warm-start"],
        ["extend", "--checkpoint=a", gamma, "--out=b", domains, "--no-refit"],
        ["extend", "--checkpoint=b", beta, "--out=c", domains, "--no-refit", "--replace"],
        ["remove", "--checkpoint=c", "--expert=alpha", "--out=d"],
    ):
        assert not HEAVY & imported(tmp_path, *words), words
    verify_expert_embeddings(tmp_path / "d")


@pytest.mark.parametrize(("kind", "code"), [(BadBatchesError, 65), (DataError, 1)])
def test_bad_batches_have_an_exit_code_of_their_own_in_every_verb(monkeypatch, capsys, kind, code):
    def run(args):
        raise kind("3 batches in a row")

    monkeypatch.setattr(__main__, "_module", lambda verb: SimpleNamespace(run=run))
    assert __main__._run(SimpleNamespace(verb="stage"), "nexus-ds stage") == code
    assert capsys.readouterr().err == "nexus-ds stage: 3 batches in a row\n"
