"""Batches whose loss or gradient is not a number: left out, counted, and named by their documents.

ZeRO looks at the norm of the gradient before it updates anything, so that such a step leaves
weights and moments as they were, on all ranks. The step counts as done: what follows draws other
text, and so does a resumption. One bad document then costs a batch and not the run. Several in a
row are no accident: `training.bad_batches` of them end it, with a state behind them.
Not covered: losses that are large and finite, which clipping answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nexus_ds.data.mixture import Sampler
from nexus_ds.data.provenance import told
from nexus_ds.runtime.ranks import together
from nexus_ds.settings import Config

NAMED = 4  # samples that each rank names at most: their text is read again
NAMED_IN_ALL = 16  # of all ranks, in one line of the log


class BadBatches:
    """Counts bad batches and names what was in them.

    Args:
        config: the run's.
        sampler: what draws the samples.
    """

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.config = config
        self.sampler = sampler
        self.in_a_row = 0
        self.skipped = 0
        self._finite: list[Tensor] = []
        """Of the step at hand, per micro-batch: which sequences [B] have a loss that is a number;
        on the device, where nothing waits for them."""

    def start(self) -> None:
        """Begin a step."""
        self._finite.clear()

    def see(self, losses_BS: Tensor) -> None:
        """Look at one forward pass's losses of tokens [B, S]."""
        self._finite.append(losses_BS.detach().isfinite().all(1))

    def next(self, bad: bool) -> None:
        """End a step. All ranks must say the same."""
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0

    def named(self, mine: Sequence[int]) -> str:
        """Return what was wrong with the step at hand, in words. All ranks must call.

        Args:
            mine: numbers of this rank's samples, in the order of its passes.
        """
        finite = [sound for sound_B in self._finite for sound in sound_B.tolist()]
        bad = [number for number, sound in zip(mine, finite, strict=True) if not sound]
        anywhere = any(together(lambda: bool(bad)))
        # A gradient may be too large for its type where every loss is a number.
        doubtful = bad if anywhere else mine
        kind = "losses that are not numbers" if anywhere else "a gradient that is not finite"
        names = [name for own in together(lambda: self._names(doubtful)) for name in own]
        names = names[:NAMED_IN_ALL]
        more = sum(together(lambda: len(doubtful))) - len(names)
        return f"{kind}: {'; '.join(names)}" + (f"; and {more} more samples" if more else "")

    def _names(self, samples: Sequence[int]) -> list[str]:
        found = []
        for number in samples[:NAMED]:
            index, block = self.sampler.locate(number)
            domain = self.sampler.domains[index]
            where = told(
                self.config.data,
                Path(self.config.model.tokenizer),
                self.sampler.files[index],
                domain,
                block,
            )
            found.append(f"sample {number} ({where})")
        return found
