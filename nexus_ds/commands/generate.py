"""The verb `generate`: continue prompts with any checkpoint, dense or Nexus.

One prompt's text comes token by token, those of a file come in batches. A model that does not fit
runs layer by layer, with the same tokens: every token then reads the whole checkpoint.
Not covered: beams, several answers to one prompt, a conversation that goes on, serving.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.needs import ADDED, BATCH, Way
from nexus_ds.checkpoint.qwen2_moe import gate_name, router_layers
from nexus_ds.checkpoint.records import is_nexus, read_manifest
from nexus_ds.console import print_text, visible
from nexus_ds.data.encoding import beginning
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    UnsupportedModelError,
)
from nexus_ds.generation.prompts import Given, Prompt, read_prompts, tokenised
from nexus_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from nexus_ds.generation.continuation import Asked, Continuation, Said
    from nexus_ds.report.routed_text import Coloured, Legend, Marked

# What imports torch is imported inside functions: `generate --help` waits for no torch.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="dense or Nexus checkpoint",
    )
    parser.add_argument("prompt", nargs="?", help="text to continue")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line; a .jsonl has objects with prompt, or with messages",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, in the tokenizer's chat template",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="text doesn't begin with the BOS of the model's tokenizer "
        "(trained with data.bos=false)",
    )
    _add_drawing(parser)
    _add_routing(parser)
    parser.add_argument(
        "--batch",
        type=int,
        default=BATCH,
        metavar="N",
        help="prompts of a file that go through the model together (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "stored"),
        help="auto: fp32 on a CPU, the stored dtype on a GPU",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print prompt, text and speed as JSON, an object a line",
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are chosen."""
    parser.add_argument(
        "--tokens",
        type=int,
        default=ADDED,
        metavar="N",
        help="most tokens to add (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: always the likeliest token (default)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together reach this probability (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the draws at a temperature above 0; a file's next prompt has the next seed",
    )


def _add_routing(parser: argparse.ArgumentParser) -> None:
    """Declare what is shown of the routers."""
    parser.add_argument(
        "--show-routing",
        action="store_true",
        help="colour each token by its expert on a terminal, mark its expert elsewhere",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="show this layer's routing (default: the expert that most layers chose first)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the routing as a page, too"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict one another or mean nothing, before a model is read."""
    # both or neither; an empty prompt is one that has no token
    if (args.prompt is None) == (args.prompts is None):
        raise ConfigError("give one prompt, or --prompts FILE with one a line")
    if args.tokens < 1:
        raise ConfigError(f"--tokens: expected a number above 0, found {args.tokens}")
    if args.batch < 1:
        raise ConfigError(f"--batch: expected a number above 0, found {args.batch}")
    if not math.isfinite(args.temperature) or args.temperature < 0:
        raise ConfigError(
            f"--temperature: expected 0 or a positive number, found {args.temperature}"
        )
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p: expected a number above 0, at most 1, found {args.top_p}")
    # the likeliest token is in any share
    if args.top_p < 1 and not args.temperature:
        raise ConfigError("--top-p draws tokens; give --temperature above 0 with it")
    if args.layer is not None and not (args.show_routing or args.html):
        raise ConfigError("--layer says whose routing is shown; give --show-routing or --html too")
    if args.html and args.html.exists():
        raise OutputExistsError(f"{args.html} exists already; give another --html or remove it")


def _most_rows(headers: Headers, layers: Sequence[int]) -> int:
    """Return the rows [E, H] of the largest of some layers' routers; CheckpointError for none."""
    shapes = {gate_name(layer): headers.info(gate_name(layer)).shape for layer in layers}
    for name, shape in shapes.items():
        # rows without a column take no room: there may be as many as a header likes
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{headers.directory}: {name} has the shape {shape}, expected a row for each "
                "expert; the file is damaged, fetch or save it again"
            )
    return max(shape[0] for shape in shapes.values())


def _legend(
    directory: Path,
    layer: int | None,
) -> Legend:
    """Return what the colours of a checkpoint's experts mean; headers and JSON are read."""
    from nexus_ds.report.routed_text import Legend

    config = read_config(directory)
    headers = Headers(directory)
    layers = router_layers(config, set(headers.names()))
    if not layers:
        raise UnsupportedModelError(
            f"{directory}: a {config.get('model_type')} without routers, of which there is no "
            "routing to show; leave --show-routing and --html out, or give a mixture"
        )
    if layer is not None and layer not in layers:
        raise ConfigError(
            f"--layer {layer}: no router there; layers with one: {layers[0]} to {layers[-1]}"
        )
    if is_nexus(directory):
        experts = read_manifest(directory).experts
        labels = [expert.name for expert in experts]
        domains = [expert.domain for expert in experts]
    else:
        # a family's config.json has a name of its own for how many there are
        count = _most_rows(headers, layers)
        labels = [f"expert {number}" for number in range(count)]
        domains = [""] * len(labels)
    return Legend(labels, domains, layers, layer)


# Printing ----------------------------------------------------------------------------------------


class _Voice:
    """Prints tokens as they come; none twice, where memory ran out and all began anew."""

    def __init__(self, legend: Legend | None) -> None:
        self.legend = legend
        self.on_terminal = sys.stdout.isatty()
        self.begun = False
        self.told: list[Said] = []
        self.place = 0
        self.painter = self._painter()

    def begin(self) -> None:
        """Begin a text, or begin it anew."""
        self.begun = True
        self.place = 0

    def coloured(self) -> bool:
        """Return whether experts have colours: on a terminal, unless NO_COLOR is set."""
        return self.on_terminal and not os.environ.get("NO_COLOR")

    def _painter(self) -> Coloured | Marked | None:
        from nexus_ds.report.routed_text import Coloured, Marked

        if self.legend is None:
            return None
        return Coloured(self.legend) if self.coloured() else Marked(self.legend)

    def safe(self, text: str) -> str:
        """Return text without what would move a terminal's cursor."""
        # a file gets every byte
        return visible(text) if self.on_terminal else text

    def write(self, text: str) -> None:
        """Print what is safe, with the colours that are meant."""
        print(text, end="", flush=True)

    def say(self, said: Said) -> None:
        """Print a token, unless that was done before memory ran out."""
        if self.legend is None and not said.added:
            # the prompt stands there as it was given
            return
        again = self.place < len(self.told)
        if again and self.told[self.place].text != said.text:
            # a rounding decided otherwise: what stands there is not this text's beginning
            before = self.told[: self.place]
            self.told = []
            # a painter knows the stretch that it is in
            self.painter = self._painter()
            self.write("\n")
            for token in before:
                self._print(token)
            again = False
        if not again:
            self._print(said)
        self.place += 1

    def _print(self, said: Said) -> None:
        self.told.append(said)
        said = replace(said, text=self.safe(said.text))
        shown = self.painter.add(said) if self.painter else said.text
        self.write(shown)

    def end(self) -> None:
        """End the text."""
        self.write((self.painter.end() if self.painter else "") + "\n")
        self.begun = False
        self.told = []
        self.painter = self._painter()

    def summary(self, said: Sequence[Said]) -> None:
        """Print the legend below all texts."""
        # as `_painter`
        from nexus_ds.report.routed_text import legend_text

        if self.legend is not None:
            self.write("\n" + legend_text(self.legend, said, self.coloured()) + "\n")


def _answer(
    prompt: Prompt, found: Continuation, speed: float, legend: Legend | None
) -> dict[str, object]:
    """Return what --json prints of a prompt."""
    answer: dict[str, object] = {
        "prompt": prompt.given,
        "text": found.text,
        "tokens": found.tokens,
        "tokens_per_second": speed,
    }
    if legend is None:
        return answer
    tokens = []
    for said in found.said:
        assert said.decision is not None, "routes were asked for"
        token = {
            "id": said.token,
            "text": said.text,
            "added": said.added,
            "experts": said.decision.experts,
            "weights": said.decision.weights,
        }
        tokens.append(token)
    answer["routing"] = {
        "experts": legend.experts,
        "domains": legend.domains,
        "layers": legend.layers,
        "tokens": tokens,
    }
    return answer


# Work --------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """Prompts, those that are done, and where their text goes."""

    args: argparse.Namespace
    tokenizer: PreTrainedTokenizerFast
    prompts: Sequence[Prompt]
    legend: Legend | None
    voice: _Voice
    found: list[Continuation] = field(default_factory=list)
    slow: bool = False

    @property
    def spoken(self) -> bool:
        """Whether text is printed token by token."""
        return len(self.prompts) == 1 and not self.args.json

    @contextmanager
    def progress(self, streamed: bool) -> Iterator[Progress | None]:
        """Show progress of what takes long, where no text on the terminal does."""
        many = len(self.prompts) > 1
        long = many or self.slow or streamed
        # a bar among texts would be torn
        texts_on_terminal = self.voice.on_terminal and not self.args.json
        if not long or texts_on_terminal:
            yield None
            return
        total = len(self.prompts) if many else self.args.tokens
        with Progress("generate", total, "prompts" if many else "tokens") as progress:
            progress.advance(len(self.found))
            yield progress

    def run(self, way: Way) -> None:
        """Continue the prompts that are not done."""
        from nexus_ds.checkpoint.loading import device
        from nexus_ds.checkpoint.pieces import open_way
        from nexus_ds.generation.continuation import rows_at_once
        from nexus_ds.generation.prompts import require_room

        model = open_way(self.args.checkpoint, self.args.precision, device(), way)
        # a file's last prompt is refused before its first one is begun
        for prompt in self.prompts:
            require_room(model, prompt)
        # the way says what fits, the model what stays exact
        rows = rows_at_once(model, self.length, way.rows)
        with self.progress(way.streamed) as progress:
            while len(self.found) < len(self.prompts):
                self.batch(model, rows, progress)

    @property
    def length(self) -> int:
        """Return the tokens of the longest prompt with all that may be added."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        return max(lengths) + self.args.tokens

    def asked(self, start: int) -> Asked:
        """Return what is asked for prompt number `start` and those after it."""
        from nexus_ds.generation.continuation import Asked
        from nexus_ds.generation.drawing import Drawing

        args = self.args
        drawing = Drawing(args.temperature, args.top_p, args.seed + start)
        return Asked(args.tokens, drawing, routed=self.legend is not None)

    def batch(
        self,
        model: PreTrainedModel,
        rows: int,
        progress: Progress | None,
    ) -> None:
        """Continue the next prompts, `rows` of them."""
        from nexus_ds.generation.continuation import continue_prompts

        start = len(self.found)
        prompts = self.prompts[start : start + rows]
        single = len(self.prompts) == 1
        if self.spoken:
            self.begin(prompts[0])
        started = time.perf_counter()
        found = continue_prompts(
            model,
            self.tokenizer,
            prompts,
            self.asked(start),
            tell=self.voice.say if self.spoken else _quiet,
            step=progress.advance if progress and single else _quiet,
        )
        seconds = time.perf_counter() - started
        if progress and not single:
            progress.advance(len(prompts))
        self.found += found
        self.show(prompts, found, seconds)

    def begin(self, prompt: Prompt) -> None:
        """Print what stands before an answer: the prompt, unless it is coloured with the text or is
        a conversation's."""
        again = self.voice.begun
        self.voice.begin()
        if not (again or prompt.chat or self.voice.legend):
            self.voice.write(self.voice.safe(str(prompt.given)))

    def show(
        self, prompts: Sequence[Prompt], found: Sequence[Continuation], seconds: float
    ) -> None:
        """Print what was not printed as it came."""
        count = sum(continuation.tokens for continuation in found)
        speed = count / max(seconds, 1e-9)
        for prompt, continuation in zip(prompts, found, strict=True):
            if self.args.json:
                answer = _answer(prompt, continuation, speed, self.legend)
                print_text(json.dumps(answer, ensure_ascii=False))
                continue
            if not self.spoken:
                self.begin(prompt)
                for said in continuation.said:
                    self.voice.say(said)
            self.voice.end()
            if len(self.prompts) > 1:
                print_text()


def _quiet(said: object = None) -> None:
    """Tell nobody."""


def _job(args: argparse.Namespace) -> _Job:
    """Read all but the model."""
    given: dict[str, Given] = {"the prompt": args.prompt}
    if args.prompts is not None:
        given = read_prompts(args.prompts)
    shown = args.show_routing or args.html is not None
    legend = _legend(args.checkpoint, args.layer) if shown else None
    tokenizer = open_tokenizer(args.checkpoint)
    begin = () if args.no_bos else beginning(tokenizer.backend_tokenizer, args.checkpoint)
    prompts = []
    for name, text in given.items():
        prompt = tokenised(tokenizer, text, name, args.chat, begin)
        prompts.append(prompt)
    voice = _Voice(legend if args.show_routing else None)
    return _Job(args, tokenizer, prompts, legend, voice)


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    _check(args)
    from nexus_ds.checkpoint.loading import device
    from nexus_ds.checkpoint.pieces import in_pieces, need_of, planned_way, warn_of_time
    from nexus_ds.report.routed_text import write_routed_page

    job = _job(args)
    place = device()
    need = need_of(args.checkpoint, args.precision, place).with_cache()
    rows = min(args.batch, len(job.prompts))
    chosen = planned_way(need, [place], rows, job.length, "generate")
    batches = math.ceil(len(job.prompts) / chosen.rows)
    # layer by layer each pass reads all files once
    reads = batches * args.tokens if chosen.streamed else 0
    tokens = job.length * len(job.prompts)
    job.slow = warn_of_time("generate", need, tokens, place, reads)
    in_pieces("generate", chosen, job.run)
    texts = [continuation.said for continuation in job.found]
    if not args.json:
        job.voice.summary(list(chain(*texts)))
    if args.html:
        assert job.legend is not None, "--html asks for routes"
        write_routed_page(
            args.html, f"Where {args.checkpoint.name} sends tokens", job.legend, texts
        )
    return 0
