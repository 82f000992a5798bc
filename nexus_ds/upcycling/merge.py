"""How upcycling merges what the branches share: `model.merge` and its settings.

The paper takes the mean (section 2.1). The seed's own weights and the ways to merge that
`checkpoint.merging` has are alternatives, measured in docs/merging.md.
Not covered: FFNs, which are never merged; `extend`, whose lambda is a share of a mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.assembly import Rule
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.merging import ByRow, DareTies, Ties
from nexus_ds.checkpoint.qwen2_moe import Stored
from nexus_ds.data.token_counts import TokenCounts
from nexus_ds.errors import ConfigError
from nexus_ds.settings import Config, ModelConfig
from nexus_ds.upcycling.same_tokenizers import Alignment
from nexus_ds.upcycling.sources import Blend, Part, Stack

OWN = ("merge", "merge_weights", "merge_density")


def check_merge(
    model: ModelConfig,
    experts: Collection[str],
    grown: bool,
) -> None:
    """Raise ConfigError for settings of merging that don't go together.

    Args:
        model: `merge` and its settings.
        experts: their names.
        grown: whether vocabularies may have grown.
    """
    for name in model.merge_weights:
        if name not in experts:
            raise ConfigError(
                f"model.merge_weights: {name} is none of the experts {', '.join(experts)}; name "
                "these, those that are left out weigh 1"
            )
    weights = weights_of(model, experts)
    if min(weights) < 0 or not sum(weights):
        raise ConfigError(
            f"model.merge_weights: the branches weigh {', '.join(map(str, weights))}; expected "
            "numbers of at least 0, not all of them 0"
        )
    # a row that some models lack is the mean of the others', also where all else is the seed's
    if grown and model.merge not in ("mean", "seed"):
        raise ConfigError(
            f"model.merge: {model.merge} can't merge vocabularies that grew; leave --align-vocab "
            "out, or set model.merge=mean or seed"
        )
    if grown and model.merge_rows != "alike":
        raise ConfigError(
            "model.merge_rows: counted can't merge vocabularies that grew; leave --align-vocab "
            "out, or set model.merge_rows=alike"
        )


def weights_of(model: ModelConfig, experts: Collection[str]) -> list[float]:
    """Return the weight of each branch."""
    return [model.merge_weights.get(name, 1.0) for name in experts]


def recorded_merge(model: ModelConfig) -> dict[str, object]:
    """Return what nexus.json has of merging; empty for the plain mean, as older versions have
    it."""
    values = {name: getattr(model, name) for name in OWN}
    counted = model.merge_rows != "alike"
    if counted:
        values["merge_rows"] = model.merge_rows
    plain = model.merge == "mean" and not model.merge_weights and not counted
    return {} if plain else values


def row_weights(
    counts: TokenCounts,
    weights: Sequence[float],
    rows: int,
) -> Floats:
    """Return the weight of each branch in each row [N, V] fp32; a row's add up to 1.

    They are the token's shares of the branches' texts, however long these are, times the branches'
    own weights, which are all that counts for a token that no text has.

    Args:
        counts: of each token, by expert.
        weights: of the branches, see `weights_of`.
        rows: of the embeddings; tokens of padding are in no text.
    """
    shares_NV = np.zeros((len(weights), rows))
    for share_V, count, weight in zip(shares_NV, counts.values(), weights, strict=True):
        share_V[: len(count)] = weight * count / count.sum()
    unseen_V = ~shares_NV.any(axis=0)
    shares_NV[:, unseen_V] = np.array(weights)[:, None]
    return (shares_NV / shares_NV.sum(axis=0)).astype(np.float32)


@dataclass(frozen=True)
class Merge:
    """How tensors outside of the FFNs become one of several."""

    seed: Headers
    branches: Mapping[str, Headers]
    """By expert's name."""
    config: Config
    """`model.merge` and its settings, and `seed`."""
    alignment: Alignment | None
    """None: all models have the same tokens."""
    counts: TokenCounts | None
    """For `model.merge_rows`."""

    def source(self, entry: Stored) -> Blend | Stack:
        """Return what becomes a tensor."""
        own = Part("seed", self.seed, entry.dense_name)
        parts = [
            Part(f"expert {name}", reader, entry.dense_name)
            for name, reader in self.branches.items()
        ]
        if entry.dense_name not in (EMBEDDING, HEAD):
            return self._whole(own, parts)
        if self.counts:
            rows, width = entry.shape
            weights_NV = row_weights(self.counts, self._weights(), rows)
            return Blend(parts, rule=ByRow(weights_NV, width))
        if self.alignment and self.config.model.merge == "seed":
            # the seed gives all rows that it has
            mean = self._mean(parts)
            everyone = Blend([own, *mean.parts])
            return self.alignment.blend(everyone)
        whole = self._whole(own, parts)
        if self.alignment:
            return self.alignment.blend(whole)
        return whole

    def _whole(self, own: Part, branches: Sequence[Part]) -> Blend:
        model = self.config.model
        rule: Rule
        match model.merge:
            case "seed":
                return Blend([own])
            case "ties":
                rule = Ties(self._weights(), model.merge_density)
            case "dare_ties":
                # of its own for each tensor, whatever stands before it
                drawn = (self.config.seed, zlib.crc32(own.name.encode()))
                rule = DareTies(self._weights(), model.merge_density, drawn)
            case _:
                return self._mean(branches)
        return Blend([own, *branches], rule=rule)

    def _mean(self, branches: Sequence[Part]) -> Blend:
        weights = self._weights()
        pairs = zip(branches, weights, strict=True)
        parts = [replace(part, weight=weight) for part, weight in pairs]
        return Blend(parts, divisor=float(sum(weights)))

    def _weights(self) -> list[float]:
        return weights_of(self.config.model, self.branches)
