"""The verb inspect: facts of one checkpoint, differences of several, JSON."""

import argparse
import json
import shutil

import pytest
from conftest import of_another_origin, save_branch, train_shared_gates

from nexus_ds.commands import inspect_model
from nexus_ds.errors import CheckpointError


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    inspect_model.add_arguments(parser)
    assert inspect_model.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def test_one_checkpoint(nexus_dir, capsys):
    lines = run(capsys, nexus_dir).splitlines()
    facts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines if "  " in line}
    assert (
        facts["kind"] == "Nexus"
        and facts["routed_experts"] == "3"
        and facts["encoder.name"] == "tiny"
    )
    assert "expert 1: beta (domain beta) from branches/beta, sha256 000000000000" in lines
    assert 'step 1: upcycle {"seed": "seed"}' in lines


def test_several_show_what_differs(dense_dir, nexus_dir, capsys):
    out = run(capsys, dense_dir, nexus_dir)
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["family"].split() == ["family", "llama", "qwen2_moe"]
    assert "hidden_size" in rows["equal:"] and "hidden_size" not in rows
    assert rows["experts"].split()[1] == "–"


def test_a_strangers_words_are_no_lines_of_their_own(nexus_dir, capsys, tmp_path):
    shutil.copytree(nexus_dir, tmp_path / "strange")
    path = tmp_path / "strange" / "nexus.json"
    sidecar = json.loads(path.read_text())
    sidecar["encoder"]["name"] = "tiny\nlicense  MIT"
    sidecar["experts"][0]["source"] = "branches/alpha\nexpert 9: law"
    sidecar["lineage"][0]["verb"] = "upcycle\nlicense  MIT"
    path.write_text(json.dumps(sidecar))
    text = run(capsys, tmp_path / "strange")
    assert text.count("\n") == run(capsys, nexus_dir).count("\n")
    assert "tiny license  MIT" in text and "from branches/alpha expert 9: law, sha256" in text
    assert "step 1: upcycle license  MIT {" in text


def test_json(dense_dir, nexus_dir, capsys):
    assert json.loads(run(capsys, dense_dir, "--json"))["family"] == "llama"
    both = json.loads(run(capsys, dense_dir, nexus_dir, "--json"))
    assert [facts["kind"] for facts in both] == ["dense", "Nexus"]


def test_no_checkpoint(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(capsys, tmp_path)


def test_a_mixture_shows_its_router_and_what_became_of_it(nexus_dir, capsys, tmp_path):
    out = run(capsys, nexus_dir)
    assert "router.rows" in out and "sidecar and config.json agree" in out
    assert "cosine of  alpha  beta  gamma" in out and "norm of row, layer" in out
    facts = json.loads(run(capsys, nexus_dir, "--json"))
    assert facts["domains"]["cosines"]["alpha"][0] == 1
    assert [len(norms) for norms in facts["router"]["row_norms"]] == [3, 3]
    assert facts["shared_expert_gate"] == "constant" and "outlook" not in facts
    shutil.copytree(nexus_dir, tmp_path / "tuned")
    train_shared_gates(tmp_path / "tuned")
    assert "TRAINED ELSEWHERE: " in run(capsys, tmp_path / "tuned")


def test_a_seed_and_branches_show_their_base_and_what_they_can_become(nexus_dir, capsys, tmp_path):
    for index, name in enumerate(("seed", "law")):
        save_branch(nexus_dir, tmp_path / name, index)
    shutil.copytree(tmp_path / "law", tmp_path / "other")
    of_another_origin(tmp_path / "other")
    names = [tmp_path / name for name in ("seed", "law", "other")]
    out = run(capsys, *names)
    assert f"{tmp_path / 'law'}: shares a base: cosine 0.8" in out
    assert f"{tmp_path / 'other'}: unrelated: cosine" in out
    assert "\nself_attn  " in out and "\n1      " in out
    assert "can be put together (as seed and experts): no\n1. weights that are unrelated" in out
    both = json.loads(run(capsys, *names[:2], "--json"))
    assert both[0]["outlook"] == {
        "as": "seed and experts",
        "possible": True,
        "problems": [],
        "notes": [],
    }
    assert both[1]["relation"]["to"] == str(names[0]) and "relation" not in both[0]


def test_what_decides_a_models_computation_is_shown(dense_dir, capsys, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.5}')
    facts = json.loads(run(capsys, tmp_path / "m", "--json"))
    assert facts["rope"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert facts["generation_config"] == {"temperature": 0.5}
    assert facts["chat_template"].startswith("chat_template.jinja ")
    assert facts["tokenizer"]["form"] == "tokenizer.json" and facts["tokenizer"]["tokens"] == 31
    assert facts["tokenizer"]["eos_token"] == "<|endoftext|>"
    assert facts["outlook"]["as"] == "expert" and facts["outlook"]["possible"]


def test_damage_is_shown_and_the_rest_too(nexus_dir, capsys, tmp_path):
    shutil.copytree(nexus_dir, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "generation_config.json").write_text('{"custom_generate": "x"}')
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 2}))
    facts = json.loads(run(capsys, tmp_path / "m", "--json"))
    assert facts["tokenizer"]["form"].startswith("DAMAGED: ")
    assert facts["generation_config"].startswith("REFUSED: ")
    assert facts["sidecar"] == (
        "DAMAGED: num_experts_per_tok is 2 in config.json, 1 in the sidecar"
    )
    (tmp_path / "m" / "nexus" / "nexus_router.safetensors").unlink()
    facts = json.loads(run(capsys, tmp_path / "m", "--json"))
    assert facts["router"]["rows"].startswith("DAMAGED: ") and facts["domains"] == {}
