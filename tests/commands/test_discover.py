"""The verb discover: real text of known domains, mixed, is found again, and the pipeline takes it
from there."""

import contextlib
import io
import json
import re
import shlex
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.__main__ import build_parser, main
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.command_lines import DS_JSON, TRAIN
from nexus_ds.config import load_config
from nexus_ds.data.demo_text import demo_source
from nexus_ds.data.domains import embed_domains, read_domain_embeddings
from nexus_ds.data.rows import read_rows
from nexus_ds.data.sentence_encoder import SentenceEncoder
from nexus_ds.data.sources import open_source
from nexus_ds.pipeline import resolve

TRUE = ("algebra", "cpp", "docs", "python")
DOCUMENTS, CHARACTERS = 20, 500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text of four domains of this installation in one file, by turns; `meta` says which."""
    source, rows = demo_source(), []
    for domain in TRUE:
        texts = (
            d.text[:CHARACTERS]
            for d in source.documents(domain, "train")
            if len(d.text) > CHARACTERS
        )
        rows.append(
            [
                json.dumps({"text": text, "meta": {"truth": domain}})
                for text in islice(texts, DOCUMENTS)
            ]
        )
    path = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    path.write_text(
        "".join(f"{row}\n" for turn in zip(*rows, strict=True) for row in turn), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def found(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "the domains"
    words = [
        "discover",
        "--data",
        str(corpus),
        "--domains",
        "4",
        "--out",
        str(out),
        "--documents",
        "4",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(words) == 0
    (out.parent / "said").write_text(said.getvalue(), encoding="utf-8")
    return out


def truth(out):
    """Return {found domain: {true domain: documents}}."""
    return {
        name: Counter(
            d.meta["truth"]
            for s in ("train", "validation")
            for d in read_rows(out / name / f"{s}.jsonl.gz")
        )
        for name in open_source(str(out)).domains()
    }


def test_known_domains_are_found_again(found):
    table = truth(found)
    assert sum(sum(counts.values()) for counts in table.values()) == len(TRUE) * DOCUMENTS
    purity = sum(max(counts.values()) for counts in table.values()) / (len(TRUE) * DOCUMENTS)
    assert purity >= 0.8, table  # one big cluster: 0.25
    assert {max(counts, key=counts.get) for counts in table.values()} == set(TRUE)


def test_the_file_is_what_embed_would_write(found):
    embeddings = read_domain_embeddings(found / "domains.safetensors")
    assert set(embeddings.names) == set(
        open_source(str(found)).domains()
    ) and embeddings.data == str(found)
    again = embed_domains(open_source(str(found)), embeddings.names, SentenceEncoder(), 4, 0)
    np.testing.assert_allclose(embeddings.vectors, again.vectors, atol=1e-5)


def test_the_printed_commands_can_be_typed(found):
    said = (found.parent / "said").read_text(encoding="utf-8")
    names = open_source(str(found)).domains()
    [branch] = re.findall(r"next, for the branch of each domain: (.*)", said)
    words = shlex.split(branch)
    assert words[:4] == ["deepspeed", str(TRAIN), "--deepspeed", str(DS_JSON)]
    config = resolve(load_config("own", words[6:]))
    assert (config.model.path, config.data.path) == ("SEED", str(found))
    [name] = config.data.domains
    assert name in names and config.output == f"branches/{name}"
    [upcycle] = re.findall(r"then: (.*)", said)
    args = build_parser("upcycle").parse_args(shlex.split(upcycle)[1:])
    assert sorted(args.expert) == [f"{name}=branches/{name}" for name in names]
    assert args.domains == str(found / "domains.safetensors")


def test_upcycle_takes_folders_and_file(found, dense_dir, tmp_path):
    names = read_domain_embeddings(found / "domains.safetensors").names
    words = [
        "upcycle",
        "--seed",
        str(dense_dir),
        "--out",
        str(tmp_path / "moe"),
        "data.sequence_length=32",
        "router.fit_windows=2",
        "router.fit_steps=3",
        "--domains",
        str(found / "domains.safetensors"),
    ]
    for index, name in enumerate(names):
        shutil.copytree(dense_dir, tmp_path / name)
        generator = torch.Generator().manual_seed(index)
        tensors = load_file(tmp_path / name / "model.safetensors")
        changed = {
            n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()
        }
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        words += ["--expert", f"{name}={tmp_path / name}"]
    assert main(words) == 0  # with the warm start, which reads the folders
    assert [expert.domain for expert in read_sidecar(tmp_path / "moe").experts] == names
    verify_expert_embeddings(tmp_path / "moe")


def test_what_it_prints_and_records(corpus, tmp_path, capsys):
    words = [
        "discover",
        "--data",
        str(corpus),
        "--domains",
        "2",
        "--documents",
        "1",
        "--sample",
        "8",
    ]
    (tmp_path / "small.jsonl").write_text(
        "".join(f"{line}\n" for line in corpus.read_text().splitlines()[:10])
    )
    words[2] = str(tmp_path / "small.jsonl")
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == [
        "domain",
        "train",
        "validation",
        "MB",
        "words",
        "that",
        "set",
        "it",
        "apart",
    ]
    assert (
        "silhouette 0." in said
        and "stage=branch" in said
        and "then: nexus-ds upcycle --seed SEED --expert" in said
    )
    assert main([*words, "--out", str(tmp_path / "two"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    recorded = json.loads((tmp_path / "two" / "discovery.json").read_text())
    assert (
        recorded.items() <= answer.items()
        and recorded["documents"] == 10
        and recorded["sampled"] == 8
    )
    assert recorded["domains"].keys() == set(open_source(str(tmp_path / "two")).domains())
    for file in (tmp_path / "one").rglob("*.gz"):  # the same seed: the same bytes
        assert (
            file.read_bytes()
            == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--domains", "1"],
            "--domains 1, --sample 5000, --documents 200: expected at least 2, 1 and 1",
        ),
        (["--domains", "3", "--data", "nowhere"], "no text at nowhere: nothing there"),
        (["--domains", "3", "--encoder", "nobody/nothing"], "no sentence encoder 'nobody/nothing'"),
        (["--domains", "3", "--every", "1"], "one document of 1 for validation"),
        (["--domains", "9", "--sample", "12"], "found 12 documents for 9 domains"),
    ],
)
def test_mistakes_leave_nothing_behind(corpus, tmp_path, capsys, more, message):
    data = [] if "--data" in more else ["--data", str(corpus)]
    assert main(["discover", *data, "--out", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(corpus, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["discover", "--data", str(corpus), "--out", str(tmp_path), "--domains", "2"]) == 1
    assert "exists already" in capsys.readouterr().err
