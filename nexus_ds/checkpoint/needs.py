"""What a model takes to run without being trained, by its sizes: whole, or layer by layer.

Weights, one layer's activations, a slice of the logits. No torch here: `plan` asks, too.
Units: bytes; `width` is bytes of an element in the precision that is computed in.
Not covered: CUDA's context (free memory is told without it), training (`planning.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MARGIN = 0.9
"""Share of the free memory that is planned with: allocators lose 5-10% between blocks."""
LOGITS_AT_ONCE = 1 << 24
"""Logits that scoring makes at once: 64 MiB in fp32, whatever the vocabulary."""
LOGITS_BYTES = 12
"""Of a logit at the peak of the cross-entropy: in the model's precision, in fp32, and its
log-probability."""
HIDDEN_COPIES = 8
"""Of a token's hidden state in a layer's forward pass: residual, norm, queries, attention's result,
the routed tokens in the order of experts and back."""
DISK_SPEED = 1e9
"""Bytes a second that a checkpoint is read with: an NVMe disk, or a network file system at its
best; the page cache is several times faster."""

# Sizes that verbs take where nothing says otherwise; `plan` counts with them, too -----------------

WINDOWS = 48
"""Windows of text a domain that are scored."""
BATCH = 8
"""Windows of a forward pass that scores."""
ADDED = 40
"""Tokens that `generate` adds."""
FIT_LENGTH = 512
"""Tokens of a window that a warm start reads, at most."""
FIT_BATCH = 8
"""Windows of a warm start's forward pass through a layer."""
FEATURES_SHARE = 0.25
"""Of a device's free memory, in which a warm start keeps what a router reads of all windows."""
PROBE_TOKENS = 128
"""Tokens that are computed out of a finished checkpoint: enough for every expert to be asked, too
few for the check to take long even on a CPU."""


@dataclass(frozen=True)
class Need:
    """What a model takes to run, by its sizes."""

    weights: float
    """All of them, in the precision that is computed in."""
    layer: float
    """Of the largest layer."""
    outside: float
    """Of embeddings, head and last norm."""
    resident: float
    """Of these, what computes where the layers do: on a GPU all but the embeddings."""
    token: float
    """Of a token in a forward pass through one layer."""
    hidden: float
    """Of a token's hidden state."""
    cache: float
    """Of a token's keys and values in all layers."""
    vocabulary: int
    """Logits of a token."""
    active: float
    """Parameters that a token is multiplied with."""
    stored: float
    """Of the files."""
    width: float
    """Of an element that is computed in."""
    at_once: float = LOGITS_AT_ONCE
    """Logits that are made at once, at most."""
    logit: float = LOGITS_BYTES
    """Of one of them, at the peak."""
    score: float = 0.0
    """Of a token and one that it sees, in a layer; 0 where a fused kernel computes attention."""

    @property
    def loading(self) -> float:
        """Main memory while transformers loads all weights: a layer's experts are stacked anew."""
        return self.weights + self.layer

    def with_cache(self) -> Need:
        """Return the need of generation, which keeps each token's keys and values."""
        return replace(self, token=self.token + self.cache)

    def with_all_logits(self) -> Need:
        """Return the need of code that asks for the logits of all tokens, and makes logarithms of
        their probabilities beside them: lm-eval."""
        return replace(self, at_once=float("inf"), logit=2 * self.width)

    def logits(self, rows: int, length: int) -> float:
        """Return bytes of the logits, at most, that are made at once of `rows` sequences."""
        return min(self.at_once, rows * length * self.vocabulary) * self.logit

    def working(self, rows: int, length: int) -> float:
        """Return bytes beside the weights of a pass over `rows` sequences."""
        token = self.token + length * self.score
        return rows * length * token + self.logits(rows, length)

    def whole(self, rows: int, length: int) -> float:
        """Return the peak on the device with all weights on it."""
        return self.weights + self.working(rows, length)

    def streamed(self, rows: int, length: int) -> float:
        """Return the peak on the device with the weights of one layer at a time."""
        return self.resident + self.layer + self.working(rows, length)

    def beside(self, sequences: int, length: int) -> float:
        """Return main memory of a model that is streamed to a GPU: what is outside of the layers,
        states between two of them, and logits, which come back."""
        logits = self.logits(sequences, length)
        return self.outside + self.waiting(sequences, length) + logits

    def waiting(self, sequences: int, length: int) -> float:
        """Return main memory of the hidden states between two layers, before and after."""
        return 2 * sequences * length * self.hidden

    def flops(self, tokens: float) -> float:
        """Return the arithmetic of a forward pass: a product and a sum a parameter."""
        return 2 * self.active * tokens


def per_token(
    *, width: int, hidden: int, keys: int, inner: int, layers: int, scored: int = 0
) -> dict[str, float]:
    """Return the fields of `Need` that are of a token.

    Args:
        width: bytes of an element.
        hidden: size of a hidden state.
        keys: width of keys, and of values.
        inner: width of the feed-forward networks that a token visits in a layer, together.
        layers: of the model, that keep keys and values of all tokens.
        scored: heads whose scores stand in memory.
    """
    # gate, up and their product
    token = HIDDEN_COPIES * hidden + 3 * inner
    return {
        "width": float(width),
        "token": float(token * width),
        "hidden": float(hidden * width),
        # as they come, their softmax in fp32, and that as it is multiplied
        "score": float(scored * (2 * width + 4)),
        "cache": float(2 * keys * layers * width),
    }


def features_fit(size: float, room: float) -> bool:
    """Return whether a warm start keeps what a router reads of all windows on a device.

    Args:
        size: bytes of it.
        room: free bytes on the device.
    """
    return size <= FEATURES_SHARE * room


# The way -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a model is run."""

    streamed: bool
    """Layer by layer; else it is loaded whole."""
    rows: int
    """Sequences at once in a layer."""

    def smaller(self) -> Way | None:
        """Return the way with the next smaller pieces; None: there are no smaller ones."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        return None if self.streamed else Way(streamed=True, rows=1)

    def __str__(self) -> str:
        rows = f"{self.rows} sequence{'s' if self.rows > 1 else ''} at once"
        return f"{'layer by layer' if self.streamed else 'whole'}, {rows}"


def way(need: Need, rows: int, length: int, room: float, host: float) -> Way:
    """Return the way with the largest pieces that are planned to fit.

    Args:
        need: of the model.
        rows: sequences at once that were asked for.
        length: tokens of each.
        room: free bytes on the device.
        host: free bytes of main memory, through which weights come, and where states wait.
    """
    fits = need.whole(1, length) <= MARGIN * room and need.loading <= MARGIN * host
    # A model that fits whole in no batch starts with the whole batch again, layer by layer.
    choice = Way(streamed=not fits, rows=rows)
    while (smaller := choice.smaller()) is not None:
        planned = need.streamed if choice.streamed else need.whole
        beside = need.beside(choice.rows, length) if choice.streamed else 0.0
        if planned(choice.rows, length) <= MARGIN * room and beside <= MARGIN * host:
            break
        choice = smaller
    return choice
