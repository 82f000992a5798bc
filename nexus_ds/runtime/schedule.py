"""The learning rate as a pure function of the step (paper section 4.1)."""

from __future__ import annotations

import math

from nexus_ds.settings import DataConfig, TrainingConfig


def tokens_per_step(training: TrainingConfig, data: DataConfig) -> int:
    """Return tokens that are predicted in one optimizer step over all ranks."""
    return training.batch_size * data.sequence_length


def main_steps(training: TrainingConfig, data: DataConfig) -> int:
    """Return optimizer steps before the anneal."""
    return training.steps or max(1, round(training.tokens / tokens_per_step(training, data)))


def total_steps(training: TrainingConfig, data: DataConfig) -> int:
    """Return optimizer steps with the anneal."""
    return main_steps(training, data) + round(
        training.anneal_tokens / tokens_per_step(training, data)
    )


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def learning_rate(step: int, training: TrainingConfig, data: DataConfig) -> float:
    """Return the model's learning rate at optimizer step `step` (0 is the first).

    Linear warm-up over `warmup` of the steps to `lr`, cosine to `final_lr` (or constant), then the
    anneal: a cosine from there to `anneal_lr`.
    """
    main, total = main_steps(training, data), total_steps(training, data)
    warmup = math.ceil(training.warmup * main)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    end = training.lr if training.schedule == "constant" else training.final_lr
    if step < main:
        return _cosine(training.lr, end, (step - warmup) / max(main - 1 - warmup, 1))
    return _cosine(end, training.anneal_lr, (step - main + 1) / (total - main))
