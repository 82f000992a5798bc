"""Recipes and overrides: what is understood, and how everything else is refused."""

import os
import re
from pathlib import Path

import pytest

from nexus_ds.config import RECIPES, dump, load_config, named_once, parse_yaml
from nexus_ds.errors import ConfigError
from nexus_ds.pipeline import resolve
from nexus_ds.settings import STAGES, Config


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: str(p.relative_to(RECIPES))
)
@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_loads_in_every_stage(path, stage):
    config = resolve(load_config(path, [f"stage={stage}", "branch=x", "data.domains=[x]"]))
    assert config.stage == stage
    assert config.training.tokens > 0 or config.training.steps > 0


def test_stage_settings_lie_over_the_common_ones_and_overrides_over_both(tmp_path):
    path = recipe(
        tmp_path, "training: {steps: 3, lr: 1e-3}\nstages: {moe: {training: {lr: 2e-3}}}\n"
    )
    assert load_config(path, ["stage=moe"]).training.lr == 2e-3
    assert load_config(path, ["stage=seed"]).training.lr == 1e-3
    assert load_config(path, ["stage=moe", "training.lr=5e-4"]).training.lr == 5e-4


def test_numbers_in_yaml_notation_are_numbers(tmp_path):
    config = load_config(recipe(tmp_path, "training: {steps: 3, lr: 1e-5, tokens: 1e6}"))
    assert config.training.lr == 1e-5
    assert config.training.tokens == 1_000_000


@pytest.mark.parametrize("text", ["1:30", "1:59:59", "017", "-017", "0x1F", "0b11", "010.5", "1e"])
def test_what_is_no_plain_number_is_a_text_and_no_setting_that_is_a_number(text):
    """YAML 1.1 takes 1:30 for 90 and 017 for 15; YAML 1.2 takes 017 for 17."""
    for key, kind in (("training.lr", "float"), ("training.steps", "int")):
        with pytest.raises(ConfigError, match=rf"^{key}: expected {kind}, found '{text}'$"):
            load_config("demo", [f"{key}={text}"])
    assert load_config("demo", [f"data.domains=[{text}, 7]"]).data.domains == [text, "7"]


@pytest.mark.parametrize("word", ["no", "yes", "on", "Off", "NO", "2024-1-2", "1_0", "1_000", "="])
def test_a_name_stays_as_it_is_written(word):
    """YAML 1.1 takes the language `no` for False, and 1_000 for 1000."""
    config = load_config("demo", [f"name={word}", f"data.domains={word}"])
    assert config.name == word and config.data.domains == [word]
    assert load_config("demo", [f"data.domains=[{word}]"]).data.domains == [word]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("1.10", "expected a text, found the number 1.1; put quotes around what you mean"),
        ("1e5", "expected a text, found the number 100000.0; put quotes"),
        ("+1", "expected a text, found the number 1.0; put quotes"),
        ("true", "expected str, found True"),
    ],
)
def test_a_name_that_yaml_takes_for_something_else_is_refused(word, message):
    for override in (f"name={word}", f"data.domains={word}", f"data.weights={{{word}: 1}}"):
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"^{key}: {re.escape(message)}"):
            load_config("demo", [override])
    assert load_config("demo", [f"data.domains=['{word}']"]).data.domains == [word]


@pytest.mark.parametrize(
    ("word", "value"), [("no", False), ("off", False), ("Yes", True), ("on", True), ("true", True)]
)
def test_where_a_switch_is_wanted_these_words_are_one(word, value):
    assert load_config("demo", [f"router.centre={word}"]).router.centre is value


def test_digits_in_groups_are_a_number_where_one_is_wanted():
    config = load_config("demo", ["training.tokens=2_000_000", "training.lr=1_000"])
    assert load_config("demo", ["training.steps=+3"]).training.steps == 3
    assert (config.training.tokens, config.training.lr) == (2_000_000, 1000.0)
    assert type(config.training.lr) is float
    for odd in ("1_0", "1__000", "0_100", "_100"):
        with pytest.raises(ConfigError, match=f"training.tokens: expected int, found '{odd}'"):
            load_config("demo", [f"training.tokens={odd}"])


def test_a_dumped_configuration_loads_to_the_same(tmp_path):
    config = load_config(
        recipe(tmp_path, "training: {steps: 3}\npipeline: {domains: [a, b], merge_weight: 0.1}")
    )
    assert load_config(recipe(tmp_path, dump(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {stepz: 3}", r"unknown key training.stepz, did you mean steps\?"),
        ("trainig: {steps: 3}", r"unknown key trainig, did you mean training\?"),
        ("stages: {moes: {}}", r"unknown key stages.moes, did you mean moe\?"),
        (
            "stages: {seed: {training: {lrr: 1}}}",
            r"unknown key stages.seed.training.lrr, did you mean lr\?",
        ),
        ("training: {steps: many}", r"training.steps: expected int, found 'many'"),
        ("training: {steps: true}", r"training.steps: expected int, found True"),
        ("training: {steps: 3, lr: .inf}", r"training.lr: expected a finite number"),
        (
            "training: {steps: 3, micro_batch_size: -2}",
            r"training.micro_batch_size: expected a number in \[0, ",
        ),
        (
            "training: {steps: 3}\nparallel: {zero_stage: 9}",
            r"parallel.zero_stage: expected a number in \[0, 3\], found 9",
        ),
        (
            "training: {steps: 3}\nstage: [a]",
            r"stage: expected one of seed, branch, moe, extend, found \['a'\]",
        ),
        ("? [a]\n: 3", r"recipe.yaml:1: expected a name before the colon"),
        ("training: {steps: 3, lr: -1}", r"training.lr: expected a number above 0, found -1"),
        (
            "{training: {steps: 3}, model: {task_scale: 0}}",
            r"model.task_scale: expected a number above 0, found 0",
        ),
        ("training: {steps: 3, steps: 4}", r"recipe.yaml:1: the key 'steps' stands twice"),
        ("training: &a {steps: 3}\nrouter: *a", r"recipe.yaml:2: YAML aliases are not allowed"),
        ("training: !!python/object/apply:os.system ['true']", r"the tag 'tag:.*' is not allowed"),
        (
            "training: {steps: 3}\nrouter: {kind: liner}",
            r"router.kind: unknown value 'liner', did you mean linear\?",
        ),
        ("training: 3", r"training: expected a mapping of settings, found 3"),
        ("- a", r"expected a mapping of settings, found list"),
        ("name: x", r"training.tokens and training.steps are both 0; set one of them"),
        ("training: {steps: 3, warmup: 1.5}", r"training.warmup: expected a share of the steps"),
        (
            "training: {steps: 3}\nmodel: {hidden_size: 10}",
            r"model.hidden_size 10 is not a multiple of model.heads 3",
        ),
        ("training: {steps: 3}\nstage: branch", r"name it with branch=DOMAIN"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(tmp_path, text))


def test_a_recipe_of_a_name_that_no_file_can_have(tmp_path):
    """Found by tests/fuzz.py: the traceback of an OSError."""
    with pytest.raises(ConfigError, match=r"\.yaml: base: no recipe at xxxx"):
        load_config(recipe(tmp_path, f"base: {'x' * 300}"))


def test_a_base_that_is_no_recipe_is_told_with_the_recipe_that_names_it(tmp_path):
    """Found by tests/fuzz.py: an error that named /etc/passwd alone."""
    (tmp_path / "text").write_text("root:x:0:0::/root:/bin/sh")
    with pytest.raises(ConfigError, match=r"\.yaml: base: .*text: expected a mapping of settings"):
        load_config(recipe(tmp_path, f"base: {tmp_path / 'text'}"))


def test_a_missing_recipe_lists_those_that_come_with_the_package():
    with pytest.raises(
        ConfigError, match=r"no recipe at nowhere.yaml; give a file, or one of: .*demo"
    ):
        load_config("nowhere.yaml")


def test_an_override_without_value_is_refused():
    with pytest.raises(ConfigError, match=r"override 'training.lr': expected section.key=value"):
        load_config("demo", ["training.lr"])


def test_a_huge_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="100,001 characters; a recipe has at most 100,000"):
        parse_yaml("a" * 100_001, "big.yaml")
    holes = tmp_path / "holes.yaml"
    holes.touch()
    os.truncate(holes, 3 << 30)
    with pytest.raises(ConfigError, match="has 3,221,225,472 bytes, expected at most 400,000"):
        load_config(holes)


@pytest.mark.parametrize(
    "text",
    ["!!bool maybe", "!!timestamp x", "!!int ''", "!!float ''", "!!map [a]", "! x", "{a: !own x}"],
)
def test_tags_are_refused(text):
    """The library makes each what it says, unchecked: KeyError, AttributeError, TypeError."""
    with pytest.raises(ConfigError, match=r"F:1: the tag '.*' is not allowed in recipes"):
        parse_yaml(text, "F")


@pytest.mark.parametrize("digits", ["9" * 101, "9" * 5000, "-1." + "0" * 200, "." + "0" * 200])
def test_endless_numbers_are_refused(digits):
    """Python can't read a number of 5,000 digits: a ValueError of its own."""
    with pytest.raises(
        ConfigError,
        match=rf"lr:1: a number of {len(digits)} characters, expected at most 100; put quotes",
    ):
        load_config("demo", [f"training.lr={digits}"])
    assert parse_yaml(f"'{digits}'", "F") == digits


def test_defaults_of_the_router_are_those_that_the_readme_names():
    router = Config().router
    assert (router.lr_scale, router.init, router.centre, router.warm_start) == (
        0.05,
        "balanced",
        True,
        "label_fit",
    )
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for row in (
        "`router.lr_scale` | 0.05 ",
        "`router.init` | `balanced`",
        "`router.warm_start` | `label_fit`",
    ):
        assert row in readme
    paper = load_config("paper").router
    assert (paper.lr_scale, paper.init, paper.centre, paper.warm_start) == (
        1.0,
        "normal",
        False,
        "none",
    )


def test_a_recipe_can_stand_on_another(tmp_path):
    path = recipe(
        tmp_path,
        "base: demo\ntraining: {lr: 7e-5}\npipeline: {domains: [x]}\n"
        "stages: {moe: {training: {tokens: 5}}}\n",
    )
    below, config = load_config("demo", ["stage=moe"]), load_config(path, ["stage=moe"])
    assert config.pipeline.domains == ["x"] and config.training.tokens == 5
    assert (
        config.pipeline.new_domains == below.pipeline.new_domains
        and config.training.lr == below.training.lr
    )
    assert (
        load_config(path, ["stage=seed"]).training.tokens
        == load_config("demo", ["stage=seed"]).training.tokens
    )


@pytest.mark.parametrize("base", ["[a]", "SELF"])
def test_a_base_must_be_another_recipe(tmp_path, base):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {path if base == 'SELF' else base}\n")
    with pytest.raises(ConfigError, match="base: expected the name of another recipe, found"):
        load_config(path)


def test_an_override_can_hold_for_one_stage(tmp_path):
    path = recipe(
        tmp_path, "training: {steps: 3, lr: 1e-3}\nstages: {moe: {training: {lr: 2e-3}}}\n"
    )
    words = ["stages.moe.training.lr=3e-3"]
    assert load_config(path, ["stage=moe", *words]).training.lr == 3e-3
    assert load_config(path, ["stage=seed", *words]).training.lr == 1e-3
    with pytest.raises(ConfigError, match=r"unknown key stages.mow, did you mean moe\?"):
        load_config(path, ["stages.mow.training.lr=1"])
    with pytest.raises(ConfigError, match="stages: expected a mapping of stages, found 3"):
        load_config(path, ["stages=3"])


def test_what_was_parsed_before_is_not_what_somebody_changed_since():
    first = parse_yaml("a: {b: [1]}", "recipe")
    first["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}", "recipe") == {"a": {"b": [1]}}


def test_names_of_an_option_are_taken_apart_and_each_given_once():
    assert named_once("--scored", " a, b ,") == ["a", "b"]
    assert named_once("--scored", "") == []
    with pytest.raises(ConfigError, match=r"^--scored names a domain twice: a, a; name each once$"):
        named_once("--scored", "a,a")
