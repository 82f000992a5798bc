"""JSON that this project wrote and reads back, checked against the types of what was written.

A disk cuts a file off or flips a bit, and people edit and join what they can read. So whoever reads
such a file says of which type each value must be, as a TypedDict or dataclass does, and whatever
else stands there is refused in one sentence, with its place and what makes the file again.

Not covered: whether the numbers are right (`sealed` finds that out); files from strangers
(`checkpoint.json_files`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import UnionType
from typing import NotRequired, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from typing import is_typeddict as is_typed

from nexus_ds.errors import DataError
from nexus_ds.inputs import read_bounded, require_few_values

Value = TypeVar("Value")
SHOWN = 60  # characters of a value that is not what it should be
NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return get_type_hints(kind, include_extras=True)


def _named(kind: object) -> str:
    """Return what a type's values are called in JSON."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_named, get_args(kind)))
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and kind in NAMES:
        return NAMES[kind]
    return "a list" if get_origin(kind) in (list, Sequence) else "an object"


def _parts(value: object, kind: object, where: str) -> Iterator[tuple[object, object, str]]:
    """Yield what lies in a value, with its type and its place; TypeError if that isn't `kind`."""
    origin = get_origin(kind)
    inner = get_args(kind)
    sound: bool
    if origin in (list, Sequence):
        sound = isinstance(value, list)
    elif origin in (dict, Mapping) or is_typed(kind):
        sound = isinstance(value, dict)
    else:
        plain = cast(type, kind)
        # a whole number is a float that lost its point; and true is no number
        sound = type(value) in ((float, int) if plain is float else (plain,))
        sound = sound and not (plain is float and not _is_finite(value))
    if not sound:
        raise TypeError(f"{where}: found {str(value)[:SHOWN]!r}, expected {_named(kind)}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield item, inner[0], f"{where}[{number}]"
    elif is_typed(kind) or dataclasses.is_dataclass(kind):
        yield from _fields(value, cast(type, kind), where)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield item, inner[1], f"{where}.{name}"


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(cast(float, value))
    except OverflowError:  # a whole number of 400 digits
        return False


def _fields(value: object, kind: type, where: str) -> Iterator[tuple[object, object, str]]:
    """Yield the fields of a record; TypeError where one is missing."""
    found = value if isinstance(value, dict) else vars(value)
    for name, hint in _hints(kind).items():
        needed = get_origin(hint) is not NotRequired
        if name in found:
            yield found[name], hint if needed else get_args(hint)[0], f"{where}.{name}"
        elif needed:
            raise TypeError(f"{where}: found no {name}")


def typed(value: object, kind: type[Value], where: str = "") -> Value:
    """Return `value`, out of JSON, if it is of a type in all that lies in it.

    Keys that a TypedDict doesn't name are passed over. Numbers are finite.

    Args:
        value: what was read.
        kind: str, int, float, bool, a TypedDict or dataclass; lists, mappings by text and unions of
            these; object (or Any) where anything is good.
        where: the value's place, for the message.

    Raises:
        TypeError: the first place at which something else stands.
    """
    # Without recursion: what is read may be nested deeper than Python calls.
    waiting: list[tuple[object, object, str]] = [(value, kind, where)]
    while waiting:
        inner, wanted, place = waiting.pop()
        place = place.lstrip(".")
        if wanted is object or getattr(wanted, "__name__", "") == "Any":
            continue
        if get_origin(wanted) in (Union, UnionType):
            waiting += _chosen(inner, wanted, place)
        else:
            waiting += _parts(inner, wanted, place)
    return cast(Value, value)


def _chosen(value: object, union: object, where: str) -> list[tuple[object, object, str]]:
    """Return what lies in a value of one of several types."""
    for kind in get_args(union):
        try:
            return list(_parts(value, kind, where))
        except TypeError:
            continue
    raise TypeError(f"{where}: found {str(value)[:SHOWN]!r}, expected {_named(union)}")


@contextmanager
def refusing(where: Path | str, what: str, mend: str) -> Iterator[None]:
    """Refuse a file whose content makes the block fail as wrong types do.

    Args:
        where: the file, or a line of it.
        what: it should be, "what evaluate writes".
        mend: what to do, "remove it, and the same command makes it again".

    Raises:
        DataError: in place of ValueError, TypeError, KeyError, AttributeError, IndexError,
            ArithmeticError and RecursionError.
    """
    try:
        yield
    except KeyError as error:
        raise DataError(f"{where}: found no {error}; expected {what}; {mend}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deep; expected {what}; {mend}") from error
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}; expected {what}; {mend}") from error


def parsed(content: bytes) -> object:
    """Return the JSON that is in UTF-8; ValueError or RecursionError for other bytes.

    Half a character, as "\\ud800" names one, is refused: it could be written nowhere.
    """
    require_few_values(content)
    text = content.decode("utf-8")
    value: object = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_typed(path: Path, kind: type[Value], what: str, mend: str) -> Value:
    """Return the JSON of a file, of a type as `typed` checks it.

    Raises:
        DataError: the file is no such JSON; `refusing` has the other arguments.
        OSError: it can't be read.
    """
    content = read_bounded(path, error=DataError)
    with refusing(path, what, mend):
        return typed(parsed(content), kind)
