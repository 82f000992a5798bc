"""The verb export: what it says, JSON, exit by exception, and nothing left of what is refused."""

import argparse
import json

import pytest
from branches import make_parts, upcycle

from nexus_ds.commands import export
from nexus_ds.errors import CheckpointError, ConfigError, OutputExistsError, ServingError
from nexus_ds.serving.targets import TARGETS


@pytest.fixture(scope="module")
def parts(tmp_path_factory, dense_dir, text_folder):
    """A seed, three branches, and the mixture of them."""
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder, dense_dir, text_folder)
    upcycle(folder)
    return folder


def run(*words):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("name", ["transformers4", "vllm", "sglang", "hub"])
def test_what_was_written_and_how_it_is_used(name, parts, tmp_path, capsys):
    out = tmp_path / "a b"
    assert run("--checkpoint", parts / "out", "--for", name, "--out", out) == 0
    said = capsys.readouterr().out.splitlines()
    target = TARGETS[name]
    assert said[0].startswith(f"wrote {out} for {target.program}: ") and "checked" in said[0]
    assert target.version in said[1] and ("was run" in said[1]) == (target.seen == "run")
    assert said[-1] == "next: " + target.command.replace("DIR", f"'{out}'")


def test_as_json(parts, tmp_path, capsys):
    words = ["--checkpoint", parts / "out", "--for", "sglang", "--out", tmp_path / "s", "--json"]
    assert run(*words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == TARGETS["sglang"].version and facts["seen"] == "read"
    assert facts["bytes"] > 0 and facts["tensors"] > 30 and "flashinfer" in facts["notes"][0]
    assert facts["next"].startswith("python -m sglang.launch_server --model-path ")


def test_refusals_leave_nothing(parts, tmp_path):
    words = ["--checkpoint", parts / "out", "--out", tmp_path / "o"]
    with pytest.raises(ConfigError, match="--license is of --for hub"):
        run(*words, "--for", "vllm", "--license", "mit")
    with pytest.raises(CheckpointError, match="seed"):
        run("--checkpoint", parts / "seed", "--out", tmp_path / "o", "--for", "vllm")
    (parts / "out" / "chat_template.jinja").write_text("{# /home/me/template #}")
    with pytest.raises(ServingError, match=r"chat_template.jinja of the checkpoint holds"):
        run(*words, "--for", "hub")
    (parts / "out" / "chat_template.jinja").unlink()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("")
    with pytest.raises(OutputExistsError):
        run(*words, "--for", "hub")
