from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nexus_ds.data import mixture
from nexus_ds.data.corpora import TokenFile
from nexus_ds.data.mixture import Sampler, cycle_slots, domain_weights, permuted, slots
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.settings import DataConfig

TOKENS = {"a": 600, "b": 300, "c": 100}


class Unread(TokenFile):
    """A token file of any size whose text is never read."""

    def block(self, index: int, length: int) -> np.ndarray:
        assert 0 <= index < self.blocks(length)
        return np.zeros(length + 1, dtype=np.int64)


def file(tokens: int, name: str = "x") -> TokenFile:
    return Unread(Path(name), "uint16", tokens, 1, 0, name)


def sampler(weights: dict[str, float], blocks: dict[str, int], seed: int = 0) -> Sampler:
    return Sampler({d: file(blocks[d] * 8 + 1, d) for d in weights}, weights, 8, seed)


# Permutations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 97, 1000, 1023, 1025])
def test_permuted_is_a_permutation_that_depends_on_its_key(size: int):
    image = [permuted(i, size, "key") for i in range(size)]
    assert sorted(image) == list(range(size))
    if size > 20:
        assert image != [permuted(i, size, "other key") for i in range(size)]
        fixed = sum(i == j for i, j in enumerate(image))
        assert fixed < 12  # one is expected of a random permutation
        assert abs(np.corrcoef(range(size), image)[0, 1]) < 0.5


def test_permuted_looks_random():
    size, trials = 6, 6000
    first = Counter(permuted(0, size, str(key)) for key in range(trials))
    assert all(abs(count - trials / size) < 5 * (trials / size) ** 0.5 for count in first.values())
    # of 720
    assert (
        len({tuple(permuted(i, size, str(key)) for i in range(size)) for key in range(trials)})
        > 650
    )


def test_permuted_knows_its_range():
    with pytest.raises(IndexError, match="7 is outside of range"):
        permuted(7, 7, "key")


# Weights ------------------------------------------------------------------------------------------


def test_proportional_uniform_and_explicit():
    assert domain_weights(DataConfig(), TOKENS) == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert domain_weights(DataConfig(mixture="uniform"), TOKENS) == pytest.approx(
        dict.fromkeys("abc", 1 / 3)
    )
    explicit = DataConfig(mixture="explicit", weights={"b": 0.25, "a": 0.5, "c": 0.25})
    assert domain_weights(explicit, TOKENS) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert list(domain_weights(explicit, TOKENS)) == ["a", "b", "c"]


def test_replay_gives_the_new_domains_their_share():
    replay = DataConfig(mixture="replay", new_domains=["c"])
    assert domain_weights(replay, TOKENS) == {"a": 0.25, "b": 0.25, "c": 0.5}
    two = DataConfig(mixture="replay", new_domains=["a", "c"], new_share=0.4)
    assert domain_weights(two, TOKENS) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"mixture": "explicit", "weights": {"a": 0.5, "b": 0.5}}, "data.weights: no weight for c"),
        (
            {"mixture": "explicit", "weights": {"a": 0.5, "b": 0.4, "c": 0.1, "d": 1}},
            "data.weights: unknown domain d",
        ),
        (
            {"mixture": "explicit", "weights": {"a": 1, "b": 0, "c": 0}},
            "data.weights.b: expected a number above 0, found 0",
        ),
        (
            {"mixture": "explicit", "weights": {"a": 1, "b": 0.5, "c": -0.5}},
            "data.weights.c: .* found -0.5",
        ),
        (
            {"mixture": "explicit", "weights": {"a": 1, "b": float("nan"), "c": 1}},
            "data.weights.b: .* found nan",
        ),
        (
            {"mixture": "explicit", "weights": {"a": 2, "b": 1, "c": 1}},
            "sum to 4, expected 1; .* a: 0.5, b: 0.25, c: 0.25",
        ),
        ({"mixture": "replay"}, "replay needs new and old domains, found new: none, old: a, b, c"),
        ({"mixture": "replay", "new_domains": ["a", "b", "c"]}, "found new: a, b, c, old: none"),
        (
            {"mixture": "replay", "new_domains": ["d"]},
            "data.new_domains: unknown domain d; the mixture has: a, b, c",
        ),
        (
            {"mixture": "replay", "new_domains": ["a"], "new_share": 1.0},
            "data.new_share: .* found 1.0",
        ),
        (
            {"mixture": "replay", "new_domains": ["a"], "new_share": float("nan")},
            "data.new_share: .* found nan",
        ),
        ({"domains": ["a", "x"]}, "data.domains: unknown domain x"),
        ({"mixture": "other"}, "data.mixture: unknown value 'other'"),
    ],
)
def test_bad_mixtures(mixture: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        domain_weights(DataConfig(**mixture), TOKENS)


def test_domains_without_text():
    with pytest.raises(DataError, match="no training text in the domain b"):
        domain_weights(DataConfig(), {"a": 1, "b": 0})
    with pytest.raises(ConfigError, match="the mixture has no domains"):
        domain_weights(DataConfig(), {})


def test_slots_are_the_largest_remainders():
    assert slots({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert slots({"a": 0.45, "b": 0.35, "c": 0.2}, 5) == {"a": 2, "b": 2, "c": 1}
    assert slots({"a": 0.999, "b": 0.001}, 10) == {"a": 9, "b": 1}


def test_the_cycle_meets_every_weight_within_a_hundredth():
    rng = np.random.default_rng(0)
    for _ in range(20):
        raw = rng.dirichlet(np.ones(7) * 0.5)
        weights = {str(i): float(w) for i, w in enumerate((raw + 0.003) / (raw + 0.003).sum())}
        counts = cycle_slots(weights)
        total = sum(counts.values())
        assert all(abs(counts[d] / total - w) <= 0.01 * w for d, w in weights.items())
    assert cycle_slots({"a": 0.5, "b": 0.5}) == {"a": 32, "b": 32}
    with pytest.raises(ConfigError, match="the share of b is below 1 in 16384"):
        cycle_slots({"a": 1 - 1e-9, "b": 1e-9})


# Samples ------------------------------------------------------------------------------------------

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_no_block_comes_twice_within_an_epoch_and_none_is_left_out():
    blocks = {"a": 50, "b": 7, "c": 31}
    s = sampler(WEIGHTS, blocks)
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in (s[i] for i in range(20 * s.cycle)):
        drawn[sample.domain_index].append(sample.block)
    for index, domain in enumerate(WEIGHTS):
        counts = Counter(drawn[index])
        whole, part = divmod(len(drawn[index]), blocks[domain])
        # an epoch ends before the next one begins
        assert set(counts.values()) <= {whole, whole + 1}
        assert sum(count == whole + 1 for count in counts.values()) == part
        assert len(counts) == blocks[domain]


def test_shares_are_exact_over_cycles_and_near_within():
    s = sampler(WEIGHTS, {"a": 100, "b": 100, "c": 100})
    counts = Counter(s[i].domain_index for i in range(10 * s.cycle))
    assert [counts[d] for d in range(3)] == [10 * c for c in s.counts]
    half = Counter(s.locate(i)[0] for i in range(1000))
    assert abs(half[0] / 1000 - 0.5) < 0.03


def test_random_access_equals_sequential_access():
    s = sampler(WEIGHTS, {"a": 11, "b": 5, "c": 1})
    forward = [s.locate(i) for i in range(500)]
    again = sampler(WEIGHTS, {"a": 11, "b": 5, "c": 1})
    for i in np.random.default_rng(0).permutation(500):
        assert again.locate(int(i)) == forward[i]


def test_seeds_and_epochs_have_orders_of_their_own():
    one, two = (sampler({"a": 1.0}, {"a": 64}, seed) for seed in (0, 1))
    first = [one.locate(i)[1] for i in range(64)]
    assert sorted(first) == list(range(64))
    assert first != [two.locate(i)[1] for i in range(64)]
    assert first != [one.locate(i)[1] for i in range(64, 128)]
    # an epoch of four cycles: what each of them draws differs too
    long = sampler({"a": 1.0}, {"a": 4 * 64})
    cycles = [{long.locate(i)[1] for i in range(64 * cycle, 64 * cycle + 64)} for cycle in range(8)]
    assert all(cycles[cycle] != cycles[cycle + 4] for cycle in range(4))


def test_a_sample_of_a_billion_blocks_takes_two_permuted_numbers(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    monkeypatch.setattr(
        mixture, "permuted", lambda i, size, key: sizes.append(size) or permuted(i, size, key)
    )
    s = sampler({"a": 0.9, "b": 0.1}, {"a": 10**9, "b": 10**9})
    positions = [s.locate(i) for i in range(10**12, 10**12 + 1000)]
    assert len(set(positions)) == 1000
    assert sizes == [s.cycle, 10**9] * 1000


def test_domains_are_in_the_order_of_the_weights_whatever_that_of_the_files(tmp_path: Path):
    files = {}
    for number, domain in enumerate(("gamma", "alpha", "beta")):
        np.full(81, number, dtype=np.uint16).tofile(tmp_path / f"{domain}.bin")
        files[domain] = TokenFile(tmp_path / f"{domain}.bin", "uint16", 81, 1, 0, domain)
    weights = {"beta": 0.5, "gamma": 0.25, "alpha": 0.25}
    s = Sampler(files, weights, 8, 0)
    samples = [s[i] for i in range(s.cycle)]
    assert s.domains == ["beta", "gamma", "alpha"]
    assert {(x.domain_index, int(x.tokens[0])) for x in samples} == {(0, 2), (1, 0), (2, 1)}
    assert [sum(x.domain_index == d for x in samples) for d in range(3)] == [
        s.cycle // 2,
        s.cycle // 4,
        s.cycle // 4,
    ]


def test_a_sample_is_the_block_of_its_file(tmp_path: Path):
    np.arange(801, dtype=np.uint16).tofile(tmp_path / "a.bin")
    s = Sampler({"a": TokenFile(tmp_path / "a.bin", "uint16", 801, 1, 0, "f")}, {"a": 1.0}, 8, 0)
    sample = s[5]
    assert sample.tokens.tolist() == list(range(sample.block * 8, sample.block * 8 + 9))
    assert sample.tokens.dtype == np.int64


def test_the_fingerprint_covers_all_that_decides_a_sample():
    base = sampler(WEIGHTS, {"a": 10, "b": 10, "c": 10})
    same = sampler(WEIGHTS, {"a": 10, "b": 10, "c": 10})
    assert base.fingerprint() == same.fingerprint()
    others = [
        sampler(WEIGHTS, {"a": 10, "b": 10, "c": 10}, seed=1),
        sampler({"a": 0.4, "b": 0.4, "c": 0.2}, {"a": 10, "b": 10, "c": 10}),
        Sampler({d: file(81, d) for d in WEIGHTS}, WEIGHTS, 4, 0),
        Sampler({d: file(81, "other") for d in WEIGHTS}, WEIGHTS, 8, 0),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_epochs_says_how_often_the_text_is_read():
    s = sampler({"a": 0.5, "b": 0.5}, {"a": 100, "b": 50})
    assert s.epochs(200) == {"a": 1.0, "b": 2.0}


def test_bad_samplers():
    with pytest.raises(DataError, match="c: less text than one block of 8 tokens"):
        sampler(WEIGHTS, {"a": 1, "b": 1, "c": 0})
    with pytest.raises(ConfigError, match="weights are for a, text is there for b; give the same"):
        Sampler({"b": file(100)}, {"a": 1.0}, 8, 0)
