"""Typed configuration: YAML recipes, dotted overrides, unknown keys refused with a hint.

A recipe is a file with the sections of `settings` plus `stages`: for each stage of the pipeline
(seed, branch, moe, extend) the settings that differ. `load_config(recipe, overrides)` lays the
stage's settings over the common ones and the command line's `section.key=value` over both.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from nexus_ds.errors import ConfigError
from nexus_ds.inputs import require_file
from nexus_ds.settings import SETTINGS, STAGES, Config, types_of
from nexus_ds.words import nearest

RECIPES = Path(__file__).parent / "recipes"
MOST_CHARACTERS = 100_000  # of a recipe: YAML takes 30 s for a million brackets
MOST_YAML = 4 * MOST_CHARACTERS  # bytes: four a character at most
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MOST_DIGITS = 100  # of a number, also of one to another base: Python writes 4,300 digits at most
GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2}(_[0-9]{3}){1,10}")
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
# what a recipe or an override says, before it is known to be a setting
Values = dict[str, object]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases, tags, doubled keys and endless numbers.

    Plain values are what YAML 1.2 takes them for, but that a number never begins with a needless 0:
    017 is a text, as 1:30, 0x1F and yes are.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        place = _place(event.start_mark)
        # Aliases of aliases make gigabytes of a few lines.
        if isinstance(event, yaml.events.AliasEvent):
            raise ConfigError(
                f"{place}: YAML aliases are not allowed in recipes; write the value out"
            )
        # what is made of a value is decided by its own form, which the library has checked
        if getattr(event, "tag", None) is not None:
            raise ConfigError(
                f"{place}: the tag {event.tag[:100]!r} is not allowed in recipes; leave it out"
            )
        node = super().compose_node(parent, index)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in NUMBER_TAGS:
            return node
        if len(node.value) > MOST_DIGITS:
            raise ConfigError(
                f"{place}: a number of {len(node.value)} characters, expected at most "
                f"{MOST_DIGITS}; put quotes around it if it is a text"
            )
        return node

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            place = _place(key_node.start_mark)
            if not isinstance(key, str | int | float | bool):
                raise ConfigError(f"{place}: expected a name before the colon, found {key!r}")
            # YAML itself would keep the last one and say nothing.
            if key in seen:
                raise ConfigError(f"{place}: the key {key!r} stands twice; keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _place(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}"


# Instead of YAML 1.1's, which takes 1:30 for 90, 017 for 15 and the language `no` for False.
_StrictLoader.yaml_implicit_resolvers = {}
for _kind, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"0|-?[1-9][0-9]*", "-0123456789"),
    (
        "float",
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _pattern = re.compile(rf"(?:{_form})\Z")
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list(_first))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML strictly; ConfigError names the file and line of what is wrong."""
    # copied, so that nobody changes what the next one reads
    return copy.deepcopy(_parsed(text, name))


# a comparison reads the same recipe and overrides hundreds of times
@functools.lru_cache(maxsize=1024)
def _parsed(text: str, name: str) -> object:
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"{name}: {len(text):,} characters; a recipe has at most {MOST_CHARACTERS:,}"
        )
    try:
        # it looks for characters that YAML does not allow
        loader = _StrictLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a valid recipe: {error}") from error
    loader.name = name
    try:
        return loader.get_single_data()
    # a date that there is none of is a ValueError, brackets within brackets a RecursionError
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not a valid recipe: {error}") from error
    finally:
        loader.dispose()


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds, such as a training.yaml; ConfigError names what is wrong.

    Bytes that are no UTF-8 stand for a character that no setting has.
    """
    require_file(path, MOST_YAML, ConfigError)
    found: object = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    return found


def _coerce(value: object, annotation: Any, key: str) -> object:
    """Return `value` as the annotated type, or raise ConfigError naming `key`."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is types.UnionType:
        if value is None:
            return None
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return _coerce(value, inner, key)
    if origin is list:
        # data.domains=a,b: brackets would have to be quoted in a shell
        words = [word for word in value.split(",") if word] if isinstance(value, str) else [value]
        items = value if isinstance(value, list) else [] if value is None else words
        return [_coerce(item, arguments[0], key) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a mapping, found {value!r}")
        made: dict[str, object] = {}
        for name, item in value.items():
            named = str(_coerce_scalar(name, str, key))
            made[named] = _coerce(item, arguments[1], f"{key}.{name}")
        return made
    # Whether it is one of a Literal's words is checked at the end, when the last layer has spoken.
    return _coerce_scalar(value, str if origin is typing.Literal else annotation, key)


def _coerce_scalar(value: object, annotation: type, key: str) -> object:
    # a bool is an int to Python
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and isinstance(value, int | float) and number:
        # not isfinite, which fails itself for a whole number of a thousand digits
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{key}: expected a finite number, found {value!r}")
        return float(value)
    # 1e9 is a float to YAML
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # names such as 2024, and `key:` without a value
    if annotation is str and (number or value is None):
        # 1.10 is 1.1 by now, 1e5 is 100000.0
        if isinstance(value, float):
            raise ConfigError(
                f"{key}: expected a text, found the number {value!r}; put quotes "
                "around what you mean"
            )
        return "" if value is None else str(value)
    if isinstance(value, str) and annotation is not str:
        value = _meant(value, annotation)
    if type(value) is not annotation:
        raise ConfigError(f"{key}: expected {annotation.__name__}, found {value!r}")
    return value


def _meant(text: str, annotation: type) -> object:
    """Return what a text says where a switch or a number is wanted; the text if it says none."""
    if annotation is bool:
        return SWITCHES.get(text.lower(), text)
    # digits in groups: 1_000_000
    if GROUPED.fullmatch(text):
        return annotation(text.replace("_", ""))
    return text


def _apply(target: object, values: object, prefix: str) -> None:
    """Lay a nested mapping over the dataclass `target` in place."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix or 'recipe'}: expected a mapping of settings, found {values!r}")
    known = types_of(type(target))
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in known:
            raise ConfigError(f"unknown key {key}{nearest(str(name), known)}")
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            _apply(current, value, key)
        else:
            setattr(target, name, _coerce(value, known[name], key))


def parse_override(text: str) -> Values:
    """Turn 'training.lr=1e-4' into {'training': {'lr': 0.0001}}."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected section.key=value")
    value = parse_yaml(raw, f"override {key}") if raw else ""
    *sections, last = key.split(".")
    made: Values = {last: value}
    for section in reversed(sections):
        made = {section: made}
    return made


def named_once(option: str, text: str) -> list[str]:
    """Return the domains that an option names, A,B; none of nothing.

    Raises:
        ConfigError: one that is named twice.
    """
    words = [name.strip() for name in text.split(",")]
    names = [name for name in words if name]
    if len(set(names)) != len(names):
        raise ConfigError(f"{option} names a domain twice: {', '.join(names)}; name each once")
    return names


def get_key(config: Config, dotted: str) -> Any:
    """Return the value of a dotted key."""
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: Config) -> None:
    for key, rule in SETTINGS.items():
        value = get_key(config, key)
        if rule.choices and value not in rule.choices:
            raise ConfigError(f"{key}: unknown value {value!r}{nearest(value, rule.choices)}")
        if rule.positive and value <= 0:
            raise ConfigError(f"{key}: expected a number above 0, found {value}")
        if rule.between is None:
            continue
        least, most = rule.between
        if not least <= value <= most:
            raise ConfigError(f"{key}: expected a number in [{least}, {most}], found {value}")


def validate(config: Config) -> Config:
    """Check values that can be judged without files; ConfigError says what to set."""
    _check_values(config)
    training, model = config.training, config.model
    if training.tokens <= 0 and training.steps <= 0:
        raise ConfigError("training.tokens and training.steps are both 0; set one of them")
    # 1 excluded: no step would be left to fall in
    if not 0 <= training.warmup < 1:
        raise ConfigError(
            f"training.warmup: expected a share of the steps in [0, 1), found {training.warmup}"
        )
    if config.stage == "branch" and not config.branch:
        raise ConfigError(
            "stage=branch trains one domain's dense expert; name it with branch=DOMAIN"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads {model.heads} is not a multiple of model.kv_heads {model.kv_heads}"
        )
    if model.hidden_size % model.heads:
        raise ConfigError(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.heads {model.heads}"
        )
    return config


def read_recipe(path: str | Path) -> Values:
    """Read a recipe: a path, or the name of one that comes with the package ('demo').

    `base: NAME` lays it over another recipe: mappings are merged, everything else is replaced.
    """
    recipe = _read_one(path)
    chain = [str(path)]
    while (base := recipe.pop("base", None)) is not None:
        # a recipe that stands on itself, directly or not, would be read for ever
        if not isinstance(base, str) or base in chain:
            raise ConfigError(
                f"{chain[-1]}: base: expected the name of another recipe, found {base!r}"
            )
        try:
            below = _read_one(base)
        # whose base it is: the file itself may be none of the user's
        except ConfigError as error:
            raise ConfigError(f"{chain[-1]}: base: {error}") from error
        chain.append(base)
        recipe = _merged(below, recipe)
    return recipe


def _merged(below: Values, above: Values) -> Values:
    """Return `below` with `above` laid over it, mappings inside them likewise."""
    both: Values = {}
    for key, value in above.items():
        other = below.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            both[key] = _merged(other, value)
    return below | above | both


def _read_one(path: str | Path) -> Values:
    places = (Path(path), RECIPES / f"{path}.yaml")
    # unlike pathlib's, it says no of a name that is too long for a file's
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        files = RECIPES.rglob("*.yaml")
        known = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in files)
        raise ConfigError(f"no recipe at {path}; give a file, or one of: {', '.join(known)}")
    try:
        require_file(found, MOST_YAML, ConfigError)
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{found}: not UTF-8 text ({error}); save the recipe as UTF-8") from error
    recipe = parse_yaml(text, str(found))
    if not isinstance(recipe, dict):
        raise ConfigError(f"{found}: expected a mapping of settings, found {type(recipe).__name__}")
    return recipe


def _stage_settings(layers: list[Values]) -> Values:
    """Take `stages` out of recipe and overrides and return them as one.

    An override `stages.moe.training.lr=1e-3` holds for that stage alone.
    """
    stages: Values = {}
    for layer in layers:
        given = layer.pop("stages", {})
        if not isinstance(given, dict):
            raise ConfigError(f"stages: expected a mapping of stages, found {given!r}")
        stages = _merged(stages, given)
    for name, settings in stages.items():
        if name not in STAGES:
            raise ConfigError(f"unknown key stages.{name}{nearest(str(name), STAGES)}")
        # also those of the other stages: a mistake is told at once, not when its stage comes
        _apply(Config(), settings, f"stages.{name}")
    return stages


def _chosen_stage(values: Values, overrides: list[Values]) -> str:
    given = [layer["stage"] for layer in (values, *overrides) if "stage" in layer]
    stage = given[-1] if given else Config.stage
    if not isinstance(stage, str):
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, found {stage!r}")
    return stage


def load_config(recipe: str | Path = "demo", overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, choose its stage, lay the overrides over it, and check the result.

    Raises:
        ConfigError: unknown or doubled keys, wrong types, contradictions.
    """
    values = read_recipe(recipe)
    parsed = [parse_override(text) for text in overrides]
    stages = _stage_settings([values, *parsed])
    chosen = _chosen_stage(values, parsed)
    config = Config()
    for layer in (values, stages.get(chosen, {}), *parsed):
        _apply(config, layer, "")
    return validate(config)


def as_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """Return a configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
