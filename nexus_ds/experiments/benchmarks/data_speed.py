"""Speed of the way from text to samples, against the tokenizer alone on the same documents.

A round times the tokenizer alone (`encode_batch_fast` of the `tokenizers` library on all cores,
documents in memory) and `token_files` from a .jsonl.gz file to finished token files, processes
started anew, one after the other and in turn first; a ratio compares two times of one round, so
that a machine that slows down for a while slows both.
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
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

from nexus_ds.errors import ConfigError

HELP = "tokenising and packing against the tokenizer alone, and the cost of a sample"
BATCH_CHARACTERS = 4 << 20  # that the tokenizer gets at once
VOCABULARY = 32_768  # of the tokenizer that is trained if none is given
SAMPLES, LENGTH = 2000, 2048


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

    def summary(self) -> dict[str, Any]:
        """Return speeds in MB/s (medians) and the ratios of pipeline to tokenizer: median, lowest,
        highest.

        The ratio of CPU times is what the ratio of times would be if no core ever waited.
        """
        pairs = list(zip(self.alone, self.pipeline, strict=True))
        ratios, cpu = (
            sorted(a.wall / b.wall for a, b in pairs),
            sorted(a.cpu / b.cpu for a, b in pairs),
        )
        parts = {"tokenizer": self.alone, "pipeline": self.pipeline, "reading": self.reading}
        return {
            "megabytes": self.megabytes,
            "cores": self.cores,
            **{
                f"{name}_mb_per_second": self.megabytes / statistics.median(s.wall for s in times)
                for name, times in parts.items()
            },
            "ratio": [statistics.median(ratios), ratios[0], ratios[-1]],
            "cpu_ratio": [statistics.median(cpu), cpu[0], cpu[-1]],
            "sample_microseconds": self.sample_seconds * 1e6,
            "rounds": {name: [list(s) for s in times] for name, times in parts.items()},
        }


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


def _tokenizer_alone(backend: Any, texts: Sequence[str]) -> None:
    start = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= BATCH_CHARACTERS or end == len(texts):
            backend.encode_batch_fast(texts[start:end], add_special_tokens=False)
            start, size = end, 0


def _cpu() -> float:
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _timed(action: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), _cpu()
    action()
    return Seconds(time.perf_counter() - wall, _cpu() - cpu)


def measure(
    texts: Sequence[str],
    tokenizer: Path,
    rounds: int,
    workers: int,
    say: Callable[[str], None] = print,
) -> Figures:
    """Time tokenizer, pipeline and reading on the same documents.

    Args:
        texts: documents.
        tokenizer: directory of the tokenizer.
        rounds: how often each is timed.
        workers: processes of the pipeline; 0: one a CPU core.
        say: gets a line of progress now and then.
    """
    from nexus_ds.data.corpora import open_source, token_files
    from nexus_ds.data.encoding import cores, load_tokenizer

    backend = load_tokenizer(tokenizer).backend()
    figures = Figures(sum(len(text.encode()) for text in texts) / 1e6, cores())
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text" / "all" / "train.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        source = open_source(str(path.parent.parent))
        files: dict[str, Any] = {}

        def pipeline() -> None:
            cache = Path(tempfile.mkdtemp(dir=folder))
            files.update(
                token_files(
                    source, ["all"], "train", tokenizer, cache, workers=workers or figures.cores
                )
            )

        contest: list[tuple[list[Seconds], Callable[[], Any]]] = [
            (figures.alone, lambda: _tokenizer_alone(backend, texts)),
            (figures.pipeline, pipeline),
        ]
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for seconds, action in contest if turn % 2 else reversed(contest):
                seconds.append(_timed(action))
            figures.reading.append(_timed(lambda: sum(1 for _ in source.documents("all", "train"))))
        figures.sample_seconds = _sample_seconds(files["all"])
    return figures


def _sample_seconds(file: Any) -> float:
    from nexus_ds.data.mixture import Sampler

    length = min(LENGTH, (file.tokens - 1) // 8)
    sampler = Sampler({"a": file, "b": file}, {"a": 0.7, "b": 0.3}, length, 0)
    return _timed(lambda: [sampler.sample(i) for i in range(SAMPLES)]).wall / SAMPLES


def describe(found: dict[str, Any]) -> str:
    """Return a summary as text."""
    ratio, cpu = (
        f"{middle:.3f} ({low:.3f}-{high:.3f})"
        for middle, low, high in (found["ratio"], found["cpu_ratio"])
    )
    lines = {
        "tokenizer alone, documents in memory": f"{found['tokenizer_mb_per_second']:.2f} MB/s",
        "from .jsonl.gz to token files": f"{found['pipeline_mb_per_second']:.2f} MB/s",
        "ratio": ratio,
        "ratio of CPU times": cpu,
        "reading alone (gunzip, JSON, checks)": f"{found['reading_mb_per_second']:.2f} MB/s, one process",
        f"drawing a sample of {LENGTH} tokens": f"{found['sample_microseconds']:.1f} us",
    }
    head = f"{found['megabytes']:.0f} MB of text, {found['cores']} cores, {len(found['rounds']['pipeline'])} rounds"
    return "\n".join([head, *(f"{name:44}{value}" for name, value in lines.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench data`."""
    parser.add_argument(
        "--data", default="demo", help="folder of domains, hub:NAME[#COLUMN], or demo (default)"
    )
    parser.add_argument(
        "--domains", default="", metavar="A,B", help="domains whose text is taken (all)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: one trained on the text)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=64.0, metavar="N", help="text, repeated if short (64)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (5)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes (0: one a CPU core)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Measure and print."""
    from nexus_ds.data.corpora import open_source, require_domains
    from nexus_ds.data.tokenizer import train_tokenizer

    if args.rounds < 1 or args.workers < 0 or not args.megabytes > 0:
        raise ConfigError(
            f"--rounds {args.rounds}, --megabytes {args.megabytes}, --workers {args.workers}: expected numbers above 0 "
            "(--workers 0: one a CPU core)"
        )
    source = open_source(args.data)
    domains = [name for name in args.domains.split(",") if name] or source.domains()
    require_domains(source, domains)
    share = int(args.megabytes * 1e6 / len(domains)) + 1
    texts = gather(
        (d.text for name in domains for d in source.documents(name, "train", max_bytes=share)),
        args.megabytes,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or Path(folder) / "tokenizer"
        if not args.tokenizer:
            say("training a tokenizer")
            train_tokenizer(
                iter(gather(iter(texts), min(args.megabytes, 8.0))), VOCABULARY, tokenizer
            )
        found = measure(texts, tokenizer, args.rounds, args.workers, say).summary()
    if args.json:
        print(json.dumps(found))
        return 0
    print(describe(found))
    print("next: the same with --tokenizer DIR --data DIR for your own")
    return 0
