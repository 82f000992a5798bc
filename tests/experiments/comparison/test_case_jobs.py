"""The jobs that methods share, and what a given seed model changes about them."""

import shutil
from dataclasses import replace

import pytest
from made_up_jobs import OUT

from nexus_ds.experiments.comparison.case_jobs import CaseJobs
from nexus_ds.experiments.comparison.job_graph import Builder
from nexus_ds.experiments.comparison.recipe_reader import Case
from nexus_ds.pipeline import SEED


def case(*overrides, seed=0):
    return CaseJobs(Builder("compare-tiny", overrides, OUT), Case(seed))


def test_the_tokenizer_is_one_for_all_seeds_and_models_are_not():
    first = case()
    second = replace(first, case=Case(1))
    assert first.tokenizer(first.config(SEED)) == second.tokenizer(second.config(SEED))
    assert first.seed_model() != second.seed_model()


def test_a_given_seed_model_brings_its_words_and_is_no_job(dense_dir):
    jobs = case(f"model.path={dense_dir}")
    assert jobs.seed_model() == jobs.tokenizer(jobs.config(SEED)) == dense_dir
    assert not jobs.builder.jobs


def test_a_copy_of_the_seed_model_makes_the_same_branches(dense_dir, tmp_path):
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    first, second = (case(f"model.path={path}") for path in (dense_dir, copy))
    assert first.branch("python") == second.branch("python")


def test_seeds_may_share_one_seed_model_and_vary_what_comes_after():
    first = case("compare.one_seed_model=true")
    second = replace(first, case=Case(1))
    assert first.seed_model() == second.seed_model() == case().seed_model()
    assert first.branch("python") != second.branch("python")
    assert first.branch("python") == case().branch("python")


@pytest.mark.parametrize(
    "setting",
    [
        "router.top_k=2",
        "model.shared_expert=none",
        "model.routed_scale=0.5",
        "model.task_scale=3",
        "model.merge=seed",
        "router.kind=linear",
    ],
)
def test_what_only_a_mixture_has_makes_no_other_branch(setting):
    jobs = case()
    assert jobs.branch("python") == jobs.with_settings([setting]).branch("python")
    changed = jobs.with_settings(["stages.branch.training.lr=0.5"])
    assert jobs.branch("python") != changed.branch("python")


@pytest.mark.parametrize("domain", ["2024", "yes"])
def test_a_domain_may_look_like_yaml(domain):
    jobs = case()
    job = jobs.builder.jobs[jobs.branch(domain)]
    (file,) = [path for path in jobs.builder.configs if str(path) in job.words]
    assert jobs.builder.configs[file].branch == domain


def test_a_control_of_the_embeddings_is_made_from_the_true_ones():
    jobs = case()
    true = jobs.embeddings(["python", "docs"])
    shuffled = jobs.with_settings(["compare.embedding=shuffled"]).embeddings(["python", "docs"])
    assert jobs.builder.jobs[true].words[0] == "embed"
    assert shuffled != true and jobs.builder.jobs[shuffled].needs == (true,)


def test_a_score_waits_for_the_models_that_are_made_here():
    jobs = case()
    seed = jobs.seed_model()
    scores = jobs.score("two", [seed, OUT / "given"])
    assert jobs.builder.jobs[scores].needs == (seed,) and scores.suffix == ".json"
