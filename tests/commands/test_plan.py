"""The verb `plan` as a user types it."""

import json
import shlex

import pytest

from nexus_ds.__main__ import main
from nexus_ds.command_lines import TRAIN
from nexus_ds.config import load_config

LARGE = [
    "plan",
    "--config",
    "nexus-2.8b",
    "--gpus",
    "16",
    "--nodes",
    "4",
    "--gpu-memory",
    "24GB",
    "--link",
    "25Gb",
]
TINY = ["plan", "--gpus", "2", "--gpu-memory", "8GB"]


def planned(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_json_has_the_promised_keys(capsys):
    plan = planned(capsys, *LARGE)
    assert plan["parameters"]["total"] == 9_093_480_960
    assert plan["parameters"]["active"] == 4_345_397_760
    assert len(plan["layouts"]) == 7 * 3  # stages and offloads, expert parallel 1, 2, 4
    for layout in plan["layouts"]:
        assert layout.keys() >= {
            "fits",
            "gpu_bytes",
            "host_bytes",
            "step_seconds",
            "tokens_per_second",
            "days",
        }
        assert layout["gpu_bytes"] == pytest.approx(sum(layout["gpu"].values()), abs=20)
        assert layout["step_seconds"] == pytest.approx(sum(layout["seconds"].values()))
        assert layout["node_link_bytes_per_step"] > 0
    assert plan["run"]["tokens"] == pytest.approx(41e9, rel=1e-3)  # 40B and the anneal
    # a layer and the embedding, not the 18 GB of the checkpoint
    check = plan["export_check"]
    assert check["gpu_bytes"] < 4e9 and check["host_bytes"] < 4e9 and 60 < check["seconds"] < 120
    assert plan["best"]["name"] == plan["layouts"][0]["name"]
    assert plan["one_more_expert"]["parameters"] == 20 * 3 * 2560 * 10304


def test_the_text_says_what_fits_what_is_estimated_and_what_to_type(capsys):
    assert main(LARGE) == 0
    text = capsys.readouterr().out
    for part in (
        "parameters: 9,093M, 4,345M active",
        "fastest that fits: ZeRO-3",
        "GB a training state",
        "check of the finished checkpoint: ",
        "when training's activations are gone, ",
        "activations",
        "one more expert: +1,583M parameters",
        "estimated, not measured: all seconds",
        "days",
        "next: the same command with --write",
    ):
        assert part in text


def test_it_says_what_the_link_is_good_for(capsys):
    cluster = [
        "plan",
        "--config",
        "nexus-470m",
        "--gpus",
        "8",
        "--nodes",
        "2",
        "--gpu-memory",
        "80GB",
        "--link",
    ]
    slow, fast = (
        planned(capsys, *cluster, "1Gb")["links"],
        planned(capsys, *cluster, "100Gb")["links"],
    )
    assert (slow["use"], fast["use"]) == ("expert_parallel", "zero_only")
    assert slow["flips"] == fast["flips"] and slow["flips"]
    assert main([*cluster, "1Gb"]) == 0
    text = capsys.readouterr().out
    assert "links: at 1 Gb between nodes expert parallelism is the faster: ZeRO-" in text
    assert f"; above {8e-9 * slow['flips'][0]['link']:.3g} Gb ZeRO alone" in text
    assert main(["plan", "--config", "nexus-470m", "--gpus", "8", "--gpu-memory", "80GB"]) == 0
    assert "so it is from 10 Mb to 10 Tb" in capsys.readouterr().out
    assert main(["plan", "--config", "nexus-470m", "--gpus", "1", "--gpu-memory", "80GB"]) == 0
    assert "links: at" not in capsys.readouterr().out


def test_the_written_json_and_the_command_are_those_of_the_best(tmp_path, capsys):
    out = tmp_path / "ds.json"
    assert main([*TINY, "--write", str(out), "training.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    plan = planned(capsys, *TINY, "training.lr=1e-3")
    assert json.loads(out.read_text()) == plan["best"]["deepspeed"]
    words = shlex.split(text.split("next: ", 1)[1])
    assert words[:4] == ["deepspeed", "--num_gpus", "2", str(TRAIN)]
    assert words[4:8] == ["--deepspeed", str(out), "--config", "demo"]
    config = load_config("demo", words[8:])  # the overrides are understood
    assert config.training.lr == 1e-3
    best = plan["layouts"][0]
    assert config.training.micro_batch_size == best["micro_batch_size"]
    assert config.parallel.expert == best["expert_parallel"]


def test_several_nodes_start_under_srun(capsys):
    command = planned(capsys, *LARGE)["best"]["command"]
    assert command.startswith(
        f"srun --nodes=4 --ntasks-per-node=4 python {TRAIN} --deepspeed ds.json"
    )


def test_a_dense_stage_has_no_experts(capsys):
    plan = planned(capsys, *TINY, "stage=seed")
    assert plan["one_more_expert"] is None
    assert {layout["expert_parallel"] for layout in plan["layouts"]} == {1}
    assert main([*TINY, "stage=seed"]) == 0
    assert "one more expert" not in capsys.readouterr().out


def test_nothing_fits_is_said_and_nothing_written(tmp_path, capsys):
    small = ["plan", "--config", "nexus-2.8b", "--gpus", "1", "--gpu-memory", "8GB"]
    assert main(small) == 0
    text = capsys.readouterr().out
    assert "nothing fits; nearest: ZeRO-3" in text and "next: try more GPUs" in text
    assert main([*small, "--write", str(tmp_path / "ds.json")]) == 1
    assert "no layout fits, so" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2", "--gpu-memory", "24"], "--gpu-memory: expected a size such as 24GB"),
        (
            ["--gpus", "3", "--gpu-memory", "24GB"],
            "training.batch_size 8 does not divide over 3 GPUs",
        ),
        (
            ["--gpus", "4", "--nodes", "3", "--gpu-memory", "24GB"],
            "4 GPUs don't spread evenly over 3 nodes",
        ),
        (["--gpus", "0", "--gpu-memory", "24GB"], "0 GPUs don't spread evenly over 1 nodes"),
        (
            ["--gpus", "2", "--gpu-memory", "24GB", "--gpu-tflops", "0"],
            "--gpu-tflops: expected a number above 0",
        ),
        (
            ["--gpus", "2", "--gpu-memory", "24GB", "--gpu-tflops", "nan"],
            "--gpu-tflops: expected a number above 0",
        ),
        (
            ["--gpus", "2", "--gpu-memory", "24GB", "--link", "fast"],
            "--link: expected a size such as",
        ),
        (["--gpus", "2", "--gpu-memory", "24GB", "model.path=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["plan", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nexus-ds plan: ") and message in error and error.count("\n") == 1


def test_a_directory_is_no_file_to_write(tmp_path, capsys):
    assert main([*TINY, "--write", str(tmp_path)]) == 1
    assert "is a directory; name a file" in capsys.readouterr().err


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "ds.json"
    out.write_text("mine")
    assert main([*TINY, "--write", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_the_verbs_are_printed_as_a_table_and_as_json(capsys):
    words = [*LARGE, "--verbs"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("evaluate", "extended", "layer by layer", "on CPUs", "estimated, not measured"):
        assert part in text
    plan = planned(capsys, *words)
    assert plan["assumptions"]["FORWARD_USE"] == 0.3
    row = next(verb for verb in plan["verbs"] if verb["name"] == "evaluate")
    assert row["gpu_bytes"] > 18e9 and row["how"] == "whole"
    assert main([*words, "--write", "ds.json"]) == 1
    assert "--write is a training layout's DeepSpeed JSON" in capsys.readouterr().err
