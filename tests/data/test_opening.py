"""The beginning of a domain's text."""

import json

import pytest
from conftest import DOMAINS, WORDS

from nexus_ds.data.corpora import open_source
from nexus_ds.data.hub import HubSource
from nexus_ds.data.opening import PLAIN, opening


@pytest.mark.parametrize("domain", DOMAINS)
def test_it_is_of_the_domains_validation_text(text_folder, domain):
    found = opening(open_source(str(text_folder)), domain)
    first = json.loads((text_folder / domain / "validation.jsonl").read_text().splitlines()[0])
    assert first["text"].startswith(found) and len(found.split()) == 5
    assert set(found.replace(".", "").split()) <= set(WORDS[domain].split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--option begins\n\n  1 2 3\nalone\n  is  this\tone, then", "is this one, then"),
        ("bell \x07 rings\nno control characters", "no control characters"),
        ("1 2\n3 4", PLAIN),
    ],
)
def test_it_can_be_typed(tmp_path, text, expected):
    folder = tmp_path / "law"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert opening(open_source(str(tmp_path)), "law") == expected


def test_a_stream_is_not_begun():
    # made without its own beginning, which asks the hub
    assert opening(HubSource.__new__(HubSource), "law") == PLAIN
