"""The learning rate as a pure function of the step (paper section 4.1)."""

from __future__ import annotations

import math

from nexus_ds.settings import DataConfig, TrainingConfig


def tokens_per_step(training: TrainingConfig, data: DataConfig) -> int:
    """Return tokens that are predicted in one optimizer step over all ranks."""
    return training.batch_size * data.sequence_length


def main_steps(training: TrainingConfig, data: DataConfig) -> int:
    """Return optimizer steps before the anneal."""
    if training.steps:
        return training.steps
    return max(1, round(training.tokens / tokens_per_step(training, data)))


def total_steps(training: TrainingConfig, data: DataConfig) -> int:
    """Return optimizer steps with the anneal."""
    anneal = round(training.anneal_tokens / tokens_per_step(training, data))
    return main_steps(training, data) + anneal


def _cosine(start: float, end: float, progress: float) -> float:
    """Go from `start` at progress 0 to `end` at 1 along half a cosine."""
    angle = math.pi * min(max(progress, 0.0), 1.0)
    share_left = 0.5 * (1 + math.cos(angle))
    return end + (start - end) * share_left


def learning_rate(step: int, training: TrainingConfig, data: DataConfig) -> float:
    """Return the model's learning rate at optimizer step `step` (0 is the first).

    Linear warm-up over `warmup` of the steps to `lr`, cosine to `final_lr` (or constant), then the
    anneal: a cosine from there to `anneal_lr`.
    """
    main = main_steps(training, data)
    total = total_steps(training, data)
    warmup = math.ceil(training.warmup * main)
    if step < warmup:
        # The first step has a rate above 0, the last of the warm-up the full one.
        return training.lr * (step + 1) / warmup
    end = training.lr if training.schedule == "constant" else training.final_lr
    if step < main:
        # 1 at the last step: final_lr is a rate that is trained with.
        progress = (step - warmup) / max(main - 1 - warmup, 1)
        return _cosine(training.lr, end, progress)
    progress = (step - main + 1) / (total - main)
    return _cosine(end, training.anneal_lr, progress)
