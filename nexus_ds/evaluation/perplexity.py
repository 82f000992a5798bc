"""How good a checkpoint is at each domain's text, and where its routers send that text.

`score` runs any dense or Nexus checkpoint with stock transformers over fixed windows; `cosines`
compares domains before and after the projection P (paper sections 5.4 and 5.6).

Of chats the answers are scored, as in training with data.chat: a domain's loss is the mean over the
answer tokens of all its windows together, whatever their number in each. Windows are those of plain
text, slices of the packed chats, so that an answer may begin in one window and end in the next; a
window without any answer token is not read.

Shapes: W windows, S tokens a window, T = W*S tokens, D domains of text, L layers with a router, E
routed experts, K chosen experts a token, H hidden size, V vocabulary.
Not covered: text of models with different tokenizers on one scale (perplexity is per token),
downstream tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ds.checkpoint.config_json import count, positive, read_config
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.needs import BATCH, Way
from nexus_ds.checkpoint.pieces import (
    in_pieces,
    need_of,
    open_way,
    planned_way,
    warn_of_time,
)
from nexus_ds.checkpoint.projection_module import domain_inputs
from nexus_ds.checkpoint.qwen2_moe import gate_name, router_layers
from nexus_ds.checkpoint.qwen3_next import open_reader
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.evaluation.passes import (
    Passed,
    all_places,
    cut,
    labels,
    sequences_at_once,
    timed_passes,
)
from nexus_ds.model.router import SATURATED

DEFAULT_LENGTH = 128  # tokens of a window


@dataclass
class Routing:
    """Where the tokens of each domain go.

    Attributes:
        domains: D names of the scored text.
        experts: E names.
        expert_domains: E domains that the experts were trained on; "" where no sidecar says so.
        layers: numbers of the L layers that have a router.
        share: [L, D, E] share of the routed slots (tokens times top-k) of a domain at each expert;
            sums to 1 over E.
        gate: [L, D] mean probability of the first choice.
    """

    domains: list[str]
    experts: list[str]
    expert_domains: list[str]
    layers: list[int]
    share: np.ndarray
    gate: np.ndarray

    def mean_share(self) -> dict[str, dict[str, float]]:
        """Return share[domain][expert], the mean over layers."""
        mean_DE = self.share.mean(axis=0).tolist()
        shares = {}
        for domain, mean_E in zip(self.domains, mean_DE, strict=True):
            shares[domain] = dict(zip(self.experts, mean_E, strict=True))
        return shares

    def own_share(self) -> dict[str, float]:
        """Return the share of each domain's tokens at its own expert, mean over layers.

        Only of domains that have an expert; of several experts, the sum.
        """
        mean_DE = self.share.mean(axis=0)
        expert_domains_E = np.array(self.expert_domains)
        shares = {}
        for domain, mean_E in zip(self.domains, mean_DE, strict=True):
            own_E = expert_domains_E == domain
            if own_E.any():
                shares[domain] = float(mean_E[own_E].sum())
        return shares

    def leak(self, expert: str, domains: Sequence[str] | None = None) -> float:
        """Return the share of tokens of `domains` at `expert`, mean over domains and layers.

        `domains` defaults to all domains but the expert's own: for an added expert, what it takes
        from the old ones. NaN if there are none. ConfigError for names that were not scored.
        """
        if expert not in self.experts:
            raise ConfigError(
                f"no expert {expert!r} in this model; it has: {', '.join(self.experts)}"
            )
        column = self.experts.index(expert)
        if domains is None:
            own = self.expert_domains[column]
            domains = [domain for domain in self.domains if domain != own]
        unknown = [domain for domain in domains if domain not in self.domains]
        if unknown:
            raise ConfigError(
                f"no text of {', '.join(unknown)} was scored; scored: {', '.join(self.domains)}"
            )
        # There is no text but the expert's own: nothing could leak.
        if not domains:
            return math.nan
        rows = [self.domains.index(domain) for domain in domains]
        shares_LD = self.share[:, rows, column]
        return float(shares_LD.mean())

    def saturated(self) -> list[tuple[int, str, float]]:
        """Return (layer, domain, mean gate) wherever the mean gate is above SATURATED."""
        found = []
        for layer, gate_D in zip(self.layers, self.gate, strict=True):
            pairs = zip(self.domains, gate_D.tolist(), strict=True)
            found += [(layer, domain, gate) for domain, gate in pairs if gate > SATURATED]
        return found


@dataclass
class Scores:
    """What `score` measured, by domain.

    Attributes:
        window_loss: [W] nats per token of each window, in the order of the windows; of chats per
            answer token, of windows that have one.
        window_labels: of domains with chats the answer tokens [W] of each such window.
        tokens: tokens read, of chats prompts too.
        tokens_per_second: of all domains together.
        routing: of a model with routers.
    """

    window_loss: dict[str, np.ndarray]
    tokens: dict[str, int]
    tokens_per_second: float
    routing: Routing | None
    window_labels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token of each domain: the mean over its windows, of chats over answer tokens."""
        means = {}
        for domain, loss_W in self.window_loss.items():
            labels_W = self.window_labels.get(domain)
            means[domain] = float(np.average(loss_W, weights=labels_W))
        return means

    @property
    def perplexity(self) -> dict[str, float]:
        """exp(loss) of each domain, kept below the largest float."""
        # exp(709.8) is the largest float
        bounded = {domain: min(loss, 700.0) for domain, loss in self.loss.items()}
        return {domain: math.exp(loss) for domain, loss in bounded.items()}


def window_length(asked: int, models: Sequence[Mapping[str, Any]]) -> int:
    """Return the tokens of a window: `asked`, or where that is 0 what suits all models.

    That is the shortest sequence length that one of them was trained with, else DEFAULT_LENGTH; no
    more than every model reads.

    Args:
        asked: 0 for a length that suits.
        models: what `inspection.describe` tells of each.

    Raises:
        CheckpointError: a model's config.json has no number where it says what it reads.
    """
    if asked:
        return asked
    # a model that was trained elsewhere doesn't tell its length
    trained = [model["sequence_length"] for model in models if model["sequence_length"]]
    limits = [_positions(model) for model in models if model["max_positions"]]
    return min([*(trained or [DEFAULT_LENGTH]), *limits])


def _positions(model: Mapping[str, Any]) -> int:
    """Return what a model reads at most; CheckpointError where its config.json has no number."""
    name = "max_position_embeddings"
    where = f"{model.get('directory')}/config.json"
    return positive({name: model["max_positions"]}, name, where)


def expert_names(directory: Path, number: int) -> tuple[list[str], list[str]]:
    """Return names and domains of `number` routed experts; without sidecar expert_0 .. and ""."""
    if not is_nexus(directory):
        numbered = [f"expert_{index}" for index in range(number)]
        return numbered, [""] * number
    experts = read_sidecar(directory).experts
    if len(experts) != number:
        raise CheckpointError(
            f"{directory}: the model has {number} routed experts, nexus.json names {len(experts)}; "
            "they belong to different checkpoints, make the directory again"
        )
    names = [expert.name for expert in experts]
    domains = [expert.domain for expert in experts]
    return names, domains


def _check_windows(
    windows: Mapping[str, np.ndarray],
    vocabulary: int,
    positions: int,
    model_dir: Path,
) -> None:
    """Refuse text that this model can't read, before a second of work."""
    if not windows:
        raise DataError("no domain to score; name at least one")
    for domain, tokens in windows.items():
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
            raise DataError(
                f"domain {domain!r}: found windows of shape {tokens.shape}, "
                "expected [windows, length + 1] with at least one window of two tokens"
            )
        ids = np.where(tokens < 0, ~tokens, tokens)
        smallest, largest = ids.min(), ids.max()
        # a GPU would end such a lookup with an assertion that names nothing
        if largest >= vocabulary:
            raise DataError(
                f"domain {domain!r}: found token ids from {smallest} to {largest}, "
                f"{model_dir} knows 0 to {vocabulary - 1}; "
                "tokenise the text with this model's own tokenizer"
            )
        length = tokens.shape[1] - 1
        if positions and length > positions:
            raise DataError(
                f"domain {domain!r}: windows of {length} tokens, {model_dir} reads at most "
                f"{positions}; choose a smaller length"
            )


def _answered(windows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the windows that have a label: of plain text all.

    Raises:
        DataError: a domain has none.
    """
    found = {}
    for domain, tokens_WS in windows.items():
        has_label_W = labels(tokens_WS) > 0
        if not has_label_W.any():
            raise DataError(
                f"domain {domain!r}: no token of an answer in its {len(tokens_WS)} windows; score "
                f"more windows, or chats whose answers fit into {tokens_WS.shape[1] - 1} tokens"
            )
        found[domain] = tokens_WS[has_label_W]
    return found


def _window_labels(windows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the labels [W] of each window, of domains where not every token is one."""
    found = {}
    for domain, tokens_WS in windows.items():
        if (tokens_WS[:, 1:] < 0).any():
            found[domain] = labels(tokens_WS)
    return found


def _check_losses(loss: Mapping[str, float], model_dir: Path) -> None:
    bad = [domain for domain, value in loss.items() if not math.isfinite(value)]
    if bad:
        raise CheckpointError(
            f"{model_dir}: the loss on {', '.join(bad)} is {loss[bad[0]]}, "
            "expected a finite number; the weights hold NaN or infinity, "
            "or overflow in the stored precision (try fp32)"
        )


def score(
    model_dir: Path,
    windows: Mapping[str, np.ndarray],
    batch: int = BATCH,
    precision: str = "auto",
    label: str = "",
    places: Sequence[torch.device] | None = None,
) -> Scores:
    """Score a checkpoint on fixed windows of each domain.

    A model that does not fit is run in smaller batches, then layer by layer: the numbers are the
    same, and stderr says so.

    Args:
        model_dir: a dense or Nexus checkpoint.
        windows: for each domain token ids [W, S+1], int64: S inputs and their S targets; ~id in
            the place of one that is no label.
        batch: windows a forward pass.
        precision: auto (fp32 on a CPU, the stored dtype on a GPU), fp32, or stored.
        label: what the progress line calls the model; default its directory's name.
        places: devices, each with a copy of the model and a share of the batches; default all GPUs
            of this machine, else the CPU.

    Raises:
        CheckpointError: a checkpoint that can't be loaded, or whose loss is not a number.
        DataError: no windows, none with a label, or token ids and lengths that the model doesn't
            know.
        InsufficientMemoryError: one window through one layer is too much.
    """
    model_dir = Path(model_dir)
    if batch < 1:
        raise ConfigError(f"batch: expected a number above 0, found {batch}")
    config = read_config(model_dir)
    where = str(model_dir / "config.json")
    positions = count(config, "max_position_embeddings", where)
    _check_windows(windows, count(config, "vocab_size", where), positions, model_dir)
    windows = _answered(windows)
    title = f"score {label or model_dir.name}"
    # More copies of the model than batches would have nothing to do.
    places = list(places or all_places())[: len(cut(windows, batch))]
    need = need_of(model_dir, precision, places[0])
    longest = max(tokens_WS.shape[1] - 1 for tokens_WS in windows.values())
    chosen = planned_way(need, places, batch, longest, title)
    # The first token of a window is an input only.
    tokens = {domain: tokens_WS[:, 1:].size for domain, tokens_WS in windows.items()}
    reads = len(windows) if chosen.streamed else 0
    warn_of_time(title, need, sum(tokens.values()), places[0], reads)

    def work(way: Way) -> tuple[list[Passed], float]:
        size = sequences_at_once(need, way, longest, places)
        models = [open_way(model_dir, precision, place, way) for place in places]
        return timed_passes(models, places, cut(windows, size), way, title)

    passes, seconds = in_pieces(title, chosen, work)
    loss = {
        domain: np.concatenate([found.loss_W for found in passes if found.domain == domain])
        for domain in windows
    }
    routing = _routing(model_dir, list(windows), passes)
    speed = sum(tokens.values()) / max(seconds, 1e-9)
    scores = Scores(loss, tokens, speed, routing, _window_labels(windows))
    _check_losses(scores.loss, model_dir)
    return scores


def _routing(model_dir: Path, domains: list[str], passes: Sequence[Passed]) -> Routing | None:
    """Return the routing of each domain; None of a model without routers.

    Passes are summed in the order of the windows, whichever device made them: the sums are the
    same with any number of devices.
    """
    routed = {
        domain: [found.routed for found in passes if found.domain == domain and found.routed]
        for domain in domains
    }
    layers = next(iter(routed.values()))
    if not layers:
        return None
    counts = [np.sum([part.counts_LE for part in parts], axis=0) for parts in routed.values()]
    gates = [
        sum(part.gate_sums_L for part in parts) / sum(part.tokens for part in parts)
        for parts in routed.values()
    ]
    share_LDE = np.stack([part / part.sum(axis=1, keepdims=True) for part in counts], axis=1)
    experts, expert_domains = expert_names(model_dir, share_LDE.shape[2])
    numbers = layers[0].layers
    return Routing(domains, experts, expert_domains, numbers, share_LDE, np.stack(gates, axis=1))


def cosine_matrix(vectors_EM: Tensor) -> np.ndarray:
    """Return the cosines [E, E] between vectors; 0 where one is 0."""
    unit_EM = F.normalize(vectors_EM.double(), dim=-1)
    return (unit_EM @ unit_EM.T).numpy()


@dataclass
class Cosines:
    """Cosines between experts, before and after the projection P.

    Attributes:
        names: E experts.
        embeddings: [E, E] between raw domain embeddings (paper figure 8, "before"); None without a
            sidecar.
        inputs: [E, E] between what P reads (normalised, centred); None without a sidecar.
        rows: [L, E, E] between expert embeddings (paper figure 8, "after": the last layer).
        centred_rows: [L, E, E] between expert embeddings less their mean: softmax does not see the
            mean, so these decide.
    """

    names: list[str]
    embeddings: np.ndarray | None
    inputs: np.ndarray | None
    rows: np.ndarray
    centred_rows: np.ndarray


def cosines(directory: Path) -> Cosines:
    """Return the cosines of a Qwen2-MoE checkpoint; CheckpointError if it has no router."""
    directory = Path(directory)
    config = read_config(directory)
    reader = open_reader(Headers(directory), config)
    # a Qwen2-MoE of another form may have dense layers in between
    layers = router_layers(config, set(reader.names()))
    weights = [reader.read(gate_name(layer)).float() for layer in layers]
    if not weights:
        raise CheckpointError(
            f"{directory}: no router weights ({gate_name(0)}); "
            "expected a mixture-of-experts checkpoint"
        )
    embeddings = inputs = None
    if is_nexus(directory):
        sidecar = read_sidecar(directory)
        embeddings = cosine_matrix(torch.from_numpy(sidecar.vectors))
        inputs = cosine_matrix(domain_inputs(sidecar))
    centred = [weight_EH - weight_EH.mean(0) for weight_EH in weights]
    names, _ = expert_names(directory, len(weights[0]))
    return Cosines(
        names=names,
        embeddings=embeddings,
        inputs=inputs,
        rows=np.stack([cosine_matrix(weight_EH) for weight_EH in weights]),
        centred_rows=np.stack([cosine_matrix(weight_EH) for weight_EH in centred]),
    )
