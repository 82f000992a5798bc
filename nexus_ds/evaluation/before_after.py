"""A mixture on trial: its loss by domain before a change, and that of what the change has made,
window by window.

Not covered: what to think of the difference (`report.verdict`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.data.corpora import open_source, token_files, windows
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.evaluation.perplexity import score, window_length


class BeforeAfter:
    """Validation windows in a checkpoint's own tokens, and its loss on them; see `before` and
    `after`."""

    def __init__(
        self, checkpoint: Path, data: str, domains: Sequence[str], count: int, bos: bool = True
    ) -> None:
        """Read the text and score the checkpoint as it is.

        Args:
            checkpoint: before the change.
            data: folder of domains or other source, with validation text.
            domains: to score.
            count: windows a domain.
            bos: whether documents begin as the checkpoint's tokenizer begins a text.

        Raises:
            ConfigError: fewer than one window.
            DataError: no such text, too little, or a domain without validation text.
            CheckpointError: a checkpoint that can't be loaded.
        """
        if count < 1:
            raise ConfigError(f"--windows: expected a number of at least 1, found {count}")
        length = window_length(0, [describe(checkpoint)])
        try:
            source = open_source(data)
            with tempfile.TemporaryDirectory(prefix="nexus-ds-") as cache:
                files = token_files(source, domains, "validation", checkpoint, Path(cache), bos=bos)
                self.windows = {domain: windows(files[domain], count, length) for domain in domains}
        except DataError as error:
            raise DataError(
                f"{error}\nThe table before and after reads validation text of {', '.join(domains)} (looked for in "
                f"{data}): give --data DIR with a folder for each, or name those that are there with --scored A,B"
            ) from error
        self.before = score(checkpoint, self.windows, label="before").window_loss

    def after(self, checkpoint: Path) -> dict[str, np.ndarray]:
        """Return the loss of the changed checkpoint (of the same tokenizer) by domain: [W] nats per
        token of each window."""
        return score(checkpoint, self.windows, label="after").window_loss


def chosen(text: str, checkpoint: Path, new: Sequence[str]) -> list[str]:
    """Return the domains named by `text` (A,B), else those of the checkpoint's experts and the new
    ones, each once.

    Raises:
        ConfigError: a domain that `text` names twice.
    """
    domains = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(domains)) != len(domains):
        raise ConfigError(f"--scored names a domain twice: {', '.join(domains)}; name each once")
    return domains or list(
        dict.fromkeys([*(expert.domain for expert in read_sidecar(checkpoint).experts), *new])
    )
