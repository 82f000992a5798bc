"""The text of a warm start: whose it is, how much of it, and what is said where it is missing."""

import dataclasses

import pytest
import torch
from conftest import DOMAINS

from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.config import load_config
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.warm_start import fit_text
from nexus_ds.warm_start.fit_text import read_fit_text

LENGTH = 64


def read(nexus_dir, data, *words, kept=0, sidecar=None):
    config = load_config("demo", ["data.workers=1", *words])
    sidecar = sidecar or read_sidecar(nexus_dir)
    return read_fit_text(sidecar, nexus_dir, LENGTH, kept, str(data), config, "--cold")


@pytest.fixture
def embedded(monkeypatch, tmp_path):
    """What is given to an encoder that makes embeddings of ones."""
    asked = {}

    def embed_chunks(texts, encoder, revision, cache):
        asked.update(texts=texts, revision=revision, cache=cache)
        return {domain: torch.ones(len(chunks), 8) for domain, chunks in texts.items()}

    monkeypatch.setattr(fit_text, "embed_chunks", embed_chunks)
    return asked


def test_the_label_fit_reads_windows_of_every_domain(nexus_dir, text_folder):
    text = read(nexus_dir, text_folder, "router.fit_windows=5", kept=2)
    assert list(text.windows) == list(DOMAINS) and text.chunks == {}
    assert {tokens.shape for tokens in text.windows.values()} == {(5, LENGTH)}


@pytest.mark.parametrize("start", ["none", "embedding"])
def test_starts_that_read_nothing(nexus_dir, start):
    sidecar = read_sidecar(nexus_dir)
    sidecar.router.kind = "linear"
    assert read(nexus_dir, "nowhere", f"router.warm_start={start}", sidecar=sidecar) is None


def test_the_ends_of_documents_are_line_breaks_to_the_encoder(nexus_dir, text_folder, embedded):
    text = read(nexus_dir, text_folder, "router.warm_start=chunks", "router.fit_chunks=4")
    tokenizer = open_tokenizer(nexus_dir)
    for domain, tokens_nS in text.windows.items():
        whole = tokenizer.batch_decode(tokens_nS)
        assert "<|endoftext|>" in " ".join(whole)
        # the tokenizer of these tests puts spaces between words
        parts = [[part.strip() for part in chunk.split("<|endoftext|>")] for chunk in whole]
        assert embedded["texts"][domain] == ["\n".join(filter(None, chunk)) for chunk in parts]


def test_chunks_are_of_the_older_experts_and_of_background(nexus_dir, text_folder, embedded):
    words = ("router.warm_start=chunks", "router.fit_chunks=4", "router.fit_background=[gamma]")
    sidecar = read_sidecar(nexus_dir)
    sidecar.experts[2] = dataclasses.replace(sidecar.experts[2], name="new", domain="new")
    text = read(nexus_dir, text_folder, *words, kept=2, sidecar=sidecar)
    assert list(text.windows) == ["alpha", "beta", "gamma"]
    assert {chunks.shape for chunks in text.chunks.values()} == {(4, 8)}
    assert embedded["revision"] == sidecar.encoder.revision
    # A domain with an expert is no background: at upcycling each is read once.
    again = read(nexus_dir, text_folder, *words)
    assert list(again.windows) == list(DOMAINS)


def test_embeddings_are_kept_in_the_runs_cache(nexus_dir, text_folder, embedded, tmp_path):
    words = ["router.warm_start=chunks", "router.fit_chunks=4", f"pipeline.run={tmp_path / 'run'}"]
    read(nexus_dir, text_folder, *words)
    assert not embedded["cache"].exists()
    (tmp_path / "run").mkdir()
    read(nexus_dir, text_folder, *words)
    assert embedded["cache"] == tmp_path / "run" / "tokens"
    read(nexus_dir, text_folder, *words, f"data.cache={tmp_path / 'own'}")
    assert embedded["cache"] == tmp_path / "own"


def test_what_is_missing_is_said(nexus_dir, text_folder):
    chunks = "router.warm_start=chunks"
    with pytest.raises(DataError, match=r"looked for in .*, lower router.fit_windows, or --cold"):
        read(nexus_dir, text_folder, "router.fit_windows=100000")
    with pytest.raises(
        DataError, match=r"text of alpha, beta, gamma, web .*lower router.fit_chunk"
    ):
        read(nexus_dir, text_folder, chunks, "router.fit_background=[web]")
    bare = dataclasses.replace(read_sidecar(nexus_dir), encoder=None)
    with pytest.raises(CheckpointError, match="names no encoder of its domain embeddings, but"):
        read(nexus_dir, text_folder, chunks, "router.fit_chunks=4", sidecar=bare)
    with pytest.raises(ConfigError, match="closed_form needs a linear P"):
        read(nexus_dir, text_folder, "router.warm_start=closed_form")


# Background in the place of the experts' text -----------------------------------------------------


def test_background_windows_go_to_the_nearest_domain(nexus_dir):
    """By direction, whatever their length."""
    sidecar = read_sidecar(nexus_dir)
    inputs = torch.from_numpy(sidecar.vectors)
    # of each domain one window, and others that are on the way to another domain
    vectors = {"web": torch.cat([0.1 * inputs, inputs + inputs.roll(1, 0)]), "news": -inputs}
    windows = {name: torch.arange(3 * len(v)).view(-1, 3) for name, v in vectors.items()}
    for start in ("label_fit", "chunks"):
        words = ["router.fit_windows=1", f"router.warm_start={start}"]
        router = load_config("demo", words).router
        found = fit_text.stand_ins(sidecar, windows, vectors, router)
        assert [found.windows[name].tolist() for name in DOMAINS] == windows["web"][
            :3, None
        ].tolist()
        assert found.nearest == pytest.approx(dict.fromkeys(DOMAINS, 1.0))
        left = len(vectors["web"]) + len(vectors["news"]) - len(DOMAINS)
        assert (len(found.chunks), len(found.windows)) == (
            (0, 3) if start == "label_fit" else (4, 4)
        )
        assert start == "label_fit" or len(found.windows[""]) == len(found.chunks[""]) == left


def test_background_is_all_that_is_read(nexus_dir, text_folder, embedded, tmp_path):
    words = ["router.fit_text=background", "router.fit_chunks=9", "router.fit_windows=2"]
    (tmp_path / "web").symlink_to(text_folder / "gamma")
    text = read(nexus_dir, tmp_path, *words, "router.fit_background=[web]")
    assert list(embedded["texts"]) == ["web"] and len(embedded["texts"]["web"]) == 9
    assert list(text.windows) == list(DOMAINS) == list(text.nearest)
    with pytest.raises(ConfigError, match=r"fit_background names none; give router.fit_back"):
        read(nexus_dir, tmp_path, *words)
    with pytest.raises(DataError, match=r"reads training text of zoo .*lower router.fit_chunks"):
        read(nexus_dir, tmp_path, *words, "router.fit_background=[zoo]")


def test_a_place_that_nobody_names(nexus_dir):
    with pytest.raises(ConfigError, match=r"nothing says where .* give --data DIR, or --cold to"):
        read(nexus_dir, "")
