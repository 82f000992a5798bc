"""What a new mixture consists of: `upcycled` from a seed and its branches, `extended` by experts, `reduced` by some.

Each returns a `NewModel`, checked and described but not yet written; `NewModel.write` streams it, and refits the router.
Paper sections 2.1 and 2.3. Shapes: n routed experts, m width of a domain embedding, h hidden size.
Not covered: where text and options come from (the verbs), how tensors are blended (`assembly`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_ds.config import Config, RouterConfig
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError, IncompatibleModelsError
from nexus_ds.model.assembly import (
    Blend,
    Part,
    check_alike,
    check_related,
    check_tokenizers,
    domain_vectors,
    encoder_record,
    expert_record,
    mean_of,
    portable,
    read_generation_config,
    traits,
    write_model,
)
from nexus_ds.model.checkpoint import (
    RouterRecord,
    Sidecar,
    read_sidecar,
    router_rows,
    verify_rows,
    versions,
    write_sidecar,
)
from nexus_ds.model.families import (
    FFN_PARTS,
    MODEL_DTYPES,
    SHARED_GATE_FILL,
    DenseModel,
    both_ropes,
    check_shared_gates,
    dense_ffn_name,
    expert_name,
    gate_name,
    mean_name,
    moe_config,
    open_dense,
    open_moe,
    parameter_counts,
    settings,
    shared_gate_name,
    shared_name,
)
from nexus_ds.model.fit import FitReport, fit_router
from nexus_ds.model.fit_text import FitText, read_fit_text
from nexus_ds.model.router import centre_of, domain_rows, init_projection, init_rows, layer_generator
from nexus_ds.model.starts import check_start
from nexus_ds.model.tensorfile import DTYPES, TensorReader
from nexus_ds.model.tokenizer import check_tokenizer, copy_tokenizer
from nexus_ds.outputs import write_json

FAMILIAR = 0.4  # cosine; of eleven domains P(d) failed two, the least familiar (0.32) and one taken for a near relative
LARGEST_ROW = 100.0  # a new router row's norm relative to the largest old one


@dataclass
class NewModel:
    """A checkpoint that could be written now: everything that headers and configurations can tell was checked."""

    verb: str
    config: dict[str, Any]
    """config.json."""
    dtype: str
    """Of all weights: F32 | BF16."""
    tensors: dict[str, Blend | Tensor]
    sidecar: Sidecar
    source: Path
    """Where tokenizer and generation_config.json come from."""
    kept: int = 0
    """Experts that were there before an extension."""
    cast: dict[str, str] = dataclasses.field(default_factory=dict)
    """Experts whose dense model had another dtype than the checkpoint gets: for each name that dtype."""

    def domains(self) -> list[str]:
        """Return the experts' domains, in expert order."""
        return [expert.domain for expert in self.sidecar.experts]

    def fit_text(self, data: str, config: Config, switch: str) -> FitText | None:
        """Return the training text that the router's warm start reads, None for a start that reads none.

        `chunks` and `closed_form` read text of the experts that were there before; the others of every expert's domain.
        Arguments and errors: `read_fit_text`.
        """
        positions = self.config["max_position_embeddings"]
        return read_fit_text(self.sidecar, self.source, positions, self.kept, data, config, switch)

    def write(self, directory: Path, text: FitText | None, router: RouterConfig, seed: int) -> FitReport | None:
        """Write the checkpoint into an empty directory that is not yet renamed, and start its router.

        Args:
            directory: where to.
            text: what the warm start reads; None: no start.
            router: `warm_start`, `fit_steps` and `fit_lr`.
            seed: of the start.

        Raises:
            CheckpointError: NaN, infinite or all-zero weights, no space.
        """
        write_model(directory, self.config, self.dtype, self.tensors, self.verb)
        copy_tokenizer(self.source, directory)
        generation = read_generation_config(self.source)
        if generation is not None:
            write_json(directory / "generation_config.json", generation)
        write_sidecar(directory, self.sidecar)
        report = None
        if text is not None:
            report = fit_router(directory, text, router, seed, self.kept)
            fitted = read_sidecar(directory)
            fitted.lineage[-1]["fit"] = dataclasses.asdict(report)
            write_sidecar(directory, fitted)
        verify_rows(directory)
        return report

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
            "fit": dataclasses.asdict(report) if report else None,
        }

    def describe(self, out: Path, report: FitReport | None) -> str:
        """Return the summary as lines for people."""
        facts = self.summary(out, report)
        total, active = facts["parameters"]["total"], facts["parameters"]["active"]
        lines = [
            f"wrote {out}: {len(facts['experts'])} experts ({', '.join(facts['experts'])}), top-{facts['top_k']}, "
            f"{facts['router']} router, {facts['dtype']}, {total:,} parameters, {active:,} of them active per token"
        ]
        for name, dtype in self.cast.items():
            lines.append(f"expert {name}: weights cast from {dtype} to {facts['dtype']}, the dtype of {self.source}")
        if report:
            lines.append(
                f"{report.start.replace('_', ' ')}{f', {report.steps} steps' if report.steps else ''}: "
                "share of tokens at their own domain's expert "
                f"{report.before:.2f} -> {report.after:.2f}"
            )
        for domain, cosine in report.nearest.items() if report else ():
            doubt = "" if cosine >= FAMILIAR else ": P has seen nothing like it, its row may not find its text"
            lines.append(
                f"cosine of {domain} to the nearest chunk of the text that P was fitted to: {cosine:.2f}{doubt}"
            )
        return "\n".join(lines)


def _open_all(directories: Mapping[str, Path]) -> dict[str, DenseModel]:
    return {name: open_dense(directory) for name, directory in directories.items()}


def copy_of(reader: TensorReader, name: str) -> Blend:
    """Return a checkpoint's tensor as it is; a mixture without a shared expert has zeros in its place."""
    return Blend([Part("checkpoint", reader, name, zeros=".mlp.shared_expert." in name)])


def casts(models: Mapping[str, DenseModel], dtype: str) -> dict[str, str]:
    """Return the dtypes of the models that have another one than `dtype`; both as transformers and safetensors name them."""
    return {name: MODEL_DTYPES[model.dtype] for name, model in models.items() if model.dtype != dtype}


def as_written(target: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json that says which dtype the weights have (`dtype` as safetensors names it), RoPE in both spellings."""
    return both_ropes(target) | {"dtype": MODEL_DTYPES[dtype]}


# Upcycling ---------------------------------------------------------------------------------------------------------


def upcycled(seed: Path, experts: Mapping[str, Path], embeddings: DomainEmbeddings, config: Config) -> NewModel:
    """Describe the mixture of a seed and its dense branches (paper section 2.1); nothing is written.

    Seed FFN: shared expert, or zeros. Branches' FFNs: routed experts, exact copies, in the order of `experts`. All else:
    fp32 mean over the branches, the seed not counted unless it is among them. Router: P(D) of a freshly initialised P, or
    free rows.

    Args:
        seed: dense model that all branches started from.
        experts: for each expert's name, which is also its domain, its dense model; the seed may be one of them.
        embeddings: rows of (at least) these domains; free rows do without that of the seed.
        config: `router`, `model.shared_expert` and `seed`.

    Raises:
        ConfigError: top-k larger than the number of experts, a warm start that the router can't have.
        DataError: a domain that was not embedded.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put together.
    """
    check_start(config.router.warm_start, config.router.kind, config.router.projection)
    vectors = _upcycled_vectors(seed, experts, embeddings, config)
    if config.router.top_k > len(experts):
        raise ConfigError(f"router.top_k is {config.router.top_k}, but there are {len(experts)} experts; lower it")
    base, models = open_dense(seed), _open_all(experts)
    check_alike({"seed": traits(base), **{name: traits(model) for name, model in models.items()}})
    check_related(f"the seed {seed}", base.reader, models)
    check_tokenizers(seed, experts)
    check_tokenizer(seed, base.settings["vocabulary"])
    read_generation_config(seed)
    lineage = {
        "verb": "upcycle",
        "seed_model": portable(seed),
        "family": base.family,
        "router": dataclasses.asdict(config.router),
        "seed": config.seed,
    }
    sidecar = _upcycled_sidecar(models, embeddings, vectors, config, lineage)
    router = config.router
    target = as_written(moe_config(base.config, len(models), router.top_k, router.input), base.dtype)
    tensors = _upcycled_tensors(base, models, sidecar, config)
    return NewModel("upcycle", target, base.dtype, tensors, sidecar, seed, cast=casts(models, base.dtype))


def _upcycled_vectors(seed: Path, experts: Mapping[str, Path], embeddings: DomainEmbeddings, config: Config) -> Tensor:
    """Return the domain embeddings [n, m]; free rows don't need that of the seed as an expert, which gets the mean."""
    others = [name for name, path in experts.items() if name in embeddings.names or Path(path) != Path(seed)]
    if config.router.kind == "nexus" or not others:
        return domain_vectors(embeddings, experts)
    vectors = domain_vectors(embeddings, others)
    found = dict(zip(others, vectors, strict=True))
    return torch.stack([found.get(name, vectors.mean(0)) for name in experts])


def _upcycled_sidecar(
    models: dict[str, DenseModel],
    embeddings: DomainEmbeddings,
    vectors: Tensor,
    config: Config,
    lineage: dict[str, Any],
) -> Sidecar:
    """Return the sidecar of a new mixture, with a freshly initialised P for each layer."""
    router = config.router
    sidecar = Sidecar(
        experts=[expert_record(name, model) for name, model in models.items()],
        router=RouterRecord(**{field.name: getattr(router, field.name) for field in dataclasses.fields(RouterRecord)}),
        encoder=encoder_record(embeddings, [name for name in models if name in embeddings.names]),
        lineage=[lineage],
        versions=versions(),
        vectors=vectors,
        centre=centre_of(vectors) if router.centre else torch.zeros(vectors.shape[1]),
        shared_expert=config.model.shared_expert,
    )
    sizes = next(iter(models.values())).settings
    for layer in range(sizes["layers"] if router.kind == "nexus" else 0):
        projection = sidecar.router.new_projection(vectors.shape[1], sizes["hidden_size"])
        init_projection(
            projection, sidecar.domain_inputs(), router.init, router.init_norm, layer_generator(config.seed, layer)
        )
        sidecar.projections.append(projection.state_dict())
    return sidecar


def _upcycled_tensors(
    seed: DenseModel, models: dict[str, DenseModel], sidecar: Sidecar, config: Config
) -> dict[str, Blend | Tensor]:
    """Return where each tensor of the mixture comes from."""
    named = [(f"expert {name}", model) for name, model in models.items()]
    tensors: dict[str, Blend | Tensor] = {
        name: mean_of([Part(who, model.reader, name) for who, model in named]) for name in seed.averaged_names()
    }
    hidden_size, router = seed.settings["hidden_size"], config.router
    for layer in range(seed.settings["layers"]):
        if router.kind == "nexus":
            tensors[gate_name(layer)] = router_rows(sidecar, layer, DTYPES[seed.dtype])
        elif router.warm_start == "embedding":
            tensors[gate_name(layer)] = domain_rows(sidecar.domain_inputs(), hidden_size, layer, router.init_norm)
        else:
            generator = layer_generator(config.seed, layer)
            tensors[gate_name(layer)] = init_rows(len(named), hidden_size, router.init, router.init_norm, generator)
        tensors[shared_gate_name(layer)] = torch.full((1, hidden_size), SHARED_GATE_FILL)
        if router.input == "context":
            tensors[mean_name(layer)] = torch.zeros(hidden_size)
        for part in FFN_PARTS:
            source = dense_ffn_name(layer, part)
            # A stock Qwen2-MoE multiplies the shared expert by the sigmoid of its gate, here always 1/2.
            scale = 2.0 if part == "down_proj" else 1.0
            shared = Blend([Part("seed", seed.reader, source)], scale=scale)
            none = sidecar.shared_expert == "none"
            tensors[shared_name(layer, part)] = torch.zeros(seed.reader.info(source).shape) if none else shared
            for index, (who, model) in enumerate(named):
                tensors[expert_name(layer, index, part)] = Blend([Part(who, model.reader, source)])
    return tensors


# Extending ---------------------------------------------------------------------------------------------------------


def merge_share(old: int, new: int, share: float | None) -> float:
    """Return lambda, the total share of `new` experts in every averaged weight of a mixture that had `old`.

    The default is new / (old + new): for one expert the paper's 1 / (n + 1), for several what adding them one after
    the other gives, since (1 - 1/(n+1)) (1 - 1/(n+2)) ... = n / (n + k) and each new one keeps 1 / (n + k).

    Raises:
        ConfigError: a share outside [0, 1].
    """
    if share is None:
        return new / (old + new)
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"--lambda {share}: expected a share in [0, 1]; leave it out for {new}/{old + new}")
    return share


def extended(
    checkpoint: Path,
    experts: Mapping[str, Path],
    embeddings: DomainEmbeddings,
    config: Config,
    share: float | None = None,
    linear_init: str = "keep",
) -> NewModel:
    """Describe a mixture with further experts appended (paper section 2.3); nothing is written.

    Old FFNs and the shared expert: exact copies. New FFNs: exact copies, after the old ones. All else, in fp32:
    (1 - lambda) phi_moe + lambda / k * sum of the k new models. Router: the learned P applied to the new domains,
    conditioned with the stored centre: no new parameter, and the old rows stay as they are. A linear router gets, by
    `linear_init`, one random row of the old rows' mean norm for each new expert (keep), or fresh rows for all (reset,
    the paper's baseline).

    Args:
        checkpoint: Nexus checkpoint, upcycled or trained.
        experts: for each new expert's name, which is also its domain, its dense model.
        embeddings: rows of (at least) the new domains, from the checkpoint's encoder.
        config: `router.warm_start`, `router.init`, `router.init_norm` for linear rows, and `seed`.
        share: lambda, the total share of the new experts; see `merge_share`.
        linear_init: keep | reset, for a linear router.

    Raises:
        ConfigError: an expert's name that is taken, lambda outside [0, 1].
        DataError: a domain that was not embedded.
        CheckpointError, UnsupportedModelError, IncompatibleModelsError: models that can't be put together, or
            embeddings of another encoder.
    """
    old_config, reader = open_moe(checkpoint)
    verify_rows(checkpoint)
    old = read_sidecar(checkpoint)
    _check_names(old, experts)
    check_encoder(old, embeddings)
    vectors, models = domain_vectors(embeddings, experts), open_fitting(checkpoint, experts)
    dtype = reader.info(gate_name(0)).dtype
    total = merge_share(len(old.experts), len(models), share)
    lineage = {
        "verb": "extend",
        "checkpoint": portable(checkpoint),
        "experts": list(models),
        "lambda": total,
        "linear_init": linear_init if old.router.kind == "linear" else None,
        "router": dataclasses.asdict(config.router),
        "seed": config.seed,
    }
    sidecar = dataclasses.replace(
        old,
        experts=[*old.experts, *(expert_record(name, model) for name, model in models.items())],
        lineage=[*old.lineage, lineage],
        versions=versions(),
        vectors=torch.cat([old.vectors, vectors]),
    )
    target = old_config | {"num_experts": len(sidecar.experts)}
    places = {name: number for number, name in enumerate(models, start=len(old.experts))}
    tensors = branched_tensors(reader, old_config["num_hidden_layers"], models, places, total)
    for layer in range(old_config["num_hidden_layers"]):
        rows = _extended_rows(reader, sidecar, layer, config, linear_init)
        check_rows(rows, len(old.experts), layer)
        tensors[gate_name(layer)] = rows
    target, cast = as_written(target, dtype), casts(models, dtype)
    return NewModel("extend", target, dtype, tensors, sidecar, checkpoint, len(old.experts), cast)


def open_fitting(checkpoint: Path, experts: Mapping[str, Path]) -> dict[str, DenseModel]:
    """Open dense models that are to become experts of a checkpoint.

    Raises:
        IncompatibleModelsError: sizes or tokenizers that differ from the checkpoint's, weights that have nothing to do
            with its own.
        CheckpointError, UnsupportedModelError: models that can't be read or expressed; a checkpoint that was trained
            elsewhere, with its shared expert's gate.
    """
    config, reader = open_moe(checkpoint)
    check_shared_gates(reader, config["num_hidden_layers"])
    models, own = _open_all(experts), settings(config)
    check_alike({"checkpoint": own, **{name: traits(model, with_family=False) for name, model in models.items()}})
    check_related(f"the checkpoint {checkpoint}", reader, models)
    check_tokenizers(checkpoint, experts)
    check_tokenizer(checkpoint, own["vocabulary"])
    read_generation_config(checkpoint)
    return models


def check_rows(rows: Tensor, old: int, layer: int) -> None:
    """Raise CheckpointError for rows [n, h] after the first `old` that are not finite or dwarf the old ones.

    P has then never learned such input.
    """
    norms = rows.float().norm(dim=1)
    if not bool(torch.isfinite(norms).all()) or float(norms[old:].max()) > LARGEST_ROW * float(norms[:old].max()) + 1.0:
        raise CheckpointError(
            f"layer {layer}: the rows of the new experts have norms up to {float(norms[old:].max()):.1e}, those of the old "
            f"{float(norms[:old].max()):.1e}; P is no use for these domains: embed them as the first ones were embedded"
        )


def _check_names(sidecar: Sidecar, experts: Mapping[str, Path]) -> None:
    taken = [expert.name for expert in sidecar.experts]
    for name in experts:
        if name in taken:
            raise ConfigError(
                f"--expert {name}: the checkpoint has an expert of this name ({', '.join(taken)}); rename it"
            )


def check_encoder(sidecar: Sidecar, embeddings: DomainEmbeddings) -> None:
    """Raise IncompatibleModelsError unless the embeddings come from the checkpoint's encoder."""
    old = sidecar.encoder
    dimension = sidecar.vectors.shape[1]
    if embeddings.dimension == dimension and (old is None or embeddings.revision == old.revision):
        return
    found = f"{embeddings.encoder} (revision {embeddings.revision[:12]}, dimension {embeddings.dimension})"
    name, revision = (old.name, old.revision[:12]) if old else ("unknown", "unknown")
    raise IncompatibleModelsError(
        f"the domain embeddings come from the encoder {found}, the checkpoint's from {name} (revision {revision}, "
        f"dimension {dimension}); P only understands its own: embed the new domain with that encoder"
    )


def branched_tensors(
    reader: TensorReader, layers: int, models: Mapping[str, DenseModel], places: Mapping[str, int], share: float
) -> dict[str, Blend | Tensor]:
    """Return a checkpoint's tensors with dense models in it: FFNs at their `places`, all else merged in by `share`."""
    tensors: dict[str, Blend | Tensor] = {name: copy_of(reader, name) for name in reader.names()}
    named = {name: (f"expert {name}", model) for name, model in models.items()}
    for tensor in next(iter(models.values())).averaged_names():
        parts = [Part("checkpoint", reader, tensor, 1.0 - share)]
        parts += [Part(who, model.reader, tensor, share / len(named)) for who, model in named.values()]
        tensors[tensor] = Blend(parts)
    for layer in range(layers):
        for part in FFN_PARTS:
            for name, (who, model) in named.items():
                source = Part(who, model.reader, dense_ffn_name(layer, part))
                tensors[expert_name(layer, places[name], part)] = Blend([source])
    return tensors


def _extended_rows(reader: TensorReader, sidecar: Sidecar, layer: int, config: Config, linear_init: str) -> Tensor:
    """Return the router weight [n + k, h] of one layer; `sidecar` is the new one."""
    stored = reader.read(gate_name(layer))
    old, total = len(stored), len(sidecar.experts)
    if sidecar.router.kind == "nexus":
        # The old rows as they are stored: recomputing them in a larger matrix product could change the last bit.
        return torch.cat([stored, router_rows(sidecar, layer, stored.dtype)[old:]])
    generator = layer_generator(config.seed, layer)
    if linear_init == "reset":
        return init_rows(total, stored.shape[1], config.router.init, config.router.init_norm, generator)
    norm = stored.float().norm(dim=-1).mean()
    if config.router.warm_start == "embedding":
        rows = domain_rows(sidecar.domain_inputs(), stored.shape[1], layer, 1.0)[old:]
        return torch.cat([stored, (rows / rows.norm(dim=-1, keepdim=True) * norm).to(stored.dtype)])
    fresh = torch.empty(total - old, stored.shape[1]).normal_(generator=generator)
    return torch.cat([stored, (fresh / fresh.norm(dim=-1, keepdim=True) * norm).to(stored.dtype)])


# Removing ----------------------------------------------------------------------------------------------------------


def reduced(checkpoint: Path, names: Sequence[str]) -> NewModel:
    """Describe a mixture without some of its routed experts; nothing is written.

    Their FFNs and rows go, everything else is an exact copy: the softmax of the others renormalises by itself. What the
    experts gave to the averaged weights stays there.

    Raises:
        ConfigError: an unknown expert, or fewer experts left than a token chooses.
        CheckpointError: no Nexus checkpoint, a damaged one, or one that was trained elsewhere, with its shared expert's
            gate.
    """
    config, reader = open_moe(checkpoint)
    verify_rows(checkpoint)
    check_shared_gates(reader, config["num_hidden_layers"])
    old = read_sidecar(checkpoint)
    known = [expert.name for expert in old.experts]
    for name in names:
        if name not in known:
            raise ConfigError(f"--expert {name}: the checkpoint has {', '.join(known)}; name one of these")
    kept = [index for index, name in enumerate(known) if name not in names]
    if len(kept) < old.router.top_k or not kept:
        raise ConfigError(
            f"{len(kept)} experts would be left, but each token goes to {old.router.top_k}; keep at least as many"
        )
    sidecar = dataclasses.replace(
        old,
        experts=[old.experts[index] for index in kept],
        lineage=[*old.lineage, {"verb": "remove", "checkpoint": portable(checkpoint), "experts": list(names)}],
        versions=versions(),
        vectors=old.vectors[kept],
    )
    tensors: dict[str, Blend | Tensor] = {}
    for name in reader.names():
        if ".mlp.experts." not in name:
            tensors[name] = copy_of(reader, name)
    for layer in range(config["num_hidden_layers"]):
        tensors[gate_name(layer)] = reader.read(gate_name(layer))[kept]
        for new, index in enumerate(kept):
            for part in FFN_PARTS:
                source = Part("checkpoint", reader, expert_name(layer, index, part))
                tensors[expert_name(layer, new, part)] = Blend([source])
    dtype = reader.info(gate_name(0)).dtype
    target = config | {"num_experts": len(kept)}
    return NewModel("remove", as_written(target, dtype), dtype, tensors, sidecar, checkpoint)
