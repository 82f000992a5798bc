"""Warm starts of the routers before training (a start, not a change of method); `methods` has what
is done to a layer.

A checkpoint is streamed layer by layer: the hidden states of all windows are kept, one layer's
weights at a time. Each router is fitted on the states that its layer really sees, earlier layers
already routing with their fitted rows. In a tiny replication the label fit lifted the own-domain
share from 0.37 to 0.57 for nexus and linear routers alike; without the new domain's text an
appended row P(d_new) hardly finds its expert.

Shapes: N windows, S tokens a window, T = N*S tokens, E routed experts, H hidden size, M width of an
embedding. The states of all windows stay in host memory; a layer and the states of its router's
input are on the device.
Not covered: windows longer than a sliding attention window (they are cut to it).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.checkpoint.build import transformers_config
from nexus_ds.checkpoint.loading import device
from nexus_ds.checkpoint.qwen2_moe import gate_name, mean_name
from nexus_ds.checkpoint.records import FitReport
from nexus_ds.checkpoint.sidecar import (
    Sidecar,
    expert_embeddings,
    load_projection,
    read_sidecar,
    write_sidecar,
)
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader, overwrite
from nexus_ds.errors import DataError
from nexus_ds.model.context import CONTEXT_MODEL, context
from nexus_ds.model.router import layer_generator, unit
from nexus_ds.progress import Progress
from nexus_ds.settings import CHUNK_WARM_STARTS, RouterConfig
from nexus_ds.warm_start.fit_text import FitText
from nexus_ds.warm_start.methods import (
    Features,
    check_start,
    warm_start_embeddings,
    warm_start_projection,
)

KEEPING = (
    "label_fit",
    "hidden_mean",
)  # starts that leave old rows, and so what they are scored against, in an extension
LAYER_BATCH = 8  # windows a forward pass


def _load_layer(config: Any, reader: TensorReader, layer: int, dtype: torch.dtype) -> Any:
    """Return one stock decoder layer with its weights."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

    kind: Any = Qwen2MoeDecoderLayer
    if config.model_type == CONTEXT_MODEL:
        from nexus_ds.checkpoint.hf_model import NexusMoeDecoderLayer as kind
    with torch.device("meta"):
        block = kind(config, layer)
    prefix = f"model.layers.{layer}."
    state = {
        name[len(prefix) :]: reader.read(name) for name in reader.names() if name.startswith(prefix)
    }
    experts = range(config.num_experts)
    state["mlp.experts.gate_up_proj"] = torch.stack(
        [
            torch.cat(
                [
                    state.pop(f"mlp.experts.{e}.gate_proj.weight"),
                    state.pop(f"mlp.experts.{e}.up_proj.weight"),
                ]
            )
            for e in experts
        ]
    )
    state["mlp.experts.down_proj"] = torch.stack(
        [state.pop(f"mlp.experts.{e}.down_proj.weight") for e in experts]
    )
    block.load_state_dict(
        {name: tensor.to(device(), dtype) for name, tensor in state.items()}, assign=True
    )
    return block.eval()


def _attend(
    block: Any, hidden_NSH: Tensor, positions: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the residual stream after attention and the router's input, both [N, S, H]."""
    attended, _ = block.self_attn(
        hidden_states=block.input_layernorm(hidden_NSH),
        position_embeddings=positions,
        attention_mask=None,
    )
    residual = hidden_NSH + attended
    return residual, block.post_attention_layernorm(residual)


def _share(x_TH: Tensor, labels_T: Tensor, embeddings_EH: Tensor) -> float:
    own_T = labels_T >= 0
    return float(
        (F.linear(x_TH[own_T], embeddings_EH.to(x_TH)).argmax(-1) == labels_T[own_T]).float().mean()
    )


def _with_text(sidecar: Sidecar, text: FitText, start: str) -> list[int]:
    """Return the experts whose domain has text; DataError where a start needs text of the others
    too."""
    domains = [expert.domain for expert in sidecar.experts]
    missing = [domain for domain in domains if domain not in text.windows]
    if missing and start not in CHUNK_WARM_STARTS:
        raise DataError(
            f"the router's warm start {start} has no text of {', '.join(missing)}; expected text of every expert's domain"
        )
    return [index for index, domain in enumerate(domains) if domain in text.windows]


@dataclass
class _Reading:
    """The text of a warm start, with what is known of it before a layer is run."""

    tokens_NS: Tensor
    own_T: Tensor
    """Expert of each token's domain; -1: background."""
    labels_T: Tensor
    """The same, counted among the experts that have text."""
    inputs_EM: Tensor | None
    chunks_NM: Tensor | None


def _read(sidecar: Sidecar, text: FitText, start: str, length: int) -> _Reading:
    experts, place = _with_text(sidecar, text, start), device()
    known = [sidecar.experts[index].domain for index in experts]
    domains = known + [domain for domain in text.windows if domain not in known]
    tokens = [text.windows[domain][:, :length] for domain in domains]
    sizes = torch.tensor([window.numel() for window in tokens])
    background = [-1] * (len(domains) - len(known))
    labels_T = torch.tensor([*range(len(known)), *background]).repeat_interleave(sizes).to(place)
    nexus = sidecar.router.kind == "nexus"
    return _Reading(
        tokens_NS=torch.cat(tokens),
        own_T=torch.tensor([*experts, *background]).repeat_interleave(sizes).to(place),
        labels_T=labels_T,
        inputs_EM=sidecar.domain_inputs()[experts].to(place) if nexus else None,
        chunks_NM=sidecar.inputs_of(torch.cat([text.chunks[d] for d in domains])).to(place)
        if text.chunks
        else None,
    )


class _Stream:
    """Hidden states of all windows on their way through a checkpoint."""

    def __init__(self, directory: Path, tokens_NS: Tensor) -> None:
        self.reader, self.config = TensorReader(directory), transformers_config(directory)
        # A layer on its own has no attention chosen for it, and the eager one is not causal without
        # a mask.
        self.config._attn_implementation, self.config._experts_implementation = "sdpa", "eager"
        self.dtype = torch.float32
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding

        self.hidden_NSH = F.embedding(
            tokens_NS, self.reader.read("model.embed_tokens.weight").to(self.dtype)
        )
        where = torch.arange(tokens_NS.shape[1])[None]
        cos, sin = Qwen2MoeRotaryEmbedding(self.config)(self.hidden_NSH, where)
        self.positions = cos.to(device()), sin.to(device())

    @torch.no_grad()
    def attend(self, block: Any) -> Tensor:
        """Advance the states past the layer's attention; return the router's input [T, H]."""
        inputs = []
        for start in range(0, len(self.hidden_NSH), LAYER_BATCH):
            part = slice(start, start + LAYER_BATCH)
            residual, x = _attend(block, self.hidden_NSH[part].to(device()), self.positions)
            self.hidden_NSH[part] = residual.cpu()
            inputs.append(x)
        return torch.cat(inputs).flatten(0, 1)

    def store(self, name: str, tensor: Tensor) -> Tensor:
        """Overwrite a tensor of the checkpoint; return it as it is there, in this stream's
        dtype."""
        info = self.reader.info(name)
        overwrite(info, tensor.cpu())
        return tensor.to(DTYPES[info.dtype]).to(device(), self.dtype)

    def read(self, x_TH: Tensor, mean_H: Tensor | None) -> Tensor:
        """Return what a router reads of its input [T, H]: the input itself, or its running mean
        less `mean_H`."""
        return x_TH if mean_H is None else context(x_TH, self.hidden_NSH.shape[1], mean_H)

    @torch.no_grad()
    def feed_forward(
        self, block: Any, x_TH: Tensor, embeddings_EH: Tensor, mean_H: Tensor | None
    ) -> None:
        """Advance the states past the layer's MoE block, routed by `embeddings_EH`."""
        gate, x_NSH = block.mlp.gate, x_TH.view(self.hidden_NSH.shape)
        gate.weight = nn.Parameter(embeddings_EH, requires_grad=False)
        if mean_H is not None:
            gate.mean = nn.Parameter(mean_H, requires_grad=False)
        with nullcontext() if mean_H is None else gate.reading(x_NSH.shape[1]):
            for start in range(0, len(x_NSH), LAYER_BATCH):
                part = slice(start, start + LAYER_BATCH)
                self.hidden_NSH[part] += block.mlp(x_NSH[part]).cpu()


def fit_router(
    directory: Path, text: FitText, config: RouterConfig, seed: int, kept: int = 0
) -> FitReport:
    """Start the routers of the Nexus checkpoint `directory` in place: P (or free rows), the sidecar
    and the stored rows.

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
    sidecar, start = read_sidecar(directory), config.warm_start
    check_start(start, sidecar.router.kind, sidecar.router.projection)
    settings = transformers_config(directory)
    length = min(w.shape[1] for w in text.windows.values())
    if getattr(settings, "use_sliding_window", False):
        length = min(length, settings.sliding_window)
    reading = _read(sidecar, text, start, length)
    stream, shares = _Stream(directory, reading.tokens_NS), []
    with Progress(f"warm start {start}", settings.num_hidden_layers, "layers") as progress:
        for layer in range(settings.num_hidden_layers):
            generator = layer_generator(seed, layer)
            shares.append(_pass_layer(stream, layer, sidecar, reading, config, generator, kept))
            progress.advance()
    write_sidecar(directory, sidecar)
    before, after = (sum(s[i] for s in shares) / len(shares) for i in (0, 1))
    steps = config.fit_steps if start in ("label_fit", "chunks") else 0
    return FitReport(before, after, steps, start, _nearest(sidecar, text, reading.chunks_NM))


def _nearest(sidecar: Sidecar, text: FitText, chunks_NM: Tensor | None) -> dict[str, float]:
    """Return for each domain without text the cosine of what P reads of it to that of the nearest
    chunk."""
    if chunks_NM is None:
        return {}
    cosines_EN = unit(sidecar.domain_inputs()) @ unit(chunks_NM.cpu()).T
    pairs = zip(sidecar.experts, cosines_EN.amax(1).tolist(), strict=True)
    return {expert.domain: cosine for expert, cosine in pairs if expert.domain not in text.windows}


def _pass_layer(
    stream: _Stream,
    layer: int,
    sidecar: Sidecar,
    reading: _Reading,
    config: RouterConfig,
    generator: torch.Generator,
    kept: int,
) -> tuple[float, float]:
    """Start one layer's router in place and take the states past it; return the own-domain share
    before and after."""
    block = _load_layer(stream.config, stream.reader, layer, stream.dtype)
    x_TH, old_EH = stream.attend(block), block.mlp.gate.weight.detach().clone()
    mean_H = block.mlp.gate.mean.detach().clone() if sidecar.router.input == "context" else None
    features_TH = stream.read(x_TH, mean_H)
    before = _share(features_TH, reading.own_T, old_EH)
    if mean_H is not None and not (kept and config.warm_start in KEEPING):
        mean_H = stream.store(mean_name(layer), (features_TH + mean_H).mean(0))
        features_TH = stream.read(x_TH, mean_H)
    seen = Features(features_TH, reading.labels_T, generator, reading.inputs_EM, reading.chunks_NM)
    dtype = DTYPES[stream.reader.info(gate_name(layer)).dtype]
    embeddings_EH = stream.store(
        gate_name(layer), _start_layer(sidecar, layer, seen, old_EH, config, kept, dtype)
    )
    stream.feed_forward(block, x_TH, embeddings_EH, mean_H)
    return before, _share(features_TH, reading.own_T, embeddings_EH)


def _start_layer(
    sidecar: Sidecar,
    layer: int,
    seen: Features,
    old_EH: Tensor,
    config: RouterConfig,
    kept: int,
    dtype: torch.dtype,
) -> Tensor:
    """Start one layer and return its rows [E, H]: free ones in fp32, P(D) as a model of `dtype`
    computes it."""
    if sidecar.router.kind == "linear":
        return warm_start_embeddings(old_EH.float(), seen, config, kept)
    projection = load_projection(sidecar, layer).to(seen.x_TH.device)
    warm_start_projection(projection, seen, config)
    sidecar.projections[layer] = {
        name: tensor.detach().cpu() for name, tensor in projection.state_dict().items()
    }
    return expert_embeddings(sidecar, layer, dtype)
