"""How good a checkpoint is at each domain's text, and where its routers send that text.

`score` runs any dense or Nexus checkpoint with stock transformers over fixed windows; `cosines`
compares domains before and after the projection P (paper sections 5.4 and 5.6).

Shapes: W windows, T tokens a window, D domains of text, L layers with a router, E routed experts, H
hidden size, V vocabulary.
Not covered: text of models with different tokenizers on one scale (perplexity is per token),
downstream tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ds.checkpoint.loading import load_model, read_config
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import Sidecar, read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.model.router import SATURATED
from nexus_ds.progress import Progress

DEFAULT_LENGTH = 128  # tokens of a window
LOGITS_AT_ONCE = 1 << 24  # fp32 numbers: 64 MiB of logits, whatever the vocabulary


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
        mean_DE = self.share.mean(axis=0)
        return {
            domain: {expert: float(mean_DE[d, e]) for e, expert in enumerate(self.experts)}
            for d, domain in enumerate(self.domains)
        }

    def own_share(self) -> dict[str, float]:
        """Return, for each domain that has an expert, the share of its tokens there (mean over
        layers)."""
        mean_DE = self.share.mean(axis=0)
        own = {
            d: [e for e, domain in enumerate(self.expert_domains) if domain == d]
            for d in self.domains
        }
        return {
            domain: float(mean_DE[d, own[domain]].sum())
            for d, domain in enumerate(self.domains)
            if own[domain]
        }

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
            domains = [domain for domain in self.domains if domain != self.expert_domains[column]]
        unknown = [domain for domain in domains if domain not in self.domains]
        if unknown:
            raise ConfigError(
                f"no text of {', '.join(unknown)} was scored; scored: {', '.join(self.domains)}"
            )
        if not domains:
            return math.nan
        rows = [self.domains.index(domain) for domain in domains]
        return float(self.share[:, rows, column].mean())

    def saturated(self) -> list[tuple[int, str, float]]:
        """Return (layer, domain, mean gate) wherever the mean gate is above SATURATED."""
        places = np.argwhere(self.gate > SATURATED)
        return [(self.layers[i], self.domains[d], float(self.gate[i, d])) for i, d in places]


@dataclass
class Scores:
    """What `score` measured, by domain.

    Attributes:
        window_loss: [W] nats per token of each window, in the order of the windows.
        tokens: tokens scored.
        tokens_per_second: of all domains together.
        routing: of a model with routers.
    """

    window_loss: dict[str, np.ndarray]
    tokens: dict[str, int]
    tokens_per_second: float
    routing: Routing | None

    @property
    def loss(self) -> dict[str, float]:
        """Nats per token of each domain: the mean over its windows, which are of one length."""
        return {domain: float(np.mean(loss_W)) for domain, loss_W in self.window_loss.items()}

    @property
    def perplexity(self) -> dict[str, float]:
        """exp(loss) of each domain, kept below the largest float."""
        return {domain: math.exp(min(loss, 700.0)) for domain, loss in self.loss.items()}


def window_length(asked: int, facts: Sequence[Mapping[str, Any]]) -> int:
    """Return the tokens of a window.

    For `asked` 0: the shortest sequence length that one of the models (`facts.describe`) was
    trained with, else DEFAULT_LENGTH; in any case no more than every model reads.
    """
    trained = [int(model["sequence_length"]) for model in facts if model["sequence_length"]]
    limits = [int(model["max_positions"]) for model in facts if model["max_positions"]]
    return asked or min([*(trained or [DEFAULT_LENGTH]), *limits])


def expert_names(directory: Path, count: int) -> tuple[list[str], list[str]]:
    """Return the names and the domains of `count` routed experts: the sidecar's, else expert_0 ...
    without domains."""
    if not is_nexus(directory):
        return [f"expert_{index}" for index in range(count)], [""] * count
    experts = read_sidecar(directory).experts
    if len(experts) != count:
        raise CheckpointError(
            f"{directory}: the model has {count} routed experts, nexus.json names {len(experts)}; they belong to "
            "different checkpoints, make the directory again"
        )
    return [expert.name for expert in experts], [expert.domain for expert in experts]


class RoutingMeter:
    """Counts routed tokens at a model's routers while it is a context: `with RoutingMeter(model) as
    meter: ...`."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = dict(model.named_modules())
        config: Any = model.config
        layers = range(config.num_hidden_layers)
        names = [gate_name(layer).removesuffix(".weight") for layer in layers]
        self.gates = [(layer, modules[name]) for layer, name in enumerate(names) if name in modules]
        self.layers = [layer for layer, _ in self.gates]
        self.handles: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts: dict[int, Tensor] = {}
        self.gate_sums: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = dict.fromkeys(self.layers, 0)

    def __enter__(self) -> RoutingMeter:
        for layer, module in self.gates:
            self.handles.append(module.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _hook(self, layer: int) -> Any:
        def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            logits_TE, _, chosen_TK = output  # transformers 5: (logits, gate values, indices)
            slots_E = torch.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[-1])
            gate = logits_TE.float().softmax(dim=-1).amax(dim=-1).sum(dtype=torch.float64)
            self.counts[layer] = self.counts.get(layer, 0) + slots_E
            self.gate_sums[layer] = self.gate_sums.get(layer, 0) + gate
            self.tokens[layer] += len(logits_TE)

        return count

    def share_LE(self) -> np.ndarray:
        """Return the share [L, E] of routed slots since the last reset."""
        counts = np.stack([self.counts[layer].cpu().numpy() for layer in self.layers]).astype(
            np.float64
        )
        return counts / counts.sum(axis=1, keepdims=True)

    def gate_L(self) -> np.ndarray:
        """Return the mean top-1 probability [L] since the last reset."""
        return np.array(
            [float(self.gate_sums[layer]) / self.tokens[layer] for layer in self.layers]
        )


@torch.inference_mode()
def batch_loss(model: Any, tokens_WT: Tensor) -> Tensor:
    """Return the next-token cross-entropy (nats, float64 [W]) of each of the windows [W, T+1],
    summed over its tokens.

    The logits are made in slices of LOGITS_AT_ONCE numbers and scored in fp32: a large vocabulary
    costs no memory.
    """
    inputs_WT, targets = tokens_WT[:, :-1], tokens_WT[:, 1:].reshape(-1)
    hidden_TH = model.base_model(input_ids=inputs_WT, use_cache=False).last_hidden_state.flatten(
        0, 1
    )
    head = model.get_output_embeddings()
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = []
    for start in range(0, len(hidden_TH), step):
        logits_TV = head(hidden_TH[start : start + step]).float()
        parts.append(F.cross_entropy(logits_TV, targets[start : start + step], reduction="none"))
    return torch.cat(parts).view(inputs_WT.shape).sum(dim=1, dtype=torch.float64)


def _check_windows(
    windows: Mapping[str, np.ndarray], vocabulary: int, positions: int, model_dir: Path
) -> None:
    """Refuse text that this model can't read, before a second of work."""
    if not windows:
        raise DataError("no domain to score; name at least one")
    for domain, tokens in windows.items():
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
            raise DataError(
                f"domain {domain!r}: found windows of shape {tokens.shape}, expected [windows, length + 1] "
                "with at least one window of two tokens"
            )
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise DataError(
                f"domain {domain!r}: found token ids from {tokens.min()} to {tokens.max()}, {model_dir} knows "
                f"0 to {vocabulary - 1}; tokenise the text with this model's own tokenizer"
            )
        if positions and tokens.shape[1] - 1 > positions:
            raise DataError(
                f"domain {domain!r}: windows of {tokens.shape[1] - 1} tokens, {model_dir} reads at most "
                f"{positions}; choose a smaller length"
            )


def _score_domain(model: Any, tokens_WT: np.ndarray, batch: int, progress: Progress) -> np.ndarray:
    """Return the loss (nats per token, float64 [W]) of each of the windows [W, T+1]."""
    found = []
    for start in range(0, len(tokens_WT), batch):
        part = torch.from_numpy(
            np.ascontiguousarray(tokens_WT[start : start + batch], dtype=np.int64)
        )
        found.append(batch_loss(model, part.to(model.device)).cpu().numpy())
        progress.advance(len(part))
    return np.concatenate(found) / (tokens_WT.shape[1] - 1)


def _check_losses(loss: Mapping[str, float], model_dir: Path) -> None:
    bad = [domain for domain, value in loss.items() if not math.isfinite(value)]
    if bad:
        raise CheckpointError(
            f"{model_dir}: the loss on {', '.join(bad)} is {loss[bad[0]]}, expected a finite number; the weights hold "
            "NaN or infinity, or overflow in the stored precision (try fp32)"
        )


def score(
    model_dir: Path,
    windows: Mapping[str, np.ndarray],
    batch: int = 8,
    precision: str = "auto",
    label: str = "",
) -> Scores:
    """Score a checkpoint on fixed windows of each domain.

    Args:
        model_dir: a dense or Nexus checkpoint.
        windows: for each domain token ids [W, T+1], int64: T inputs and their T targets.
        batch: windows a forward pass.
        precision: auto (fp32 on a CPU, the stored dtype on a GPU), fp32, or stored.
        label: what the progress line calls the model; default its directory's name.

    Raises:
        CheckpointError: a checkpoint that can't be loaded, or whose loss is not a number.
        DataError: no windows, or token ids and lengths that the model doesn't know.
    """
    model_dir = Path(model_dir)
    if batch < 1:
        raise ConfigError(f"batch: expected a number above 0, found {batch}")
    config = read_config(model_dir)
    positions = int(config.get("max_position_embeddings") or 0)
    _check_windows(windows, int(config.get("vocab_size", 0)), positions, model_dir)
    model = load_model(model_dir, precision)
    loss: dict[str, np.ndarray] = {}
    shares, gates = [], []
    # One pass uncounted: the first one pays for allocation and kernel selection.
    batch_loss(
        model, torch.from_numpy(next(iter(windows.values()))[:1].astype(np.int64)).to(model.device)
    )
    started = time.perf_counter()
    with (
        RoutingMeter(model) as meter,
        Progress(
            f"score {label or model_dir.name}", sum(map(len, windows.values())), "window"
        ) as progress,
    ):
        for domain, tokens_WT in windows.items():
            meter.reset()
            loss[domain] = _score_domain(model, tokens_WT, batch, progress)
            if meter.layers:
                shares.append(meter.share_LE())
                gates.append(meter.gate_L())
    seconds = time.perf_counter() - started
    tokens = {domain: len(array) * (array.shape[1] - 1) for domain, array in windows.items()}
    routing = None
    if meter.layers:
        names, domains = expert_names(model_dir, shares[0].shape[1])
        share_LDE, gate_LD = np.stack(shares, axis=1), np.stack(gates, axis=1)
        routing = Routing(list(windows), names, domains, meter.layers, share_LDE, gate_LD)
    scores = Scores(loss, tokens, sum(tokens.values()) / max(seconds, 1e-9), routing)
    _check_losses(scores.loss, model_dir)
    return scores


def cosine_matrix(vectors: Tensor) -> np.ndarray:
    """Return the cosines [E, E] between rows of `vectors` [E, M]; 0 where a row is 0."""
    unit = F.normalize(vectors.double(), dim=-1)
    return (unit @ unit.T).numpy()


@dataclass
class Cosines:
    """Cosines [E, E] between experts, before and after the projection P.

    Attributes:
        names: E experts.
        embeddings: between raw domain embeddings (paper figure 8, "before"); None without a sidecar
            that has them.
        inputs: between what P reads (normalised, centred); None without a sidecar.
        rows: [L, E, E] between router rows (paper figure 8, "after": the last layer).
        centred_rows: [L, E, E] between router rows less their mean: softmax does not see the mean,
            so these decide.
    """

    names: list[str]
    embeddings: np.ndarray | None
    inputs: np.ndarray | None
    rows: np.ndarray
    centred_rows: np.ndarray


def _sidecar(directory: Path) -> Sidecar | None:
    return read_sidecar(directory) if is_nexus(directory) else None


def cosines(directory: Path) -> Cosines:
    """Return the cosines of a Nexus or other Qwen2-MoE checkpoint; CheckpointError if it has no
    router."""
    directory = Path(directory)
    config, reader, sidecar = read_config(directory), TensorReader(directory), _sidecar(directory)
    names = [gate_name(layer) for layer in range(int(config.get("num_hidden_layers", 0)))]
    rows = [reader.read(name).float() for name in names if name in reader]
    if not rows:
        raise CheckpointError(
            f"{directory}: no router weights ({gate_name(0)}); expected a mixture-of-experts checkpoint"
        )
    vectors = sidecar.vectors if sidecar is not None and len(sidecar.vectors) else None
    return Cosines(
        names=expert_names(directory, len(rows[0]))[0],
        embeddings=None if vectors is None else cosine_matrix(vectors),
        inputs=None
        if vectors is None or sidecar is None
        else cosine_matrix(sidecar.domain_inputs()),
        rows=np.stack([cosine_matrix(r) for r in rows]),
        centred_rows=np.stack([cosine_matrix(r - r.mean(dim=0)) for r in rows]),
    )
