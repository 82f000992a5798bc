"""The loss of a mixture by domain before a change and after it, window by window.

Not covered: what to think of the difference (`report.verdict`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.records import read_manifest
from nexus_ds.config import named_once
from nexus_ds.data.corpora import open_source, token_files, windows
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.evaluation.perplexity import score, window_length


class BeforeAfter:
    """Validation windows in a checkpoint's own tokens, and its loss on them before a change.

    Attributes:
        windows: for each domain token ids [W, S+1].
        before: for each domain the loss [W], nats per token of each window.
        labels: of domains with chats the answer tokens [W] of each window.
    """

    def __init__(
        self,
        checkpoint: Path,
        data: str,
        domains: Sequence[str],
        count: int,
        bos: bool = True,
        chat: bool = False,
    ) -> None:
        """Read the text and score the checkpoint as it is.

        Args:
            checkpoint: before the change.
            data: folder of domains or other source, with validation text.
            domains: to score.
            count: windows a domain.
            bos: whether documents begin as the checkpoint's tokenizer begins a text.
            chat: whether rows may be chats, of which the answers are scored.

        Raises:
            ConfigError: fewer than one window.
            DataError: no such text, too little, or a domain without validation text.
            CheckpointError: a checkpoint that can't be loaded.
        """
        if count < 1:
            raise ConfigError(f"--windows: expected a number of at least 1, found {count}")
        try:
            self.windows = _windows(checkpoint, data, domains, count, bos, chat)
        except DataError as error:
            # who asked for a table may not know that it needs text of the old domains too
            raise DataError(
                f"{error}\nThe table before and after reads validation text of "
                f"{', '.join(domains)} (looked for in {data}): give --data DIR with a folder for "
                "each, or name those that are there with --scored A,B"
            ) from error
        scores = score(checkpoint, self.windows, label="before")
        self.before = scores.window_loss
        self.labels = scores.window_labels

    def after(self, checkpoint: Path) -> dict[str, np.ndarray]:
        """Return the loss [W] of the changed checkpoint by domain, nats per token of each window.

        Its tokenizer must be the same: the windows are.
        """
        scores = score(checkpoint, self.windows, label="after")
        return scores.window_loss


def _windows(
    checkpoint: Path,
    data: str,
    domains: Sequence[str],
    count: int,
    bos: bool,
    chat: bool,
) -> dict[str, np.ndarray]:
    """Return `count` windows [W, S+1] of each domain, of the length that the checkpoint reads."""
    length = window_length(0, [describe(checkpoint)])
    source = open_source(data)
    # The windows are in memory afterwards; the tokens of all the text are not wanted again.
    with tempfile.TemporaryDirectory(prefix="nexus-ds-") as cache:
        files = token_files(
            source, domains, "validation", checkpoint, Path(cache), bos=bos, chat=chat
        )
        return {domain: windows(files[domain], count, length, marked=chat) for domain in domains}


def chosen(text: str, checkpoint: Path, new: Sequence[str]) -> list[str]:
    """Return the domains to score: those named by `text` (A,B), else all that have an expert.

    Args:
        text: names, or nothing.
        checkpoint: before the change.
        new: domains of experts that the change adds.

    Raises:
        ConfigError: a domain that `text` names twice.
    """
    if domains := named_once("--scored", text):
        return domains
    manifest = read_manifest(checkpoint)
    old = [expert.domain for expert in manifest.experts]
    # each once, in this order: several experts may be of one domain
    return list(dict.fromkeys([*old, *new]))
