"""One rank of the benchmark of slow links: its model, what it counts, and (full) real ranks."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nexus_ds.errors import LayoutError
from nexus_ds.experiments.benchmarks import network
from nexus_ds.experiments.benchmarks.slow_links import LinkRun, compare, measure
from nexus_ds.experiments.benchmarks.slow_links_worker import Waits, random_llama
from nexus_ds.planning.traffic import exposed_all_to_all
from nexus_ds.runtime.engine import moe_layers
from nexus_ds.runtime.nexus_moe import Placement

FAST, SLOW = 10e9 / 8, 100e6 / 8


def test_ranks_draw_the_same_model_whatever_experts_they_hold():
    links = LinkRun(speeds=(FAST,), layers=2, hidden=64, ffn=16, vocabulary=50)
    halves = [random_llama(links, Placement(4, 2, rank)) for rank in range(2)]
    whole = random_llama(links, Placement(4))
    assert [len(moe_layers(model)) for model in (*halves, whole)] == [2, 2, 2]
    common = [name for name, _ in whole.named_parameters() if ".experts." not in name]
    assert any("shared_experts" in name for name in common)
    for name in common:
        for half in halves:
            assert torch.equal(half.get_parameter(name), whole.get_parameter(name)), name


class Slow:
    """An asynchronous exchange that is waited for."""

    def wait(self):
        time.sleep(0.02)


def test_only_waiting_counts(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: Slow())
    waits = Waits()
    started = time.perf_counter()
    work = dist.all_to_all_single(None, None, async_op=True)
    time.sleep(0.05)  # computing while the tokens travel
    work.wait()
    assert 0.02 <= waits.seconds <= time.perf_counter() - started - 0.05


@pytest.fixture
def limited():
    """Skip where links can't be limited."""
    try:
        network.check()
    except LayoutError as error:
        pytest.skip(str(error))


SHARED = 0.3  # seconds that the stand-in for the shared expert takes, forward and backward


@pytest.mark.slow
@pytest.mark.full
def test_overlap_saves_what_the_plan_says(limited, tmp_path, monkeypatch):
    """The shared expert sleeps, as a host does whose accelerator computes.

    No core is needed for it, so a busy machine passes too.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    out, speeds = tmp_path / "found.json", (300e6 / 8, SLOW)
    network.run_ranks("overlap_worker", [str(out), ",".join(map(str, speeds)), str(SHARED)], 2, 200)
    slow = json.loads(out.read_text())
    sent = [found["bytes"] / found["speed"] for found in slow]
    saved = sum(found["plain"] - found["overlapped"] for found in slow)
    assert saved > 0.7 * sum(seconds - exposed_all_to_all(seconds, SHARED) for seconds in sent)


@pytest.fixture(scope="module")
def rows():
    """Two ranks with little to compute, on a fast and on a slow link."""
    try:
        network.check()
    except LayoutError as error:
        pytest.skip(str(error))
    links = LinkRun(speeds=(FAST, SLOW), layers=2, batch=2, steps=3)
    return compare(links, measure(links))


@pytest.mark.slow
@pytest.mark.full
def test_real_ranks_send_the_bytes_that_the_plan_expects(rows):
    for row in rows:
        for way, sent in row.expected_bytes.items():
            assert row.ways[way].bytes == pytest.approx(sent, rel=0.05), way
        # two layers: rows there and back, forward and backward, and once how many
        all_to_alls = 2 * (4 + 1)
        counts = {name: found.collectives for name, found in row.ways.items()}
        assert counts["overlapped"] == counts["plain"] > all_to_alls
        assert counts["zero_only"] < counts["overlapped"]


@pytest.mark.slow
@pytest.mark.full
def test_real_ranks_on_a_slow_link_gain_from_expert_parallelism_as_the_plan_says(rows):
    fast, slow = rows
    floor = slow.expected_bytes["zero_only"] / slow.speed
    assert slow.ways["zero_only"].seconds > floor  # the link is as slow as it was made
    assert slow.ratio[1] > max(1.2, fast.ratio[1])
    assert slow.ratio[1] == pytest.approx(slow.expected_ratio, rel=0.3)
