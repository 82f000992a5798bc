"""From a trained mixture to one with more experts: in turn, with replayed text, by budget."""

from pathlib import Path

from made_up_jobs import jobs, made


def test_an_expert_added_in_turn_is_added_to_the_finetuned_model():
    found = made(
        "pipeline.new_domains=[x,y]",
        "compare.adding=sequence",
        "compare.extensions=[nexus_append]",
        "compare.contenders=[nexus]",
    )
    extends = jobs(found, "extend nexus_append")
    first = next(job for job in jobs(found, "nexus_append-x") if job.words[0] == "train")
    assert len(extends) == 2 and first.output in extends[1].needs
    _, seeds = found.extensions[("", "nexus_append", "x, then y")]
    assert seeds[0].experts == ("x", "y")
    # what is forgotten is read from each of them
    assert seeds[0].turns == {"x": first.output, "y": seeds[0].model}


def test_the_seed_is_given_where_experts_go_further_than_their_branches():
    words = ("compare.contenders=[nexus]", "compare.extensions=[nexus_append]")
    (plain,) = jobs(made(*words), "extend nexus_append")
    assert "--base" not in plain.words
    found = made(*words, "model.task_scale=3")
    (job,) = jobs(found, "extend nexus_append")
    base = Path(job.words[job.words.index("--base") + 1])
    assert found.builder.jobs[base].name.endswith(" seed")


def test_budgets_become_steps_that_are_validated():
    found = made(
        "compare.contenders=[nexus]",
        "compare.extensions=[nexus_append]",
        "compare.budgets=[2048,6144]",
    )
    _, seeds = found.extensions[("", "nexus_append", "cpp")]
    assert seeds[0].steps == {0: 0, 2: 2048, 6: 6144}
    (file,) = [
        path
        for path in found.builder.configs
        if "nexus_append-cpp" in path.name and "start" not in path.name
    ]
    training = found.builder.configs[file].training
    assert (training.eval_every, training.steps, training.tokens) == (2, 6, 0)


def test_p_sees_pretraining_text_without_an_expert_where_its_start_reads_chunks():
    found = made(
        "compare.contenders=[nexus,nexus_context]",
        "compare.extensions=[nexus_zero_shot,nexus_refit]",
        "pipeline.seed_domains=[python,web,cpp]",
    )
    grown = [job for job in found.builder.jobs.values() if job.words[0] in ("upcycle", "extend")]
    files = {job.name: Path(job.words[job.words.index("--config") + 1]) for job in grown}
    assert {
        name: found.builder.configs[file].router.fit_background for name, file in files.items()
    } == {
        "seed 0 upcycle nexus": [],
        "seed 0 extend nexus_refit cpp": [],
        "seed 0 upcycle nexus_context": ["web"],
        "seed 0 extend nexus_zero_shot cpp": ["web"],
    }


def test_old_text_is_replayed_beside_the_new():
    found = made("compare.contenders=[nexus]", "compare.extensions=[nexus_append]")
    (job,) = [job for job in jobs(found, "nexus_append-cpp") if job.words[0] == "train"]
    data = found.builder.configs[Path(job.words[job.words.index("--config") + 1])].data
    assert data.domains == ["python", "docs", "algebra", "tables", "cpp"]
    assert data.new_domains == ["cpp"]
