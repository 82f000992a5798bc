"""Warm starts of the routers before training; `methods` has what is done to one of them.

A checkpoint is streamed layer by layer: the hidden states of all windows are kept, one layer's
weights at a time. A layer is the family's own, called whole, as its decoder calls it: where its
norms stand, and what its attention sees, is not known here. Each router is fitted on the states
that its layer really sees, earlier layers already routing with their fitted expert embeddings. In a
tiny replication the label fit lifted the own-domain share from 0.37 to 0.57 for nexus and linear
routers alike; without the new domain's text an appended P(d_new) hardly finds its expert.

Shapes: N windows, S tokens a window, T = N*S tokens, L of them of domains with an expert, E routed
experts, H hidden size, M width of an embedding. The states of all windows stay in host memory, and
what a router reads of them too, where it would take much of the device; a layer is on the device,
with a few windows at a time.
Not covered: attention that is computed once for what a router reads and for the states behind it
(it is computed twice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.checkpoint.build import fill, transformers_config
from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.forms import PLAIN
from nexus_ds.checkpoint.loading import device, told_in_one_line
from nexus_ds.checkpoint.needs import FIT_BATCH, features_fit
from nexus_ds.checkpoint.pieces import need_of, warn_of_time
from nexus_ds.checkpoint.projection_module import (
    domain_inputs,
    expert_embeddings,
    inputs_of,
    load_projection,
    state_of,
)
from nexus_ds.checkpoint.qwen2_moe import gate_name, mean_name, open_moe
from nexus_ds.checkpoint.records import FitReport
from nexus_ds.checkpoint.room import room_on
from nexus_ds.checkpoint.sidecar import Sidecar, read_sidecar, write_sidecar
from nexus_ds.checkpoint.streaming import LayerReader
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader
from nexus_ds.errors import DataError
from nexus_ds.model.context import context
from nexus_ds.model.router import layer_generator, unit
from nexus_ds.progress import Progress
from nexus_ds.settings import CHUNK_WARM_STARTS, RouterConfig
from nexus_ds.warm_start.fit_text import FitText
from nexus_ds.warm_start.methods import (
    Features,
    mean,
    parts,
    warm_start_embeddings,
    warm_start_projection,
)
from nexus_ds.warm_start.starts import check_start

# Warm starts that keep the old expert embeddings in an extension, and so what these are fitted to.
KEEPING = ("label_fit", "hidden_mean")
ITERATIVE = ("label_fit", "chunks")


# The checkpoint, layer by layer -------------------------------------------------------------------


def _empty_model(directory: Path, config: ConfigJson) -> Any:
    """Return the mixture as its family's own model, without memory for its weights."""
    # transformers is imported here: the fit is one of few things that need it.
    from transformers import AutoModelForCausalLM

    from nexus_ds.checkpoint.native import empty_mixture

    with told_in_one_line(directory):
        if config["model_type"] not in PLAIN:
            return empty_mixture(config, False, torch.float32)
        own = transformers_config(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(own)
    return model


class _Calls:
    """What a decoder gives its first layer, and how it calls each: positions and masks of its kind.

    Its layers are not run.
    """

    def __init__(self, decoder: Any, tokens_NS: Tensor) -> None:
        """Run a decoder whose embeddings alone are in memory."""
        self.entered: list[Tensor] = []
        self.arguments: dict[int, dict[str, object]] = {}
        for layer, block in enumerate(decoder.layers):
            block.forward = self._noted(layer)
        norm, decoder.norm = decoder.norm, nn.Identity()
        for tokens_nS in tokens_NS.split(FIT_BATCH):
            decoder(input_ids=tokens_nS, use_cache=False)
        self.hidden_NSH = torch.cat(self.entered)
        # once more, so that what is the same for all windows has one row
        decoder(input_ids=tokens_NS[:1], use_cache=False)
        decoder.norm = norm
        for block in decoder.layers:
            del block.forward

    def _noted(self, layer: int) -> Callable[..., Tensor]:
        def note(hidden_nSH: Tensor, **arguments: object) -> Tensor:
            if layer == 0:
                self.entered.append(hidden_nSH)
            self.arguments[layer] = arguments
            return hidden_nSH

        return note


def _on_device(value: object) -> object:
    """Return an argument of a call with its tensors on the device."""
    if isinstance(value, tuple):
        return tuple(_on_device(item) for item in value)
    return value.to(device()) if isinstance(value, Tensor) else value


def _place_for(size: int) -> torch.device:
    """Return the device if `size` bytes are a small part of its free memory, else the CPU."""
    place = device()
    return place if features_fit(size, room_on(place)) else torch.device("cpu")


class _Stream:
    """Hidden states of all windows on their way through a checkpoint."""

    def __init__(self, directory: Path, tokens_NS: Tensor) -> None:
        config_json, reader = open_moe(directory)
        self.reader = TensorReader.of(reader)
        self.model = _empty_model(directory, config_json)
        self.config = self.model.config
        # A layer on its own has no attention chosen for it, and the eager one is not causal without
        # a mask: a family that has no other (Gemma 2) makes one.
        if self.model._supports_sdpa:
            self.config._attn_implementation = "sdpa"
        self.config._experts_implementation = "eager"
        self.dtype = torch.float32
        self.layers = LayerReader(self.reader, self.config, self.dtype, device())
        fill(self.model, "model.embed_tokens.", self.reader, self.dtype)
        with torch.no_grad():
            calls = _Calls(self.model.model, tokens_NS)
        # In main memory, of which there is more than on a device: batches of it visit that.
        self.hidden_NSH = calls.hidden_NSH
        self.arguments = calls.arguments
        self.called: dict[str, object] = {}

    def _batches(self) -> list[slice]:
        starts = range(0, len(self.hidden_NSH), FIT_BATCH)
        return [slice(start, start + FIT_BATCH) for start in starts]

    def load(self, layer: int) -> Any:
        """Return one layer with its weights, on the device; what follows runs this one."""
        # Taken out of the model: its weights go when the caller is done with it.
        block = self.model.model.layers[layer]
        self.model.model.layers[layer] = nn.Identity()
        self.layers.fill(block, layer)
        # what the decoder gives it, to be there once and not with every batch
        self.called = {name: _on_device(value) for name, value in self.arguments[layer].items()}
        return block.eval()

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor has in the checkpoint."""
        return DTYPES[self.reader.info(name).dtype]

    def store(self, name: str, tensor: Tensor) -> Tensor:
        """Overwrite a tensor of the checkpoint; return it as read back, in this stream's dtype."""
        self.reader.overwrite(name, tensor.cpu())
        rounded = tensor.to(self.stored_dtype(name))
        return rounded.to(device(), self.dtype)

    def _run(self, block: Any, batch: slice) -> Tensor:
        """Return what leaves the layer of some windows [n, S, H]."""
        hidden_nSH = self.hidden_NSH[batch].to(device())
        return block(hidden_nSH, **self.called)

    def _inputs(self, block: Any, batch: slice) -> Tensor:
        """Return what the layer's MoE block reads of some windows [n, S, H]."""
        # Made anew where it is needed: attention is cheaper than memory for all windows.
        read: list[Tensor] = []

        def note(x_nSH: Tensor) -> Tensor:
            read.append(x_nSH)
            return x_nSH

        block.mlp.forward = note
        self._run(block, batch)
        del block.mlp.forward
        return read[0]

    @torch.no_grad()
    def features(self, block: Any, mean_H: Tensor | None) -> Tensor:
        """Return what a router scores [T, H]: its input, or its running mean less `mean_H`.

        On the device where there is much room for it, else in main memory.
        """
        place = _place_for(self.hidden_NSH.nbytes)
        features_NSH = torch.empty_like(self.hidden_NSH, device=place)
        for batch in self._batches():
            x_nSH = self._inputs(block, batch)
            if mean_H is not None:
                x_tH = x_nSH.flatten(0, 1)
                x_nSH = context(x_tH, x_nSH.shape[1], mean_H).view_as(x_nSH)
            features_NSH[batch] = x_nSH
        return features_NSH.flatten(0, 1)

    @torch.no_grad()
    def advance(self, block: Any, embeddings_EH: Tensor, mean_H: Tensor | None) -> None:
        """Advance the states past the layer, routed by `embeddings_EH`."""
        gate = block.mlp.gate
        gate.weight = nn.Parameter(embeddings_EH, requires_grad=False)
        if mean_H is not None:
            gate.mean = nn.Parameter(mean_H, requires_grad=False)
        for batch in self._batches():
            self.hidden_NSH[batch] = self._run(block, batch).cpu()


# The text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """The text of a warm start, with what is known of it before a layer is run.

    Windows of domains with an expert come first; background follows.
    """

    tokens_NS: Tensor
    experts_L: Tensor
    """Expert of each token's domain."""
    labels_L: Tensor
    """The same, counted among the experts that have text."""
    inputs_EM: Tensor | None
    """What P reads of the domains of these experts; None for a linear router."""
    chunks_NM: Tensor | None
    """What P reads of each window; None for a warm start that doesn't ask."""


def _with_text(sidecar: Sidecar, text: FitText, start: str) -> list[int]:
    """Return the experts whose domain has text; DataError where a start needs text of all."""
    domains = [expert.domain for expert in sidecar.experts]
    missing = [domain for domain in domains if domain not in text.windows]
    if missing and start not in CHUNK_WARM_STARTS:
        raise DataError(
            f"the router's warm start {start} has no text of {', '.join(missing)}; "
            "expected text of every expert's domain"
        )
    return [index for index, domain in enumerate(domains) if domain in text.windows]


def _read(sidecar: Sidecar, text: FitText, start: str, length: int) -> _Reading:
    experts = _with_text(sidecar, text, start)
    known = [sidecar.experts[index].domain for index in experts]
    background = [domain for domain in text.windows if domain not in known]
    ordered = known + background
    windows = [text.windows[domain][:, :length] for domain in ordered]
    labelled = windows[: len(known)]
    tokens_of = torch.tensor([window.numel() for window in labelled])
    experts_L = torch.tensor(experts).repeat_interleave(tokens_of)
    labels_L = torch.arange(len(known)).repeat_interleave(tokens_of)
    inputs_EM = chunks_NM = None
    if sidecar.router.kind == "nexus":
        all_inputs = domain_inputs(sidecar)
        inputs_EM = all_inputs[experts].to(device())
    if text.chunks:
        vectors = [text.chunks[domain] for domain in ordered]
        vectors_NM = torch.cat(vectors)
        chunks_NM = inputs_of(sidecar, vectors_NM).to(device())
    return _Reading(
        tokens_NS=torch.cat(windows),
        experts_L=experts_L.to(device()),
        labels_L=labels_L.to(device()),
        inputs_EM=inputs_EM,
        chunks_NM=chunks_NM,
    )


# The warm start -----------------------------------------------------------------------------------


def _share(features_TH: Tensor, experts_L: Tensor, embeddings_EH: Tensor) -> float:
    """Return the share of the labelled tokens whose first choice is their domain's expert."""
    features_LH = features_TH[: len(experts_L)]
    embeddings_EH = embeddings_EH.to(experts_L.device, features_TH.dtype)
    own = 0.0
    for part, features_tH in parts(features_LH, experts_L.device):
        chosen_t = F.linear(features_tH, embeddings_EH).argmax(-1)
        own += float((chosen_t == experts_L[part]).sum())
    return own / len(experts_L)


@dataclass(frozen=True)
class _WarmStart:
    """What is done to the router of every layer."""

    sidecar: Sidecar
    """Gets the started projections."""
    reading: _Reading
    config: RouterConfig
    seed: int
    kept: int

    def pass_layer(self, stream: _Stream, layer: int) -> tuple[float, float]:
        """Start one layer's router in place and take the states past the layer.

        Returns:
            The own-domain share before and after.
        """
        block = stream.load(layer)
        gate = block.mlp.gate
        old_EH = gate.weight.detach().clone()
        mean_H = None
        if self.sidecar.router.input == "context":
            mean_H = gate.mean.detach().clone()
        experts_L = self.reading.experts_L
        features_TH = stream.features(block, mean_H)
        before = _share(features_TH, experts_L, old_EH)

        # embeddings that stay were fitted to the mean that is there
        keeps_old = self.kept > 0 and self.config.warm_start in KEEPING
        if mean_H is not None and not keeps_old:
            mean_H = self._new_mean(stream, layer, block)
            features_TH = stream.features(block, mean_H)
        name = gate_name(layer)
        dtype = stream.stored_dtype(name)
        new_EH = self._start(layer, features_TH, old_EH, dtype)
        # As stored: later layers, like every later reader, see rounded embeddings.
        new_EH = stream.store(name, new_EH)
        after = _share(features_TH, experts_L, new_EH)
        stream.advance(block, new_EH, mean_H)
        return before, after

    def _new_mean(self, stream: _Stream, layer: int, block: Any) -> Tensor:
        """Store and return the mean [H] of the normalised running means of this text."""
        zeros_H = torch.zeros_like(block.mlp.gate.mean)
        normed_TH = stream.features(block, zeros_H)
        return stream.store(mean_name(layer), mean(normed_TH, device()))

    def _start(self, layer: int, features_TH: Tensor, old_EH: Tensor, dtype: torch.dtype) -> Tensor:
        """Return one layer's expert embeddings [E, H].

        Free ones in fp32; P(D) as a model of `dtype` computes it, P is in the sidecar then.
        """
        reading = self.reading
        generator = layer_generator(self.seed, layer)
        features = Features(features_TH, reading.labels_L, reading.inputs_EM, reading.chunks_NM)
        if self.sidecar.router.kind == "linear":
            old_EH = old_EH.float()
            return warm_start_embeddings(old_EH, features, self.config, self.kept, generator)
        projection = load_projection(self.sidecar, layer).to(device())
        warm_start_projection(projection, features, self.config, generator)
        self.sidecar.projections[layer] = state_of(projection.state_dict())
        return expert_embeddings(self.sidecar, layer, dtype)


def fit_router(
    directory: Path,
    text: FitText,
    config: RouterConfig,
    seed: int,
    kept: int = 0,
) -> FitReport:
    """Start the routers of a Nexus checkpoint in place: stored embeddings and sidecar.

    Args:
        directory: a Nexus checkpoint that nobody else reads yet.
        text: of every expert's domain; for `chunks` and `closed_form` of at least the first ones.
        config: `warm_start`, `fit_steps`, `fit_lr`.
        seed: of the drawn tokens.
        kept: experts that were there before an extension.

    Raises:
        ConfigError: a start that this router can't have.
        DataError: an expert's domain has no windows.
    """
    start = config.warm_start
    sidecar = read_sidecar(directory)
    check_start(start, sidecar.router.kind, sidecar.router.projection)
    settings = transformers_config(directory)
    length = min(window.shape[1] for window in text.windows.values())
    reading = _read(sidecar, text, start, length)
    warm_start = _WarmStart(sidecar, reading, config, seed, kept)
    need = need_of(directory, "fp32", device())
    warn_of_time(f"warm start {start}", need, reading.tokens_NS.numel(), device())
    stream = _Stream(directory, reading.tokens_NS)
    layers = settings.num_hidden_layers
    before = after = 0.0
    with Progress(f"warm start {start}", layers, "layers") as progress:
        for layer in range(layers):
            share_before, share_after = warm_start.pass_layer(stream, layer)
            before += share_before
            after += share_after
            progress.advance()
    write_sidecar(directory, sidecar)
    return FitReport(
        before=before / layers,
        after=after / layers,
        steps=config.fit_steps if start in ITERATIVE else 0,
        start=start,
        nearest=text.nearest or _nearest(sidecar, text, reading.chunks_NM),
    )


def _nearest(sidecar: Sidecar, text: FitText, chunks_NM: Tensor | None) -> dict[str, float]:
    """Return for each domain without text the cosine of what P reads of it to the nearest chunk."""
    if chunks_NM is None:
        return {}
    inputs_EM = unit(domain_inputs(sidecar))
    chunks_NM = unit(chunks_NM.cpu())
    cosines_EN = inputs_EM @ chunks_NM.T
    nearest_E = cosines_EN.amax(1).tolist()
    found = {}
    for expert, cosine in zip(sidecar.experts, nearest_E, strict=True):
        # text of its own says more of a domain than the nearest chunk of others
        if expert.domain not in text.windows:
            found[expert.domain] = cosine
    return found
