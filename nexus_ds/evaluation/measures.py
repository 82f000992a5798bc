"""The measures over held-out documents, by name: what every model is asked, and its answers.

Not covered: how a model generates (`generation.samples`), tables (`report.measure_tables`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nexus_ds.data.held_out import HeldOut
from nexus_ds.evaluation.distance import Stretch, distance, stretches, written
from nexus_ds.evaluation.documents import (
    CHOICES,
    ByDocument,
    Passage,
    Reader,
    bits_per_byte,
    cloze,
    passages,
)

Continued = Callable[[Sequence[str]], list[str]]
"""What a model adds to prompts."""
Found = dict[str, ByDocument]
"""By domain."""


class Questions:
    """What all models are asked: documents, passages and prompts of each domain."""

    def __init__(
        self, texts: Mapping[str, HeldOut], measures: Sequence[str], seed: int = 0
    ) -> None:
        """Choose them, which reads no model.

        Args:
            texts: by domain.
            measures: of bits, cloze and generation.
            seed: of the choice.

        Raises:
            DataError: too little text.
        """
        self.texts = {domain: text.texts for domain, text in texts.items()}
        self.passages: dict[str, list[Passage]] = {}
        self.stretches: dict[str, list[Stretch]] = {}
        for domain, text in texts.items():
            if "cloze" in measures:
                self.passages[domain] = passages(text, domain, seed)
            if "generation" in measures:
                self.stretches[domain] = stretches(text, domain)

    def measured(self, measure: str, reader: Reader, continued: Continued) -> Found:
        """Return a measure of one model.

        Args:
            measure: bits | cloze | generation.
            reader: the model, as it scores.
            continued: the model, as it generates.
        """
        if measure == "bits":
            return bits_per_byte(reader, self.texts)
        if measure == "cloze":
            return cloze(reader, self.passages)
        prompts = [each.prompt for asked in self.stretches.values() for each in asked]
        texts = iter(continued(prompts))
        words = {}
        for domain, asked in self.stretches.items():
            words[domain] = [written(next(texts)) for _ in asked]
        return self._distances(words)

    def reference(self, measure: str) -> Found:
        """Return what a measure is to be held against: chance, or real text; of bits nothing."""
        if measure == "cloze":
            chance = ByDocument(np.array([1 / CHOICES]), np.ones(1))
            return dict.fromkeys(self.passages, chance)
        after = {}
        if measure == "generation":
            for domain, asked in self.stretches.items():
                after[domain] = [each.after for each in asked]
        return self._distances(after)

    def _distances(self, words: Mapping[str, Sequence[Sequence[str]]]) -> Found:
        """Return how far words [one list a stretch] are from what really follows the prompts."""
        found = {}
        for domain, given in words.items():
            asked = self.stretches[domain]
            documents = [each.document for each in asked]
            real = [each.real for each in asked]
            found[domain] = distance(documents, given, real)
        return found
