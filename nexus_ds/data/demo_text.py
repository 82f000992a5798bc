"""Text for a demonstration that every installation has on its disk.

Nothing is downloaded and nothing is stored here. The domains are read at run time from the Python
installation and from packages that requirements.txt names or brings:

    python      source code of Python's standard library
    docs        English documentation: docstrings of numpy, scipy, scikit-learn and networkx
    algebra     symbolic mathematics: sympy's worked examples and checks
    tables      numbers in rows: matplotlib's font metrics, data of numpy, scipy, scikit-learn
    cpp         C++ headers that come with torch

Files are taken in a fixed, mixed order until a domain is full; long ones are cut into documents at
line ends, exact duplicates are dropped, and about one stretch of text in twenty is set aside for
validation. The text depends on the versions that are installed, so numbers from two machines are
comparable only if these agree; the fingerprint tells.

Not covered: choosing other packages, near duplicates, text that is the same on all machines (give
--data DIR).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nexus_ds.data.rows import BadRows, Document, capped
from nexus_ds.errors import DataError

MAX_CHARACTERS = 20_000  # of a document
# of a file's text; the rest is left out, or a few files would fill a domain
MAX_PIECE = 3 * MAX_CHARACTERS
DOMAIN_BYTES = 3_000_000  # of a domain, both splits together
STRETCH = 4  # documents of one file that lie in the same split
VALIDATION_SHARE = 0.05
SHORTEST_DOCSTRING = 300  # characters
VERSION = 1  # of the rules in this file


def _whole(text: str) -> Iterator[str]:
    yield text


def _docstrings(source: str) -> Iterator[str]:
    """Yield the longer docstrings of Python source."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                yield text


@dataclass(frozen=True)
class Recipe:
    """Which files make a domain."""

    packages: tuple[str, ...]
    """Packages whose folders are searched; empty: the standard library."""
    suffixes: tuple[str, ...]
    """Ends of file names."""
    extract: Callable[[str], Iterator[str]] = _whole
    """Turns a file's text into pieces."""
    only: str = ""
    """A part that paths (relative to the package, with slashes) must contain."""
    without: tuple[str, ...] = ()
    """Parts that paths must not contain."""


STDLIB_WITHOUT = (
    "/test/",
    "/tests/",
    "/site-packages/",
    "/dist-packages/",
    "/pydoc_data/",
    "/encodings/",
    "/idlelib/",
)
RECIPES: dict[str, Recipe] = {
    "algebra": Recipe(("sympy",), (".py",), only="/tests/"),
    "cpp": Recipe(
        ("torch",), (".h", ".hpp", ".cuh"), only="/include/", without=("/ATen/ops/", "/google/")
    ),
    "docs": Recipe(
        ("numpy", "scipy", "sklearn", "networkx"),
        (".py",),
        extract=_docstrings,
        without=("/tests/",),
    ),
    "python": Recipe((), (".py",), without=STDLIB_WITHOUT),
    "tables": Recipe(("matplotlib", "numpy", "scipy", "sklearn"), (".afm", ".csv", ".dat", ".txt")),
}


def _roots(recipe: Recipe) -> list[Path]:
    """Return the folders that a recipe searches; packages are found without being imported."""
    if not recipe.packages:
        return [Path(sysconfig.get_paths()["stdlib"])]
    found = []
    for package in recipe.packages:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            found.append(Path(spec.submodule_search_locations[0]))
    return found


def _hash(text: str) -> int:
    # file names may hold bytes that are no UTF-8
    content = text.encode("utf-8", errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


@cache
def _files(domain: str) -> list[tuple[str, Path]]:
    """Return (relative name, path) of a domain's files in a fixed order, all folders mixed."""
    recipe = RECIPES[domain]
    found: list[tuple[str, Path]] = []
    for root in _roots(recipe):
        for folder, folders, files in os.walk(root):
            place = f"{Path(folder).relative_to(root.parent).as_posix()}/"
            # taken out of os.walk's own list, they are not walked into
            folders[:] = [name for name in folders if not _unwanted(recipe, f"{place}{name}/")]
            if recipe.only not in place:
                continue
            for file in files:
                if file.endswith(recipe.suffixes):
                    found.append((place + file, Path(folder, file)))
    # by hash, or one package after the other would fill the domain
    return sorted(found, key=lambda item: (_hash(item[0]), item[0]))


def _unwanted(recipe: Recipe, place: str) -> bool:
    return any(part in place for part in recipe.without)


def _cut(text: str) -> Iterator[str]:
    """Cut text into documents of at most MAX_CHARACTERS, at line ends where there are any."""
    while len(text) > MAX_CHARACTERS:
        end = text.rfind("\n", MAX_CHARACTERS // 2, MAX_CHARACTERS) + 1 or MAX_CHARACTERS
        yield text[:end]
        text = text[end:]
    yield text


def _documents(domain: str) -> Iterator[tuple[str, Document]]:
    """Yield (split, document) of a domain, in a fixed order, without exact duplicates."""
    seen: set[int] = set()
    for name, path in _files(domain):
        try:
            text = path.read_text(encoding="utf-8").replace("\0", "")
        except (OSError, UnicodeDecodeError):
            # a file of another encoding is no loss among thousands
            continue
        for number, piece in enumerate(_pieces(text, RECIPES[domain])):
            key = _hash(piece)
            if not piece.strip() or key in seen:
                continue
            seen.add(key)
            meta = {"set_name": domain, "source": name}
            yield _split(name, number), Document(piece, meta, f"{name}#{number}")


def _pieces(text: str, recipe: Recipe) -> Iterator[str]:
    for part in recipe.extract(text):
        yield from _cut(part[:MAX_PIECE])


def _split(name: str, number: int) -> str:
    """Return the split of a file's document; neighbours lie in the same one."""
    # neighbours are alike: apart, one would tell a model what stands in the other
    share = _hash(f"split {name} {number // STRETCH}") / 2**64
    return "validation" if share < VALIDATION_SHARE else "train"


class DemoSource:
    """Text of this installation by domain, as a source like any other."""

    name = "demo"

    def __init__(self) -> None:
        self._loaded: dict[str, dict[str, list[Document]]] = {}

    def domains(self) -> list[str]:
        """Return the domains, sorted."""
        return sorted(RECIPES)

    def _require(self, domain: str) -> None:
        if domain not in RECIPES:
            raise DataError(f"demo: no domain {domain}; found: {', '.join(self.domains())}")

    def _load(self, domain: str) -> dict[str, list[Document]]:
        """Return {split: documents} of a domain, about DOMAIN_BYTES together."""
        self._require(domain)
        if domain not in self._loaded:
            splits: dict[str, list[Document]] = {"train": [], "validation": []}
            size = 0
            for split, document in _documents(domain):
                splits[split].append(document)
                size += len(document.text.encode("utf-8", errors="replace"))
                if size >= DOMAIN_BYTES:
                    break
            self._loaded[domain] = splits
        return self._loaded[domain]

    def documents(
        self,
        domain: str,
        split: str,
        on_bad_row: str = "error",
        max_bytes: int = 0,
        bad_rows: BadRows | None = None,
    ) -> Iterator[Document]:
        """Yield documents in a fixed order; nothing is damaged here.

        Raises:
            DataError: this installation has no such text.
        """
        documents = self._load(domain)[split]
        if not documents:
            places = ", ".join(RECIPES[domain].packages) or "the standard library"
            raise DataError(
                f"demo: this installation has no text for the domain {domain} (files of {places}); "
                "choose other domains or give --data DIR"
            )
        return capped(iter(documents), max_bytes)

    def fingerprint(self, domain: str, split: str) -> str:
        """Return the sha256 over names and sizes of the domain's files."""
        self._require(domain)
        # not over their bytes: reading them all takes seconds
        facts = [f"{VERSION} {domain} {split}"]
        facts += [f"{name} {path.stat().st_size}" for name, path in _files(domain)]
        return hashlib.sha256("\n".join(facts).encode("utf-8", "replace")).hexdigest()

    def size(self, domain: str, split: str) -> int:
        """Return about how many bytes of text there are."""
        self._require(domain)
        share = VALIDATION_SHARE if split == "validation" else 1 - VALIDATION_SHARE
        return int(DOMAIN_BYTES * share)


def demo_source() -> DemoSource:
    """Return the text of this installation as a source."""
    return DemoSource()
