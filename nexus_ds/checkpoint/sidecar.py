"""The Nexus checkpoint: a stock Qwen2-MoE directory, plus a sidecar that lets it be trained on and
extended.

    config.json, model*.safetensors, tokenizer files     what transformers, vLLM and llama.cpp read
    nexus.json                                           experts, router, encoder, lineage, versions
    nexus_router.safetensors                             domain embeddings, their centre, P of each
    layer (fp32)

The router rows in the model file are P(D) in the model's dtype: redundant, and checked by
`verify_expert_embeddings`.
Not covered: the model file itself (`qwen2_moe`, `tensors`), tokenizers (`tokenizer`), training
states (`runtime.states`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from nexus_ds import __version__
from nexus_ds.checkpoint.qwen2_moe import gate_name, open_moe
from nexus_ds.checkpoint.tensors import (
    TensorReader,
    read_json_object,
    require_directory,
    write_tensors,
)
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.model.context import CONTEXT_MODEL
from nexus_ds.model.router import Projection, condition, expert_embeddings_in
from nexus_ds.outputs import new_file, write_json

SIDECAR, ROUTER = "nexus.json", "nexus_router.safetensors"
FORMAT = 2
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file that `content_fingerprint` reads
EMBEDDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Largest difference of stored and recomputed rows relative to the largest entry: machines differ
in summing order."""

Record = TypeVar("Record")


@dataclass
class ExpertRecord:
    """A routed expert: where its FFN came from."""

    name: str
    domain: str
    source: str
    """Path of the dense model as it was given; of an absolute path the last part."""
    sha256: str
    """Of the dense model's FFN tensors, see `tensorfile.sha256_of_tensors`."""


@dataclass
class EncoderRecord:
    """The sentence encoder of the domain embeddings; only embeddings of the same one can be
    appended."""

    name: str
    revision: str
    """Hash of its weights."""
    dimension: int
    documents: int
    """Documents per domain that were averaged (of the domain with the fewest)."""
    normalised: bool
    """Whether each document's embedding had length one."""


@dataclass
class RouterRecord:
    """The form of the router; see `RouterConfig`."""

    kind: str
    depth: int
    width: int
    """Inner width of P; 0: the hidden size."""
    projection: str
    """Form of P: swiglu | gelu | relu | linear."""
    row_norm: str
    """free | fixed."""
    input: str
    """token | context."""
    centre: bool
    top_k: int

    def new_projection(self, embedding_size: int, hidden_size: int) -> Projection:
        """Return an untrained P of this form."""
        return Projection(
            embedding_size, hidden_size, self.depth, self.width, self.projection, self.row_norm
        )


@dataclass
class Sidecar:
    """What a Nexus checkpoint holds besides the Qwen2-MoE; n experts, m the embedding's
    dimension."""

    experts: list[ExpertRecord]
    router: RouterRecord
    encoder: EncoderRecord | None
    lineage: list[dict[str, Any]]
    """One entry a verb that made or changed the model, oldest first."""
    versions: dict[str, str]
    vectors: Tensor
    """Raw domain embeddings [n, m] fp32, in expert order."""
    centre: Tensor
    """[m] fp32: mean of the upcycled domains' unit vectors; zeros when `router.centre` is off."""
    projections: list[dict[str, Tensor]] = field(default_factory=list)
    """State of `Projection` for each layer, fp32; empty for a linear router."""
    shared_expert: str = "seed"
    """seed | none: its weights are zeros."""

    def domain_inputs(self) -> Tensor:
        """Return what P reads, [n, m] fp32: the conditioned embeddings, or the raw ones where
        centring is off."""
        return self.inputs_of(self.vectors)

    def inputs_of(self, vectors: Tensor) -> Tensor:
        """Return what P reads of raw embeddings [.., m], as `domain_inputs` does of the
        experts'."""
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


def is_nexus(directory: Path) -> bool:
    """Return whether a directory is a Nexus checkpoint (has the sidecar)."""
    return (Path(directory) / SIDECAR).is_file()


def _sidecar_tensors(sidecar: Sidecar) -> dict[str, Tensor]:
    """Return the sidecar's tensors under their names on disk."""
    tensors = {"vectors": sidecar.vectors, "centre": sidecar.centre}
    for layer, state in enumerate(sidecar.projections):
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def _fail(where: Path, what: str) -> None:
    raise CheckpointError(
        f"{where}: {what}; the sidecar is damaged or of another model, restore it from where it came"
    )


def check_sidecar(sidecar: Sidecar, where: Path) -> None:
    """Raise CheckpointError where the parts of a sidecar contradict each other."""
    experts, names = len(sidecar.experts), [expert.name for expert in sidecar.experts]
    if sidecar.vectors.ndim != 2 or len(sidecar.vectors) != experts or not experts:
        _fail(
            where,
            f"{experts} experts but domain embeddings of shape {tuple(sidecar.vectors.shape)}",
        )
    if len(set(names)) != experts:
        _fail(where, f"the experts' names {names} are not all different")
    if sidecar.centre.shape != sidecar.vectors.shape[1:]:
        _fail(
            where,
            f"centre of shape {tuple(sidecar.centre.shape)}, embeddings {tuple(sidecar.vectors.shape)}",
        )
    if sidecar.encoder and sidecar.encoder.dimension != sidecar.vectors.shape[1]:
        _fail(
            where,
            f"encoder of dimension {sidecar.encoder.dimension}, embeddings {tuple(sidecar.vectors.shape)}",
        )
    if sidecar.shared_expert not in ("seed", "none"):
        _fail(where, f"shared_expert is {sidecar.shared_expert!r}, expected seed or none")
    if bool(sidecar.projections) != (sidecar.router.kind == "nexus"):
        _fail(where, f"a {sidecar.router.kind} router with {len(sidecar.projections)} projections")
    for name, tensor in _sidecar_tensors(sidecar).items():
        if not bool(torch.isfinite(tensor).all()):
            _fail(
                where,
                f"{name} holds {int((~torch.isfinite(tensor)).sum())} values that are not finite",
            )
    for layer in range(len(sidecar.projections)):
        load_projection(sidecar, layer, where)


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Write or replace nexus.json and nexus_router.safetensors; CheckpointError if the parts
    contradict each other."""
    check_sidecar(sidecar, Path(directory))
    with new_file(Path(directory) / ROUTER, overwrite=True) as temporary:
        write_tensors(temporary, _sidecar_tensors(sidecar))
    value = {
        "format": FORMAT,
        "experts": [dataclasses.asdict(expert) for expert in sidecar.experts],
        "router": dataclasses.asdict(sidecar.router),
        "encoder": dataclasses.asdict(sidecar.encoder) if sidecar.encoder else None,
        "lineage": sidecar.lineage,
        "versions": sidecar.versions,
        "shared_expert": sidecar.shared_expert,
    }
    write_json(Path(directory) / SIDECAR, value)


def _record(cls: type[Record], value: Any, where: str) -> Record:
    """Build a record from JSON, refusing missing, unknown and mistyped fields."""
    hints = get_type_hints(cls)
    if not isinstance(value, dict) or set(value) != set(hints):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(
            f"{where}: found {found}, expected {sorted(hints)}; the sidecar is damaged"
        )
    for name, kind in hints.items():
        if type(value[name]) is not kind:
            raise CheckpointError(
                f"{where}.{name}: found {value[name]!r}, expected {kind.__name__}"
            )
    return cls(**value)


def _projections(reader: TensorReader) -> list[dict[str, Tensor]]:
    """Return the states of all layers' projections."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name in reader.names():
        words = name.split(".", 2)
        if words[0] == "layers" and len(words) == 3 and words[1].isdigit():
            layers.setdefault(int(words[1]), {})[words[2]] = reader.read(name)
    if sorted(layers) != list(range(len(layers))):
        raise CheckpointError(
            f"{reader.directory / ROUTER}: projections of layers {sorted(layers)}, expected all from 0"
        )
    return [layers[layer] for layer in range(len(layers))]


def _from_format_1(value: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a checkpoint of format 1 as of format 2, which names more forms of
    the router."""
    router = dict(value["router"]) if isinstance(value.get("router"), dict) else {}
    if "activation" in router:
        router |= {"projection": router.pop("activation"), "row_norm": "free", "input": "token"}
    return value | {"format": 2, "router": router, "shared_expert": "seed"}


def read_sidecar(directory: Path) -> Sidecar:
    """Read the sidecar of a Nexus checkpoint and check it against itself and against config.json.

    Raises:
        CheckpointError: no Nexus checkpoint, damaged, of another format, or of another model.
    """
    directory = require_directory(Path(directory))
    if not is_nexus(directory):
        raise CheckpointError(
            f"{directory} has no {SIDECAR}: it is no Nexus checkpoint; make one with nexus-ds upcycle"
        )
    value, where = read_json_object(directory, SIDECAR), f"{directory / SIDECAR}"
    if value.get("format") == 1:
        value = _from_format_1(value)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format {value.get('format')!r}, this version reads {FORMAT}; use a matching one"
        )
    if not isinstance(value.get("experts"), list) or not isinstance(value.get("lineage"), list):
        raise CheckpointError(
            f"{where}: expected lists of experts and lineage; the sidecar is damaged"
        )
    encoder = value.get("encoder")
    reader = TensorReader.of_file(directory, ROUTER)
    sidecar = Sidecar(
        experts=[
            _record(ExpertRecord, e, f"{where}: experts[{i}]")
            for i, e in enumerate(value["experts"])
        ],
        router=_record(RouterRecord, value.get("router"), f"{where}: router"),
        encoder=_record(EncoderRecord, encoder, f"{where}: encoder")
        if encoder is not None
        else None,
        lineage=value["lineage"],
        versions=value.get("versions") or {},
        vectors=reader.read("vectors"),
        centre=reader.read("centre"),
        projections=_projections(reader),
        shared_expert=value.get("shared_expert", ""),
    )
    check_sidecar(sidecar, directory)
    _check_against_config(directory, sidecar)
    return sidecar


def _check_against_config(directory: Path, sidecar: Sidecar) -> None:
    """Raise CheckpointError where the sidecar tells of another model than config.json."""
    config = read_json_object(directory, "config.json")
    pairs = {
        "num_experts": len(sidecar.experts),
        "num_experts_per_tok": sidecar.router.top_k,
        "num_hidden_layers": len(sidecar.projections) or config.get("num_hidden_layers"),
        "hidden_size": load_projection(sidecar, 0).maps[-1].out_features
        if sidecar.projections
        else config.get("hidden_size"),
        "model_type": CONTEXT_MODEL if sidecar.router.input == "context" else "qwen2_moe",
    }
    for key, found in pairs.items():
        if config.get(key) != found:
            _fail(directory, f"config.json has {key} {config.get(key)!r}, {SIDECAR} says {found}")


def content_fingerprint(directory: Path) -> str:
    """Return a sha256 that differs between models: configuration and sidecar in full, weights by
    size and samples.

    Cheap at any size. It tells a retrained or another model apart; it is no proof against somebody
    who means to deceive.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.name in ("config.json", SIDECAR, ROUTER):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for part in range(SAMPLES):
                    file.seek(size * part // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def load_projection(sidecar: Sidecar, layer: int, where: Path = Path(SIDECAR)) -> Projection:
    """Return P of one layer in fp32; CheckpointError if the stored weights are not those of the
    recorded form."""
    record, state = sidecar.router, sidecar.projections[layer]
    last = state.get(f"maps.{0 if record.projection == 'linear' else record.depth - 1}.weight")
    # any size: what is there won't fit it
    hidden = last.shape[0] if last is not None and last.ndim == 2 else 1
    try:
        projection = record.new_projection(sidecar.vectors.shape[1], hidden)
        projection.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (RuntimeError, ConfigError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise CheckpointError(
            f"{where}: P of layer {layer} has the weights {shapes}, which is not the form {dataclasses.asdict(record)} "
            f"on embeddings of dimension {sidecar.vectors.shape[1]}; the sidecar is damaged"
        ) from error
    return projection


def expert_embeddings(sidecar: Sidecar, layer: int, dtype: torch.dtype) -> Tensor:
    """Return the router weight [n, h] that P(D) gives one layer of a model of `dtype` (paper
    section 3).

    Raises:
        CheckpointError: the router is linear: its rows are in the model file alone.
    """
    if sidecar.router.kind != "nexus":
        raise CheckpointError(
            "a linear router has free rows; they are in the model file, not in the sidecar"
        )
    return expert_embeddings_in(load_projection(sidecar, layer), sidecar.domain_inputs(), dtype)


def verify_expert_embeddings(directory: Path) -> None:
    """Check that the stored router rows are P(D), recomputed in the model's dtype; nothing to check
    for linear ones.

    Raises:
        CheckpointError: the rows of a layer differ, or the checkpoint is damaged.
    """
    sidecar = read_sidecar(directory)
    _, reader = open_moe(directory)
    for layer in range(len(sidecar.projections)):
        stored = reader.read(gate_name(layer))
        expected = expert_embeddings(sidecar, layer, stored.dtype)
        scale = expected.float().abs().max().clamp_min(1e-30)
        difference = float((stored.float() - expected.float()).abs().max() / scale)
        if not difference <= EMBEDDING_TOLERANCE[stored.dtype]:
            raise CheckpointError(
                f"{directory}: {gate_name(layer)} differs from P(D) of {ROUTER} by {difference:.1e} of its largest "
                f"entry, expected at most {EMBEDDING_TOLERANCE[stored.dtype]:.1e}; model and sidecar are not "
                "of one training, restore both from the same checkpoint"
            )
