"""The templates on a real SLURM: they are accepted, the whole pipeline runs, a failure stops what
depends on it."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from slurm.rig import REPO, TINY

TEMPLATES = ("tokens", "seed", "dense_branch", "embed", "upcycle", "finetune", "evaluate")
# as long as the rig is patient, the whole run included
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_accepted(slurm, template):
    answer = slurm.run("sbatch", "--test-only", f"slurm/{template}.sh", cwd=REPO, check=False)
    assert "to start at" in answer, answer


def test_the_whole_pipeline_runs_as_jobs(slurm, whole_run):
    assert (whole_run / "report" / "report.html").is_file()
    assert (whole_run / "extended" / "nexus.json").is_file()
    lines = slurm.status(whole_run).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["finished"] * 14, lines
    logs = sorted(path.name for path in (whole_run / "logs").glob("*.log"))
    assert len([name for name in logs if name.startswith("dense_branch-")]) == 5  # a real array
    assert len(logs) == 11, logs
    log = next((whole_run / "logs").glob("upcycle-*.log")).read_text()
    assert "on node1, node2: 4 ranks" in log
    assert "4 ranks, expert parallel 2, ZeRO stage 3" in log
    assert "preflight: 4 ranks, 2 a node, on CPUs" in log


def test_a_finished_stage_is_not_made_again_nor_requeued(slurm, whole_run):
    job = slurm.submit(
        "seed", TINY, f"pipeline.run={whole_run}", options=("--nodes=2", "--ntasks-per-node=2")
    )
    log = whole_run / "logs" / f"seed-{job}.log"
    assert slurm.finished(job, 60, log) == "COMPLETED"
    assert slurm.field(job, "Restarts") == "0"
    assert "is finished already" in log.read_text()


def test_one_branch_fails_and_the_rest_is_cancelled_with_the_reason(slurm, copy_of):
    run = copy_of("seed", "domains.safetensors", "domains-new.safetensors")
    command = ["slurm/pipeline.sh", TINY, f"pipeline.run={run}", "training.steps=200"]
    site = run.parent / "site.sh"
    site.write_text("export DS_ACCELERATOR=cpu\nSBATCH_FLAGS=(--no-requeue)\n")
    env = {**slurm.env, "NEXUS_SITE": str(site)}
    # Only the branch shall train that long: the seed is there with its own number of steps.
    (run / "seed" / "training.yaml").write_text(
        (run / "seed" / "training.yaml").read_text().replace("steps: 10\n", "steps: 200\n")
    )
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    jobs = dict(
        reversed(line.split()) for line in (run / "logs" / "jobs.txt").read_text().splitlines()
    )
    array, later = (
        jobs["dense_branch"].partition("_")[0],
        [jobs["upcycle"], jobs["finetune"], jobs["evaluate"]],
    )
    victim = slurm.until(
        lambda: slurm.processes(slurm.field(f"{array}_1", "JobId"), SLURM_ARRAY_TASK_ID="1"),
        60,
        "second branch",
    )
    os.kill(victim[0], signal.SIGKILL)
    for job in later:
        assert slurm.finished(job, 240, run / "logs" / f"dense_branch-{array}_1.log") == "CANCELLED"
    rows = {line.split()[0]: line for line in slurm.status(run).splitlines()}
    assert "failed" in rows["branch:docs"] and "without progress" in rows["branch:docs"]
    for stage in ("upcycle", "moe", "extend", "extended", "evaluate"):
        assert "cancelled" in rows[stage] and "needs branch:docs, which failed" in rows[stage], (
            rows[stage]
        )


def test_gpus_that_torch_does_not_see_fail_in_preflight(slurm, copy_of):
    run = copy_of("upcycled")
    site = run.parent / "site.sh"
    site.write_text("unset DS_ACCELERATOR\n")
    env = {**slurm.env, "NEXUS_SITE": str(site)}
    options = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        f"--output={slurm.stubs}/%j.out",
    )
    command = ["sbatch", "--parsable", *options, "slurm/upcycle.sh", TINY, f"pipeline.run={run}"]
    job = slurm.run(*command, cwd=REPO, env=env).strip()
    log = run / "logs" / f"upcycle-{job}.log"
    assert slurm.finished(job, 60, log) == "FAILED"
    text = log.read_text()
    for node in ("node1", "node2"):
        assert f"{node}: the job has 1 GPUs on this node, torch sees 0" in text
    assert "preflight failed; nothing was started" in text
    assert not (run / "nexus.training").exists()


@pytest.mark.full
def test_tasks_of_an_array_that_all_miss_the_seed_make_it_once(slurm, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit("dense_branch", TINY, f"pipeline.run={run}", options=("--array=0-1",))
    logs = [run / "logs" / f"dense_branch-{job}_{index}.log" for index in (0, 1)]
    for index, log in enumerate(logs):
        assert slurm.finished(f"{job}_{index}", 180, log) == "COMPLETED", log.read_text()
    assert sum("== seed done" in log.read_text() for log in logs) == 1
    assert (run / "branches" / "python" / "config.json").is_file() and (
        run / "branches" / "docs"
    ).is_dir()


def test_the_literal_command_on_a_fresh_clone(slurm, tmp_path):
    """sbatch slurm/upcycle.sh with no argument: the demo recipe, everything missing; minutes on two
    cores."""
    clone = tmp_path / "a clone"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "runs", "shared", "site.sh", ".*_cache", "__pycache__", "*.egg-info"
    )
    shutil.copytree(REPO, clone, ignore=left_out)
    (clone / ".venv").symlink_to(REPO / ".venv")
    env = {name: value for name, value in slurm.env.items() if name != "NEXUS_SITE"}
    job = slurm.run("sbatch", "--parsable", "slurm/upcycle.sh", cwd=clone, env=env).strip()
    log = clone / "runs" / "demo" / "logs" / f"upcycle-{job}.log"
    assert slurm.finished(job, 1500, log) == "COMPLETED", log.read_text()[-3000:]
    assert json.loads((clone / "runs" / "demo" / "nexus" / "nexus.json").read_text())["experts"]
    assert f"log: {log}" in (clone / f"nexus-upcycle-{job}.out").read_text()
