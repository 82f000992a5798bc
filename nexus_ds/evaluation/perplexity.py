"""How good a checkpoint is at each domain's text, and where its routers send that text.

`score` runs any dense or Nexus checkpoint with stock transformers over fixed windows; `cosines`
compares domains before and after the projection P (paper sections 5.4 and 5.6).

Shapes: W windows, S tokens a window, T = W*S tokens, D domains of text, L layers with a router, E
routed experts, K chosen experts a token, H hidden size, V vocabulary.
Not covered: text of models with different tokenizers on one scale (perplexity is per token),
downstream tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nexus_ds.checkpoint.loading import load_model, read_config
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.model.router import SATURATED
from nexus_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LENGTH = 128  # tokens of a window
LOGITS_AT_ONCE = 1 << 24  # fp32 numbers: 64 MiB of logits, whatever the vocabulary
# Of a module: itself, what it was given, what it returned.
Hook = Callable[[nn.Module, object, tuple[Tensor, ...]], None]


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
    """
    if asked:
        return asked
    # a model that was trained elsewhere doesn't tell its length
    trained = [model["sequence_length"] for model in models if model["sequence_length"]]
    limits = [model["max_positions"] for model in models if model["max_positions"]]
    lengths = trained or [DEFAULT_LENGTH]
    return min(int(length) for length in [*lengths, *limits])


def expert_names(directory: Path, count: int) -> tuple[list[str], list[str]]:
    """Return names and domains of `count` routed experts; without sidecar expert_0 .. and ""."""
    if not is_nexus(directory):
        numbered = [f"expert_{index}" for index in range(count)]
        return numbered, [""] * count
    experts = read_sidecar(directory).experts
    if len(experts) != count:
        raise CheckpointError(
            f"{directory}: the model has {count} routed experts, nexus.json names {len(experts)}; "
            "they belong to different checkpoints, make the directory again"
        )
    names = [expert.name for expert in experts]
    domains = [expert.domain for expert in experts]
    return names, domains


class RoutingMeter:
    """Counts routed tokens at a model's routers: `with RoutingMeter(model) as meter: ...`.

    It is stock transformers that is measured, so its modules are found by their names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = dict(model.named_modules())
        self.routers: dict[int, nn.Module] = {}
        for layer in range(model.config.num_hidden_layers):
            name = gate_name(layer).removesuffix(".weight")
            if name in modules:
                self.routers[layer] = modules[name]
        self.layers = list(self.routers)
        self.handles: list[RemovableHandle] = []
        self.shares: list[np.ndarray] = []
        """[L, E] for each `take`: shares of the routed slots."""
        self.gates: list[np.ndarray] = []
        """[L] for each `take`: mean probability of the first choice."""
        self._forget()

    def take(self) -> None:
        """Keep what was counted since the last call, and begin anew; without routers do nothing."""
        if not self.layers:
            return
        counts = torch.stack([self.counts[layer] for layer in self.layers])
        counts_LE = counts.cpu().numpy()
        slots_L1 = counts_LE.sum(axis=1, keepdims=True)
        self.shares.append(counts_LE / slots_L1)
        sums_L = np.array([float(self.gate_sums[layer]) for layer in self.layers])
        tokens_L = np.array([self.tokens[layer] for layer in self.layers])
        self.gates.append(sums_L / tokens_L)
        self._forget()

    def _forget(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.gate_sums: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = dict.fromkeys(self.layers, 0)

    def __enter__(self) -> RoutingMeter:
        for layer, module in self.routers.items():
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

    def _hook(self, layer: int) -> Hook:
        def count(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
            # transformers 5: (logits, gate values, indices)
            logits_TE, _, chosen_TK = output
            # Sums stay on the device: to ask for them here would wait for it at every layer.
            tokens, experts = logits_TE.shape
            slots_E = torch.bincount(chosen_TK.reshape(-1), minlength=experts)
            probability_TE = logits_TE.float().softmax(dim=-1)
            gate_T = probability_TE.amax(dim=-1)
            # In fp32, sums over millions of tokens would lose digits.
            gate_sum = gate_T.sum(dtype=torch.float64)
            self.counts[layer] = self.counts.get(layer, 0) + slots_E
            self.gate_sums[layer] = self.gate_sums.get(layer, 0) + gate_sum
            self.tokens[layer] += tokens

        return count


@torch.inference_mode()
def batch_loss(model: PreTrainedModel, tokens_WS: Tensor) -> Tensor:
    """Return the next-token cross-entropy (nats, float64 [W]) of each window, summed over tokens.

    The logits are made in slices of LOGITS_AT_ONCE numbers and scored in fp32: a large vocabulary
    costs no memory.

    Args:
        model: as transformers loads it.
        tokens_WS: token ids [W, S+1]: S inputs and their S targets.
    """
    inputs_WS = tokens_WS[:, :-1]
    targets_T = tokens_WS[:, 1:].reshape(-1)
    # Without the output layer, which would make the logits of all tokens at once.
    output = model.base_model(input_ids=inputs_WS, use_cache=False)
    hidden_TH = output.last_hidden_state.flatten(0, 1)
    head = model.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    losses = []
    for start in range(0, len(hidden_TH), step):
        part = slice(start, start + step)
        logits_tV = head(hidden_TH[part]).float()
        losses_t = F.cross_entropy(logits_tV, targets_T[part], reduction="none")
        losses.append(losses_t)
    losses_WS = torch.cat(losses).view(inputs_WS.shape)
    return losses_WS.sum(dim=1, dtype=torch.float64)


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
        smallest, largest = tokens.min(), tokens.max()
        # a GPU would end such a lookup with an assertion that names nothing
        if smallest < 0 or largest >= vocabulary:
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


def _on_device(tokens_WS: np.ndarray, model: PreTrainedModel) -> Tensor:
    # The windows may be a view of a memory-mapped file, of any integer type.
    tokens = np.ascontiguousarray(tokens_WS, dtype=np.int64)
    return torch.from_numpy(tokens).to(model.device)


def _score_domain(
    model: PreTrainedModel,
    tokens_WS: np.ndarray,
    batch: int,
    progress: Progress,
) -> np.ndarray:
    """Return the loss (nats per token, float64 [W]) of each of the windows [W, S+1]."""
    found = []
    for start in range(0, len(tokens_WS), batch):
        part = _on_device(tokens_WS[start : start + batch], model)
        loss_w = batch_loss(model, part)
        found.append(loss_w.cpu().numpy())
        progress.advance(len(part))
    length = tokens_WS.shape[1] - 1
    return np.concatenate(found) / length


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
    batch: int = 8,
    precision: str = "auto",
    label: str = "",
) -> Scores:
    """Score a checkpoint on fixed windows of each domain.

    Args:
        model_dir: a dense or Nexus checkpoint.
        windows: for each domain token ids [W, S+1], int64: S inputs and their S targets.
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
    _warm_up(model, windows)
    title = f"score {label or model_dir.name}"
    count = sum(len(tokens_WS) for tokens_WS in windows.values())
    loss: dict[str, np.ndarray] = {}
    started = time.perf_counter()
    with RoutingMeter(model) as meter, Progress(title, count, "window") as progress:
        for domain, tokens_WS in windows.items():
            loss[domain] = _score_domain(model, tokens_WS, batch, progress)
            meter.take()
    seconds = time.perf_counter() - started
    # The first token of a window is an input only.
    tokens = {domain: tokens_WS[:, 1:].size for domain, tokens_WS in windows.items()}
    routing = _routing(model_dir, list(windows), meter) if meter.layers else None
    # a clock of coarse steps may see no time pass over a few windows
    tokens_per_second = sum(tokens.values()) / max(seconds, 1e-9)
    scores = Scores(loss, tokens, tokens_per_second, routing)
    _check_losses(scores.loss, model_dir)
    return scores


def _warm_up(model: PreTrainedModel, windows: Mapping[str, np.ndarray]) -> None:
    """Do one pass uncounted: the first one pays for allocation and kernel selection."""
    some_WS = next(iter(windows.values()))[:1]
    batch_loss(model, _on_device(some_WS, model))


def _routing(model_dir: Path, domains: list[str], meter: RoutingMeter) -> Routing:
    """Return the routing of the domains that a meter has taken, one after the other."""
    share_LDE = np.stack(meter.shares, axis=1)
    gate_LD = np.stack(meter.gates, axis=1)
    experts, expert_domains = expert_names(model_dir, share_LDE.shape[2])
    return Routing(domains, experts, expert_domains, meter.layers, share_LDE, gate_LD)


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
    reader = TensorReader(directory)
    layers = int(config.get("num_hidden_layers", 0))
    names = [gate_name(layer) for layer in range(layers)]
    # a Qwen2-MoE of another form may have dense layers in between
    weights = [reader.read(name).float() for name in names if name in reader]
    if not weights:
        raise CheckpointError(
            f"{directory}: no router weights ({gate_name(0)}); "
            "expected a mixture-of-experts checkpoint"
        )
    embeddings = inputs = None
    if is_nexus(directory):
        sidecar = read_sidecar(directory)
        embeddings = cosine_matrix(sidecar.vectors)
        inputs = cosine_matrix(sidecar.domain_inputs())
    centred = [weight_EH - weight_EH.mean(0) for weight_EH in weights]
    names, _ = expert_names(directory, len(weights[0]))
    return Cosines(
        names=names,
        embeddings=embeddings,
        inputs=inputs,
        rows=np.stack([cosine_matrix(weight_EH) for weight_EH in weights]),
        centred_rows=np.stack([cosine_matrix(weight_EH) for weight_EH in centred]),
    )
