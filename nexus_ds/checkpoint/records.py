"""nexus.json: what a Nexus checkpoint's experts, router and encoder are, and how it came about.

This is the half of the sidecar that needs no torch, so that commands that only ask what is there
stay light.
Not covered: domain embeddings and projections, and checks against them (`sidecar`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from nexus_ds.checkpoint.json_files import read_json_object, require_directory
from nexus_ds.errors import CheckpointError
from nexus_ds.settings import RouterConfig

SIDECAR = "nexus.json"
ROUTER = "nexus/nexus_router.safetensors"
ROUTER_BEFORE = "nexus_router.safetensors"
"""Where the first checkpoints have it."""
FORMAT = 2
ADOPT = "a mixture that was trained elsewhere becomes one by nexus-ds adopt DIR --from NEXUS"

Record = TypeVar("Record")
HUB_CACHE = "models--"  # begins the folder of a model in the cache of the hub


def portable(path: str | Path) -> str:
    """Return a path as it may be recorded: relative ones as given, of an absolute one its name, and
    of a model in the hub's cache its name there.

    Checkpoints travel: what lies above means nothing elsewhere, and tells of the machine.
    """
    path = Path(path)
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith(HUB_CACHE):
        # models--OWNER--NAME/snapshots/REVISION
        return cached.removeprefix(HUB_CACHE).replace("--", "/")
    return path.name if path.is_absolute() else path.as_posix()


@dataclass
class ExpertRecord:
    """A routed expert: where its FFN came from."""

    name: str
    domain: str
    source: str
    """Path of the dense model as it was given; of an absolute path the last part."""
    sha256: str
    """Of the dense model's FFN tensors, see `headers.sha256_of_tensors`; empty until they are
    read."""
    license: str = ""
    """Of the dense model, as its card says it; empty: not said."""


@dataclass
class EncoderRecord:
    """The sentence encoder of the domain embeddings; only embeddings of the same one fit."""

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


@dataclass
class FitReport:
    """What a warm start did to the routers."""

    before: float
    """Own-domain share of the fitted tokens before it, mean over layers."""
    after: float
    """The same after it."""
    steps: int
    """Of SGD; 0 for a closed form."""
    start: str = "label_fit"
    """`router.warm_start`."""
    nearest: dict[str, float] = field(default_factory=dict)
    """For each domain whose text a start from chunks did without: cosine of its embedding to the
    nearest chunk's."""


# Lineage ------------------------------------------------------------------------------------------

# `lambda` is a word of Python's.
FILE_KEYS = {"share": "lambda"}
# where they are empty
LEFT_OUT = ("seed_license", "scales", "perplexity", "aligned", "merge", "seed_sha256")
FIELDS = {key: name for name, key in FILE_KEYS.items()}

# Beside experts, whose names have no blanks.
SEED = "the seed"
CHECKPOINT = "the checkpoint"


@dataclass(frozen=True, kw_only=True)
class Step:
    """An entry of the lineage: one command that made or changed the model.

    Fields stand in the order of the file's keys; `fit`, where there is one, comes last there.
    """

    verb: str
    """As the file has it."""
    fit: FitReport | None = None
    """Of the router's warm start, None where there was none."""

    @property
    def is_extension(self) -> bool:
        """Whether a finetune that follows is about some experts of this step only."""
        return False

    @property
    def new_experts(self) -> list[str]:
        """Names of the experts that an extension appended or put in the place of old ones."""
        return []

    def entry(self) -> dict[str, object]:
        """Return the step as nexus.json has it."""
        values = dataclasses.asdict(self)
        fit = values.pop("fit")
        if fit is not None:
            values["fit"] = fit
        # an older version's entry has none of these, and stays as it is
        for name in LEFT_OUT:
            if not values.get(name, True):
                del values[name]
        return {FILE_KEYS.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class UpcycleStep(Step):
    """Dense models became a mixture."""

    verb: str = field(default="upcycle", init=False)
    seed_model: str
    family: str
    router: RouterConfig
    seed: int
    seed_license: str = ""
    """As its card says it; empty: not said."""
    scales: dict[str, float] = field(default_factory=dict)
    """Of `shared` and `routed` experts' outputs at the start, folded into down_proj; of `task`: how
    far routed experts go from the seed; empty: 1."""
    aligned: dict[str, list[str]] = field(default_factory=dict)
    """Rows of the embeddings (`31:33`, the end excluded) that come from some experts' models alone,
    with these experts, or from `the seed`; all others come from all."""
    merge: dict[str, object] = field(default_factory=dict)
    """Settings of merging, by their names in `ModelConfig`; empty: the plain mean."""
    seed_sha256: dict[str, str] = field(default_factory=dict)
    """Of the seed's FFN tensors, by their dtype (F32), where later experts need the seed again;
    empty: they don't, or an older version wrote it."""


@dataclass(frozen=True, kw_only=True)
class TrainStep(Step):
    """The mixture was trained."""

    verb: str = field(default="train", init=False)
    stage: str
    steps: int
    tokens: int
    """Of the steps that updated the model."""
    mixture: dict[str, float]
    """Share of each domain's text in the tokens."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Of each domain's validation text at the end."""


@dataclass(frozen=True, kw_only=True)
class ExtendStep(Step):
    """Experts were appended."""

    verb: str = field(default="extend", init=False)
    checkpoint: str
    """The extended one."""
    experts: list[str]
    share: float
    """lambda: the total share of the new experts' models in the averaged weights."""
    linear_init: str | None
    """keep | reset; None for a router that is not linear."""
    router: RouterConfig
    seed: int
    aligned: dict[str, list[str]] = field(default_factory=dict)
    """As an upcycling's; `the checkpoint` (older versions: `checkpoint`) is the extended one."""

    @property
    def is_extension(self) -> bool:
        """Whether a finetune that follows is about some experts of this step only."""
        return True

    @property
    def new_experts(self) -> list[str]:
        """Names of the appended experts."""
        return self.experts


@dataclass(frozen=True, kw_only=True)
class ReplaceStep(Step):
    """Experts were replaced.

    The file calls it an extension too, marked `replaced`: all who read on, older versions among
    them, finetune the same way after either.
    """

    verb: str = field(default="extend", init=False)
    checkpoint: str
    """The one whose experts were replaced."""
    experts: list[str]
    replaced: bool = field(default=True, init=False)
    share: float
    """lambda: the total share of the new experts' models in the averaged weights."""
    router: RouterConfig
    seed: int
    aligned: dict[str, list[str]] = field(default_factory=dict)
    """As an extension's."""

    @property
    def is_extension(self) -> bool:
        """Whether a finetune that follows is about some experts of this step only."""
        return True

    @property
    def new_experts(self) -> list[str]:
        """Names of the replaced experts."""
        return self.experts


@dataclass(frozen=True, kw_only=True)
class RemoveStep(Step):
    """Experts were removed."""

    verb: str = field(default="remove", init=False)
    checkpoint: str
    """The one with them."""
    experts: list[str]


@dataclass(frozen=True, kw_only=True)
class AdoptStep(Step):
    """The mixture was trained elsewhere, without its sidecar, and got it back."""

    verb: str = field(default="adopt", init=False)
    checkpoint: str
    """The one that the training began from."""
    trained: str
    """What it has saved."""
    row_error: list[float]
    """For each layer, how far P(D) is from the trained rows, relative to their largest entry."""
    approximate: bool
    """Whether that, or a gate that was set back, changed what the model computes."""


@dataclass(frozen=True, kw_only=True)
class OtherStep(Step):
    """An entry with other keys than this version writes: kept as it is."""

    written: dict[str, object]

    @property
    def is_extension(self) -> bool:
        """Whether a finetune that follows is about some experts of this step only."""
        return self.verb == "extend"

    @property
    def new_experts(self) -> list[str]:
        """Names of the experts that an extension is about; CheckpointError if it names none."""
        if not self.is_extension:
            return []
        experts = self.written.get("experts")
        if not isinstance(experts, list):
            raise CheckpointError(
                f"{SIDECAR}: an extension in its lineage lists no experts; it is damaged"
            )
        return experts

    def entry(self) -> dict[str, object]:
        """Return the step as nexus.json has it."""
        return self.written


STEPS: dict[str, type[Step]] = {
    "upcycle": UpcycleStep,
    "train": TrainStep,
    "extend": ExtendStep,
    "remove": RemoveStep,
    "adopt": AdoptStep,
}


def _own_step(entry: Mapping[str, Any]) -> Step | None:
    """Return the record of an entry with just the keys of this version, None for others."""
    kind = STEPS.get(str(entry.get("verb")))
    if entry.get("replaced"):
        kind = ReplaceStep
    if kind is None:
        return None
    values = {FIELDS.get(key, key): value for key, value in entry.items()}
    # What tells the kind is no argument of it.
    for key in ("verb", "replaced"):
        values.pop(key, None)
    try:
        if "router" in values:
            values["router"] = RouterConfig(**values["router"])
        if "fit" in values:
            values["fit"] = FitReport(**values["fit"])
        return kind(**values)
    except TypeError:
        return None


def step_of(entry: Mapping[str, object]) -> Step:
    """Return the record of one entry; whatever is in it, `Step.entry` gives it back unchanged."""
    step = _own_step(entry)
    # Compared as text, since the order of keys counts too: the file must not change.
    if step is not None and json.dumps(step.entry()) == json.dumps(entry):
        return step
    return OtherStep(verb=str(entry.get("verb", "")), written=dict(entry))


def start_scale(lineage: list[Step], kind: str) -> float:
    """Return a scale with which dense models are put in.

    Args:
        lineage: of the mixture.
        kind: shared | routed: of this expert's output | task: of how far a routed expert goes from
            the seed.
    """
    for step in lineage:
        if isinstance(step, UpcycleStep):
            return step.scales.get(kind, 1.0)
    return 1.0


def keeps_seed(lineage: list[Step]) -> bool:
    """Return whether a mixture started with the seed's own weights outside of its FFNs
    (model.merge=seed)."""
    return any(
        isinstance(step, UpcycleStep) and step.merge.get("merge") == "seed" for step in lineage
    )


def last_extension(lineage: list[Step]) -> list[str]:
    """Return the names of the experts that the last extension is about; none without one."""
    extensions = [step for step in lineage if step.is_extension]
    return extensions[-1].new_experts if extensions else []


# The file -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Manifest:
    """What nexus.json says."""

    experts: list[ExpertRecord]
    router: RouterRecord
    encoder: EncoderRecord | None
    lineage: list[Step]
    """One step for each command that made or changed the model, oldest first."""
    versions: dict[str, str]
    """Of the software that wrote it, by package."""
    shared_expert: str = "seed"
    """seed | none: its weights are zeros."""


def manifest_json(manifest: Manifest) -> dict[str, object]:
    """Return the contents of nexus.json."""
    encoder = manifest.encoder
    return {
        "format": FORMAT,
        "experts": [dataclasses.asdict(expert) for expert in manifest.experts],
        "router": dataclasses.asdict(manifest.router),
        "encoder": dataclasses.asdict(encoder) if encoder else None,
        "lineage": [step.entry() for step in manifest.lineage],
        "versions": manifest.versions,
        "shared_expert": manifest.shared_expert,
    }


def is_nexus(directory: Path) -> bool:
    """Return whether a directory is a Nexus checkpoint (has the sidecar)."""
    return (Path(directory) / SIDECAR).is_file()


def _record(cls: type[Record], value: object, where: str) -> Record:
    """Build a record from JSON, refusing missing, unknown and mistyped fields."""
    hints = get_type_hints(cls)
    # what an older version did not write yet has a default
    required = {name for name in hints if not hasattr(cls, name)}
    if not isinstance(value, dict) or not required <= set(value) <= set(hints):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(
            f"{where}: found {found}, expected {sorted(hints)}; the sidecar is damaged"
        )
    for name, kind in hints.items():
        # type and not isinstance: JSON's true is an int to Python.
        if name in value and type(value[name]) is not kind:
            raise CheckpointError(
                f"{where}.{name}: found {value[name]!r}, expected {kind.__name__}"
            )
    return cls(**value)


def _damaged(where: str, expected: str) -> NoReturn:
    raise CheckpointError(f"{where}: expected {expected}; the sidecar is damaged")


def router_name(directory: Path) -> str:
    """Return where a checkpoint has its router's file, from its directory."""
    before = (directory / ROUTER_BEFORE).exists()
    if before and (directory / ROUTER).exists():
        raise CheckpointError(
            f"{directory} has both {ROUTER} and {ROUTER_BEFORE}, expected one of them; "
            "remove the one that is not of this model"
        )
    return ROUTER_BEFORE if before else ROUTER


def read_manifest(directory: Path) -> Manifest:
    """Read nexus.json of a Nexus checkpoint.

    Raises:
        CheckpointError: no Nexus checkpoint, damaged, or of another format.
    """
    directory = require_directory(Path(directory))
    if not is_nexus(directory):
        raise CheckpointError(
            f"{directory} has no {SIDECAR}: it is no Nexus checkpoint; "
            f"make one with nexus-ds upcycle; {ADOPT}"
        )
    value = read_json_object(directory, SIDECAR)
    where = str(directory / SIDECAR)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format {value.get('format')!r}, this version reads {FORMAT}; "
            "use a matching one"
        )
    experts = value.get("experts")
    lineage = value.get("lineage")
    encoder = value.get("encoder")
    if not isinstance(experts, list) or not isinstance(lineage, list):
        _damaged(where, "lists of experts and lineage")
    if not all(isinstance(entry, dict) for entry in lineage):
        _damaged(where, "a JSON object for each step of the lineage")
    versions = value.get("versions") or {}
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        _damaged(where, "a version, as text, for each package")
    return Manifest(
        experts=[
            _record(ExpertRecord, expert, f"{where}: experts[{index}]")
            for index, expert in enumerate(experts)
        ],
        router=_record(RouterRecord, value.get("router"), f"{where}: router"),
        encoder=None if encoder is None else _record(EncoderRecord, encoder, f"{where}: encoder"),
        lineage=[step_of(entry) for entry in lineage],
        versions=versions,
        shared_expert=value.get("shared_expert", ""),
    )
