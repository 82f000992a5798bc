"""Continuations of many prompts, drawn from a model as it is (temperature 1, all tokens).

Not covered: printing, chats (`commands.generate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_ds.checkpoint.loading import device
from nexus_ds.checkpoint.needs import BATCH, Way
from nexus_ds.checkpoint.pieces import in_pieces, need_of, open_way, planned_way, warn_of_time
from nexus_ds.data.encoding import load_tokenizer
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.generation.continuation import Asked, continue_prompts, rows_at_once
from nexus_ds.generation.drawing import Drawing
from nexus_ds.generation.prompts import Prompt
from nexus_ds.progress import Progress


@dataclass(frozen=True)
class Sampler:
    """A checkpoint, and how it continues prompts."""

    checkpoint: Path
    length: int
    """Tokens of prompt and continuation together; half of them are the continuation's."""
    seed: int = 0
    """Of the first prompt; the next one has the next seed."""
    batch: int = BATCH
    precision: str = "auto"
    bos: bool = True
    label: str = ""

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Return prompts of texts, opened as in training; of one that is too long the end."""
        tokenizer = load_tokenizer(self.checkpoint, self.bos)
        backend = tokenizer.backend()
        room = max(1, self.length - self.length // 2 - len(tokenizer.begin))
        found = []
        for number, text in enumerate(texts, start=1):
            ids = backend.encode(text, add_special_tokens=False).ids
            own = [*tokenizer.begin, *ids[-room:]]
            found.append(Prompt(text, own, f"prompt {number}", chat=False))
        return found

    def continued(self, texts: Sequence[str]) -> list[str]:
        """Return what the model adds to each text, the same whatever stands beside it.

        Raises:
            CheckpointError: a checkpoint that can't be loaded.
            InsufficientMemoryError: one prompt through one layer is too much.
        """
        title = f"continue prompts with {self.label or self.checkpoint.name}"
        prompts = self.prompts(texts)
        place = device()
        need = need_of(self.checkpoint, self.precision, place).with_cache()
        chosen = planned_way(need, [place], self.batch, self.length, title)
        # layer by layer each pass reads all files once
        passes = -(-len(prompts) // chosen.rows) * (self.length // 2)
        tokens = len(prompts) * self.length
        warn_of_time(title, need, tokens, place, passes if chosen.streamed else 0)
        found: list[str] = []
        in_pieces(title, chosen, lambda way: self._work(way, prompts, found, title))
        return found

    def _work(self, way: Way, prompts: Sequence[Prompt], found: list[str], title: str) -> None:
        """Add the continuations that are missing in `found`."""
        model = open_way(self.checkpoint, self.precision, device(), way)
        tokenizer = open_tokenizer(self.checkpoint)
        rows = rows_at_once(model, self.length, way.rows)
        with Progress(title, len(prompts), "prompt") as progress:
            progress.advance(len(found))
            while len(found) < len(prompts):
                start = len(found)
                drawing = Drawing(temperature=1.0, seed=self.seed + start)
                asked = Asked(self.length // 2, drawing)
                batch = prompts[start : start + rows]
                added = continue_prompts(model, tokenizer, batch, asked)
                found += [continuation.text for continuation in added]
                progress.advance(len(batch))
