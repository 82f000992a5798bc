"""What collects the jobs: names that follow from how a thing is made, and files of settings."""

from pathlib import Path

from made_up_jobs import OUT

from nexus_ds.config import load_config
from nexus_ds.experiments.comparison.build import build
from nexus_ds.experiments.comparison.job_graph import Builder, moe_domains, scored_domains


def builder(out=OUT):
    return Builder("compare-tiny", ["compare.seeds=[0]"], out)


def test_the_name_of_an_output_does_not_depend_on_where_it_lies():
    here, there = (
        build("compare-tiny", ["compare.seeds=[0]"], out) for out in (OUT, Path("/elsewhere/deep"))
    )
    assert [p.relative_to(OUT) for p in here.builder.jobs] == [
        p.relative_to("/elsewhere/deep") for p in there.builder.jobs
    ]


def test_the_same_call_twice_is_one_job_and_another_call_another():
    made = builder()
    first = made.add_work(0, "average", "average", {"models": [Path("a"), Path("b")]}, ())
    again = made.add_work(0, "average", "average", {"models": ["a", "b"]}, ())
    other = made.add_work(0, "average", "average", {"models": ["b", "a"]}, ())
    of_another_seed = made.add_work(1, "average", "average", {"models": ["a", "b"]}, ())
    assert first == again and len({first, other, of_another_seed}) == len(made.jobs) == 3


def test_a_setting_that_changes_no_result_changes_no_name():
    made = builder()
    paths = {}
    for words in ((), ("training.log_every=3",), ("training.lr=0.5",)):
        config = load_config("compare-tiny", words)
        paths[words] = made.add_training("nexus", config, (), 1.0)
    plain, logged_often, learned_faster = paths.values()
    assert plain == logged_often != learned_faster


def test_a_training_reads_its_settings_from_the_file_that_is_written(tmp_path):
    made = builder(tmp_path)
    config = load_config("compare-tiny", ["training.steps=7", "seed=3"])
    output = made.add_training("nexus", config, (), flops_per_token=2.0)
    job = made.jobs[output]
    made.write_configs()
    words = dict(zip(job.words[1::2], job.words[2::2], strict=True))
    saved = load_config(words["--config"])
    assert (saved.training.steps, saved.seed, saved.output) == (7, 3, str(output))
    assert job.flops == 2.0 * job.tokens > 0


def test_a_given_model_is_no_job_to_wait_for():
    made = builder()
    mean = made.add_work(0, "average", "average", {}, ())
    assert made.ours([Path("given"), mean]) == (mean,)


def test_domains_stand_once_each_and_in_order():
    words = ["pipeline.domains=[b,a]", "pipeline.seed_domains=[web,a]", "pipeline.new_domains=[x]"]
    config = load_config("demo", words)
    assert moe_domains(config) == ["b", "a", "web"]
    assert scored_domains(config) == ["b", "a", "web", "x"]
    assert moe_domains(load_config("demo", [*words, "data.domains=[a]"])) == ["a"]
