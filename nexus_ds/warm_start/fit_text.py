"""The text that a router's warm start reads: windows of each domain, embedded where it asks.

Not covered: what is done with it (`fit`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus_ds.checkpoint.needs import FIT_LENGTH
from nexus_ds.checkpoint.projection_module import domain_inputs, inputs_of
from nexus_ds.checkpoint.sidecar import Sidecar
from nexus_ds.data.chunks import embed_chunks
from nexus_ds.data.corpora import open_source, token_files, windows
from nexus_ds.data.encoding import beginning
from nexus_ds.data.tokenizer import open_tokenizer
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.model.router import unit
from nexus_ds.settings import CHUNK_WARM_STARTS, Config, RouterConfig
from nexus_ds.warm_start.starts import NO_TEXT, check_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES_PER_TOKEN = 16  # of text that is tokenised: several times what a token takes
# Of a domain's text that is tokenised at least; chunks come from all over it.
LEAST_BYTES = 1 << 16
CHUNK_BYTES = 4 << 20


@dataclass
class FitText:
    """Text that a warm start reads."""

    windows: dict[str, Tensor]
    """For each domain token ids [n, S] int64; background is what is not an expert's domain."""
    chunks: dict[str, Tensor]
    """For each domain the embeddings [n, M] fp32 of its windows; empty for starts that need
    none."""
    nearest: dict[str, float] = field(default_factory=dict)
    """For each domain whose text background stands for: cosine of its embedding to the nearest
    window's."""


def read_fit_text(
    sidecar: Sidecar,
    source: Path,
    positions: int,
    kept: int,
    data: str,
    config: Config,
    switch: str,
) -> FitText | None:
    """Return the text that `config.router.warm_start` reads, None for one that reads none.

    Args:
        sidecar: whose experts' domains, and which encoder.
        source: directory with the tokenizer.
        positions: tokens that the model reads at most.
        kept: experts that were there before an extension, 0 at upcycling: `chunks` and
            `closed_form` read only their text, and that of `router.fit_background`. With
            `router.fit_text: background` no start reads text of an expert.
        data: folder of domains or other source.
        config: `router`, `pipeline.encoder`, `data.cache`, `data.sequence_length`, `data.workers`,
            `data.on_bad_row`, `data.bos`.
        switch: the option that does without the start, for the message.

    Raises:
        ConfigError: a start that this router can't have, no encoder on this machine, nothing that
            says where the text is.
        DataError: the text is gone, lacks a domain, is damaged or too short.
        IncompatibleModelsError: an encoder other than that of the domain embeddings.
        CheckpointError: the sidecar names no encoder.
    """
    start = config.router.warm_start
    domains = [expert.domain for expert in sidecar.experts]
    check_start(start, sidecar.router.kind, sidecar.router.projection)
    if start in NO_TEXT:
        return None
    if not data:
        raise ConfigError(
            "nothing says where the text of the router's warm start is: give --data DIR, "
            f"or {switch} to read none"
        )
    embedded = start in CHUNK_WARM_STARTS
    stand_in = config.router.fit_text == "background"
    read = list(domains)
    background: list[str] = []
    if embedded:
        read = domains[: kept or None]
        background = [name for name in config.router.fit_background if name not in domains]
    if stand_in:
        read, background = [], _background(config)
    wanted = [*read, *background]
    try:
        found = _windows(source, positions, data, config, wanted, embedded or stand_in)
    except DataError as error:
        setting = "router.fit_chunks" if embedded or stand_in else "router.fit_windows"
        raise DataError(
            f"{error}\nThe router's warm start reads training text of "
            f"{', '.join(wanted)} (looked for in {data}): "
            f"give --data DIR with a folder for each, lower {setting}, or {switch} to go without it"
        ) from error
    if not embedded and not stand_in:
        return FitText(found, {})
    vectors = _embedded(sidecar, source, found, config)
    if stand_in:
        return stand_ins(sidecar, found, vectors, config.router)
    return FitText(found, vectors)


def _background(config: Config) -> list[str]:
    names = list(config.router.fit_background)
    if not names:
        raise ConfigError(
            "router.fit_text background reads text of domains without an expert, and "
            "router.fit_background names none; give router.fit_background=[A,B], folders of --data"
        )
    return names


def stand_ins(
    sidecar: Sidecar,
    windows: dict[str, Tensor],
    vectors: dict[str, Tensor],
    router: RouterConfig,
) -> FitText:
    """Return background text in the place of the experts' own.

    Each expert gets the `router.fit_windows` windows whose embeddings are nearest to its domain's,
    as P reads both. (Those that are nearer to it than to the next domain by most did worse: 0.009
    nats, with three seeds of a tiny model.)

    Args:
        sidecar: whose experts.
        windows: background token ids [n, S] by domain.
        vectors: their embeddings [n, M].
        router: `warm_start` and `fit_windows`.
    """
    pool_NS = torch.cat(list(windows.values()))
    pool_NM = torch.cat(list(vectors.values()))
    inputs_EM = unit(domain_inputs(sidecar))
    cosines_EN = inputs_EM @ unit(inputs_of(sidecar, pool_NM)).T
    found = FitText({}, {})
    left_N = torch.ones(len(pool_NS), dtype=torch.bool)
    for number, expert in enumerate(sidecar.experts):
        picked_n = cosines_EN[number].topk(min(router.fit_windows, len(pool_NS))).indices
        left_N[picked_n] = False
        found.windows[expert.domain] = pool_NS[picked_n]
        found.chunks[expert.domain] = pool_NM[picked_n]
        found.nearest[expert.domain] = float(cosines_EN[number].amax())
    if router.warm_start not in CHUNK_WARM_STARTS:
        return FitText(found.windows, {}, found.nearest)
    # these starts read text of no domain too; no domain has this name
    found.windows[""], found.chunks[""] = pool_NS[left_N], pool_NM[left_N]
    return found


def _windows(
    source: Path,
    positions: int,
    data: str,
    config: Config,
    domains: list[str],
    embedded: bool,
) -> dict[str, Tensor]:
    """Return windows [count, length] of each domain, from all over the text that is tokenised."""
    router = config.router
    if embedded:
        count = router.fit_chunks
        least = CHUNK_BYTES
    else:
        count = router.fit_windows
        least = LEAST_BYTES
    length = min(config.data.sequence_length, positions, FIT_LENGTH)
    with tempfile.TemporaryDirectory() as cache:
        files = token_files(
            open_source(data),
            domains,
            "train",
            source,
            Path(cache),
            workers=config.data.workers,
            max_bytes=max(least, count * (length + 1) * BYTES_PER_TOKEN),
            on_bad_row=config.data.on_bad_row,
            bos=config.data.bos,
            chat=config.data.chat,
        )
        found = {}
        for name in domains:
            tokens = torch.from_numpy(windows(files[name], count, length))
            # `windows` gives one token more, the target of the last one.
            found[name] = tokens[:, :length]
        return found


def _embedded(
    sidecar: Sidecar,
    source: Path,
    found: dict[str, Tensor],
    config: Config,
) -> dict[str, Tensor]:
    """Return the embeddings [n, M] fp32 of windows of text.

    They are kept in the run's token cache where there is one.
    """
    if sidecar.encoder is None:
        raise CheckpointError(
            f"{source}: the checkpoint names no encoder of its domain embeddings, "
            f"but router.warm_start {config.router.warm_start} embeds text; use label_fit or none"
        )
    tokenizer = open_tokenizer(source)
    texts = {domain: _texts(tokenizer, tokens_nS) for domain, tokens_nS in found.items()}
    run = Path(config.pipeline.run)
    encoder = config.pipeline.encoder
    revision = sidecar.encoder.revision
    if config.data.cache:
        return embed_chunks(texts, encoder, revision, Path(config.data.cache))
    if run.is_dir():
        return embed_chunks(texts, encoder, revision, run / "tokens")
    with tempfile.TemporaryDirectory() as scratch:
        return embed_chunks(texts, encoder, revision, Path(scratch))


def _texts(tokenizer: PreTrainedTokenizerFast, tokens_nS: Tensor) -> list[str]:
    """Return the text of each window, as the encoder of the domains reads it."""
    # What begins a document is no text, and nothing that an encoder knows.
    begin = set(beginning(tokenizer.backend_tokenizer, Path(tokenizer.name_or_path)))
    texts = []
    for row in tokens_nS.tolist():
        documents: list[list[int]] = [[]]
        for token in row:
            # Nor is what ends one: to an encoder its name would be a word of the text.
            if token == tokenizer.eos_token_id:
                documents.append([])
            elif token not in begin:
                documents[-1].append(token)
        pieces = tokenizer.batch_decode([document for document in documents if document])
        texts.append("\n".join(pieces))
    return texts
