import argparse
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import WORDS, save_tokenizer

from nexus_ds.__main__ import main
from nexus_ds.commands import stage
from nexus_ds.config import load_config
from nexus_ds.data import corpora, preparation
from nexus_ds.data.preparation import tokenised
from nexus_ds.errors import ConfigError
from nexus_ds.launch import EXIT_STOPPED
from nexus_ds.pipeline import check_domains, resolve, shared_overrides


def args(name, *overrides, **more):
    return argparse.Namespace(
        **{"name": name, "overrides": list(overrides), "config": "demo", "deepspeed": "", **more}
    )


def test_an_array_task_finds_its_domain(monkeypatch):
    config = load_config("demo")
    found = []
    for index in range(5):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        found.append(stage.branch_domain(config))
    assert found == [*config.pipeline.domains, *config.pipeline.new_domains]


@pytest.mark.parametrize("index", ["5", "-1", "x", "", "1; true", "²", "٣", "9" * 5000])
def test_a_task_without_a_branch_says_which_there_are(monkeypatch, index):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", index)
    with pytest.raises(ConfigError, match=r"--array=0-4"):
        stage.branch_domain(load_config("demo"))


def test_branch_given_by_name_needs_no_array(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert stage.branch_domain(load_config("demo", ["branch=docs"])) == "docs"


@pytest.mark.parametrize(
    "domain",
    ["a/b", "..", ".hidden", "-x", "a,b", "a=b", "a b", "x$(touch y)", "a'b", "a\nb", "a\x00b", ""],
)
def test_domains_that_can_t_be_names_are_refused(domain):
    config = load_config("demo")
    config.pipeline.domains = ["fine", domain]
    with pytest.raises(ConfigError, match="can't be the name of an expert"):
        check_domains(config)


@pytest.mark.parametrize("domain", ["wiki-pedia", "2024", "yes", "a_b.c"])
def test_domains_that_can_be_names_are_accepted(domain):
    config = load_config("demo")
    config.pipeline.domains = [domain]
    check_domains(config)


def test_outputs_are_where_the_pipeline_puts_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    run = f"pipeline.run={tmp_path}"
    names = {
        "tokens": "tokens.json",
        "seed": "seed",
        "branch": "branches/docs",
        "embed": "domains-new.safetensors",
        "upcycle": "upcycled",
        "moe": "nexus",
        "extend": "extension",
        "extended": "extended",
        "evaluate": "report",
    }
    for name, path in names.items():
        options = args(name, run)
        assert stage.show("output", stage._config(options), options) == str(tmp_path / path)


def test_shown_facts(tmp_path):
    options = args("seed", f"pipeline.run={tmp_path}/a run")
    config = stage._config(options)
    assert stage.show("branches", config, options) == "5"
    assert stage.show("extension", config, options) == "yes"
    assert stage.show("logs", config, options) == f"{tmp_path}/a run/logs"
    assert load_config(tmp_path / "a run" / "logs" / "recipe.yaml").pipeline == config.pipeline
    config.pipeline.new_domains = []
    assert stage.show("extension", config, options) == "no"


def test_progress_is_of_the_stage_and_of_what_it_makes_first(tmp_path):
    run = tmp_path / "run"

    def progress(name, *words):
        options = args(name, f"pipeline.run={run}", "pipeline.domains=[docs,law]", *words)
        return stage.show("progress", stage._config(options), options)

    assert progress("embed") == "embed 0 embed:new 0"
    (run / "domains.safetensors").mkdir(parents=True)
    assert progress("embed") == "embed:new 0"
    for name in ("step_8", "step_40", "partial", "step_²", "step_041"):
        (run / "seed.training" / "states" / name).mkdir(parents=True)
    assert progress("seed") == "seed 40", "a training tokenises for itself"
    assert progress("upcycle") == "tokens 0 seed 40 branch:docs 0 branch:law 0 upcycle 0"
    assert progress("branch", "branch=law", "model.path=elsewhere") == "branch:law 0"
    (run / "tokens").mkdir()
    (run / "tokens" / "docs-train.json").touch()
    assert progress("tokens") == "tokens 1"
    assert progress("tokens", f"data.cache={tmp_path}") == "tokens 0"
    (run / "upcycled").mkdir()
    assert progress("upcycle") == "tokens 1 seed 40 branch:docs 0 branch:law 0"


def test_a_path_with_a_newline_is_refused_before_a_shell_sees_it(tmp_path):
    options = args("seed", "pipeline.run=" + json.dumps(f"{tmp_path}/a\nb"))
    with pytest.raises(ConfigError, match="control character"):
        stage.show("logs", stage._config(options), options)


def test_a_stage_that_the_recipe_lacks(tmp_path):
    options = args("extend", "pipeline.new_domains=[]", f"pipeline.run={tmp_path}")
    config = stage._config(options)
    with pytest.raises(
        ConfigError,
        match=r"adds no expert, so it has no stage extend; give pipeline.new_domains=\[E\]",
    ):
        stage.chosen(stage.plan(config, options), stage.names_of("extend", config))


@pytest.mark.parametrize("name", ["branch", "embed", "upcycle", "moe", "evaluate"])
def test_a_recipe_without_domains_says_what_to_set(name, capsys):
    assert main(["stage", "--config=own", name]) == 1
    assert (
        "pipeline.domains is empty: a run trains a branch for each; give pipeline.domains=[A,B,..]"
        in (capsys.readouterr().err)
    )
    # pipeline.sh: no array of 0 to -1
    assert main(["stage", "--config=own", "--show=branches", "seed"]) == 1


def test_a_branch_that_the_recipe_lacks_is_named_with_those_it_has(capsys):
    assert main(["stage", "branch", "branch=law"]) == 1
    assert (
        "branch=law is none of the recipe's domains (python, docs, algebra, tables, cpp); "
        "give pipeline" in (capsys.readouterr().err)
    )


def test_a_branch_of_a_given_seed_needs_no_other(monkeypatch):
    """Else a new seed would be trained, and not be used."""
    trained = []
    monkeypatch.setattr(stage, "train", lambda config, options: trained.append(options.overrides))
    monkeypatch.setattr(stage, "make", lambda *given: pytest.fail("made an earlier stage"))
    words = ["branch=law", "pipeline.domains=[law]", "model.path=models/seed"]
    stage.run(args("branch", *words, show=None))
    assert trained == [words]


def test_settings_of_one_stage_do_not_reach_earlier_ones():
    given = [
        "training.lr=1",
        "pipeline.run=x",
        "stage=moe",
        "router.top_k=2",
        "name=n",
        "data.path=d",
        "seed=3",
    ]
    assert shared_overrides(given) == ["pipeline.run=x", "router.top_k=2", "data.path=d", "seed=3"]


def test_a_trained_stage_becomes_train_py(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(stage.os, "execv", lambda program, words: seen.extend(words))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    stage.train(
        load_config("demo"), args("branch", "pipeline.domains=['2024']", "training.steps=3")
    )
    assert seen[2:] == [
        str(stage.TRAIN),
        "--config=demo",
        "pipeline.domains=['2024']",
        "training.steps=3",
        "stage=branch",
        'branch="python"',
    ]
    seen.clear()
    stage.train(load_config("demo"), args("moe", deepspeed="x.json"))
    assert "--deepspeed=x.json" in seen and seen[-1] == "stage=moe"


def test_a_finished_stage_is_left_alone(tmp_path, capsys):
    (tmp_path / "upcycled").mkdir()
    # What a killed writer left goes all the same; no later writer comes by.
    (tmp_path / ".upcycled.tmp-2").mkdir()
    lock = f"process 2 on {socket.gethostname()} since yesterday\n"
    (tmp_path / ".upcycled.lock").write_text(lock)
    assert main(["stage", "--config=demo", "upcycle", f"pipeline.run={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"finished: {tmp_path / 'upcycled'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["upcycled"]  # nor is what it was made of


@pytest.fixture
def run_of_text(tmp_path, text_folder):
    """The words of a run on tiny text: two domains, and one that comes later."""
    return [
        f"pipeline.run={tmp_path / 'run'}",
        "pipeline.domains=[alpha,beta]",
        "pipeline.new_domains=[gamma]",
        "pipeline.vocabulary=300",
        f"data.path={text_folder}",
    ]


def test_the_stage_tokens_makes_all_that_trainings_read(tmp_path, run_of_text, monkeypatch, capsys):
    """Once, in one pass: what a training then asks for is there."""
    assert main(["stage", "--config=demo", "tokens", *run_of_text]) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out == f"finished: {run / 'tokens.json'}\n"
    made = json.loads((run / "tokens.json").read_text())
    names = [Path(path).name.rpartition("-")[0] for path in made]
    domains = ("alpha", "beta", "gamma")
    assert names == [f"{name}-{split}" for split in ("validation", "train") for name in domains]
    assert all(Path(path).stat().st_size == 2 * tokens for path, tokens in made.items())
    monkeypatch.setattr(corpora._Maker, "make_all", lambda *_: pytest.fail("tokenised again"))
    for words in (["stage=seed"], ["stage=branch", "branch=gamma"], ["stage=moe"]):
        config = resolve(load_config("demo", [*run_of_text, *words]))
        source = corpora.open_source(config.data.path)
        tokenizer = Path(config.model.tokenizer)
        for split, domains in zip(
            ("train", "validation"),
            (config.data.domains, config.data.validation_domains),
            strict=True,
        ):
            files = tokenised(config.data, source, domains, split, tokenizer)
            assert {str(file.path) for file in files.values()} <= set(made)
    assert main(["stage", "--config=demo", "tokens", *run_of_text]) == 0


def test_stages_that_are_done_need_no_text(tmp_path, run_of_text):
    for name in ("seed", "branches/alpha", "branches/beta", "nexus", "extended"):
        (tmp_path / "run" / name).mkdir(parents=True)
    save_tokenizer(tmp_path / "run" / "tokenizer", WORDS)
    assert main(["stage", "--config=demo", "tokens", *run_of_text]) == 0
    made = json.loads((tmp_path / "run" / "tokens.json").read_text())
    # the branch of gamma is left: it scores all domains
    names = [Path(path).name.rpartition("-")[0] for path in made]
    scored = [f"{name}-validation" for name in ("alpha", "beta", "gamma")]
    assert names == [*scored, "gamma-train"]


def test_a_signal_stops_the_tokenising_in_order(tmp_path, run_of_text, monkeypatch, capsys):
    def tokenise(configs):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(10)

    monkeypatch.setattr(preparation, "tokenise", tokenise)
    assert main(["stage", "--config=demo", "tokens", *run_of_text]) == EXIT_STOPPED
    assert "start the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokens.json").exists()


def test_a_training_does_not_wait_for_the_text_of_others(monkeypatch, run_of_text):
    trained = []
    monkeypatch.setattr(stage, "train", lambda config, options: trained.append(options.name))
    monkeypatch.setattr(stage, "make", lambda *given: pytest.fail("made an earlier stage"))
    stage.run(args("seed", *run_of_text, show=None))
    assert trained == ["seed"]


@pytest.fixture
def another_rank(monkeypatch, run_of_text):
    """What rank 1 of a training of the mixture does while nothing is made yet, as it happens."""
    done = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage, "make", lambda *given: pytest.fail("not rank 0's work"))
    monkeypatch.setattr(stage, "train", lambda config, options: done.append("trained"))
    return done, args("moe", *run_of_text, "pipeline.domains=[alpha,beta]", show=None)


def test_other_ranks_begin_to_train_once_rank_0_has_made_what_comes_before(
    another_rank, monkeypatch
):
    """In train.py they would wait under the limit of its start, which no training keeps."""
    done, options = another_rank
    config = stage._config(options)

    def look(seconds):
        assert len(done) < 9
        done.append("looked")
        if len(done) == 3:
            for step in stage.plan(config, options):
                if step.name != "moe":
                    step.output.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(stage.time, "sleep", look)
    stage.run(options)
    assert done == ["looked"] * 3 + ["trained"]


def test_a_signal_ends_a_rank_that_waits_in_order_and_rank_0_says_it(
    another_rank, monkeypatch, capsys
):
    done, options = another_rank
    monkeypatch.setattr(stage.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert stage.run(options) == EXIT_STOPPED
    assert done == [] and capsys.readouterr().err == ""


def test_an_unknown_recipe_is_one_line(capsys):
    assert main(["stage", "--config=nowhere", "moe"]) == 1
    assert capsys.readouterr().err.startswith("nexus-ds stage: no recipe at nowhere")
