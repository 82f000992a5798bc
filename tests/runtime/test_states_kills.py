"""A kill at any point of a save leaves a good state, and the next start goes on from it."""

import os

import pytest
from launch import fork_ranks
from saved_states import WORKER, content, equal, launch

from nexus_ds.runtime.states import newest_good

POINTS = (
    "before_files",
    "during_file",
    "after_file",
    "before_manifest",
    "before_rename",
    "after_rename",
    "after_latest",
    "during_retention",
)


def check_kill(tmp_path, monkeypatch, checkpoint, source, point, rank):
    monkeypatch.setenv("NEXUS_FAULT", f"kill:rank{rank}:{point}:4")
    folder = tmp_path / "states"
    words = [
        "stage=3",
        "parallel.expert=2",
        "router.load_balance=0",
        "save=2,4,6",
        "keep=1",
        "training.batch_size=8",
    ]
    ranks = fork_ranks([WORKER, checkpoint, folder, tmp_path / "out", *words, "until=6"], 2)
    for process in ranks:
        process.communicate(timeout=120)
    assert ranks[rank].returncode == -9
    assert ranks[1 - rank].returncode not in (0, None)
    step, problems = newest_good(folder)
    # there all files are whole: rank 0 may commit, or miss rank 1 before
    if (rank, point) != (1, "after_file"):
        assert step == (4 if point in ("after_rename", "after_latest", "during_retention") else 2)
    assert problems == []
    assert equal(content(folder / f"step_{step}"), content(source[0] / f"step_{step}"))
    monkeypatch.delenv("NEXUS_FAULT")
    return folder, words, step


def check_going_on(checkpoint, source, folder, words, step):
    """Start the ranks once more: they take the state of `step` and end as if nothing had been."""
    result = launch(checkpoint, folder, 2, *words, "until=6")
    assert result["first"] == step and result["messages"] == []
    losses = {number: loss for number, loss in source[1].items() if int(number) >= step}
    assert result["losses"] == losses
    assert equal(content(folder / "step_6"), content(source[0] / "step_6"))
    assert sorted(os.listdir(folder)) == ["latest", "step_6"]


@pytest.mark.slow
def test_a_killed_save_leaves_a_state_that_resumes(
    tmp_path, monkeypatch, checkpoint, source, alone
):
    folder, words, step = check_kill(tmp_path, monkeypatch, checkpoint, source, "during_file", 1)
    assert step == 2 and list(folder.glob("partial_*"))
    # as a kill while `latest` is written leaves it
    (folder / ".latest.tmp-123000000001").write_text("step_")
    check_going_on(checkpoint, source, folder, words, step)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_leaves_a_good_state(
    tmp_path, monkeypatch, checkpoint, source, alone, point
):
    found = check_kill(tmp_path, monkeypatch, checkpoint, source, point, 0)
    check_going_on(checkpoint, source, *found)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("point", ["before_files", "after_file"])
def test_a_kill_of_another_rank_leaves_a_good_state(
    tmp_path, monkeypatch, checkpoint, source, alone, point
):
    found = check_kill(tmp_path, monkeypatch, checkpoint, source, point, 1)
    check_going_on(checkpoint, source, *found)
