"""Stages of a run: where they live, what they need, and the commands that make them."""

import shlex
from pathlib import Path

import pytest
import yaml

from nexus_ds.command_lines import (
    DS_JSON,
    TRAIN,
)
from nexus_ds.config import dump, load_config
from nexus_ds.errors import CheckpointError, ConfigError, OutputExistsError
from nexus_ds.pipeline import (
    check_domains,
    check_made,
    check_start,
    needed_for,
    resolve,
    shared_overrides,
    steps,
)

WORDS = ["pipeline.run=RUN", "pipeline.domains=[a,b]", "pipeline.new_domains=[c]"]


def config_of(tmp_path, *words):
    return resolve(
        load_config("demo", [w.replace("RUN", str(tmp_path)) for w in WORDS] + list(words))
    )


def test_each_stage_knows_its_place_and_its_text(tmp_path):
    seed, branch = (
        config_of(tmp_path, "stage=seed"),
        config_of(tmp_path, "stage=branch", "branch=b"),
    )
    moe, extend = config_of(tmp_path), config_of(tmp_path, "stage=extend")
    assert (seed.model.path, seed.output, seed.data.domains) == ("", f"{tmp_path}/seed", ["a", "b"])
    assert (branch.model.path, branch.output) == (f"{tmp_path}/seed", f"{tmp_path}/branches/b")
    assert branch.data.domains == ["b"] and branch.name == "branch b"
    assert (moe.model.path, moe.output) == (f"{tmp_path}/upcycled", f"{tmp_path}/nexus")
    assert (extend.data.domains, extend.data.new_domains) == (["a", "b", "c"], ["c"])
    assert moe.data.validation_domains == ["a", "b", "c"]


def test_a_given_checkpoint_brings_its_own_domains(nexus_dir):
    config = resolve(load_config("own", [f"model.path={nexus_dir}"]))
    assert config.data.domains == ["alpha", "beta", "gamma"]
    assert config.model.tokenizer == str(nexus_dir)


def test_no_domains_at_all_is_refused(dense_dir):
    with pytest.raises(
        ConfigError, match=r"no domains to train on; set pipeline.domains or data.domains"
    ):
        resolve(load_config("own", [f"model.path={dense_dir}"]))


def test_what_is_there_is_not_needed_again(tmp_path):
    plan = steps(config_of(tmp_path), "demo", [], 2)
    names = [step.name for step in plan]
    assert names[:2] == ["tokens", "seed"] and names[-1] == "extended"
    assert {s.name for s in needed_for(plan, "moe")} == {
        "tokens",
        "seed",
        "branch:a",
        "branch:b",
        "embed",
        "upcycle",
    }
    (tmp_path / "upcycled").mkdir()
    assert needed_for(plan, "moe") == []
    (tmp_path / "seed").mkdir()
    (tmp_path / "nexus").mkdir()
    assert {s.name for s in needed_for(plan, "extended")} == {"branch:c", "embed:new", "extend"}


def test_extend_gets_the_seed_where_experts_go_further_than_their_branches(tmp_path):
    def extending(*words):
        (found,) = [
            s for s in steps(config_of(tmp_path, *words), "demo", [], 2) if s.name == "extend"
        ]
        return found.command

    assert "--base" not in extending()
    command = extending("model.task_scale=3")
    assert command[command.index("--base") + 1] == str(tmp_path / "seed")


def test_how_documents_begin_holds_for_the_whole_run():
    assert shared_overrides(["data.bos=false", "training.steps=3"]) == ["data.bos=false"]


def test_what_is_said_for_an_earlier_stage_reaches_it():
    """It was dropped: a seed was trained for as long as the recipe says."""
    words = ["stages.seed.training.steps=3", "training.steps=5", "data.path=demo"]
    handed = shared_overrides(words)
    assert handed == ["stages.seed.training.steps=3", "data.path=demo"]
    assert load_config("demo", [*handed, "stage=seed"]).training.steps == 3
    assert load_config("demo", [*handed, "stage=moe"]).training.steps == 0


@pytest.mark.parametrize(
    ("recipe", "words", "found", "missing"),
    [
        (
            "own",
            ["stage=branch", "branch=law"],
            "stage=branch starts from the seed; there is none at runs/own/seed, and the recipe "
            "own makes none for law (pipeline.domains: none; pipeline.new_domains: none). "
            "Missing: model.path, data.path, output; type: ",
            ["model.path=DIR", "data.path=DIR", "output=models/law"],
        ),
        (
            "own-context",
            ["stage=branch", "branch=law", "data.path=my data", "output=x"],
            "Missing: model.path; type: ",
            ["model.path=DIR"],
        ),
        (
            "own",
            [],
            "stage=moe starts from what nexus-ds upcycle wrote; there is none at runs/own/upcycled",
            ["model.path=DIR", "data.path=DIR", "output=DIR"],
        ),
        (
            "own",
            ["stage=extend"],
            "stage=extend starts from what nexus-ds extend wrote; there is none at ",
            ["model.path=DIR", "data.path=DIR", "output=DIR"],
        ),
        (
            "paper",
            ["stage=branch", "branch=law"],
            "(pipeline.domains: python, docs, algebra, tables; pipeline.new_domains: cpp)",
            ["model.path=DIR", "data.path=DIR", "output=models/law"],
        ),
        (
            "paper/table2",
            ["stage=extend"],
            "there is none at runs/nexus-470m/extension, and the recipe paper/table2 makes ",
            ["model.path=DIR", "data.path=DIR", "output=DIR"],
        ),
    ],
)
def test_a_stage_without_a_model_to_start_from_prints_the_whole_command(
    recipe, words, found, missing
):
    with pytest.raises(ConfigError) as error:
        check_start(load_config(recipe, words), recipe, words)
    said, _, command = str(error.value).partition("type: ")
    assert found in f"{said}type: "
    start = ["deepspeed", str(TRAIN), "--deepspeed", str(DS_JSON), "--config", recipe]
    assert shlex.split(command) == [*start, *words, *missing]
    given = load_config(recipe, shlex.split(command)[len(start) :])
    check_start(given, recipe, [])
    if given.stage == "branch":
        assert resolve(given).data.domains == ["law"]


@pytest.mark.parametrize(
    "words", [["stage=seed"], ["stage=branch", "branch=cpp"], [], ["stage=extend"]]
)
def test_a_recipe_that_makes_the_start_is_let_through(words):
    check_start(load_config("demo", words), "demo", words)


def test_a_start_or_an_output_that_is_there_is_enough():
    words = ["stage=branch", "branch=law"]
    Path("runs/own/seed").mkdir(parents=True)
    check_start(load_config("own", words), "own", words)
    Path("runs/own/seed").rename("done")
    check_start(load_config("own", [*words, "output=done"]), "own", [*words, "output=done"])


def test_a_stage_that_was_made_with_other_settings_is_not_taken_for_this_runs(tmp_path):
    words = [w.replace("RUN", str(tmp_path)) for w in WORDS]
    config = config_of(tmp_path, "stage=seed")
    config.data.path = "elsewhere"
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "training.yaml").write_text(dump(config))
    plan = steps(config_of(tmp_path), "demo", words, 2)
    with pytest.raises(
        OutputExistsError,
        match=r"seed was made with other settings \(data.path: 'elsewhere' there, 'demo'",
    ):
        check_made(plan, "demo", words)
    whole = dump(config_of(tmp_path, "stage=seed"))
    (tmp_path / "seed" / "training.yaml").write_text(whole)
    check_made(plan, "demo", words)


def test_a_setting_that_is_newer_than_a_stage_was_as_usual(tmp_path):
    words = [word.replace("RUN", str(tmp_path)) for word in WORDS]
    plan = steps(config_of(tmp_path), "demo", words, 1)
    then = yaml.safe_load(dump(config_of(tmp_path, "stage=seed")))
    assert then["model"].pop("task_scale") == 1.0
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "training.yaml").write_text(yaml.safe_dump(then))
    check_made(plan, "demo", words)
    with pytest.raises(OutputExistsError, match=r"\(model.task_scale: 1.0 there, 2.0 here\)"):
        check_made(plan, "demo", [*words, "model.task_scale=2.0"])
    # nothing is known of what an empty file was made with
    (tmp_path / "seed" / "training.yaml").write_text("")
    with pytest.raises(OutputExistsError, match="seed was made with other settings"):
        check_made(plan, "demo", words)


@pytest.mark.parametrize("name", ["a b", "c++", "../x", "", "x" * 201])
def test_domains_that_can_not_name_an_expert_are_refused_before_anything_runs(tmp_path, name):
    config = config_of(tmp_path)
    config.pipeline.domains = ["a", name]
    with pytest.raises(
        ConfigError, match=r"can't be the name of an expert; expected at most 200 letters, digits"
    ):
        check_domains(config)


def test_a_damaged_sidecar_is_named(tmp_path):
    (tmp_path / "nexus.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"nexus.json is damaged .*; restore it"):
        resolve(load_config("own", [f"model.path={tmp_path}"]))


@pytest.mark.parametrize(("old", "new"), [(["a", "b", "a"], []), (["a", "b"], ["a"])])
def test_a_domain_that_is_named_twice_is_refused(tmp_path, old, new):
    config = config_of(tmp_path)
    config.pipeline.domains, config.pipeline.new_domains = old, new
    with pytest.raises(ConfigError, match=r"new_domains name a domain twice: a, b, a; name each"):
        check_domains(config)
