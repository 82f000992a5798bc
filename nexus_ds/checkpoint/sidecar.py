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

import torch
from torch import Tensor

from nexus_ds import __version__
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.qwen2_moe import gate_name, open_moe
from nexus_ds.checkpoint.records import (
    SIDECAR,
    Manifest,
    RouterRecord,
    manifest_json,
    read_manifest,
)
from nexus_ds.checkpoint.tensors import TensorReader, write_tensors
from nexus_ds.errors import CheckpointError, ConfigError
from nexus_ds.model.context import CONTEXT_MODEL
from nexus_ds.model.router import Projection, condition, expert_embeddings_in
from nexus_ds.outputs import new_file, write_json

ROUTER = "nexus_router.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file that `content_fingerprint` reads
EMBEDDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Largest difference of stored and recomputed rows relative to the largest entry: machines differ
in summing order."""


@dataclass(kw_only=True)
class Sidecar(Manifest):
    """What a Nexus checkpoint holds besides the Qwen2-MoE; n experts, m the embedding's width."""

    vectors: Tensor
    """Raw domain embeddings [n, m] fp32, in expert order."""
    centre: Tensor
    """[m] fp32: mean of the upcycled domains' unit vectors; zeros when `router.centre` is off."""
    projections: list[dict[str, Tensor]] = field(default_factory=list)
    """State of `Projection` for each layer, fp32; empty for a linear router."""

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
    write_json(Path(directory) / SIDECAR, manifest_json(sidecar))


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


def read_sidecar(directory: Path) -> Sidecar:
    """Read the sidecar of a Nexus checkpoint and check it against itself and against config.json.

    Raises:
        CheckpointError: no Nexus checkpoint, damaged, of another format, or of another model.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    reader = TensorReader.of_file(directory, ROUTER)
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
    """Return P of one layer in fp32; CheckpointError if the stored weights are not those of the
    recorded form."""
    record, state = sidecar.router, sidecar.projections[layer]
    last = state.get(f"maps.{0 if record.projection == 'linear' else record.depth - 1}.weight")
    # any size: what is there won't fit it
    hidden = last.shape[0] if last is not None and last.ndim == 2 else 1
    try:
        projection = new_projection(record, sidecar.vectors.shape[1], hidden)
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
