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
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import numpy as np

from nexus_ds import __version__
from nexus_ds.checkpoint.arithmetic import Floats
from nexus_ds.checkpoint.config_json import CONTEXT_MODEL
from nexus_ds.checkpoint.expert_rows import (
    TOLERANCE,
    WIDENING,
    Shapes,
    condition,
    last_map,
    maps_of,
    relative_difference,
    rows_in,
    shapes_of,
)
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.headers import Headers, Plan
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.new_files import write_file
from nexus_ds.checkpoint.projections import Projections, State
from nexus_ds.checkpoint.qwen2_moe import gate_name, open_moe
from nexus_ds.checkpoint.records import (
    ADOPT,
    ROUTER,
    ROUTER_BEFORE,
    SIDECAR,
    Manifest,
    manifest_json,
    read_manifest,
    router_name,
)
from nexus_ds.checkpoint.values import encoded, read_floats, read_values
from nexus_ds.errors import CheckpointError
from nexus_ds.inputs import read_bounded, require_file
from nexus_ds.outputs import new_file, write_json

LAYER_TENSOR = re.compile(r"layers\.(?P<layer>[0-9]{1,9})\.(?P<own>.+)")
"""Name of a tensor of one layer's P."""
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a weight file that `content_fingerprint` reads
FREE_ROWS = "a linear router has free rows; they are in the model file, not in the sidecar"


@dataclass(kw_only=True)
class Sidecar(Manifest):
    """What a Nexus checkpoint holds besides the Qwen2-MoE; n experts, m the embedding's width."""

    vectors: Floats
    """Raw domain embeddings [n, m] fp32, in expert order."""
    centre: Floats
    """[m] fp32: mean of the upcycled domains' unit vectors; zeros when `router.centre` is off."""
    projections: list[State] | Projections = field(default_factory=list)
    """P of each layer; empty for a linear router."""

    def domain_inputs(self) -> Floats:
        """Return what P reads of the experts' domains, [n, m] fp32; see `inputs_of`."""
        return self.inputs_of(self.vectors)

    def inputs_of(self, vectors: Floats) -> Floats:
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


def _fail(where: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: {what}; the sidecar is damaged or of another model, "
        "restore it from where it came"
    )


def check_parts(sidecar: Sidecar, where: Path) -> None:
    """Raise CheckpointError where the parts of a sidecar contradict each other."""
    experts = len(sidecar.experts)
    names = [expert.name for expert in sidecar.experts]
    shape = sidecar.vectors.shape
    encoder = sidecar.encoder
    router = sidecar.router
    if len(shape) != 2 or shape[0] != experts or not experts:
        _fail(where, f"{experts} experts but domain embeddings of shape {shape}")
    if len(set(names)) != experts:
        _fail(where, f"the experts' names {names} are not all different")
    if sidecar.centre.shape != shape[1:]:
        _fail(where, f"centre of shape {sidecar.centre.shape}, embeddings {shape}")
    if encoder and encoder.dimension != shape[1]:
        _fail(where, f"encoder of dimension {encoder.dimension}, embeddings {shape}")
    if sidecar.shared_expert not in ("seed", "none"):
        _fail(where, f"shared_expert is {sidecar.shared_expert!r}, expected seed or none")
    if bool(sidecar.projections) != (router.kind == "nexus"):
        _fail(where, f"a {router.kind} router with {len(sidecar.projections)} projections")


def form_of(sidecar: Sidecar, layer: int, state: State, where: Path = Path(SIDECAR)) -> Shapes:
    """Return the shapes of P's weights; CheckpointError where one layer's are of another form."""
    router = sidecar.router
    width = sidecar.vectors.shape[1]
    found = {name: weight.shape for name, weight in state.items()}
    maps = maps_of(router)
    last = found.get(last_map(router), ())
    # Before a name is made for each: nexus.json may say any number.
    there = sum(name.startswith("maps.") for name in state)
    if there == maps > 0 and len(last) == 2 and router.projection in WIDENING:
        expected = shapes_of(router, width, last[0])
        if found == expected:
            return expected
    raise CheckpointError(
        f"{where}: P of layer {layer} has the weights {found}, which is not the form "
        f"{dataclasses.asdict(router)} on embeddings of dimension {width}; "
        "the sidecar is damaged"
    )


def _checked(sidecar: Sidecar, where: Path) -> Iterator[tuple[str, Floats]]:
    """Yield all numbers under their names on disk, looked at, one layer's P at a time."""
    named = {"vectors": sidecar.vectors, "centre": sidecar.centre}
    yield from _finite(named, where)
    # by number: a loop over the states would hold one while the next is made
    for layer in range(len(sidecar.projections)):
        yield from checked_layer(sidecar, layer, sidecar.projections[layer], where)


def checked_layer(
    sidecar: Sidecar, layer: int, state: State, where: Path
) -> Iterator[tuple[str, Floats]]:
    """Yield one layer's P under its names on disk, in their order there, looked at.

    Raises:
        CheckpointError: of another form than the sidecar says, or not finite.
    """
    ordered = {own: state[own] for own in form_of(sidecar, layer, state, where)}
    yield from _finite(ordered, where, f"layers.{layer}.")


def _finite(state: State, where: Path, lead: str = "") -> Iterator[tuple[str, Floats]]:
    for own, values in state.items():
        # one that is not finite leaves no sum finite, and counting takes twenty times as long
        with np.errstate(all="ignore"):
            sound = math.isfinite(float(values.sum()))
        odd = 0 if sound else values.size - int(np.isfinite(values).sum())
        if odd:
            _fail(where, f"{lead}{own} holds {odd} values that are not finite")
        yield lead + own, values


def check_sidecar(sidecar: Sidecar, where: Path) -> None:
    """Raise CheckpointError where the parts of a sidecar contradict each other, or hold what is no
    number; each layer's P is looked at once."""
    check_parts(sidecar, where)
    named = {"vectors": sidecar.vectors, "centre": sidecar.centre}
    deque(_finite(named, where), maxlen=0)
    for layer in range(len(sidecar.projections)):
        # exhausted by what holds no tensor on to the next layer
        deque(checked_layer(sidecar, layer, sidecar.projections[layer], where), maxlen=0)


def router_plan(sidecar: Sidecar, form: Shapes) -> Plan:
    """Return what the router's file will hold; `form` has the shapes of one layer's P."""
    shapes: Shapes = {"vectors": sidecar.vectors.shape, "centre": sidecar.centre.shape}
    for layer in range(len(sidecar.projections)):
        shapes |= {f"layers.{layer}.{own}": shape for own, shape in form.items()}
    # fp32 whatever the model is in: its rows are recomputed from these
    return {name: ("F32", shape) for name, shape in shapes.items()}


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Write or replace the sidecar's two files; CheckpointError if its parts contradict others."""
    directory = Path(directory)
    check_parts(sidecar, directory)
    form: Shapes = {}
    if sidecar.projections:
        form = form_of(sidecar, 0, sidecar.projections[0], directory)
    plan = router_plan(sidecar, form)
    with new_file(directory / ROUTER, overwrite=True) as temporary:
        named = _checked(sidecar, directory)
        write_file(temporary, plan, ((name, encoded(x, "F32").data) for name, x in named))
    # not a second one, which might be of another training
    (directory / ROUTER_BEFORE).unlink(missing_ok=True)
    write_manifest(directory, sidecar)


def write_manifest(directory: Path, sidecar: Sidecar) -> None:
    """Write or replace nexus.json alone, beside a router's file of the same sidecar.

    It comes last: it is what makes a directory a Nexus checkpoint.
    """
    write_json(directory / SIDECAR, manifest_json(sidecar))


def _projections(reader: Headers) -> Projections:
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
        return {own: read_floats(reader, name) for own, name in layers[layer].items()}

    return Projections(len(layers), read)


def read_sidecar(directory: Path) -> Sidecar:
    """Read the sidecar of a Nexus checkpoint and check it against itself and against config.json.

    Raises:
        CheckpointError: no Nexus checkpoint, damaged, of another format, or of another model.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    reader = Headers.of_file(directory, router_name(directory))
    sidecar = Sidecar(
        **vars(manifest),
        vectors=read_floats(reader, "vectors"),
        centre=read_floats(reader, "centre"),
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
        shapes = form_of(sidecar, 0, sidecar.projections[0], directory)
        pairs["num_hidden_layers"] = len(sidecar.projections)
        pairs["hidden_size"] = shapes[last_map(sidecar.router)][0]
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
            content = read_bounded(path)
            digest.update(path.name.encode() + content)
        elif path.suffix == ".safetensors":
            _add_samples(digest, path)
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    """Add name, size and evenly spaced samples of a weight file to a digest."""
    size = require_file(path)
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for part in range(SAMPLES):
            start = size * part // SAMPLES
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))


def rows_of(sidecar: Sidecar, layer: int, dtype: str, state: State | None = None) -> Floats:
    """Return what P(D) gives one layer of a model of `dtype` (F32 | BF16), [n, h] (paper section
    3); fp32 numbers that the dtype has.

    Args:
        sidecar: has D, and P.
        layer: number of the layer.
        dtype: of the model.
        state: the layer's P; None: that of the sidecar, made for this.

    Raises:
        CheckpointError: the router is linear: its expert embeddings are in the model file alone; or
            P is of another form than the sidecar says.
    """
    if sidecar.router.kind != "nexus":
        raise CheckpointError(FREE_ROWS)
    state = sidecar.projections[layer] if state is None else state
    form_of(sidecar, layer, state)
    return rows_in(sidecar.router, state, sidecar.domain_inputs(), dtype)


def verify_expert_embeddings(directory: Path) -> None:
    """Check that the stored expert embeddings are P(D), recomputed in the model's dtype.

    There is nothing to check for a linear router.

    Raises:
        CheckpointError: those of a layer differ, or the checkpoint is damaged.
    """
    _, headers = open_moe(directory)
    check_rows_of(read_sidecar(directory), headers)


def check_rows_of(sidecar: Sidecar, reader: Headers) -> None:
    """Check a model's stored expert embeddings; see `verify_expert_embeddings`."""
    for layer in range(len(sidecar.projections)):
        name = gate_name(layer)
        dtype = reader.info(name).dtype
        difference = relative_difference(read_values(reader, name), rows_of(sidecar, layer, dtype))
        # "not <=" is true of NaN as well.
        if not difference <= TOLERANCE[dtype]:
            raise CheckpointError(
                f"{reader.directory}: {name} differs from P(D) of {ROUTER} by "
                f"{difference:.1e} of its largest entry, expected at most "
                f"{TOLERANCE[dtype]:.1e}; model and sidecar are not "
                f"of one training, restore both from the same checkpoint; {ADOPT}"
            )
