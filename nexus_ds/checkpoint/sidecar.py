"""The Nexus checkpoint: a stock Qwen2-MoE, plus a sidecar that lets it be trained and extended.

    config.json, model*.safetensors, tokenizer    what transformers, vLLM and llama.cpp read
    nexus.json                                    experts, router, encoder, lineage, versions
    nexus/nexus_router.safetensors                domain embeddings, their centre, P of each layer
                                                  (fp32)

The router's file has a folder of its own because vLLM and SGLang load all *.safetensors that lie
beside model.safetensors as weights of the model; where it lies beside it, as it first did, it is
read all the same. The expert embeddings in the model file are P(D) in the model's dtype: redundant,
and checked by `verify_expert_embeddings`.
Not covered: the model file itself (`qwen2_moe`, `tensors`), nexus.json on its own (`records`),
tokenizers (`tokenizer`), training states (`runtime.states`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from nexus_ds import __version__
from nexus_ds.checkpoint.config_json import CONTEXT_MODEL
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.projections import Projections, State
from nexus_ds.checkpoint.qwen2_moe import gate_name, open_moe
from nexus_ds.checkpoint.records import (
    ADOPT,
    ROUTER,
    ROUTER_BEFORE,
    SIDECAR,
    Manifest,
    RouterRecord,
    manifest_json,
    read_manifest,
    router_name,
)
from nexus_ds.checkpoint.tensors import TensorReader, write_planned
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.model.router import Projection, condition, expert_embeddings_in
from nexus_ds.model.threads import one_thread
from nexus_ds.outputs import new_file, write_json

Named = tuple[str, Tensor]
Planned = dict[str, tuple[str, tuple[int, ...]]]
LAYER_TENSOR = re.compile(r"layers\.(?P<layer>\d+)\.(?P<own>.+)")
"""Name of a tensor of one layer's P."""
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file that `content_fingerprint` reads
EMBEDDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Largest difference of stored and recomputed expert embeddings, relative to the largest entry.

Machines differ in summing order.
"""


@dataclass(kw_only=True)
class Sidecar(Manifest):
    """What a Nexus checkpoint holds besides the Qwen2-MoE; n experts, m the embedding's width."""

    vectors: Tensor
    """Raw domain embeddings [n, m] fp32, in expert order."""
    centre: Tensor
    """[m] fp32: mean of the upcycled domains' unit vectors; zeros when `router.centre` is off."""
    projections: list[State] | Projections = field(default_factory=list)
    """State of `Projection` for each layer, fp32; empty for a linear router."""

    def domain_inputs(self) -> Tensor:
        """Return what P reads of the experts' domains, [n, m] fp32; see `inputs_of`."""
        return self.inputs_of(self.vectors)

    def inputs_of(self, vectors: Tensor) -> Tensor:
        """Return what P reads of raw embeddings [.., m]: as they are where centring is off."""
        return condition(vectors, self.centre) if self.router.centre else vectors


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    found = {"nexus_ds": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "deepspeed"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _on_disk(state: Mapping[str, Tensor], layer: int | None = None) -> Iterator[Named]:
    """Yield the tensors of a layer's P, or of no layer, under their names on disk."""
    lead = "" if layer is None else f"layers.{layer}."
    for name, tensor in state.items():
        # fp32 whatever the model is in: its rows are recomputed from these
        full = tensor.detach().float()
        yield lead + name, full.cpu().contiguous()


def _sidecar_tensors(sidecar: Sidecar) -> Iterator[Named]:
    """Yield the sidecar's tensors under their names on disk, one layer's at a time."""
    yield from _on_disk({"vectors": sidecar.vectors, "centre": sidecar.centre})
    for layer, state in enumerate(sidecar.projections):
        yield from _on_disk(state, layer)


def _fail(where: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: {what}; the sidecar is damaged or of another model, "
        "restore it from where it came"
    )


def _check_finite(named: Iterable[Named], where: Path) -> Planned:
    """Return dtypes and shapes of tensors; CheckpointError for one that holds no numbers."""
    plan: Planned = {}
    for name, tensor in named:
        plan[name] = "F32", tuple(tensor.shape)
        # one that is not finite leaves no sum finite, and counting takes twenty times as long
        if math.isfinite(float(tensor.sum())):
            continue
        odd = tensor.numel() - int(torch.isfinite(tensor).sum())
        if odd:
            _fail(where, f"{name} holds {odd} values that are not finite")
    return plan


@one_thread()
def check_sidecar(sidecar: Sidecar, where: Path) -> Planned:
    """Return dtype and shape of each tensor on disk; each layer's P is looked at once.

    Raises:
        CheckpointError: the parts of a sidecar contradict each other.
    """
    experts = len(sidecar.experts)
    names = [expert.name for expert in sidecar.experts]
    shape = tuple(sidecar.vectors.shape)
    encoder = sidecar.encoder
    router = sidecar.router
    if len(shape) != 2 or shape[0] != experts or not experts:
        _fail(where, f"{experts} experts but domain embeddings of shape {shape}")
    if len(set(names)) != experts:
        _fail(where, f"the experts' names {names} are not all different")
    if sidecar.centre.shape != shape[1:]:
        _fail(where, f"centre of shape {tuple(sidecar.centre.shape)}, embeddings {shape}")
    if encoder and encoder.dimension != shape[1]:
        _fail(where, f"encoder of dimension {encoder.dimension}, embeddings {shape}")
    if sidecar.shared_expert not in ("seed", "none"):
        _fail(where, f"shared_expert is {sidecar.shared_expert!r}, expected seed or none")
    if bool(sidecar.projections) != (router.kind == "nexus"):
        _fail(where, f"a {router.kind} router with {len(sidecar.projections)} projections")
    own = {"vectors": sidecar.vectors, "centre": sidecar.centre}
    plan = _check_finite(_on_disk(own), where)
    for layer, state in enumerate(sidecar.projections):
        plan |= _check_finite(_on_disk(state, layer), where)
        _loaded(sidecar, layer, state, where)
    return plan


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Write or replace the sidecar's two files; CheckpointError if its parts contradict others."""
    directory = Path(directory)
    plan = check_sidecar(sidecar, directory)
    with new_file(directory / ROUTER, overwrite=True) as temporary:
        write_planned(temporary, plan, _sidecar_tensors(sidecar))
    # not a second one, which might be of another training
    (directory / ROUTER_BEFORE).unlink(missing_ok=True)
    # nexus.json comes last: it is what makes a directory a Nexus checkpoint.
    write_json(directory / SIDECAR, manifest_json(sidecar))


def _projections(reader: TensorReader) -> Projections:
    """Return the states of all layers' projections, each read when it is asked for."""
    layers: dict[int, dict[str, str]] = {}
    for name in reader.names():
        # layers.3.maps.0.weight
        found = LAYER_TENSOR.fullmatch(name)
        if found:
            layers.setdefault(int(found["layer"]), {})[found["own"]] = name
    numbers = sorted(layers)
    if numbers != list(range(len(layers))):
        raise CheckpointError(
            f"{reader.directory / ROUTER}: projections of layers {numbers}, expected all from 0"
        )

    def read(layer: int) -> State:
        return {own: reader.read(name) for own, name in layers[layer].items()}

    return Projections(len(layers), read)


def read_sidecar(directory: Path) -> Sidecar:
    """Read the sidecar of a Nexus checkpoint and check it against itself and against config.json.

    Raises:
        CheckpointError: no Nexus checkpoint, damaged, of another format, or of another model.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    reader = TensorReader.of_file(directory, router_name(directory))
    sidecar = Sidecar(
        **vars(manifest),
        vectors=reader.read("vectors"),
        centre=reader.read("centre"),
        projections=_projections(reader),
    )
    check_sidecar(sidecar, directory)
    _check_against_config(directory, sidecar)
    return sidecar


def _check_against_config(directory: Path, sidecar: Sidecar) -> None:
    """Raise CheckpointError where the sidecar tells of another model than config.json."""
    config = read_json_object(directory, "config.json")
    pairs: dict[str, object] = {
        "num_experts": len(sidecar.experts),
        "num_experts_per_tok": sidecar.router.top_k,
    }
    # A linear router's sidecar knows nothing of layers and their width.
    if sidecar.projections:
        last_map = load_projection(sidecar, 0).maps[-1]
        pairs["num_hidden_layers"] = len(sidecar.projections)
        pairs["hidden_size"] = last_map.out_features
    reads_context = sidecar.router.input == "context"
    known = config.get("model_type")
    form = known if known in MIXTURES and known != CONTEXT_MODEL else "qwen2_moe"
    pairs["model_type"] = CONTEXT_MODEL if reads_context else form
    for key, expected in pairs.items():
        found = config.get(key)
        if found != expected:
            _fail(directory, f"config.json has {key} {found!r}, {SIDECAR} says {expected}")


def content_fingerprint(directory: Path) -> str:
    """Return a sha256 that differs between models.

    It covers configuration and sidecar in full, weights by size and samples.
    Cheap at any size. It tells a retrained or another model apart; it is no proof against somebody
    who means to deceive.
    """
    digest = hashlib.sha256()
    directory = Path(directory)
    for path in [*sorted(directory.iterdir()), *sorted(directory.glob("nexus/*"))]:
        if path.name in ("config.json", SIDECAR, ROUTER_BEFORE):
            content = path.read_bytes()
            digest.update(path.name.encode() + content)
        elif path.suffix == ".safetensors":
            _add_samples(digest, path)
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    """Add name, size and evenly spaced samples of a weight file to a digest."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for part in range(SAMPLES):
            start = size * part // SAMPLES
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))


def new_projection(router: RouterRecord, embedding_size: int, hidden_size: int) -> Projection:
    """Return an untrained P of a recorded form, from embeddings [.., m] to rows [.., h]."""
    return Projection(
        embedding_size,
        hidden_size,
        router.depth,
        router.width,
        router.projection,
        router.row_norm,
    )


def load_projection(sidecar: Sidecar, layer: int, where: Path = Path(SIDECAR)) -> Projection:
    """Return P of one layer in fp32; CheckpointError if its weights are of another form."""
    return _loaded(sidecar, layer, sidecar.projections[layer], where)


def _loaded(sidecar: Sidecar, layer: int, stored: State, where: Path) -> Projection:
    """Return P of one layer with the weights `stored`; see `load_projection`."""
    router = sidecar.router
    # copies: whoever changes the module does not change the sidecar
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}
    width = sidecar.vectors.shape[1]
    maps = 1 if router.projection == "linear" else router.depth
    last = state.get(f"maps.{maps - 1}.weight")
    # Without a last map any size will do: what is there won't fit.
    hidden = last.shape[0] if last is not None and last.ndim == 2 else 1
    try:
        # Before anything of that size is built.
        largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
        if maps != sum(name.startswith("maps.") for name in state) or router.width > largest:
            raise ConfigError(f"{maps} maps of width {router.width}")
        # of no memory, and nothing is drawn, until it gets these
        with torch.device("meta"):
            projection = new_projection(router, width, hidden)
        projection.load_state_dict(state, assign=True)
    # torch's own word for weights that don't fit
    except (RuntimeError, ConfigError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise CheckpointError(
            f"{where}: P of layer {layer} has the weights {shapes}, which is not the form "
            f"{dataclasses.asdict(router)} on embeddings of dimension {width}; "
            "the sidecar is damaged"
        ) from error
    return projection


@one_thread()
def expert_embeddings(sidecar: Sidecar, layer: int, dtype: torch.dtype) -> Tensor:
    """Return what P(D) gives one layer of a model of `dtype`, [n, h] (paper section 3).

    Raises:
        CheckpointError: the router is linear: its expert embeddings are in the model file alone.
    """
    if sidecar.router.kind != "nexus":
        raise CheckpointError(
            "a linear router has free rows; they are in the model file, not in the sidecar"
        )
    projection = load_projection(sidecar, layer)
    return expert_embeddings_in(projection, sidecar.domain_inputs(), dtype)


def verify_expert_embeddings(directory: Path) -> None:
    """Check that the stored expert embeddings are P(D), recomputed in the model's dtype.

    There is nothing to check for a linear router.

    Raises:
        CheckpointError: those of a layer differ, or the checkpoint is damaged.
    """
    _, headers = open_moe(directory)
    check_rows_of(read_sidecar(directory), TensorReader.of(headers))


@one_thread()
def check_rows_of(sidecar: Sidecar, reader: TensorReader) -> None:
    """Check a model's stored expert embeddings; see `verify_expert_embeddings`."""
    for layer in range(len(sidecar.projections)):
        name = gate_name(layer)
        stored = reader.read(name)
        tolerance = EMBEDDING_TOLERANCE[stored.dtype]
        expected = expert_embeddings(sidecar, layer, stored.dtype).float()
        # rows of zeros, as a P of zeros gives them, have no relative error
        scale = expected.abs().max().clamp_min(1e-30)
        largest = (stored.float() - expected).abs().max()
        difference = float(largest / scale)
        # "not <=" is true of NaN as well.
        if not difference <= tolerance:
            raise CheckpointError(
                f"{reader.directory}: {name} differs from P(D) of {ROUTER} by "
                f"{difference:.1e} of its largest entry, expected at most "
                f"{tolerance:.1e}; model and sidecar are not "
                f"of one training, restore both from the same checkpoint; {ADOPT}"
            )
