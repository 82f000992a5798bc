"""From models that become experts to a row: what a method is put together from, and costs."""

import pytest
from made_up_jobs import jobs, made

from nexus_ds.experiments.comparison.method_jobs import DENSE, PARTS
from nexus_ds.experiments.comparison.methods import METHODS

DOMAINS = ["python", "docs", "algebra", "tables"]


def expert_names(found, method):
    """Return the experts that the call of `upcycle` names, with where each comes from."""
    (job,) = jobs(found, f"upcycle {method}")
    words = job.words
    given = [words[place + 1] for place, word in enumerate(words) if word == "--expert"]
    return dict(text.split("=", 1) for text in given)


def test_every_method_is_a_dense_model_or_made_of_known_parts():
    for method in METHODS:
        assert (method.routed in PARTS) != (method.name in DENSE), method.name


def test_what_becomes_routed_experts():
    found = made(
        "compare.contenders=[nexus,btx,sparse_upcycling,scratch]",
        "compare.extensions=[nexus_append]",
    )
    (seed,) = {job.output for job in jobs(found, "seed 0 seed")}
    branches = {name: str(jobs(found, f"branch-{name}")[0].output) for name in DOMAINS}
    assert expert_names(found, "nexus") == branches
    assert expert_names(found, "btx") == branches | {"seed": str(seed)}
    assert expert_names(found, "sparse_upcycling") == dict.fromkeys(DOMAINS, str(seed))
    random = expert_names(found, "scratch")
    assert len(set(random.values())) == 4 and not set(random.values()) & {*branches.values()}


def test_matched_contenders_have_the_whole_budget():
    found = made(
        "compare.contenders=[union,nexus,sparse_upcycling_matched]",
        "compare.extensions=[linear_reset]",
    )
    trained = {
        name: sum(job.flops for job in jobs(found, f"seed 0 {name}") if job.words[0] == "train")
        for name in ("union", "sparse_upcycling_matched")
    }
    whole = [
        job
        for part in ("python", "docs", "algebra", "tables")
        for job in jobs(found, f"branch-{part}")
    ]
    whole += [job for job in jobs(found, "seed 0 nexus") if job.words[0] == "train"]
    budget = sum(job.flops for job in whole)
    assert trained["union"] == pytest.approx(budget, rel=0.002) and trained["union"] > 1e12
    assert trained["sparse_upcycling_matched"] == pytest.approx(budget, rel=0.002)


def by_hand(active, layers, hidden, length):
    """Operations of a token, forward and backward: six a weight that multiplies, and causal
    attention over `length`.

    Queries by keys and weights by values, forward: 2 x 2 x hidden x length / 2; the backward pass
    costs twice that.
    """
    return 6 * active + layers * 3 * 2 * hidden * length


def test_operations_of_a_dense_model_and_of_a_mixture_are_those_counted_by_hand():
    """The demo's sizes: vocabulary 2048 (tied), hidden 96, 3 layers, inner width 256, length 128, 4
    experts, top-1."""
    attention, norms, ffn = 4 * 96 * 96, 2 * 96, 3 * 96 * 256
    dense = 2048 * 96 + 96 + 3 * (attention + norms + ffn)
    rows = 4 * 96 + 96  # the router's, and the shared expert's gate
    # the shared expert is the dense model's FFN; a token visits one routed expert
    mixture = dense + 3 * (ffn + rows)
    found = made("compare.contenders=[nexus,union]", "compare.extensions=[nexus_append]")
    expected = {
        "seed 0 seed": dense,
        "seed 0 branch-python": dense,
        "seed 0 union": dense,
        "seed 0 nexus": mixture,
    }
    # one more expert: a row more, and a token still visits one
    expected["seed 0 nexus_append-cpp"] = mixture + 3 * 96
    jobs_of = {job.name: job for job in found.builder.jobs.values() if job.words[0] == "train"}
    for name, active in expected.items():
        assert jobs_of[name].flops == jobs_of[name].tokens * by_hand(active, 3, 96, 128), name
    assert (
        jobs_of["seed 0 seed"].tokens == 977 * 8 * 128
        and jobs_of["seed 0 nexus"].tokens == 391 * 8 * 128
    )
    top_two = made(
        "compare.contenders=[nexus]", "compare.extensions=[nexus_append]", "router.top_k=2"
    )
    (job,) = [
        job
        for job in jobs(top_two, "seed 0 nexus")
        if job.words[0] == "train" and "append" not in job.name
    ]
    assert job.flops == job.tokens * by_hand(mixture + 3 * ffn, 3, 96, 128)


def test_operations_with_a_given_seed_are_those_of_its_sizes(dense_dir):
    """Vocabulary 31 (tied), hidden 16, 2 layers, inner width 24; four experts, and the recipe's
    length of 128."""
    ffn = 3 * 16 * 24
    dense = 31 * 16 + 16 + 2 * (4 * 16 * 16 + 2 * 16 + ffn)
    found = made(
        "compare.contenders=[nexus]", "compare.extensions=[nexus_append]", f"model.path={dense_dir}"
    )
    (branch,) = jobs(found, "seed 0 branch-python")
    (nexus,) = [
        job
        for job in jobs(found, "seed 0 nexus")
        if job.words[0] == "train" and "append" not in job.name
    ]
    assert branch.flops == branch.tokens * by_hand(dense, 2, 16, 128)
    assert nexus.flops == nexus.tokens * by_hand(dense + 2 * (ffn + 4 * 16 + 16), 2, 16, 128)
