"""The verb `adopt`: what it says, where it writes, and what is left of a refusal."""

import json
import shutil

import pytest
from branches import make_parts, stock, upcycle
from conftest import train_shared_gates

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.sidecar import read_sidecar


@pytest.fixture
def tuned(tmp_path, nexus_dir):
    stock(nexus_dir).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_it_writes_beside_what_was_trained_and_names_the_next_command(
    tuned, nexus_dir, capsys, monkeypatch
):
    monkeypatch.chdir(tuned.parent)
    assert main(["adopt", "tuned", "--from", str(nexus_dir)]) == 0
    out = tuned.parent / "tuned-adopted"
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"layer {layer}: rows kept, P(D) differs from the trained ones by 0.0e+00 of the largest "
        "entry; last map of P moved by 0.0e+00 of its length"
        for layer in range(2)
    ]
    assert lines[2].startswith(f"wrote {out}: 3 experts (alpha, beta, gamma), top-1, nexus router")
    words = f"extend --checkpoint {out} --expert NAME=DIR --domains FILE --out DIR"
    assert lines[-1] == f"next: nexus-ds {words}"
    assert not (tuned / "nexus.json").exists()
    assert read_sidecar(out).lineage[-1].trained == "tuned"


def test_json(tuned, nexus_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adopt", str(tuned), "--from", str(nexus_dir), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == ["alpha", "beta", "gamma"] and found["out"] == str(out)
    zero = {"row_error": 0.0, "moved": 0.0, "rows": "kept", "gate": 0.0}
    assert found["layers"] == [zero, zero]


def test_a_refusal_leaves_nothing(tuned, nexus_dir, tmp_path, capsys):
    train_shared_gates(tuned)
    words = ["adopt", str(tuned), "--from", str(nexus_dir)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "layer 0: the shared expert's gate was trained" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    assert main([*words, "--approximate"]) == 0
    assert "gate set back, it was within" in capsys.readouterr().out
    assert main([*words, "--approximate"]) == 1
    assert "tuned-adopted exists already" in capsys.readouterr().err


def test_a_copied_sidecar_does_not_count(tuned, nexus_dir, tmp_path):
    shutil.copy(nexus_dir / "nexus.json", tuned)
    shutil.copytree(nexus_dir / "nexus", tuned / "nexus")
    assert main(["adopt", str(tuned), "--from", str(nexus_dir), "--out", str(tmp_path / "o")]) == 0


def test_experts_beyond_their_branches_need_the_seed_next(tmp_path, dense_dir, text_folder, capsys):
    parts = make_parts(tmp_path, dense_dir, text_folder)
    upcycle(parts, "model.task_scale=2")
    stock(parts / "out").save_pretrained(parts / "tuned")
    assert main(["adopt", str(parts / "tuned"), "--from", str(parts / "out")]) == 0
    assert " --base SEED --domains FILE" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("merge", ["seed", "mean"])
def test_what_the_seed_gave_is_kept_by_the_next_command(
    tmp_path, dense_dir, text_folder, capsys, merge
):
    parts = make_parts(tmp_path, dense_dir, text_folder)
    upcycle(parts, f"model.merge={merge}")
    stock(parts / "out").save_pretrained(parts / "tuned")
    assert main(["adopt", str(parts / "tuned"), "--from", str(parts / "out")]) == 0
    said = " --lambda 0 --domains FILE" in capsys.readouterr().out.splitlines()[-1]
    assert said == (merge == "seed")
