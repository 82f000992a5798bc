"""A user's mistakes told all at once, so that nobody mends one only to be told of the next.

Not covered: mistakes after which nothing sensible can be asked (a directory that is not there ends
the questions about it, not those about the others).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nexus_ds.errors import NexusError


class Problems:
    """Mistakes that were found, in order."""

    def __init__(self) -> None:
        self.found: list[NexusError] = []

    def add(self, error: NexusError) -> None:
        """Keep a mistake, unless it is there already; several in one are taken apart."""
        several = error.__cause__
        if isinstance(several, ExceptionGroup):
            for one in several.exceptions:
                assert isinstance(one, NexusError)
                self.add(one)
        elif str(error) not in map(str, self.found):
            self.found.append(error)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a mistake that the block raises, each one where it raises several."""
        try:
            yield
        except NexusError as error:
            self.add(error)

    def refuse(self) -> None:
        """Raise what was found: a lone mistake as it is, several as one list.

        The list is of the first one's type, and `collected` takes it apart again.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = [f"{number}. {error}" for number, error in enumerate(self.found, start=1)]
            listed = "\n".join([f"{len(lines)} things to mend; nothing was written:", *lines])
            raise type(self.found[0])(listed) from ExceptionGroup("found", self.found)
