"""Keys that ask for code."""

from nexus_ds.code_hooks import code_hooks, walk


def test_every_key_is_walked_with_its_place():
    value = {"a": [{"b": 1}, [{"c": None}]], "d": "x"}
    assert [place for place, _, _ in walk(value)] == ["a", "a.0.b", "a.1.0.c", "d"]
    assert list(walk([1, "a"])) == []


def test_keys_that_ask_for_code_and_what_is_harmless_of_them():
    asked = {"auto_map": {"AutoModel": "x.Y"}, "a": {"attn_implementation": "someone/kernel"}}
    asked |= {"kernel_config": [1], "_attn_implementation_internal": ["sdpa"]}
    harmless = {"trust_remote_code": False, "auto_map": None, "attn_implementation": "sdpa"}
    assert [place for place, _, _ in code_hooks(asked)] == [
        "auto_map",
        "a.attn_implementation",
        "kernel_config",
        "_attn_implementation_internal",
    ]
    assert list(code_hooks(harmless)) == []
