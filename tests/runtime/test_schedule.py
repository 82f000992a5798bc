"""The learning rate: paper section 4.1, fact 13 of the method."""

import pytest

from nexus_ds.runtime.schedule import learning_rate, main_steps, tokens_per_step, total_steps
from nexus_ds.settings import DataConfig, TrainingConfig

DATA = DataConfig(sequence_length=100)
PAPER = TrainingConfig(
    tokens=25_000,
    batch_size=1,
    lr=1e-3,
    final_lr=3e-4,
    warmup=0.1,
    anneal_tokens=1_000,
    anneal_lr=3e-5,
)


def rate(step):
    return learning_rate(step, PAPER, DATA)


def test_steps_follow_from_tokens():
    assert tokens_per_step(PAPER, DATA) == 100
    assert main_steps(PAPER, DATA) == 250
    assert total_steps(PAPER, DATA) == 260


def test_warm_up_takes_a_tenth_of_the_steps_linearly_to_the_peak():
    assert rate(0) == pytest.approx(1e-3 / 25)
    assert rate(11) == pytest.approx(1e-3 * 12 / 25)
    assert rate(24) == pytest.approx(1e-3)
    assert max(rate(s) for s in range(260)) == pytest.approx(1e-3)


def test_the_cosine_ends_at_final_lr_and_the_anneal_at_its_own():
    assert rate(249) == pytest.approx(3e-4)
    assert (rate(25) + rate(249)) / 2 == pytest.approx(rate(137), rel=2e-3)
    assert rate(259) == pytest.approx(3e-5)
    after = [rate(s) for s in range(249, 260)]
    assert after == sorted(after, reverse=True)


def test_a_constant_schedule_stays_at_the_peak():
    training = TrainingConfig(steps=50, lr=2e-3, schedule="constant", warmup=0.1)
    assert learning_rate(49, training, DATA) == 2e-3
    assert learning_rate(0, training, DATA) == pytest.approx(2e-3 / 5)
