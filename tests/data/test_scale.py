"""Nothing on the way from token files to samples grows with the text.

Sparse files of 50 GB stand for real ones.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ds.data import mixture
from nexus_ds.data.corpora import TokenFile, open_source, token_files, windows
from nexus_ds.data.mixture import Sampler, domain_weights, permuted
from nexus_ds.settings import DataConfig
from tests.data.conftest import bytes_read

TOKENS = 25 << 30  # of a file of 50 GiB
LENGTH = 2048


def anonymous_and_mapped() -> int:
    """Return this process's resident memory in bytes, memory maps of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def enlarged(file: TokenFile) -> TokenFile:
    """Return a file that was verified, as if it were large; verifying reads it once."""
    os.truncate(file.path, 2 * TOKENS)
    return replace(file, tokens=TOKENS)


def test_a_hundred_gigabytes_of_token_files_add_no_memory_and_are_not_read(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
):
    arguments = (
        open_source(str(corpus)),
        ["alpha", "beta"],
        "train",
        tokenizer_dir,
        tmp_path / "cache",
    )
    files = {name: enlarged(file) for name, file in token_files(*arguments).items()}
    before, read = anonymous_and_mapped(), bytes_read()
    weights = domain_weights(DataConfig(), {name: file.tokens for name, file in files.items()})
    sampler = Sampler(files, weights, LENGTH, 0)
    assert len(sampler.fingerprint()) == 64
    assert windows(files["alpha"], 8, LENGTH).shape == (8, LENGTH + 1)
    assert bytes_read() - read < 4 << 20  # the source's text, the tokenizer, manifests and windows
    assert sum(file.tokens for file in files.values()) == 2 * TOKENS
    read = bytes_read()
    blocks = {sampler.sample(i).block for i in range(0, 10**9, 10**6)}
    # a thousand samples, and what counts them
    assert bytes_read() - read < 1000 * 2 * (LENGTH + 1) + 4096
    assert len(blocks) > 990
    assert max(blocks) - min(blocks) > 0.9 * TOKENS // LENGTH
    assert anonymous_and_mapped() - before < 16 << 20


@pytest.mark.parametrize("size", [10, 10**4, 10**7, 10**12, 10**15])
def test_shuffling_costs_the_same_at_any_size(size: int, monkeypatch: pytest.MonkeyPatch):
    calls = 0
    keyed = mixture._keyed

    def counted(hasher: object, value: int) -> int:
        nonlocal calls
        calls += 1
        return keyed(hasher, value)

    monkeypatch.setattr(mixture, "_keyed", counted)
    image = {permuted(i, size, "key") for i in range(0, size, max(size // 500, 1))}
    assert len(image) == len(range(0, size, max(size // 500, 1)))  # no number twice
    assert calls <= 1.5 * 2 * mixture.ROUNDS * len(image)  # one walk, rarely two
