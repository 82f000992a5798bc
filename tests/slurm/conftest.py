"""A cluster for the whole session, and one run of the whole pipeline on it that later tests start
from."""

import shutil
import subprocess
import tempfile

import pytest

from slurm.cluster import Cluster, obstacle
from slurm.rig import REPO, TINY, Slurm

SITE = """\
export DS_ACCELERATOR=cpu
WIDE_FLAGS=(--nodes=2 --ntasks-per-node=2 --gpus-per-node=2)
BRANCH_FLAGS=(--gpus-per-node=1)
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if reason := obstacle():
        pytest.skip(reason)
    site = tmp_path_factory.mktemp("site") / "site.sh"
    site.write_text(SITE)
    root = tempfile.mkdtemp(dir="/tmp", prefix="nexus-slurm-")  # sockets need a short path
    try:
        with Cluster(root) as cluster:
            cluster.env["NEXUS_SITE"] = str(site)
            yield Slurm(cluster, site.parent)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def whole_run(slurm, tmp_path_factory):
    """The whole tiny pipeline, submitted by pipeline.sh to two nodes with two ranks each; 2-3
    minutes on two cores."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    command = ["slurm/pipeline.sh", TINY, f"pipeline.run={run}"]
    done = subprocess.run(
        command, cwd=REPO, env=slurm.env, capture_output=True, text=True, timeout=480
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip()
    state = slurm.finished(last, 420)
    assert state == "COMPLETED", slurm.status(run) + "".join(
        f"\n--- {log.name}\n{log.read_text()[-1500:]}"
        for log in sorted((run / "logs").glob("*.log"))
    )
    return run


@pytest.fixture
def copy_of(whole_run, tmp_path):
    """Copy parts of the whole run, as if the copy had made them: copy_of("upcycled", ...) ->
    directory of the new run."""

    def copy(*names):
        run = tmp_path / "run"
        run.mkdir()
        for name in (*names, "tokens", "tokenizer"):
            source = whole_run / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, run / name)
        for saved in run.rglob("training.yaml"):
            saved.write_text(saved.read_text().replace(str(whole_run), str(run)))
        return run

    return copy
