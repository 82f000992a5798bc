"""Typed configuration: YAML recipes, dotted overrides, unknown keys refused with the nearest known
one.

A recipe is a file with the sections below plus `stages`: for each stage of the pipeline (seed,
branch, moe, extend) the settings that differ. `load_config(recipe, overrides)` lays the stage's
settings over the common ones and the command line's `section.key=value` over both.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from nexus_ds.errors import ConfigError
from nexus_ds.settings import CHOICES, POSITIVE, RANGES, STAGES, Config
from nexus_ds.words import nearest

RECIPES = Path(__file__).parent / "recipes"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases and reads `1e-5` as a number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(
                f"{mark.name}:{mark.line + 1}: YAML aliases are not allowed in recipes; write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}: expected a name before the colon, found {key!r}"
                )
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}: the key {key!r} stands twice; keep one of the two"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML strictly; ConfigError names the file and line of what is wrong."""
    return copy.deepcopy(_parsed(text, name))


# a comparison reads the same recipe and overrides hundreds of times
@functools.lru_cache(maxsize=1024)
def _parsed(text: str, name: str) -> Any:
    if len(text) > 1_000_000:
        raise ConfigError(f"{name}: {len(text)} characters; a recipe has at most 1,000,000")
    loader = _StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a valid recipe: {error}") from error
    finally:
        loader.dispose()


def _coerce(value: Any, annotation: Any, key: str) -> Any:
    """Return `value` as the annotated type, or raise ConfigError naming `key`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), key)
    if origin is list:
        items = (
            value if isinstance(value, list) else [part for part in str(value).split(",") if part]
        )
        return [_coerce(item, arguments[0], key) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a mapping, found {value!r}")
        return {
            str(name): _coerce(item, arguments[1], f"{key}.{name}") for name, item in value.items()
        }
    return _coerce_scalar(value, annotation, key)


def _coerce_scalar(value: Any, annotation: type, key: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and number:
        if not math.isfinite(value):
            raise ConfigError(f"{key}: expected a finite number, found {value!r}")
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if annotation is str and (number or value is None):
        return "" if value is None else str(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}: expected {annotation.__name__}, found {value!r}")
    return value


def _apply(target: Any, values: Any, prefix: str) -> None:
    """Lay a nested mapping over the dataclass `target` in place."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix or 'recipe'}: expected a mapping of settings, found {values!r}")
    hints = typing.get_type_hints(type(target))
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            raise ConfigError(f"unknown key {key}{nearest(str(name), hints)}")
        if dataclasses.is_dataclass(getattr(target, name)):
            _apply(getattr(target, name), value, key)
        else:
            setattr(target, name, _coerce(value, hints[name], key))


def parse_override(text: str) -> dict[str, Any]:
    """Turn 'training.lr=1e-4' into {'training': {'lr': 0.0001}}."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected section.key=value")
    value: Any = parse_yaml(raw, f"override {key}") if raw else ""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def get_key(config: Config, dotted: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: Config) -> None:
    for key, choices in CHOICES.items():
        value = get_key(config, key)
        if value not in choices:
            raise ConfigError(f"{key}: unknown value {value!r}{nearest(value, choices)}")
    for key in POSITIVE:
        if get_key(config, key) <= 0:
            raise ConfigError(f"{key}: expected a number above 0, found {get_key(config, key)}")
    for key, (least, most) in RANGES.items():
        if not least <= get_key(config, key) <= most:
            raise ConfigError(
                f"{key}: expected a number in [{least}, {most}], found {get_key(config, key)}"
            )


def validate(config: Config) -> Config:
    """Check values that can be judged without files; ConfigError says what to set."""
    _check_values(config)
    training = config.training
    if training.tokens <= 0 and training.steps <= 0:
        raise ConfigError("training.tokens and training.steps are both 0; set one of them")
    if not 0 <= training.warmup < 1:
        raise ConfigError(
            f"training.warmup: expected a share of the steps in [0, 1), found {training.warmup}"
        )
    if config.stage == "branch" and not config.branch:
        raise ConfigError(
            "stage=branch trains one domain's dense expert; name it with branch=DOMAIN"
        )
    model = config.model
    if model.kv_heads and model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads {model.heads} is not a multiple of model.kv_heads {model.kv_heads}"
        )
    if config.model.hidden_size % config.model.heads:
        raise ConfigError(
            f"model.hidden_size {config.model.hidden_size} is not a multiple of model.heads {config.model.heads}"
        )
    return config


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe: a path, or the name of one that comes with the package ('demo').

    `base: NAME` lays it over another recipe: mappings are merged, everything else is replaced.
    """
    recipe = _read_one(path)
    chain = [str(path)]
    while (base := recipe.pop("base", None)) is not None:
        if not isinstance(base, str) or base in chain:
            raise ConfigError(
                f"{chain[-1]}: base: expected the name of another recipe, found {base!r}"
            )
        chain.append(base)
        recipe = _merged(_read_one(base), recipe)
    return recipe


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(below[k], v)
        for k, v in above.items()
        if isinstance(v, dict) and isinstance(below.get(k), dict)
    }
    return below | above | both


def _read_one(path: str | Path) -> dict[str, Any]:
    found = next((p for p in (Path(path), RECIPES / f"{path}.yaml") if p.is_file()), None)
    if found is None:
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
        raise ConfigError(f"no recipe at {path}; give a file, or one of: {', '.join(known)}")
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{found}: not UTF-8 text ({error}); save the recipe as UTF-8") from error
    recipe = parse_yaml(text, str(found))
    if not isinstance(recipe, dict):
        raise ConfigError(f"{found}: expected a mapping of settings, found {type(recipe).__name__}")
    return recipe


def _stage_settings(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Take `stages` out of recipe and overrides (stages.moe.training.lr=1e-3 holds for one stage)
    and return them as one."""
    stages: dict[str, Any] = {}
    for layer in layers:
        given = layer.pop("stages", {})
        if not isinstance(given, dict):
            raise ConfigError(f"stages: expected a mapping of stages, found {given!r}")
        stages = _merged(stages, given)
    for name, settings in stages.items():
        if name not in STAGES:
            raise ConfigError(f"unknown key stages.{name}{nearest(str(name), STAGES)}")
        _apply(Config(), settings, f"stages.{name}")
    return stages


def load_config(recipe: str | Path = "demo", overrides: typing.Sequence[str] = ()) -> Config:
    """Read a recipe, choose its stage, lay the overrides over it, and check the result.

    Raises:
        ConfigError: unknown or doubled keys, wrong types, contradictions.
    """
    values = read_recipe(recipe)
    parsed = [parse_override(text) for text in overrides]
    stages = _stage_settings([values, *parsed])
    chosen = next(
        (o["stage"] for o in reversed(parsed) if "stage" in o), values.get("stage", Config.stage)
    )
    if not isinstance(chosen, str):
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, found {chosen!r}")
    config = Config()
    for layer in (values, stages.get(chosen, {}), *parsed):
        _apply(config, layer, "")
    return validate(config)


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """Return a configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
