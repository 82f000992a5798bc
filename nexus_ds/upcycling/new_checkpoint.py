"""A mixture that could be written now, and the one that it is made of.

`upcycled`, `extended`, `replaced` and `reduced` each return a `NewModel`: checked and described,
but not yet written. `NewModel.write` streams it to disk and fits its router.
Not covered: where text and options come from (commands/), how tensors are blended (`blend`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_ds.checkpoint.config_json import ConfigJson, read_generation_config
from nexus_ds.checkpoint.dense import MODEL_DTYPES, DenseModel
from nexus_ds.checkpoint.dense_settings import both_ropes, cached_positions
from nexus_ds.checkpoint.file_layout import in_files
from nexus_ds.checkpoint.hashes import Hashing
from nexus_ds.checkpoint.headers import Headers, tensor_bytes
from nexus_ds.checkpoint.model_card import nexus_card, write_model_card
from nexus_ds.checkpoint.older_stacks import unlike_transformers_4
from nexus_ds.checkpoint.qwen2_moe import (
    Role,
    Stored,
    gate_name,
    open_moe,
    parameter_counts,
    planned,
    stored,
)
from nexus_ds.checkpoint.records import FitReport
from nexus_ds.checkpoint.sidecar import (
    Sidecar,
    check_rows_of,
    read_sidecar,
    write_manifest,
    write_sidecar,
)
from nexus_ds.checkpoint.tokenizer import copy_tokenizer
from nexus_ds.outputs import write_json
from nexus_ds.settings import Config, RouterConfig
from nexus_ds.upcycling.same_tokenizers import Alignment
from nexus_ds.upcycling.sources import Blend, Part, Source
from nexus_ds.upcycling.writing import Beside, write_model
from nexus_ds.warm_start.starts import NO_TEXT, check_start

if TYPE_CHECKING:
    from nexus_ds.warm_start.fit_text import FitText

# Cosine of MiniLM's embeddings. Of eleven domains P(d) failed two: the least familiar one (0.32),
# and one that it took for a near relative. A language model's are nearer to each other.
FAMILIAR = 0.4


@dataclass(frozen=True)
class OldModel:
    """A Nexus checkpoint that another is to be made of; checked, no weight is in memory."""

    directory: Path
    config: ConfigJson
    reader: Headers
    sidecar: Sidecar

    @property
    def dtype(self) -> str:
        """Of all weights, as safetensors names it: F32 | BF16 | F16."""
        return self.reader.info(gate_name(0)).dtype

    def target(self, experts: int, alignment: Alignment | None = None) -> ConfigJson:
        """Return config.json of the same model with so many routed experts, and aligned rows."""
        changed: ConfigJson = {"num_experts": experts}
        if alignment:
            changed["vocab_size"] = alignment.rows
        return as_written(self.config | changed, self.dtype)


def open_old(checkpoint: Path) -> OldModel:
    """Open a Nexus checkpoint, upcycled or trained.

    Raises:
        CheckpointError: none, damaged, or rows that are not P(D).
        UnsupportedModelError: code hooks.
    """
    config, reader = open_moe(checkpoint)
    sidecar = read_sidecar(checkpoint)
    check_rows_of(sidecar, reader)
    return OldModel(checkpoint, config, reader, sidecar)


@dataclass
class NewModel:
    """A checkpoint that could be written now: everything that headers and configurations can tell
    was checked."""

    verb: str
    config: ConfigJson
    dtype: str
    """Of all weights: F32 | BF16 | F16."""
    tensors: dict[str, Source]
    sidecar: Sidecar
    source: Path
    """Where generation_config.json comes from."""
    tokenizer: Path
    """Where the tokenizer comes from: `source`, unless vocabularies were aligned."""
    kept: int = 0
    """Experts that were there before an extension."""
    cast: dict[str, str] = dataclasses.field(default_factory=dict)
    """Experts whose dense model had another dtype than the checkpoint gets: for each name that
    dtype."""

    def domains_of(self, names: Collection[str]) -> list[str]:
        """Return the domains of experts, in expert order; a card may name another than the
        expert's."""
        return [expert.domain for expert in self.sidecar.experts if expert.name in names]

    def fit_text(self, data: str, config: Config, switch: str) -> FitText | None:
        """Return the training text that the router's warm start reads, None for a start that reads
        none.

        `chunks` and `closed_form` read text of the experts that were there before; the others of
        every expert's domain.
        Arguments and errors: `read_fit_text`.
        """
        router = self.sidecar.router
        check_start(config.router.warm_start, router.kind, router.projection)
        if config.router.warm_start in NO_TEXT:
            return None
        # it imports torch, for which a start without text does not wait
        from nexus_ds.warm_start.fit_text import read_fit_text

        positions = self.config["max_position_embeddings"]
        return read_fit_text(
            self.sidecar, self.tokenizer, positions, self.kept, data, config, switch
        )

    def write(
        self,
        directory: Path,
        text: FitText | None,
        router: RouterConfig,
        seed: int,
    ) -> FitReport | None:
        """Write the checkpoint into an empty directory that is not yet renamed, and start its
        router.

        Args:
            directory: where to.
            text: what the warm start reads; None: no start.
            router: `warm_start`, `fit_steps` and `fit_lr`.
            seed: of the start.

        Raises:
            CheckpointError: NaN, infinite or all-zero weights, no space.
        """
        with Hashing(directory) as hashing:
            # a warm start changes the weights; nothing else does
            follow = hashing.follow if text is None else bool
            digests = write_model(
                directory,
                self.config,
                self.dtype,
                self.tensors,
                self.verb,
                self._unhashed(),
                Beside(self.sidecar, follow),
            )
            if text is None:
                hashing.begin()
            self._write_rest(directory, digests)
            report = None
            # the warm start reads the checkpoint as anybody does: it has to be whole by now
            if text is not None:
                from nexus_ds.warm_start.fit import fit_router

                report = fit_router(directory, text, router, seed, self.kept)
                _record_fit(directory, report)
            sidecar = read_sidecar(directory)
            write_model_card(directory, nexus_card(sidecar))
            # what every reader will check first
            _, headers = open_moe(directory)
            check_rows_of(sidecar, headers)
            # last: it is of all that stands there
            hashing.record()
        return report

    def _write_rest(self, directory: Path, digests: Mapping[str, str]) -> None:
        """Write the tokenizer and the sidecar; `digests` are those of experts whose hash was not
        known."""
        for number, expert in enumerate(self.sidecar.experts):
            sha256 = digests.get(expert.name, expert.sha256)
            self.sidecar.experts[number] = dataclasses.replace(expert, sha256=sha256)
        copy_tokenizer(self.tokenizer, directory)
        generation = read_generation_config(self.source)
        if generation is not None:
            write_json(directory / "generation_config.json", generation)
        # a router's file that has a P is there
        if self.sidecar.projections:
            write_manifest(directory, self.sidecar)
        else:
            write_sidecar(directory, self.sidecar)

    def _unhashed(self) -> dict[str, list[str]]:
        """Return the FFN tensors of experts whose hash is not known yet, in the hash's order."""
        own_names: dict[str, dict[str, str]] = {}
        for name, entry in stored(self.config).items():
            if entry.role is not Role.ROUTED:
                continue
            expert = self.sidecar.experts[entry.expert]
            if not expert.sha256:
                own_names.setdefault(expert.name, {})[entry.dense_name] = name
        return {
            expert: [names[dense_name] for dense_name in sorted(names)]
            for expert, names in own_names.items()
        }

    def summary(self, out: Path, report: FitReport | None) -> dict[str, Any]:
        """Return what a program wants to know of the new checkpoint."""
        total, active = parameter_counts(self.config, self.sidecar.shared_expert == "seed")
        return {
            "out": str(out),
            "experts": [expert.name for expert in self.sidecar.experts],
            "top_k": self.sidecar.router.top_k,
            "router": self.sidecar.router.kind,
            "dtype": MODEL_DTYPES[self.dtype],
            "cast": self.cast,
            "parameters": {"total": total, "active": active},
            "transformers_4": unlike_transformers_4(self.config),
            "cached_positions": cached_positions(self.config),
            "fit": dataclasses.asdict(report) if report else None,
        }

    def describe(self, out: Path, report: FitReport | None) -> str:
        """Return the summary as lines for people."""
        facts = self.summary(out, report)
        parameters, experts = facts["parameters"], facts["experts"]
        total, active = parameters["total"], parameters["active"]
        lines = [
            f"wrote {out}: {len(experts)} experts ({', '.join(experts)}), "
            f"top-{facts['top_k']}, {facts['router']} router, {facts['dtype']}, "
            f"{total:,} parameters, {active:,} of them active per token"
        ]
        for name, dtype in self.cast.items():
            lines.append(
                f"expert {name}: weights cast from {dtype} to {facts['dtype']}, "
                f"the dtype of {self.source}"
            )
        lines += [f"note: transformers 4: {said}" for said in facts["transformers_4"]]
        if facts["cached_positions"]:
            lines.append(
                f"note: generation beyond {facts['cached_positions']:,} tokens is right with "
                "use_cache=False alone: a cache keeps keys with the frequencies of shorter texts"
            )
        if report:
            router = getattr(self.sidecar.lineage[-1], "router", None)
            own = router is None or router.fit_text == "own"
            lines += _fit_lines(report, own)
        return "\n".join(lines)


def _record_fit(directory: Path, report: FitReport) -> None:
    """Note in the last step of a checkpoint's lineage what the warm start has done."""
    # read again: P is another one than before the fit
    sidecar = read_sidecar(directory)
    sidecar.lineage[-1] = dataclasses.replace(sidecar.lineage[-1], fit=report)
    write_sidecar(directory, sidecar)


def _fit_lines(report: FitReport, own: bool) -> list[str]:
    """Return what a warm start has done, as lines for people.

    Args:
        report: of it.
        own: whether it read the domains' own text.
    """
    whose = "their own domain's expert" if own else "the expert whose domain their text stands for"
    start = report.start.replace("_", " ")
    steps = f", {report.steps} steps" if report.steps else ""
    lines = [
        f"{start}{steps}: share of tokens at {whose} {report.before:.2f} -> {report.after:.2f}"
    ]
    text = "the text that P was fitted to" if own else "the text that stands for it"
    for domain, cosine in report.nearest.items():
        line = f"cosine of {domain} to the nearest chunk of {text}: {cosine:.2f}"
        # of text that stands for a domain, 0.2 was enough
        if own and cosine < FAMILIAR:
            line += ": P has seen nothing like it, its row may not find its text"
        lines.append(line)
    return lines


def bytes_of(target: ConfigJson, dtype: str) -> int:
    """Return the bytes of a mixture's weight files; `dtype` is as safetensors names it."""
    plan = in_files(planned(target, dtype), target)
    return sum(tensor_bytes(*entry) for entry in plan.values())


def copy_of(reader: Headers, name: str, entry: Stored) -> Source:
    """Return a checkpoint's tensor as it is; `entry` is what the table says of it."""
    if entry.fill is not None:
        # a constant; in fp16, as others save it, it is zero
        return entry.fill
    # a mixture without a shared expert has zeros in its place
    return Blend([Part("checkpoint", reader, name, zeros=entry.role is Role.SHARED)])


def casts(models: Mapping[str, DenseModel], dtype: str) -> dict[str, str]:
    """Return the dtypes of the models that have another one than `dtype`.

    `dtype` is as safetensors names it, the dtypes returned are as transformers does.
    """
    other = {name: model.dtype for name, model in models.items() if model.dtype != dtype}
    return {name: MODEL_DTYPES[found] for name, found in other.items()}


def as_written(target: ConfigJson, dtype: str) -> ConfigJson:
    """Return a config.json that says the weights' dtype, and RoPE in both spellings.

    `dtype` is as safetensors names it.
    """
    return both_ropes(target) | {"dtype": MODEL_DTYPES[dtype]}
