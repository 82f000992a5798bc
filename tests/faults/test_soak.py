"""The soak in short, and that it sees what it is there to see."""

import pytest
from soak import FAULTS, ON_DISK, ON_NETWORK, Soak, SoakError, tiny


@pytest.mark.slow
@pytest.mark.full
def test_a_run_under_faults_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path, nexus_dir, text_folder, capsys
):
    soak = Soak(tiny(nexus_dir, text_folder), tmp_path / "soak", seed=3, pause=(1, 4))
    with capsys.disabled():
        print("\n" + soak.soak(minutes=1.5))
    assert soak.rounds and soak.survived
    known = {*FAULTS, *ON_DISK, *ON_NETWORK}
    assert {*soak.survived, *soak.left_out} <= known


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
