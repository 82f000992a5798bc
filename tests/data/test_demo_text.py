import sysconfig
import zlib
from itertools import islice
from pathlib import Path

import pytest

from nexus_ds.data import demo_text
from nexus_ds.data.corpora import open_source
from nexus_ds.data.demo_text import MAX_CHARACTERS, Recipe, demo_source
from nexus_ds.errors import DataError

DOMAINS = ["algebra", "cpp", "docs", "python", "tables"]


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, list[str]]]:
    source = demo_source()
    splits = ("train", "validation")
    return {
        d: {s: [document.text for document in source.documents(d, s)] for s in splits}
        for d in source.domains()
    }


def test_five_domains_of_a_megabyte_each(texts: dict[str, dict[str, list[str]]]):
    assert list(texts) == DOMAINS
    for splits in texts.values():
        train, validation = (
            sum(len(text.encode()) for text in splits[s]) for s in ("train", "validation")
        )
        assert train >= 1_000_000
        assert validation >= 50_000
        assert validation < 0.2 * train


def test_documents_are_short_and_unique_across_splits(texts: dict[str, dict[str, list[str]]]):
    for splits in texts.values():
        both = splits["train"] + splits["validation"]
        assert len(set(both)) == len(both)
        assert max(map(len, both)) <= MAX_CHARACTERS
        assert all(text.strip() and "\0" not in text for text in both)


def test_a_domain_compresses_its_own_validation_text_best(texts: dict[str, dict[str, list[str]]]):
    samples = {
        d: "".join(t[:2000] for t in islice(splits["train"], 15)).encode()
        for d, splits in texts.items()
    }

    def cost(domain: str, text: bytes) -> int:
        return len(zlib.compress(samples[domain] + text)) - len(zlib.compress(samples[domain]))

    for domain, splits in texts.items():
        costs = dict.fromkeys(DOMAINS, 0)
        for text in islice(splits["validation"], 10):
            for other in DOMAINS:
                costs[other] += cost(other, text[:1500].encode())
        assert min(costs, key=costs.__getitem__) == domain, costs


def test_documents_are_stretches_of_the_files_that_they_name():
    library = Path(sysconfig.get_paths()["stdlib"])
    for document in islice(open_source("demo").documents("python", "train"), 50):
        name, _, number = document.where.partition("#")
        assert (
            document.text in (library.parent / name).read_text(encoding="utf-8").replace("\0", "")
            and int(number) >= 0
        )
        assert document.meta == {"set_name": "python", "source": name}
    assert (
        sum(
            len(d.text.encode())
            for d in open_source("demo").documents("python", "train", max_bytes=5000)
        )
        == 5000
    )


def test_the_fingerprint_follows_names_and_sizes_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a.txt").write_text("one")
    monkeypatch.setattr(demo_text, "_roots", lambda recipe: [tmp_path / "pack"])
    monkeypatch.setitem(demo_text.RECIPES, "pack", Recipe(("pack",), (".txt",)))
    seen = [
        demo_source().fingerprint("pack", "train"),
        demo_source().fingerprint("pack", "validation"),
    ]
    for name, content in (("a.txt", "more"), ("b.txt", "one"), ("c.py", "not of the domain")):
        (tmp_path / "pack" / name).write_text(content)
        demo_text._files.cache_clear()
        seen.append(demo_source().fingerprint("pack", "train"))
    demo_text._files.cache_clear()
    assert len(set(seen)) == 4 and seen[-1] == seen[-2]


def test_domains_that_are_not_there(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        DataError, match="demo: no domain novels; found: algebra, cpp, docs, python, tables"
    ):
        demo_source().documents("novels", "train")
    monkeypatch.setitem(demo_text.RECIPES, "gone", Recipe(("no_such_package",), (".py",)))
    with pytest.raises(
        DataError,
        match=r"no text for the domain gone \(files of no_such_package\); .*give --data DIR",
    ):
        demo_source().documents("gone", "train")


def test_files_are_cut_deduplicated_and_split_by_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "pack"
    (root / "skipped").mkdir(parents=True)
    (root / "long.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    (root / "copy.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "skipped" / "x.txt").write_text("no")
    monkeypatch.setattr(demo_text, "_roots", lambda recipe: [root])
    monkeypatch.setitem(
        demo_text.RECIPES, "pack", Recipe(("pack",), (".txt",), without=("/skipped/",))
    )
    splits = demo_source()._load("pack")
    documents = [document for split in splits.values() for document in split]
    assert "".join(d.text for d in documents) == (root / "long.txt").read_text()
    assert all(d.text.endswith("\n") for d in documents)
    assert sorted(map(len, splits.values())) == [0, len(documents)]
