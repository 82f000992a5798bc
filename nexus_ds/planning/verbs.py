"""What each verb that touches a model or its text takes: memory of a GPU, of the host, and time.

Sizes are counted as the verbs hold them: dense models and mixtures are written tensor by tensor,
routers are fitted a layer at a time, scores and text come from a model that is whole on the GPU
where it fits, else layer by layer (`checkpoint.needs` decides for both, the verb and this). Speeds
are estimates, named below.

Units: bytes, seconds; `width` is bytes of an element on disk.
Not covered: training (`memory`, `traffic`), downloads, starting Python and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nexus_ds.checkpoint.needs import (
    ADDED,
    BATCH,
    DISK_SPEED,
    FIT_BATCH,
    FIT_LENGTH,
    WINDOWS,
    Need,
    Way,
    features_fit,
    per_token,
    way,
)
from nexus_ds.errors import ConfigError
from nexus_ds.planning import assumptions as assume
from nexus_ds.planning.export import export_check
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.memory import FP32, disk
from nexus_ds.planning.sizes import Sizes
from nexus_ds.settings import CHUNK_WARM_STARTS, Config

PROMPT = 128
"""Tokens of a prompt."""

# Estimates ---------------------------------------------------------------------------------------

FORWARD_USE = 0.3
"""Share of a GPU's peak in bf16 that a forward pass reaches."""
FP32_SHARE = 0.25
"""Peak in fp32 over that in bf16: routers are fitted in fp32."""
GPU_MEMORY_SPEED = 8e11
"""Bytes a second that a GPU reads its own memory with: between a 3090 (9.4e11) and an A100 (2e12),
at what single tokens reach of it."""
CPU_MEMORY_SPEED = 4e10
"""The same of a host: two channels of DDR4."""
CPU_FLOPS = 2e11
"""Operations a second of a host in fp32: 8 cores with AVX2 at half of their peak."""
ENCODED_PER_SECOND = 100.0
"""Windows of text that the sentence encoder embeds in a second on a host."""
TOKENISED_PER_SECOND = 5e5
"""Tokens that one process makes of text in a second."""
TOKENISERS = 8
"""Processes that make tokens, where data.workers does not say."""
TEXT_BYTES = 1e9
"""Main memory of a process that reads text: libraries, encoder or tokenizer, a batch of it."""
COPY_BYTES = 64e6
"""Of what is written, in memory at once: slices of rows of all branches, and the mean of them."""


@dataclass(frozen=True)
class Verb:
    """What one verb takes."""

    name: str
    model: str
    """Which model it is about."""
    how: str
    """whole, layer by layer, a tensor at a time, or text."""
    gpu_bytes: float
    """Peak on one GPU, without CUDA's context."""
    host_bytes: float
    """Peak of main memory."""
    seconds: float
    """On all GPUs of a node, where the verb uses them, else on one."""
    cpu_bytes: float
    """Peak of main memory without a GPU: everything is computed there, in fp32."""
    cpu_seconds: float
    """Time without a GPU."""
    sizes: str
    """For how much text, how many files: what it was counted for."""


def need_of_sizes(sizes: Sizes, width: int) -> Need:
    """Return what a model takes to run without training, from its sizes (`pieces.need_of` reads
    the same off a checkpoint)."""
    # A shared expert that is switched off is zeros, which transformers multiplies with, too.
    counts = replace(sizes, shared=True).counts()
    embedding = sizes.vocabulary * sizes.hidden
    outside = embedding * (1 if sizes.tied else 2) + sizes.hidden
    return Need(
        weights=float(width * counts["total"]),
        layer=width * (counts["total"] - outside) / sizes.layers,
        outside=float(width * outside),
        resident=float(width * (embedding + sizes.hidden)),
        active=float(counts["active"] - (0 if sizes.tied else embedding)),
        stored=float(width * counts["total"]),
        vocabulary=sizes.vocabulary,
        **per_token(
            width=width,
            hidden=sizes.hidden,
            keys=sizes.kv_width,
            # the shared expert and those that a token visits
            inner=sizes.ffn * (1 + sizes.top_k if sizes.experts else 1),
            layers=sizes.attending,
            scored=sizes.scored_heads,
        ),
    )


@dataclass(frozen=True)
class _Planner:
    """The verbs about one model."""

    name: str
    sizes: Sizes
    config: Config
    machine: Machine
    width: int

    @property
    def need(self) -> Need:
        return need_of_sizes(self.sizes, self.width)

    @property
    def written(self) -> float:
        """Bytes of the checkpoint, P included."""
        return disk(self.sizes, self.width, 0)["export"]

    @property
    def dense(self) -> float:
        """Bytes of one dense model that is an expert."""
        counts = self.sizes.counts()
        return float(self.width * counts["dense"])

    @property
    def length(self) -> int:
        return self.config.data.sequence_length

    def _speed(self) -> float:
        return self.machine.tflops * 1e12 * FORWARD_USE

    def _way(self, need: Need, rows: int, length: int) -> Way:
        room = self.machine.gpu_memory - assume.CONTEXT_BYTES
        # Main memory that nobody told of is not checked.
        host = self.machine.host_memory or math.inf
        return way(need, rows, length, room, host)

    def _on_cpu(self, need: Need, rows: int, length: int, sequences: int) -> tuple[Way, float]:
        """Return how a model is run without a GPU, and the main memory of that.

        Args:
            need: in fp32, with the embeddings outside.
            rows, length: sequences at once that are asked for, and their tokens.
            sequences: whose states wait between two layers, where it is streamed.
        """
        need = replace(need, resident=need.outside)
        host = self.machine.host_memory or math.inf
        chosen = way(need, rows, length, host, host)
        if chosen.streamed:
            held = need.streamed(chosen.rows, length) + need.waiting(sequences, length)
        else:
            held = max(need.loading, need.whole(chosen.rows, length))
        return chosen, TEXT_BYTES + held

    def scored(self, name: str, times: int = 1) -> Verb:
        """Return `evaluate`, or a table before and after."""
        need, domains = self.need, max(1, self.sizes.experts)
        chosen = self._way(need, BATCH, self.length)
        planned = need.streamed if chosen.streamed else need.whole
        tokens = WINDOWS * domains * self.length
        # Streamed, it is read once a domain; whole, once a GPU, from the page cache but for one.
        reads = domains if chosen.streamed else 1
        gpus = self.machine.local
        computing = need.flops(tokens) / (self._speed() * gpus)
        fp32 = need_of_sizes(self.sizes, FP32)
        on_cpu, cpu_bytes = self._on_cpu(fp32, BATCH, self.length, WINDOWS)
        cpu_reads = domains if on_cpu.streamed else 1
        return Verb(
            name,
            self.name,
            "layer by layer" if chosen.streamed else "whole",
            planned(chosen.rows, self.length),
            TEXT_BYTES + (need.beside(WINDOWS, self.length) if chosen.streamed else need.loading),
            times * (computing + reads * need.stored / DISK_SPEED),
            cpu_bytes,
            times * (fp32.flops(tokens) / CPU_FLOPS + cpu_reads * need.stored / DISK_SPEED),
            f"{domains} x {WINDOWS} windows of {self.length}, {chosen.rows} at once",
        )

    def generated(self) -> Verb:
        """Return `generate`."""
        need, length = self.need.with_cache(), PROMPT + ADDED
        chosen = self._way(need, 1, length)
        planned = need.streamed if chosen.streamed else need.whole
        # Each token reads the active weights once; streamed, all of them from the files.
        one = need.stored / DISK_SPEED if chosen.streamed else need.active * self.width
        seconds = ADDED * (one if chosen.streamed else one / GPU_MEMORY_SPEED)
        fp32 = need_of_sizes(self.sizes, FP32).with_cache()
        on_cpu, cpu_bytes = self._on_cpu(fp32, 1, length, 1)
        read = need.stored / DISK_SPEED
        cpu_one = read if on_cpu.streamed else need.active * FP32 / CPU_MEMORY_SPEED
        return Verb(
            "generate",
            self.name,
            "layer by layer" if chosen.streamed else "whole",
            planned(1, length),
            TEXT_BYTES + (need.beside(1, length) if chosen.streamed else need.loading),
            seconds + (0.0 if chosen.streamed else read),
            cpu_bytes,
            need.flops(length) / CPU_FLOPS + ADDED * cpu_one + (0.0 if on_cpu.streamed else read),
            f"{PROMPT} tokens and {ADDED} more",
        )

    def fitted(self) -> tuple[float, float, float, float, float, str]:
        """Return GPU and host bytes and seconds, host bytes and seconds without a GPU, and sizes of
        the warm start.

        The hidden states of all windows are in main memory.
        """
        router = self.config.router
        need = need_of_sizes(self.sizes, FP32)
        if router.warm_start in ("none", "embedding"):
            return 0.0, 0.0, 0.0, 0.0, 0.0, "no text"
        windows = router.fit_windows
        if router.warm_start in CHUNK_WARM_STARTS:
            windows = router.fit_chunks
        length = min(FIT_LENGTH, self.length)
        tokens = windows * length * max(1, self.sizes.experts)
        flops = need.flops(tokens)
        read = need.stored * self.width / FP32 / DISK_SPEED
        # No logits are made. What a router reads of all windows is where there is room for it.
        states = tokens * need.hidden
        computing = need.layer + FIT_BATCH * length * need.token
        on_gpu = features_fit(states, self.machine.gpu_memory - assume.CONTEXT_BYTES - need.layer)
        # At first the embedding lies beside the states, as stored and in fp32.
        embedding = need.vocabulary * need.hidden * (1 + self.width / FP32)
        beside = max(states + embedding, states if on_gpu else 2 * states)
        return (
            computing + (states if on_gpu else 0.0),
            beside,
            flops / (self._speed() * FP32_SHARE) + read,
            max(states + embedding, 2 * states + computing),
            flops / CPU_FLOPS + read,
            f"{router.warm_start} on {tokens:,} tokens",
        )

    def made(self, name: str, read: float, refit: bool) -> Verb:
        """Return a verb that writes a checkpoint out of `read` bytes of others."""
        gpu, host, seconds, cpu_host, cpu_seconds, sizes = self.fitted()
        moved = (read + self.written) / DISK_SPEED
        copied = f"{(read + self.written) / 1e9:.0f} GB read and written"
        # P of all layers is read and written whole
        projections = float(FP32 * self.sizes.counts()["projection"])
        copying = TEXT_BYTES + COPY_BYTES + 2 * projections
        if not refit:
            how = "a tensor at a time"
            return Verb(name, self.name, how, 0.0, copying, moved, copying, moved, copied)
        return Verb(
            name,
            self.name,
            "layer by layer",
            gpu,
            max(copying, TEXT_BYTES + projections + host),
            moved + seconds,
            max(copying, TEXT_BYTES + projections + cpu_host),
            moved + cpu_seconds,
            f"{copied}; {sizes}",
        )

    def exported(self) -> Verb:
        """Return the export of a trained model, and its check on a few tokens."""
        check = export_check(self.sizes, self.width)
        seconds = self.written / DISK_SPEED + check.seconds
        return Verb(
            "export",
            self.name,
            "a tensor at a time",
            check.gpu_bytes,
            TEXT_BYTES + check.host_bytes,
            seconds,
            TEXT_BYTES + check.host_bytes + check.gpu_bytes,
            seconds + self.need.flops(assume.PROBE_TOKENS) / CPU_FLOPS,
            f"written, read again, {assume.PROBE_TOKENS} tokens checked, beside the training's own "
            "memory",
        )


def _text(config: Config, tokens: float) -> Iterator[Verb]:
    """Yield the verbs that read text, without the model."""
    pipe, processes = config.pipeline, config.data.workers or TOKENISERS
    windows = 2 * pipe.embedding_documents * max(1, len(pipe.domains))
    encoding = windows / ENCODED_PER_SECOND
    sizes = f"{windows:,} windows of {len(pipe.domains)} domains"
    yield Verb("embed", "encoder", "text", 0.0, TEXT_BYTES, encoding, TEXT_BYTES, encoding, sizes)
    seconds = tokens / (TOKENISED_PER_SECOND * processes)
    sizes = f"{tokens / 1e9:.3g}B tokens, {processes} processes"
    host = TEXT_BYTES * processes
    yield Verb("tokens", "tokenizer", "text", 0.0, host, seconds, host, seconds, sizes)


def verbs(config: Config, sizes: Sizes, machine: Machine, width: int, tokens: float) -> list[Verb]:
    """Return what the verbs take for a mixture, and for it with the recipe's new experts (or one).

    Args:
        config: a recipe.
        sizes: of its mixture.
        machine: what it runs on.
        width: bytes of an element on disk.
        tokens: of text that are tokenised for its training.

    Raises:
        ConfigError: a dense model.
    """
    if not sizes.experts:
        raise ConfigError(
            f"plan --verbs is about a mixture, stage={config.stage} is a dense model; "
            "leave the stage out, or give stage=moe"
        )
    more = len(config.pipeline.new_domains) or 1
    # The sizes of that stage have the new experts already.
    if config.stage == "extend" and not config.model.path:
        sizes = replace(sizes, experts=sizes.experts - more)
    base = _Planner("mixture", sizes, config, machine, width)
    larger = replace(sizes, experts=sizes.experts + more)
    grown = _Planner("extended", larger, config, machine, width)
    branches = (sizes.experts + 1) * base.dense
    return [
        *_text(config, tokens),
        base.made("upcycle", branches, refit=True),
        base.exported(),
        base.scored("evaluate"),
        base.generated(),
        grown.made("extend", base.written + more * base.dense, refit=True),
        grown.scored("extend --verdict", times=2),
        grown.exported(),
        grown.scored("evaluate"),
        grown.generated(),
        base.made("remove", grown.written, refit=False),
        base.made("adopt", base.written, refit=False),
        grown.scored("remove --data", times=2),
    ]


def assumed() -> dict[str, float]:
    """Return the estimates that the times and a few sizes rest on, by name."""
    # read anew at every call: tests change the module's numbers
    named = {name: value for name, value in globals().items() if name.isupper()}
    return {name: value for name, value in named.items() if isinstance(value, float)}
