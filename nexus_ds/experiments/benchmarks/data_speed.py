"""Speed of the way from text to samples, against the tokenizer alone on the same documents.

A round times two things, one after the other and in turn first: the tokenizer alone
(`encode_batch_fast` of the `tokenizers` library on all cores, documents in memory), and
`token_files` from a .jsonl.gz file to finished token files, processes started anew. A ratio
compares two times of one round, so that a machine that slows down for a while slows both.
Not covered: storage slower than a page cache, downloads, several machines.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nexus_ds.console import print_text
from nexus_ds.data.corpora import TokenFile, token_files
from nexus_ds.data.encoding import cores, load_tokenizer
from nexus_ds.data.mixture import Sampler
from nexus_ds.data.sources import Source, open_source, require_domains
from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELP = "tokenising and packing against the tokenizer alone, and the cost of a sample"
BATCH_CHARACTERS = 4 << 20  # that the tokenizer gets at once
VOCABULARY = 32_768  # of the tokenizer that is trained if none is given
TRAINING_MEGABYTES = 8.0  # of text that a tokenizer is trained on: more changes few merges
SAMPLES = 2000
LENGTH = 2048  # tokens of a sample


class Seconds(NamedTuple):
    """What something took."""

    wall: float
    cpu: float
    """Of this process and of the processes that it started."""


@dataclass
class Figures:
    """Seconds of each round, and what they were for."""

    megabytes: float
    """Of UTF-8 text."""
    cores: int
    alone: list[Seconds] = field(default_factory=list)
    """The tokenizer alone."""
    pipeline: list[Seconds] = field(default_factory=list)
    """From the file of documents to the token file."""
    reading: list[Seconds] = field(default_factory=list)
    """Gunzip, JSON and checks alone, in one process."""
    sample_seconds: float = 0.0
    """Of drawing one sample of LENGTH tokens."""

    def summary(self) -> Summary:
        """Return speeds in MB/s (medians) and the ratios of pipeline to tokenizer.

        The ratio of CPU times is what the ratio of times would be if no core ever waited.
        """
        pairs = list(zip(self.alone, self.pipeline, strict=True))
        return Summary(
            megabytes=self.megabytes,
            cores=self.cores,
            tokenizer_mb_per_second=self._speed(self.alone),
            pipeline_mb_per_second=self._speed(self.pipeline),
            reading_mb_per_second=self._speed(self.reading),
            ratio=_spread([alone.wall / whole.wall for alone, whole in pairs]),
            cpu_ratio=_spread([alone.cpu / whole.cpu for alone, whole in pairs]),
            sample_microseconds=self.sample_seconds * 1e6,
            rounds={
                "tokenizer": self.alone,
                "pipeline": self.pipeline,
                "reading": self.reading,
            },
        )

    def _speed(self, rounds: list[Seconds]) -> float:
        walls = [seconds.wall for seconds in rounds]
        return self.megabytes / statistics.median(walls)


@dataclass(frozen=True)
class Summary:
    """Speeds in MB of text a second, and ratios of tokenizer to pipeline: 1 if the rest is free."""

    megabytes: float
    cores: int
    tokenizer_mb_per_second: float
    pipeline_mb_per_second: float
    reading_mb_per_second: float
    ratio: list[float]
    """Of times: median, lowest and highest of the rounds."""
    cpu_ratio: list[float]
    """Of CPU times, likewise."""
    sample_microseconds: float
    rounds: dict[str, list[Seconds]]

    def to_json(self) -> dict[str, object]:
        """Return plain values by name; seconds as [wall, cpu]."""
        return vars(self).copy()


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def gather(documents: Iterator[str], megabytes: float) -> list[str]:
    """Return texts of `megabytes` in all; too few documents are repeated."""
    found: list[str] = []
    seen: list[str] = []
    size = 0.0
    for text in chain(_kept(documents, seen), cycle(seen)):
        found.append(text)
        size += len(text.encode()) / 1e6
        if size >= megabytes:
            break
    return found


def _kept(documents: Iterator[str], seen: list[str]) -> Iterator[str]:
    for text in documents:
        seen.append(text)
        yield text


def _tokenizer_alone(backend: Tokenizer, texts: Sequence[str]) -> None:
    start = 0
    size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= BATCH_CHARACTERS or end == len(texts):
            backend.encode_batch_fast(texts[start:end], add_special_tokens=False)
            start = end
            size = 0


def _cpu() -> float:
    # children count once they have ended and were waited for, as a pipeline's workers are
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _timed(action: Callable[[], object]) -> Seconds:
    wall = time.perf_counter()
    cpu = _cpu()
    action()
    wall = time.perf_counter() - wall
    cpu = _cpu() - cpu
    return Seconds(wall, cpu)


def measure(
    texts: Sequence[str],
    tokenizer: Path,
    rounds: int,
    workers: int,
    say: Callable[[str], None] = print_text,
) -> Figures:
    """Time tokenizer, pipeline and reading on the same documents.

    Args:
        texts: documents.
        tokenizer: directory of the tokenizer.
        rounds: how often each is timed.
        workers: processes of the pipeline; 0: one a CPU core.
        say: gets a line of progress now and then.
    """
    backend = load_tokenizer(tokenizer).backend()
    size = sum(len(text.encode()) for text in texts)
    figures = Figures(size / 1e6, cores())
    # the tokenizer alone may use all cores; the pipeline's processes turn its threads off
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(str(_write_texts(Path(folder), texts)))
        files: list[TokenFile] = []

        def pipeline() -> None:
            files.append(_pipeline(source, tokenizer, Path(folder), workers or figures.cores))

        order: list[tuple[list[Seconds], Callable[[], object]]] = [
            (figures.pipeline, pipeline),
            (figures.alone, partial(_tokenizer_alone, backend, texts)),
        ]
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for seconds, action in order:
                seconds.append(_timed(action))
            order.reverse()
            figures.reading.append(_timed(partial(_read, source)))
        figures.sample_seconds = _sample_seconds(files[-1])
    return figures


def _pipeline(source: Source, tokenizer: Path, folder: Path, workers: int) -> TokenFile:
    # a new cache each time, or the second round would find its work done
    cache = Path(tempfile.mkdtemp(dir=folder))
    return token_files(source, ["all"], "train", tokenizer, cache, workers=workers)["all"]


def _read(source: Source) -> None:
    for _ in source.documents("all", "train"):
        pass


def _write_texts(folder: Path, texts: Sequence[str]) -> Path:
    """Write texts as a source with one domain, `all`; return its folder."""
    path = folder / "text" / "all" / "train.jsonl.gz"
    path.parent.mkdir(parents=True)
    # gzip's own default level, so that reading costs what it does with files of others
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path.parent.parent


def _sample_seconds(file: TokenFile) -> float:
    # a short text is cut into shorter samples, so that there are some to draw from
    length = min(LENGTH, (file.tokens - 1) // 8)
    sampler = Sampler({"a": file, "b": file}, {"a": 0.7, "b": 0.3}, length, 0)

    def draw() -> None:
        for index in range(SAMPLES):
            sampler.sample(index)

    return _timed(draw).wall / SAMPLES


def describe(found: Summary) -> str:
    """Return a summary as text."""
    middle, low, high = found.ratio
    ratio = f"{middle:.3f} ({low:.3f}-{high:.3f})"
    middle, low, high = found.cpu_ratio
    cpu_ratio = f"{middle:.3f} ({low:.3f}-{high:.3f})"
    lines = {
        "tokenizer alone, documents in memory": f"{found.tokenizer_mb_per_second:.2f} MB/s",
        "from .jsonl.gz to token files": f"{found.pipeline_mb_per_second:.2f} MB/s",
        "ratio": ratio,
        "ratio of CPU times": cpu_ratio,
        "reading alone (gunzip, JSON, checks)": (
            f"{found.reading_mb_per_second:.2f} MB/s, one process"
        ),
        f"drawing a sample of {LENGTH} tokens": f"{found.sample_microseconds:.1f} us",
    }
    rounds = len(found.rounds["pipeline"])
    head = f"{found.megabytes:.0f} MB of text, {found.cores} cores, {rounds} rounds"
    return "\n".join([head, *(f"{name:44}{value}" for name, value in lines.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench data`."""
    parser.add_argument(
        "--data", default="demo", help="folder of domains, hub:NAME[#COLUMN], or demo (default)"
    )
    parser.add_argument(
        "--domains",
        default="",
        metavar="A,B",
        help="domains whose text is taken (all)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer (default: one trained on the text)",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=64.0,
        metavar="N",
        help="text, repeated if short (64)",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (5)")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes (0: one a CPU core)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Measure and print."""
    if args.rounds < 1 or args.workers < 0 or not args.megabytes > 0:
        raise ConfigError(
            f"--rounds {args.rounds}, --megabytes {args.megabytes}, --workers {args.workers}: "
            "expected numbers above 0 (--workers 0: one a CPU core)"
        )
    source = open_source(args.data)
    domains = [name for name in args.domains.split(",") if name] or source.domains()
    require_domains(source, domains)
    share = int(args.megabytes * 1e6 / len(domains)) + 1
    # a domain after the other, each read when its turn comes
    each = (source.documents(name, "train", max_bytes=share) for name in domains)
    documents = chain.from_iterable(each)
    texts = gather((document.text for document in documents), args.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or Path(folder) / "tokenizer"
        if not args.tokenizer:
            say("training a tokenizer")
            some = gather(iter(texts), min(args.megabytes, TRAINING_MEGABYTES))
            train_tokenizer(iter(some), VOCABULARY, tokenizer)
        found = measure(texts, tokenizer, args.rounds, args.workers, say).summary()
    if args.json:
        print_text(json.dumps(found.to_json()))
        return 0
    print_text(describe(found))
    print_text("next: the same with --tokenizer DIR --data DIR for your own")
    return 0
