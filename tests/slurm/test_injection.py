"""No value of a recipe or name is run by a shell: the templates with fake srun, scontrol and sbatch
that note their words."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.rig import REPO, clean_environment

TEMPLATES = ("tokens", "seed", "dense_branch", "embed", "upcycle", "finetune", "evaluate")
EVIL = (
    "x$(touch canary)",
    "x`touch canary`",
    "x; touch canary",
    'x" ; touch canary; "',
    "x' ; touch canary; '",
    "x & touch canary",
    "x | touch canary",
    "x\n#SBATCH --wrap=touch canary",
    "x > canary",
    "-x --wrap=touch",
    "%j %x",
)
FAKE = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print({{"scontrol": "node1", "sbatch": "7"}}.get(os.path.basename(sys.argv[0]), ""))
"""


@pytest.fixture
def shell(tmp_path):
    """shell(script, *arguments) -> (exit code, output, what the fakes were called with), run in
    `tmp_path`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol", "sbatch"):
        (programs / name).write_text(FAKE.format(python=sys.executable))
        (programs / name).chmod(0o755)
    # of a job that waits for SLURM to end it
    (programs / "sleep").write_text("#!/bin/sh\n")
    (programs / "sleep").chmod(0o755)
    notes = tmp_path / "notes"

    def run(script, *arguments, repository=REPO, **more):
        notes.write_text("")
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_ARRAY_TASK_ID": "0",
            "NOTES": str(notes),
            "SLURM_ARRAY_JOB_ID": "7",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NEXUS_REPO": str(repository),
            "NEXUS_SITE": str(tmp_path / "no site"),
            "MAX_STALLED": "0",
        }
        done = subprocess.run(
            ["bash", str(repository / "slurm" / f"{script}.sh"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**clean_environment(), **job, **more},
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        logs = "".join(path.read_text() for path in tmp_path.rglob("*-7*.log"))
        return (
            done.returncode,
            done.stdout + done.stderr + logs,
            [json.loads(n) for n in notes.read_text().splitlines()],
        )

    return run


def recipe(path, **pipeline):
    settings = {
        "run": str(path.parent / "run"),
        "domains": ["python", "docs"],
        "new_domains": ["cpp"],
    } | pipeline
    path.write_text(json.dumps({"pipeline": settings, "training": {"steps": 1}}), encoding="utf-8")
    return str(path)


def canaries(tmp_path):
    return [str(path) for root in (tmp_path, REPO) for path in root.glob("canary*")]


@pytest.mark.parametrize("word", EVIL)
def test_names_and_settings_reach_programs_as_one_word(shell, tmp_path, word):
    file_name = "r" + word.replace("/", "") + ".yaml"
    path = recipe(tmp_path / file_name)
    for template in ("upcycle", "dense_branch"):
        code, output, calls = shell(template, path, f"name={json.dumps(word)}")
        srun = [call for call in calls if call[0] == "srun"]
        assert srun and code == 1 and "error" in output, output  # the fake made no output
        assert all(
            f"--config={path}" in call and f"name={json.dumps(word)}" in call for call in srun
        ), srun
    assert canaries(tmp_path) == []


@pytest.mark.parametrize("word", EVIL)
def test_a_run_s_folder_is_only_a_path(shell, tmp_path, word):
    path = recipe(tmp_path / "recipe.yaml", run=str(tmp_path / f"run {word}"))
    code, output, calls = shell("upcycle", path)
    if "\n" in word:
        assert code == 1 and "control character" in output
        assert not any(call[0] == "srun" for call in calls)
    else:
        assert (tmp_path / f"run {word}" / "logs" / "upcycle-7_0.log").is_file()
        assert any(call[0] == "srun" for call in calls)
    assert canaries(tmp_path) == []


@pytest.mark.parametrize("word", EVIL)
def test_a_domain_never_reaches_a_shell(shell, tmp_path, word):
    path = recipe(tmp_path / "recipe.yaml", domains=[word, "docs"])
    code, output, calls = shell("dense_branch", path)
    assert code == 1 and "can't be the name of an expert" in output, output
    assert not any(call[0] == "srun" for call in calls)
    assert canaries(tmp_path) == []


REFUSING = """#!/bin/sh
case "$*" in *--job-name={template}*) {answer} ;; esac
echo >> jobs
wc -l < jobs
"""


@pytest.mark.parametrize("answer", ["echo no partition >&2; exit 1", "exit 0"])
@pytest.mark.parametrize(
    ("template", "before"), [("tokens", ""), ("dense_branch", "1 2"), ("evaluate", "1 2 3 4 5 6")]
)
def test_a_job_that_sbatch_refuses_ends_the_pipeline(shell, tmp_path, template, before, answer):
    sbatch = REFUSING.format(template=template, answer=answer).replace("jobs", f"{tmp_path}/jobs")
    (tmp_path / "bin" / "sbatch").write_text(sbatch)
    code, output, _ = shell("pipeline", recipe(tmp_path / "recipe.yaml"))
    assert code == 1
    said = f"error: sbatch refused {template} (see above), so the run is not submitted as a whole"
    if before:
        said += f"\njobs before it are; to take them back type: scancel {before}"
    assert output.endswith(f"{said}\n"), output


@pytest.mark.parametrize("word", EVIL)
def test_pipeline_submits_words_and_never_sbatch_lines(shell, tmp_path, word):
    file_name = "r" + word.replace("/", "") + ".yaml"
    run = tmp_path / ("run " + word.replace("\n", " "))
    path = recipe(tmp_path / file_name, run=str(run))
    code, output, calls = shell("pipeline", path, f"name={json.dumps(word)}")
    assert code == 0, output
    submitted = [call for call in calls if call[0] == "sbatch"]
    assert [call[-3] for call in submitted] == [f"slurm/{name}.sh" for name in TEMPLATES]
    for call in submitted:
        options = call[1:-3]
        assert call[-2:] == [path, f"name={json.dumps(word)}"]
        assert all(option.startswith("--") and "\n" not in option for option in options), options
        name = next(option for option in options if option.startswith("--job-name="))
        assert set(name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-="
        ), name
        log = next(option for option in options if option.startswith("--output="))
        assert log.startswith(f"--output={str(run).replace('%', '%%')}/logs/")
    assert "--dependency=afterok:7" in submitted[1]
    assert "--array=0-2" in submitted[2] and "--dependency=afterok:7" in submitted[2]
    assert "--dependency=afterok:7:7" in submitted[4]
    assert all("--kill-on-invalid-dep=yes" in call for call in submitted)
    assert canaries(tmp_path) == []


def test_a_repository_with_a_strange_path_works(shell, tmp_path):
    (tmp_path / "my $(touch canary) repo").symlink_to(REPO)
    path = recipe(tmp_path / "recipe.yaml")
    _, output, calls = shell("upcycle", path, repository=tmp_path / "my $(touch canary) repo")
    assert any(call[0] == "srun" for call in calls), output
    assert canaries(tmp_path) == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_ask_for_no_account_partition_or_time(template):
    lines = [
        line
        for line in (REPO / "slurm" / f"{template}.sh").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert "#SBATCH --requeue" in lines and "#SBATCH --signal=B:USR1@300" in lines
    assert not [
        line
        for line in lines
        if any(word in line for word in ("account", "partition", "time", "gpus", "qos"))
    ]
    assert (REPO / "slurm" / f"{template}.sh").stat().st_mode & stat.S_IXUSR


def test_a_wrong_folder_or_a_missing_environment_says_what_to_type(shell, tmp_path):
    code, output, _ = shell("upcycle", NEXUS_REPO=str(tmp_path / "nowhere"))
    assert code == 1 and "submit from the repository's folder" in output
    bare = tmp_path / "bare"
    (bare / "slurm").mkdir(parents=True)
    for name in ("common.sh", "upcycle.sh"):
        (bare / "slurm" / name).write_text((REPO / "slurm" / name).read_text())
    programs = tmp_path / "bin"
    (programs / "python3").write_text("#!/bin/sh\nexit 1\n")
    (programs / "python3").chmod(0o755)
    code, output, _ = shell("upcycle", repository=bare)
    assert code == 1 and "make setup" in output and "no " in output
    assert canaries(tmp_path) == []


def without_scontrol(tmp_path):
    """Return a PATH of all programs of this machine but scontrol."""
    folder = tmp_path / "programs"
    folder.mkdir()
    paths = [tmp_path / "bin", *map(Path, os.environ["PATH"].split(os.pathsep))]
    for path in (p for found in paths if found.is_dir() for p in found.iterdir()):
        if path.name != "scontrol" and not (folder / path.name).is_symlink():
            (folder / path.name).symlink_to(path)
    return str(folder)


REQUEUES = {
    "it refuses": (
        '[ "$1" != requeue ] || { echo no controller >&2; exit 1; }; echo node1',
        "no controller",
    ),
    # its package is taken away while the job runs
    "it is gone": ('[ "$1" != --oneliner ] || rm "$0"; echo node1', "scontrol: command not found"),
}
STATES = {0: "there is no state yet", 7: "the state of step 7 is kept"}


@pytest.mark.parametrize("step", STATES)
@pytest.mark.parametrize("how", REQUEUES)
def test_a_failing_requeue_keeps_the_state_and_says_so(shell, tmp_path, how, step):
    script, message = REQUEUES[how]
    path, programs = recipe(tmp_path / "recipe.yaml"), without_scontrol(tmp_path)
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\nexit 75\n")
    scontrol = Path(programs) / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n{script}\n")
    scontrol.chmod(0o755)
    state = tmp_path / "run" / "seed.training" / "states" / f"step_{step}" / "manifest.json"
    if step:
        state.parent.mkdir(parents=True)
        state.write_text("{}")
    code, output, _ = shell("seed", path, MAX_STALLED="3", PATH=programs)
    assert code == 1 and message in output, output
    said = f"'scontrol requeue 7_0' failed; {STATES[step]}: submit the same job again to go on"
    assert said in output
    assert not step or state.read_text() == "{}"


def test_a_machine_without_scontrol_is_named_before_anything_starts(shell, tmp_path):
    path = recipe(tmp_path / "recipe.yaml")
    code, output, calls = shell("seed", path, PATH=without_scontrol(tmp_path))
    assert code == 1 and calls == []
    assert "scontrol: command not found" in output
    assert "error: scontrol show hostnames failed" in output


def failing(tmp_path, made, code=1):
    """Let the fake srun end with `code` after somebody made a file of the run."""
    path = tmp_path / "run" / made
    # a state is a folder
    make = "mkdir" if path.name.startswith("step_") else "touch"
    srun = (
        '#!/bin/sh\ncase "$*" in *preflight*) exit 0;; esac\n'
        f'mkdir -p "{path.parent}"; {make} "{path}"\nexit {code}\n'
    )
    (tmp_path / "bin" / "srun").write_text(srun)


OTHERS = ("seed.training/states/step_7", "branches/docs/model.safetensors")


@pytest.mark.parametrize("made", OTHERS)
@pytest.mark.parametrize("template", ["embed", "tokens", "evaluate", "dense_branch"])
def test_progress_of_other_jobs_requeues_no_failure(shell, tmp_path, template, made):
    run = tmp_path / "run"
    for there in ("seed", "upcycled", "nexus", "extension", "extended"):
        (run / there).mkdir(parents=True)
    failing(tmp_path, made)
    code, output, calls = shell(template, recipe(tmp_path / "recipe.yaml"), MAX_STALLED="3")
    assert (run / made).exists()
    assert code == 1 and "without progress; its message stands above" in output, output
    assert not any("requeue" in call for call in calls)


OWN = {
    "seed": "seed.training/states/step_7",
    "tokens": "tokens/docs-train.json",
    "embed": "domains.safetensors",
    "dense_branch": "branches/python.training/states/step_7",
    # of the seed, which this job makes first
    "upcycle": "seed.training/states/step_7",
}


@pytest.mark.parametrize("template", OWN)
def test_a_failure_after_progress_is_requeued(shell, tmp_path, template):
    failing(tmp_path, OWN[template])
    code, output, calls = shell(template, recipe(tmp_path / "recipe.yaml"), MAX_STALLED="3")
    assert code == 75 and "is not finished (exit 1" in output, output
    assert ["scontrol", "requeue", "7_0"] in calls
    # and once more, without any
    code, output, calls = shell(template, recipe(tmp_path / "recipe.yaml"), MAX_STALLED="3")
    assert code == 1 and "without progress" in output, output
    assert ["scontrol", "requeue", "7_0"] not in calls


def test_a_run_that_bad_batches_ended_is_not_requeued_for_the_state_behind_them(shell, tmp_path):
    failing(tmp_path, OWN["seed"], code=65)
    code, output, calls = shell("seed", recipe(tmp_path / "recipe.yaml"), MAX_STALLED="3")
    assert code == 1 and "seed ended after several bad batches in a row" in output, output
    assert not any("requeue" in call for call in calls)


def test_what_a_lost_start_made_counts_for_that_start_alone(shell, tmp_path):
    """A node was lost after progress, so that nobody noted it; the next start fails at once."""
    failing(tmp_path, "seed.training/config.yaml", code=75)
    words = ("seed", recipe(tmp_path / "recipe.yaml"))
    for _ in range(2):
        code, output, _ = shell(*words, MAX_STALLED="3")
        assert code == 75, output
    (tmp_path / "run" / "seed.training" / "states" / "step_7").mkdir(parents=True)
    for expected in (75, 75, 1):
        code, output, _ = shell(*words, MAX_STALLED="3")
        assert code == expected, output
    assert "no progress in 3 starts at step 7 of seed" in output


def test_a_template_outside_of_a_job_says_how_to_submit_it(shell, tmp_path):
    code, output, _ = shell("upcycle", recipe(tmp_path / "recipe.yaml"), SLURM_JOB_ID="")
    assert code == 1 and "not a job; type: sbatch slurm/upcycle.sh" in output


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (138, 0), (1, 1)])
def test_ranks_that_are_signalled_after_the_output_is_there_have_finished(
    shell, tmp_path, code, expected
):
    path = recipe(tmp_path / "recipe.yaml")
    output = tmp_path / "run" / "seed"
    srun = f'#!/bin/sh\ncase "$*" in *preflight*) exit 0;; esac\nmkdir -p "{output}"\nexit {code}\n'
    (tmp_path / "bin" / "srun").write_text(srun)
    found, text, calls = shell("seed", path, MAX_STALLED="3")
    assert found == expected, text
    assert ("stage seed is finished" in text) == (expected == 0)
    assert not any("requeue" in call for call in calls)
    assert expected == 0 or f"exit 1, although {output} is there" in text


def test_a_site_may_extend_what_nobody_has_set(shell, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("export NEVER_SET=/opt/x:$NEVER_SET\n")
    path = recipe(tmp_path / "recipe.yaml")
    code, output, calls = shell("pipeline", path, NEXUS_SITE=str(site))
    assert code == 0 and len(calls) == 7, output


EARLY = """
source {repo}/slurm/common.sh
template=x python=python3
trap 'on_signal USR1' USR1
set -T
trap '[ "$BASH_COMMAND" != "child=\\$!" ] || {{ trap - DEBUG; kill -USR1 $$; }}' DEBUG
launch -- stage
echo "code=$code stopping=$stopping"
"""


def test_a_signal_between_the_start_of_a_step_and_its_number_reaches_the_ranks(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/bin/sh\ntrap 'exit 75' USR1\nfor i in 1 2 3 4 5 6 7 8 9 10; do sleep 1; done\n"
    )
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", EARLY.format(repo=REPO)],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    # 138: before it listened
    assert done.stdout.splitlines()[-1] in ("code=75 stopping=USR1", "code=138 stopping=USR1")
