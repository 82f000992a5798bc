"""Domains discovered in text without labels: documents clustered, and named by their own words.

A document is described twice: by the embedding of its opening, which knows what it is about, and by
its words (tf-idf in few dimensions), which also know what kind of text it is. On five mixtures of 4
to 11 known domains, k-means over both had a purity of 0.95 to 0.99, over embeddings alone 0.76 to
0.95. Openings of OPENING characters do as well as whole windows of the encoder in a third of the
time; the spherical kind of k-means, mixtures of Gaussians and subtracting the mean did no better.

A seeded sample of documents is clustered. Then all documents are read again, a batch at a time, and
each goes to the domain whose centre is nearest.

Shape letters: D documents, M dimension of the encoder, F features (M and those of the words), N
domains, V words.

Not covered: how many domains there are (compare the silhouettes of several numbers), domains of
equal size, near duplicates that come to lie in both splits.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexus_ds.data.domains import ENCODE_BATCH, Encoder, document_vectors, sample_documents, unit
from nexus_ds.data.rows import SUFFIXES, BadRows, Document, read_rows
from nexus_ds.data.sources import SPLITS
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.outputs import create
from nexus_ds.progress import Progress

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# sklearn takes a second to load, which other verbs should not pay: it is imported where it works.

OPENING = 400  # characters of a document that are embedded
READ = 4000  # characters of a document in which words are counted
# words in fewer documents, or in a larger share of them, say nothing of domains
RARE = 3
COMMON = 0.9
VOCABULARY = 50_000
WORD_FEATURES = 100
LARGE = 50_000  # documents in the sample from which k-means works on batches
STARTS = 10  # of k-means, of which the best is kept
SILHOUETTE_SAMPLE = 5000  # documents; all pairs of them are compared
NAME_WORDS = 2
SHOWN_WORDS = 8
SAFE_WORD = re.compile("[a-z]{1,24}")
KEPT_WORDS = 8 * SHOWN_WORDS  # of a domain: names skip words that others have taken


def corpus_files(path: Path) -> list[Path]:
    """Return a corpus' files, sorted: `path` itself, or all .jsonl[.gz|.zst] in and below it.

    What is hidden there is no text: an output that is being written, or that a killed writer left.

    Raises:
        DataError: no such files.
    """
    if path.is_file():
        files = [path]
        otherwise = "a file of another kind"
    elif path.is_dir():
        below = sorted(path.rglob("*.jsonl*"))
        files = [found for found in below if found.is_file() and not _hidden(found, path)]
        otherwise = "none in it"
    else:
        files = []
        otherwise = "nothing there"
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise DataError(
            f"no text at {path}: {otherwise}; expected files of one {{'text': ...}} a line, "
            f"{' or '.join(SUFFIXES)}"
        )
    return files


def _hidden(file: Path, folder: Path) -> bool:
    """Return whether a file, or a folder between it and `folder`, has a name with a dot ahead."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


class Words:
    """What words say of documents: tf-idf of a sample's words, in WORD_FEATURES directions.

    The directions are those of the truncated SVD (latent semantic analysis, Deerwester et al.
    1990).
    """

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.counter = TfidfVectorizer(
            # a word that a document has fifty times says little more than one it has twice
            sublinear_tf=True,
            min_df=RARE,
            max_df=COMMON,
            max_features=VOCABULARY,
        )
        self.reduction = None
        try:
            found_DV = self.counter.fit_transform(texts)
        except ValueError:
            # too few documents, or hardly a word in them
            return
        # one document, or one word, has no directions to tell apart
        if min(found_DV.shape) > 1:
            size = min(WORD_FEATURES, *found_DV.shape)
            reduction = TruncatedSVD(size, random_state=seed)
            self.reduction = reduction.fit(found_DV)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit vectors [D, F - M] of documents; zeros for one without known words."""
        if self.reduction is None:
            return np.zeros((len(texts), 1))
        found_DV = self.counter.transform(texts)
        reduced = self.reduction.transform(found_DV)
        return unit(reduced)


@dataclass
class Clusters:
    """N domains of a sample, the largest first."""

    names: list[str]
    centres: np.ndarray
    """[N, F] means of the domains' documents."""
    words: list[list[str]]
    """That set each domain apart, the best first."""
    silhouette: float
    """Mean over the sample of (b - a) / max(a, b), a and b the mean cosine distances to the own and
    the nearest other domain's documents: 1 for islands, 0 for a cloud that was cut."""

    def nearest(self, vectors_DF: np.ndarray) -> np.ndarray:
        """Return for each document the number [D] of its domain."""
        return nearest(vectors_DF, self.centres)


def nearest(vectors_DF: np.ndarray, centres_NF: np.ndarray) -> np.ndarray:
    """Return for each vector the number [D] of the centre that is nearest."""
    # |v - c|^2 = |v|^2 - 2 (v c - |c|^2 / 2): the nearest centre has the largest bracket
    half_norm_N = (centres_NF**2).sum(axis=1) / 2
    bracket_DN = vectors_DF @ centres_NF.T - half_norm_N
    return np.argmax(bracket_DN, axis=1)


def fit_clusters(texts: Sequence[str], vectors_DF: np.ndarray, count: int, seed: int) -> Clusters:
    """Cluster documents into `count` domains, the largest first.

    Args:
        texts: of D documents.
        vectors_DF: their features.
        count: domains.
        seed: of k-means' starts.

    Raises:
        DataError: a domain of fewer than two documents.
    """
    centres_NF = _k_means(vectors_DF, count, seed)
    labels_D = nearest(vectors_DF, centres_NF)
    sizes_N = np.bincount(labels_D, minlength=count)
    _check_sizes(sizes_N, len(texts))
    order_N = np.argsort(-sizes_N, kind="stable")
    # the inverse permutation: a domain's old number to its place in the order
    labels_D = np.argsort(order_N)[labels_D]
    words = distinctive_words(texts, labels_D, count)
    return Clusters(
        names=domain_names(words),
        centres=centres_NF[order_N],
        words=words,
        silhouette=_silhouette(vectors_DF, labels_D, seed),
    )


def _check_sizes(sizes_N: np.ndarray, documents: int) -> None:
    smallest = sizes_N.min()
    # a domain needs one document to train on and one to validate with
    if smallest < 2:
        raise DataError(
            f"one of the {len(sizes_N)} domains has {smallest} of the {documents} sampled "
            "documents, expected two or more; ask for fewer domains or a larger sample"
        )


def _k_means(vectors_DF: np.ndarray, count: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = KMeans if len(vectors_DF) < LARGE else MiniBatchKMeans
    model = kind(
        n_clusters=count,
        init="k-means++",
        n_init=STARTS,
        random_state=seed,
    )
    model.fit(vectors_DF)
    return np.asarray(model.cluster_centers_)


def _silhouette(vectors_DF: np.ndarray, labels_D: np.ndarray, seed: int) -> float:
    from sklearn.metrics import silhouette_score

    order_D = np.random.default_rng(seed).permutation(len(labels_D))
    chosen = order_D[:SILHOUETTE_SAMPLE]
    labels = labels_D[chosen]
    if len(set(labels)) < 2:
        # of two domains one is so small that it fell through
        return 0.0
    score = silhouette_score(vectors_DF[chosen], labels, metric="cosine")
    return float(score)


def distinctive_words(texts: Sequence[str], labels_D: np.ndarray, count: int) -> list[list[str]]:
    """Return for each of `count` domains the words that set it apart, best first.

    A word's score is p log(p / q), p and q its shares of the domain's and of all documents (its
    term of the Kullback-Leibler divergence): frequent here, and more so than elsewhere. Counting
    documents keeps one long text from naming the domain.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(
        binary=True,
        strip_accents="unicode",
        stop_words="english",
        token_pattern=r"[^\W\d_]{3,}",
        dtype=np.float64,
    )
    try:
        present_DV = counter.fit_transform(texts)
    except ValueError:
        # no word of three letters in any document
        return [[] for _ in range(count)]
    vocabulary = counter.get_feature_names_out()
    everywhere_V = _column_means(present_DV)
    found = []
    for cluster in range(count):
        mine_D = np.flatnonzero(labels_D == cluster)
        here_V = _column_means(present_DV[mine_D])
        score_V = _divergence(here_V, everywhere_V)
        # stable: of words that score alike the first in the alphabet, on any machine
        best = np.argsort(-score_V, kind="stable")[:KEPT_WORDS]
        found.append([str(vocabulary[v]) for v in best if score_V[v] > 0])
    return found


def _divergence(here_V: np.ndarray, everywhere_V: np.ndarray) -> np.ndarray:
    """Return the term p log(p / q) [V] of each word."""
    # a word that is nowhere here scores 0 log(..), not NaN
    ratio_V = np.maximum(here_V, 1e-12) / everywhere_V
    return here_V * np.log(ratio_V)


def _column_means(present_DV: csr_matrix) -> np.ndarray:
    """Return the share [V] of documents that have each word."""
    # the mean of a sparse matrix is a matrix, not an array
    return np.asarray(present_DV.mean(axis=0)).ravel()


def domain_names(words: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each domain, safe for folders and experts.

    It is made of the domain's first words that no earlier domain's name has.
    """
    taken: set[str] = set()
    names = []
    for number, best in enumerate(words, start=1):
        # names become folders: letters of ASCII alone, whatever the text is written in
        safe = (word for word in best if SAFE_WORD.fullmatch(word))
        free = (word for word in safe if word not in taken)
        chosen = list(islice(free, NAME_WORDS))
        taken.update(chosen)
        names.append("-".join(chosen) or f"domain-{number}")
    return names


@dataclass
class _Domain:
    """Files and counts of one domain while it is written."""

    name: str
    seed: int
    every: int
    """One document of so many is set aside for validation."""
    files: dict[str, gzip.GzipFile]
    """Of each split."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Documents of each split."""
    size: int = 0
    """Bytes of rows, before they are compressed."""

    def _split(self) -> str:
        """Return where the next document goes: one of each block is drawn for validation."""
        documents = sum(self.counts.values())
        block, place = divmod(documents, self.every)
        # \0 stands in no name, so two different triples never make one key
        key = f"{self.seed}\0{self.name}\0{block}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        # among the first block's first two, so that a domain of two has one in each split
        places = self.every if block else 2
        drawn = int.from_bytes(digest) % places
        return "validation" if place == drawn else "train"

    def add(self, document: Document) -> None:
        """Write one document."""
        split = self._split()
        # as the row had it: of a chat the roles, without which it would be plain text
        key, value = ("messages", document.chat) if document.chat else ("text", document.text)
        content = {key: value, "meta": document.meta}
        row = json.dumps(content, ensure_ascii=False) + "\n"
        # JSON's own way of writing a lone surrogate, which `meta` may hold and UTF-8 may not.
        line = row.encode("utf-8", errors="backslashreplace")
        self.size += self.files[split].write(line)
        self.counts[split] += 1


@dataclass(frozen=True)
class Written:
    """What became of one domain."""

    train: int
    """Documents."""
    validation: int
    bytes: int
    """Of rows, before they are compressed."""
    words: list[str]
    """That set it apart."""

    def to_json(self) -> dict[str, object]:
        """Return plain values by name."""
        return asdict(self)


class Discovery:
    """One corpus on its way to domains: `fit` on a sample, then `write` all of it.

    Memory: the sample's openings of READ characters, its embeddings, and a batch of documents.
    """

    def __init__(
        self,
        files: Sequence[Path],
        encoder: Encoder,
        *,
        seed: int = 0,
        every: int = 20,
        on_bad_row: str = "error",
    ) -> None:
        """Take note of the corpus.

        Args:
            files: of .jsonl[.gz|.zst].
            encoder: turns openings into unit-norm vectors.
            seed: of the sample, of k-means and of the validation split.
            every: one document of so many of a domain is set aside for validation.
            on_bad_row: error | skip, for damaged lines.
        """
        if every < 2:
            raise ConfigError(f"one document of {every} for validation: expected one of 2 or more")
        self.files = list(files)
        self.encoder = encoder
        self.seed = seed
        self.every = every
        self.on_bad_row = on_bad_row
        self.documents = 0
        self.skipped = 0
        self.words = Words([], seed)
        self.known: dict[str, np.ndarray] = {}
        """Embeddings [M] of the sampled documents, by the place where they stand."""

    def _read(self, bad_rows: BadRows | None = None) -> Iterator[Document]:
        for file in self.files:
            yield from read_rows(file, self.on_bad_row, bad_rows)

    def _cut(self) -> Iterator[Document]:
        """Yield the documents' beginnings, and count them."""
        self.documents = 0
        for document in self._read():
            self.documents += 1
            yield Document(document.text[:READ], {}, document.where)

    def _embedded(self, documents: Sequence[Document]) -> dict[str, np.ndarray]:
        """Return the embedding [M] of each document, by its place; the sample's are known."""
        new = [document for document in documents if document.where not in self.known]
        if not new:
            return self.known
        openings = [document.text[:OPENING] for document in new]
        vectors_DM = document_vectors(openings, self.encoder, 1)
        places = (document.where for document in new)
        return self.known | dict(zip(places, vectors_DM, strict=True))

    def _features(self, documents: Sequence[Document]) -> np.ndarray:
        """Return the features [D, F] of documents: embedding and words, with the same weight."""
        known = self._embedded(documents)
        embedded_DM = np.array([known[document.where] for document in documents])
        read = [document.text[:READ] for document in documents]
        words = self.words.vectors(read)
        # both are unit vectors, so neither outweighs the other
        return np.concatenate([embedded_DM, words], axis=1)

    def fit(self, count: int, documents: int) -> Clusters:
        """Read the corpus once and cluster a sample of `documents` of it into `count` domains.

        Raises:
            DataError: damaged rows; too few documents for so many domains.
        """
        sample = sample_documents(self._cut(), documents, self.seed, "discover")
        if len(sample) < 2 * count:
            raise DataError(
                f"found {len(sample)} documents for {count} domains; expected two for each: "
                "ask for fewer domains"
            )
        with Progress("embed the sample", len(sample), "doc") as progress:
            for batch in _batches(iter(sample)):
                self.known = self._embedded(batch)
                progress.advance(len(batch))
        texts = [document.text for document in sample]
        self.words = Words(texts, self.seed)
        features_DF = self._features(sample)
        return fit_clusters(texts, features_DF, count, self.seed)

    def write(self, clusters: Clusters, out: Path) -> dict[str, Written]:
        """Read the corpus again and write each document into its domain's folder.

        Args:
            clusters: of the sample.
            out: directory, there and empty; it gets <domain>/{train,validation}.jsonl.gz.

        Returns:
            What became of each domain.
        """
        bad_rows = BadRows()
        with ExitStack() as stack, Progress("assign", self.documents, "doc") as progress:
            domains = [self._open(stack, out / name) for name in clusters.names]
            for batch in _batches(self._read(bad_rows)):
                features_DF = self._features(batch)
                numbers = clusters.nearest(features_DF)
                for document, number in zip(batch, numbers, strict=True):
                    domains[number].add(document)
                progress.advance(len(batch))
        self.skipped = bad_rows.count
        written = {}
        for domain, words in zip(domains, clusters.words, strict=True):
            written[domain.name] = Written(
                train=domain.counts["train"],
                validation=domain.counts["validation"],
                bytes=domain.size,
                words=words[:SHOWN_WORDS],
            )
        return written

    def _open(self, stack: ExitStack, folder: Path) -> _Domain:
        folder.mkdir()
        files: dict[str, gzip.GzipFile] = {}
        for split in SPLITS:
            stream = stack.enter_context(create(folder / f"{split}.jsonl.gz"))
            # Without a name and a time the bytes depend on the text alone.
            file = gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0)
            files[split] = stack.enter_context(file)
        return _Domain(folder.name, self.seed, self.every, files)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, ENCODE_BATCH)):
        yield batch
