"""Models whose tokenizer puts BOS before a text: every verb reads documents that begin so, or
without where asked."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import add_token, save_branch

from nexus_ds.__main__ import main
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.commands import demo, generate
from nexus_ds.config import load_config
from nexus_ds.data.domains import DomainEmbeddings, write_domain_embeddings
from nexus_ds.errors import IncompatibleModelsError
from nexus_ds.evaluation.perplexity import score
from nexus_ds.experiments.comparison import work
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import loop
from nexus_ds.warm_start import fit_text

DOMAINS, COUNT, LENGTH = ("alpha", "beta", "gamma"), 6, 64
BOS = 1  # <unk>, which the texts don't need
READS = pytest.mark.parametrize("bos", [True, False])


@pytest.fixture(scope="module")
def llama_like(nexus_dir, tmp_path_factory):
    """A Nexus checkpoint with a tokenizer as a Llama's."""
    out = shutil.copytree(nexus_dir, tmp_path_factory.mktemp("models") / "bos")
    value = json.loads((out / "tokenizer.json").read_text())
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [
            {"SpecialToken": {"id": "<unk>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {"<unk>": {"id": "<unk>", "ids": [BOS], "tokens": ["<unk>"]}},
    }
    (out / "tokenizer.json").write_text(json.dumps(value))
    return out


def ids_of(checkpoint, text_folder, domain, split, bos):
    """Return a domain's text as one list of ids, by stock transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = [json.loads(line)["text"] for line in (text_folder / domain / f"{split}.jsonl").open()]
    assert all(tokenizer(text).input_ids[0] == BOS for text in texts)
    return [
        i
        for text in texts
        for i in [*tokenizer(text).input_ids[0 if bos else 1 :], tokenizer.eos_token_id]
    ]


def windows_of(checkpoint, text_folder, bos, split="validation", length=LENGTH):
    """Return the windows that are scored, cut by hand."""
    found = {}
    for domain in DOMAINS:
        ids = ids_of(checkpoint, text_folder, domain, split, bos)
        blocks = (len(ids) - 1) // length
        starts = [index * blocks // COUNT * length for index in range(COUNT)]
        found[domain] = np.array([ids[start : start + length + 1] for start in starts])
    assert any(BOS in tokens for tokens in found.values()) == bos
    return found


@READS
def test_evaluate(llama_like, text_folder, tmp_path, capsys, bos):
    words = [
        "--checkpoint",
        str(llama_like),
        "--data",
        str(text_folder),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    more = ["--windows", str(COUNT), "--length", str(LENGTH), *([] if bos else ["--no-bos"])]
    assert main(["evaluate", *words, *more]) == 0
    expected = score(llama_like, windows_of(llama_like, text_folder, bos)).perplexity
    assert json.loads(capsys.readouterr().out)["perplexity"]["bos"] == pytest.approx(expected)


@READS
def test_generate(llama_like, capsys, monkeypatch, bos):
    asked = []
    prompted = generate.tokenised
    monkeypatch.setattr(
        generate, "tokenised", lambda *words: asked.append(prompted(*words)) or asked[-1]
    )
    words = ["--checkpoint", str(llama_like), "tree leaf", "--tokens", "1"]
    assert main(["generate", *words, *([] if bos else ["--no-bos"])]) == 0
    (prompt,) = asked
    assert prompt.ids[:-2] == [BOS] * bos and BOS not in prompt.ids[-2:]
    assert capsys.readouterr().out.startswith("tree leaf")


@READS
def test_remove(llama_like, text_folder, tmp_path, capsys, bos):
    words = [
        "--checkpoint",
        str(llama_like),
        "--expert",
        "beta",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    more = ["--data", str(text_folder), "--windows", str(COUNT), *([] if bos else ["--no-bos"])]
    assert main(["remove", *words, *more]) == 0
    result = json.loads(capsys.readouterr().out)
    before = {
        domain: math.log(row["before"]) for domain, row in result["verdict"]["domains"].items()
    }
    assert before == pytest.approx(score(llama_like, windows_of(llama_like, text_folder, bos)).loss)
    assert ("--no-bos" in result["next"]) != bos


@READS
def test_extend(llama_like, text_folder, tmp_path, capsys, bos):
    branch = save_branch(llama_like, tmp_path / "delta")
    vectors = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    embeddings = DomainEmbeddings(
        ["delta"], vectors, "tiny", "1" * 64, 16, 4, {"delta": 5}, 0, str(text_folder)
    )
    write_domain_embeddings(tmp_path / "d.safetensors", embeddings)
    words = [
        "--checkpoint",
        str(llama_like),
        "--expert",
        f"delta={branch}",
        "--domains",
        str(tmp_path / "d.safetensors"),
    ]
    more = [
        "--verdict",
        "--scored",
        ",".join(DOMAINS),
        "--windows",
        str(COUNT),
        "--no-refit",
        "--json",
    ]
    assert (
        main(
            [
                "extend",
                *words,
                "--out",
                str(tmp_path / "out"),
                *more,
                f"data.bos={str(bos).lower()}",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["verdict"]["domains"]
    before = {domain: math.log(row["before"]) for domain, row in rows.items()}
    assert before == pytest.approx(score(llama_like, windows_of(llama_like, text_folder, bos)).loss)


@READS
def test_the_comparisons_scores(llama_like, text_folder, tmp_path, bos):
    work.score(
        str(tmp_path / "out.json"),
        [str(llama_like)],
        str(text_folder),
        list(DOMAINS),
        COUNT,
        LENGTH,
        str(tmp_path / "cache"),
        bos,
    )
    expected = score(llama_like, windows_of(llama_like, text_folder, bos)).loss
    assert json.loads((tmp_path / "out.json").read_text())["loss"] == pytest.approx(expected)


@READS
def test_the_routers_fit_and_the_text_that_is_embedded(
    llama_like, text_folder, tmp_path, monkeypatch, bos
):
    config = load_config(
        "demo",
        [
            f"data.bos={str(bos).lower()}",
            "data.workers=1",
            "router.warm_start=chunks",
            f"router.fit_chunks={COUNT}",
            f"pipeline.run={tmp_path / 'none'}",
        ],
    )
    seen = {}
    monkeypatch.setattr(fit_text, "embed_chunks", lambda texts, *_: seen.update(texts) or {})
    text = fit_text.read_fit_text(
        read_sidecar(llama_like), llama_like, LENGTH, 0, str(text_folder), config, "--cold"
    )
    expected = windows_of(llama_like, text_folder, bos, "train")
    for domain in DOMAINS:
        assert torch.equal(text.windows[domain], torch.from_numpy(expected[domain][:, :-1]))
        assert not any("<unk>" in chunk for chunk in seen[domain])


@READS
def test_the_demos_and_the_comparisons_evaluations(tmp_path, monkeypatch, capsys, bos):
    asked = []
    monkeypatch.setattr(
        demo.subprocess,
        "run",
        lambda command, **_: asked.append(command) or SimpleNamespace(returncode=0),
    )
    setting = f"data.bos={str(bos).lower()}"
    demo.evaluate(
        resolve(load_config("demo", ["pipeline.domains=[a]", f"pipeline.run={tmp_path}", setting]))
    )
    assert ("--no-bos" in asked[0]) != bos
    words = [
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--seeds",
        "0",
        "compare.contenders=[btm]",
        setting,
    ]
    assert main(["compare", *words, "compare.extensions=[]", "compare.tasks=arc_easy"]) == 0
    scores = [line for line in capsys.readouterr().out.splitlines() if '"windows"' in line]
    assert scores and all((f'"bos": {str(bos).lower()}' in line) for line in scores)
    assert main(["compare", *words, "compare.contenders=[seed]", "compare.tasks=arc_easy"]) == 0
    tasks = [line for line in capsys.readouterr().out.splitlines() if "--tasks arc_easy" in line]
    assert tasks and all(("--no-bos" in line) != bos for line in tasks)


def test_training_refuses_a_tokenizer_beyond_the_embedding(nexus_dir, tmp_path):
    large = tmp_path / "large"
    add_token(shutil.copytree(nexus_dir, large))
    words = [f"model.path={nexus_dir}", "data.sequence_length=16", "data.domains=[a]"]
    loop.check(load_config("demo", [*words, f"model.tokenizer={nexus_dir}"]))
    with pytest.raises(IncompatibleModelsError, match=r"ids up to 31 .* the model embeds 31"):
        loop.check(load_config("demo", [*words, f"model.tokenizer={large}"]))


@READS
def test_training(llama_like, text_folder, tmp_path, alone, bos):
    words = [
        f"data.path={text_folder}",
        f"data.cache={tmp_path}",
        "data.domains=[alpha]",
        "data.sequence_length=16",
        "data.validation_domains=[alpha,beta,gamma]",
        f"training.eval_windows={COUNT}",
    ]
    data = loop.read_data(load_config("demo", [*words, f"data.bos={str(bos).lower()}"]), llama_like)
    ids = ids_of(llama_like, text_folder, "alpha", "train", bos)
    for number in range(5):
        sample = data.sampler.sample(number)
        assert sample.tokens.tolist() == ids[16 * sample.block :][:17]
    expected = windows_of(llama_like, text_folder, bos, length=16)
    assert all((data.validation[domain] == expected[domain]).all() for domain in DOMAINS)
