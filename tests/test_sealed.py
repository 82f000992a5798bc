import json
import tracemalloc

import pytest

from nexus_ds import sealed
from nexus_ds.sealed import read_sealed, seal

VALUE = {"step": 2, "parts": {"b": [1, 2.5], "a": None}, "é": "–"}


def test_what_was_sealed_comes_back_in_its_order(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(seal(VALUE | {"pair": (1, 2), "numbered": {3: 4}}))
    found = read_sealed(path)
    assert found == VALUE | {"pair": [1, 2], "numbered": {"3": 4}}
    assert list(found["parts"]) == ["b", "a"]


def test_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "manifest.json"
    text = seal(VALUE).encode()
    for place in range(len(text)):
        for bit in (0, 4):
            harmed = bytearray(text)
            harmed[place] ^= 1 << bit
            path.write_bytes(harmed)
            # Blanks between values say nothing.
            if _parsed(harmed) == json.loads(text):
                continue
            with pytest.raises(ValueError, match=r"valid JSON|hash of itself|sha256|was written"):
                read_sealed(path)


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_other_values_types_and_orders_are_seen(tmp_path):
    path = tmp_path / "manifest.json"
    told = json.loads(seal(VALUE))
    turned = {"parts": told["parts"] | {"b": told["parts"]["b"]}} | told
    for other in ({"step": 66}, {"step": "2"}, {"step": True}, {"parts": []}, {"more": 1}):
        path.write_text(json.dumps(told | other))
        with pytest.raises(
            ValueError, match=r"found sha256 [0-9a-f]{12} of what it says, expected"
        ):
            read_sealed(path)
    path.write_text(json.dumps(turned))
    with pytest.raises(ValueError, match="found sha256"):
        read_sealed(path)
    del told["sealed"]
    for other in (told, [], None, 3):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="found no hash of itself under 'sealed'"):
            read_sealed(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 5000, b"\xef\xbb\xbf{}"]
)
def test_what_is_no_json_is_told_as_such(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"^not valid JSON \("):
        read_sealed(tmp_path / "manifest.json")


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "MAX_BYTES", 10)
    (tmp_path / "manifest.json").write_text(seal(VALUE))
    with pytest.raises(ValueError, match=r"^more than 10 bytes"):
        read_sealed(tmp_path / "manifest.json")


def test_a_small_file_takes_little_memory(tmp_path):
    """Found by tests/fuzz.py: a bounded read took 1 GiB for whatever there was."""
    path = tmp_path / "manifest.json"
    path.write_text(seal(VALUE))
    tracemalloc.start()
    try:
        read_sealed(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
