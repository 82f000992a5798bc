"""What is read back is of the types that were written, or is refused with its place."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest

from nexus_ds.errors import ConfigError, DataError
from nexus_ds.typed_json import read_typed, refusing, typed


@dataclass
class Inner:
    values: list[float]
    more: dict[str, Any]


class Record(TypedDict):
    name: str
    count: int
    loss: float | None
    flag: NotRequired[bool]
    parts: NotRequired[dict[str, list[int]] | None]


SOUND = {"name": "a", "count": 1, "loss": 2.5, "more": object()}


@pytest.mark.parametrize(
    "more",
    [{}, {"loss": 3}, {"loss": None}, {"flag": True, "parts": {"x": [1, 2]}}, {"parts": None}],
)
def test_what_was_written_comes_back(more):
    assert typed(SOUND | more, Record) == SOUND | more


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": 3}, "name: found '3', expected text"),
        ({"count": "x" * 99}, f"count: found '{'x' * 60}', expected a whole number"),
        ({"count": True}, "count: found 'True', expected a whole number"),
        ({"loss": float("nan")}, "loss: found 'nan', expected a finite number or null"),
        ({"loss": "x"}, "loss: found 'x', expected a finite number or null"),
        ({"loss": 10**400}, f"loss: found '1{'0' * 59}', expected a finite number or null"),
        ({"flag": 1}, "flag: found '1', expected true or false"),
        ({"flag": None}, "flag: found 'None', expected true or false"),
        ({"parts": []}, r"parts: found '[]', expected an object or null"),
        ({"parts": {"x": {}}}, "parts.x: found '{}', expected a list"),
        ({"parts": {"x": [1, 2.0]}}, "parts.x[1]: found '2.0', expected a whole number"),
    ],
)
def test_what_was_not_is_refused_with_its_place(more, message):
    with pytest.raises(TypeError) as caught:
        typed(SOUND | more, Record)
    assert str(caught.value) == message


def test_missing_keys_and_dataclasses():
    with pytest.raises(TypeError, match=r"^x: found no count$"):
        typed({"x": {"name": "a"}}, dict[str, Record])
    assert typed(Inner([1, 2.5], {"a": None}), Inner).values == [1, 2.5]
    with pytest.raises(TypeError, match=r"^values\[1\]: found 'None', expected a finite number$"):
        typed(Inner([1, None], {}), Inner)
    with pytest.raises(TypeError, match=r"^more: found '\[\]', expected an object$"):
        typed(Inner([], []), Inner)


def test_nesting_is_no_matter():
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(TypeError, match=r"^loss: found"):
        typed(SOUND | {"loss": {"a": 1}}, Record)
    assert typed({"more": value}, dict[str, object])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": 1',
        b"\xff\xfe",
        b"null",
        b"3",
        b'{"a": "x"}',
        b'{"a": NaN}',
        b'{"\\uD800": 1}',
        b"[" * 99999,
        pytest.param(b"[" + b"{}," * 2_000_001 + b"{}]", id="many"),
    ],
)
def test_a_damaged_file_is_one_message(tmp_path, content):
    path = tmp_path / "made.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_typed(path, dict[str, float], "what was made", "remove it")
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and said.endswith("; expected what was made; remove it")
    path.write_text(json.dumps({"a": 1}))
    assert read_typed(path, dict[str, float], "what was made", "remove it") == {"a": 1}


def test_what_fails_while_it_is_read_is_refused_and_mistakes_stay_what_they_are():
    with (
        pytest.raises(DataError, match=r"^f: found no 'a'; expected this; do that$"),
        refusing("f", "this", "do that"),
    ):
        {}["a"]
    with (
        pytest.raises(ConfigError, match=r"^another$"),
        refusing("f", "this", "do that"),
    ):
        raise ConfigError("another")
    with (
        pytest.raises(FileNotFoundError),
        refusing("f", "this", "do that"),
    ):
        Path("/nonexistent").read_bytes()
