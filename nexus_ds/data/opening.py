"""The beginning of a domain's own text: a prompt that suits a model that has read it.

Not covered: text that is streamed from a hub, which is not begun for a few words.
"""

from __future__ import annotations

from itertools import islice

from nexus_ds.data.hub import HubSource
from nexus_ds.data.sources import Source

PLAIN = "The first thing"
"""Where no text says better."""
WORDS = 5
DOCUMENTS = 20
"""That are looked at."""


def _beginning(line: str) -> str:
    """Return the first words of a line; '' where they are no prompt to type."""
    words = line.split()[:WORDS]
    found = " ".join(words)
    # a dash would begin an option, and numbers alone say little
    typed = found.isprintable() and not found.startswith("-")
    return found if typed and len(words) > 1 and found[0].isalpha() else ""


def opening(
    source: Source,
    domain: str,
) -> str:
    """Return the first words of a domain's validation text.

    Raises:
        DataError: no such domain, or a file that can't be read.
    """
    if isinstance(source, HubSource):
        return PLAIN
    documents = source.documents(domain, "validation", on_bad_row="skip")
    for document in islice(documents, DOCUMENTS):
        for line in document.text.splitlines():
            found = _beginning(line)
            if found:
                return found
    return PLAIN
