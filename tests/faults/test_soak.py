"""The soak in short, and that it sees what it is there to see."""

import re
from types import SimpleNamespace

import pytest
from soak import FAULTS, ON_DISK, ON_NETWORK, Soak, SoakError, tiny


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(2400)  # each kind of fault, and a start after it, on a machine that is shared
def test_a_run_under_faults_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path, nexus_dir, text_folder, capsys
):
    soak = Soak(tiny(nexus_dir, text_folder), tmp_path / "soak", seed=3, pause=(1, 4))
    with capsys.disabled():
        print("\n" + soak.soak(minutes=1.5))
    assert soak.rounds
    # What the promises say of this test holds for every kind of fault.
    assert {*soak.survived, *soak.left_out} == {*FAULTS, *ON_DISK, *ON_NETWORK}


def test_the_list_has_each_kind_and_goes_on_until_each_was_survived(tmp_path):
    lists = []
    for seed in (0, 0, 1):
        soak = Soak([], tmp_path, seed=seed, pause=(1, 4))
        soak.run = SimpleNamespace(saved=lambda: [tmp_path / "step_1", tmp_path / "step_2"])
        drawn = [soak._next()[0] for _ in FAULTS]
        assert sorted(drawn) == sorted(FAULTS)
        soak.survived.update(drawn[1:])
        assert soak.waiting() == drawn[:1]
        # not felt: it comes again before any other
        assert soak._next()[0] == drawn[0]
        lists.append(drawn)
    assert lists[0] == lists[1] != lists[2]


@pytest.mark.parametrize("wrong", ["a loss", "a step"])
def test_another_course_is_seen(tmp_path, wrong):
    soak = Soak([], tmp_path, seed=0, pause=(1, 4))
    soak.losses = {1: 3.0, 2: 2.0}
    lines = {"a loss": [(1, 3.0), (2, 2.5), (2, 2.0)], "a step": [(1, 3.0)]}[wrong]

    class Run:
        def steps(self):
            return lines

    soak.run = Run()
    with pytest.raises(SoakError, match="losses of another course"):
        soak._compare_losses()


@pytest.mark.parametrize(
    ("said", "enough"),
    [
        ("train.py: [Errno 28] No space left on device", False),
        ("train.py: [Errno 28] No space left on device: '/d/src' -> '/d/dst'", False),
        ("train.py: /d/states: not enough space for a training state", False),
        ("[Errno 28] No space left on device: need 210 bytes more, free 0: '/d/log'", True),
        ("/d/states: not enough space for a training state: need 1,200 bytes, free 0; make", True),
    ],
)
def test_a_full_disk_has_to_be_told_with_what_is_free(said, enough):
    assert bool(re.search(ON_DISK["full disk"].dying, said)) == enough
