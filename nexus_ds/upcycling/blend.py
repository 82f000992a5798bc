"""Putting models together: what all of upcycling shares. Checks first, then one pass of writing.

Every tensor of the output is a `Blend` (a weighted sum of stored tensors, in fp32; a single one is
copied exactly) or is given (expert embeddings). `write_tensors` reads and writes slices of rows, so
memory does not grow with the model.
Not covered: aligning models of different bases (permutations, other vocabularies); averages other
than linear ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nexus_ds.checkpoint.cards import DomainCard, check_card, ffn_sha256
from nexus_ds.checkpoint.config_json import ConfigJson, refuse_hooks
from nexus_ds.checkpoint.dense import DenseModel
from nexus_ds.checkpoint.headers import row_slices, sha256_of_tensors
from nexus_ds.checkpoint.json_files import read_json_object
from nexus_ds.checkpoint.model_card import stated_license
from nexus_ds.checkpoint.qwen2_moe import stored
from nexus_ds.checkpoint.qwen3_next import open_writer
from nexus_ds.checkpoint.records import EncoderRecord, ExpertRecord, portable
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader, TensorWriter
from nexus_ds.checkpoint.tokenizer import (
    TokenizerMeaning,
    chat_templates,
    read_tokenizer,
    same_tokenizer_files,
)
from nexus_ds.command_lines import EXPERT_NAME
from nexus_ds.data.domains import DomainEmbeddings
from nexus_ds.errors import CheckpointError, ConfigError, IncompatibleModelsError
from nexus_ds.outputs import write_json
from nexus_ds.progress import Progress

# no biases: not every family has them
ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
# of each attention matrix of so many layers, by `check_related`
SAMPLED_LAYERS, SAMPLED_VALUES = 3, 1 << 18
UNRELATED = 0.1
"""Median cosine of attention matrices below which models have nothing to do with each other.

Measured in the demo, whose learning rates are high: branches and their seed 0.94; the trained seed
and its own random start, a thousand steps before, 0.22; the same and another random start 0 give or
take 0.01 (0.03 in the smallest models of tests).
"""


@dataclass(frozen=True)
class Part:
    """One summand of a tensor: `weight` times the tensor `name` of a model."""

    who: str
    """Names the model in messages."""
    reader: TensorReader
    name: str
    weight: float = 1.0
    zeros: bool = False
    """Whether only zeros are right: the shared expert of a mixture without one."""


@dataclass(frozen=True)
class Blend:
    """sum(weight * tensor) / divisor * scale over the parts, in fp32.

    A lone part of weight 1 is copied as it is, or cast. `scale` is a power of two, so that scaling
    a copy is exact.
    """

    parts: Sequence[Part]
    divisor: float = 1.0
    scale: float = 1.0


def mean_of(parts: Sequence[Part]) -> Blend:
    """Return the arithmetic mean of tensors (paper section 2.1)."""
    return Blend(parts, divisor=float(len(parts)))


def parse_experts(values: Iterable[str]) -> dict[str, Path]:
    """Parse the NAME=DIR of --expert, in the order given.

    Raises:
        ConfigError: another form, a name that is no plain word, or a name given twice.
    """
    experts: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        if not equals or not directory or not EXPERT_NAME.fullmatch(name):
            raise ConfigError(
                f"--expert {value!r}: expected NAME=DIR, "
                "with a name of letters, digits, '_', '.', '-'"
            )
        if name in experts:
            raise ConfigError(
                f"--expert {name} is given twice; each expert needs a name of its own"
            )
        experts[name] = Path(directory)
    return experts


def _flat(settings: Mapping[str, object]) -> dict[str, str]:
    """Return settings as texts, RoPE one key a line and layer types as one letter a layer."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            for inner, item in sorted(value.items()):
                flat[f"{key}.{inner}"] = str(item)
        elif isinstance(value, tuple):
            flat[key] = "".join(str(item)[0] for item in value)
        else:
            flat[key] = str(value)
    return flat


def traits(model: DenseModel) -> dict[str, object]:
    """Return all that must agree between models that are averaged; a dtype is cast instead."""
    return {"family": model.family, **vars(model.settings)}


def check_alike(models: Mapping[str, Mapping[str, object]]) -> None:
    """Raise IncompatibleModelsError with one table of all differences among models.

    Args:
        models: for each model's name its traits.
    """
    flat = {name: _flat(settings) for name, settings in models.items()}
    # in the order in which models first have them: a dict, not a set
    keys: dict[str, None] = {}
    for settings in flat.values():
        keys |= dict.fromkeys(settings)
    rows = []
    for key in keys:
        found = [settings.get(key, "-") for settings in flat.values()]
        if len(set(found)) > 1:
            rows.append([key, *found])
    if rows:
        raise IncompatibleModelsError(
            "the models differ where they must agree; use branches of one seed, saved alike:\n"
            + _columns([["", *flat], *rows])
        )


def _columns(table: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _relation(a: TensorReader, b: TensorReader, names: Sequence[str]) -> float:
    """Return the median, over some matrices of two models, of the cosine of their middle rows.

    NaN where none has one: zeros and non-numbers have none, whoever writes the tensors names them.
    """
    cosines = []
    for name in names:
        rows, width = a.info(name).shape
        wanted = max(1, SAMPLED_VALUES // width)
        count = min(rows, wanted)
        start = (rows - count) // 2
        stop = start + count
        x = a.read_rows(name, start, stop).double().flatten()
        y = b.read_rows(name, start, stop).double().flatten()
        norms = x.norm() * y.norm()
        cosines.append(x @ y / norms)
    # the median: one matrix that training has turned does not decide
    return float(torch.stack(cosines).nanmedian())


def _sampled_names(layers: int) -> list[str]:
    """Return the names of the attention matrices that are compared."""
    # a model of fewer layers has all of them sampled, each once
    picked = {layers * part // SAMPLED_LAYERS for part in range(SAMPLED_LAYERS)}
    names = []
    for layer in sorted(picked):
        names += [f"model.layers.{layer}.self_attn.{part}" for part in ATTENTION]
    return names


def check_related(origin: str, reader: TensorReader, models: Mapping[str, DenseModel]) -> None:
    """Refuse models of another origin: of the same sizes and tokenizer, but their average is noise.

    Attention matrices tell: they are averaged, and nothing but a common start makes them similar.
    (Norms are alike in all models.) A few MB of each model are read.

    Args:
        origin: what the models should descend from, for messages.
        reader: its weights, dense or of a mixture.
        models: for each expert's name its dense model.

    Raises:
        IncompatibleModelsError: names each unrelated expert and its cosine.
    """
    # their sizes were compared before: any one's layers are everyone's
    layers = next(iter(models.values())).settings.layers
    names = _sampled_names(layers)
    unrelated = []
    for name, model in models.items():
        cosine = _relation(reader, model.reader, names)
        if cosine < UNRELATED:
            unrelated.append(f"expert {name} ({model.directory}): cosine {cosine:.2f}")
    if unrelated:
        raise IncompatibleModelsError(
            f"weights that are unrelated to those of {origin}: {'; '.join(unrelated)} "
            "(median over attention matrices; a branch has about 0.9, "
            f"expected at least {UNRELATED}). The average of models of different origin is noise, "
            "even where sizes and tokenizer agree: give branches that were trained from that "
            "model, or the one that these come from"
        )


def check_tokenizers(reference: Path, others: Mapping[str, Path]) -> None:
    """Check that ids mean the same to models; say on stderr what is not taken from `others`.

    A token in another role (another end of a document) is a note: `reference`'s is kept. So is a
    chat template.

    Args:
        reference: checkpoint whose tokenizer the new one gets.
        others: for each expert's name its model's directory.

    Raises:
        IncompatibleModelsError: another vocabulary or another way to split a text; names the first
            five differences.
        CheckpointError, UnsupportedModelError: a tokenizer that can't be read.
    """
    # read when first needed: equal files are told apart by their hashes alone
    own = None
    for name, directory in others.items():
        if same_tokenizer_files(reference, directory):
            continue
        own = own or read_tokenizer(reference)
        other = read_tokenizer(directory)
        difference = own.difference(other)
        if difference:
            raise _other_tokenizer(name, directory, reference, difference)
        notes = [*_role_notes(own, other), *_template_notes(reference, directory)]
        for note in notes:
            print(f"note: expert {name}: {note}", file=sys.stderr, flush=True)


def _other_tokenizer(
    name: str, directory: Path, reference: Path, difference: str
) -> IncompatibleModelsError:
    return IncompatibleModelsError(
        f"the tokenizer of expert {name} ({directory}) is not that of {reference}: "
        f"{difference}; experts of one model must be trained on one tokenizer. "
        "If no text of this one held what differs, copy the tokenizer files of "
        f"{reference} over those in {directory}"
    )


def _role_notes(own: TokenizerMeaning, other: TokenizerMeaning) -> list[str]:
    roles = own.other_roles(other)
    if not roles:
        return []
    return [
        f"{'; '.join(roles)}: every id means the same, and the new checkpoint keeps the latter; "
        "its tokenizer_config.json can change it"
    ]


def _template_notes(reference: Path, directory: Path) -> list[str]:
    own = chat_templates(reference)
    other = chat_templates(directory)
    # the texts alone: the same template may lie in either of two files
    same = list(own.values()) == list(other.values())
    if not other or same:
        return []
    kept = f"that of {reference}" if own else "none"
    return [
        f"its chat template ({', '.join(other)} in {directory}) is not taken along, "
        f"the new checkpoint has {kept}: copy it there, as chat_template.jinja, "
        "to chat as this expert does"
    ]


def domain_vectors(embeddings: DomainEmbeddings, names: Iterable[str]) -> Tensor:
    """Return the raw domain embeddings [n, m] fp32 of experts.

    Raises:
        DataError: a domain that was not embedded; names those that were.
    """
    # copies: rows of a file are views into all of it
    vectors = [embeddings.vector(name).copy() for name in names]
    return torch.stack([torch.from_numpy(vector) for vector in vectors])


def encoder_record(embeddings: DomainEmbeddings, names: Iterable[str]) -> EncoderRecord:
    """Return what the sidecar keeps of the encoder."""
    fewest = min(embeddings.documents.get(name, 0) for name in names)
    return EncoderRecord(
        embeddings.encoder,
        embeddings.revision,
        embeddings.dimension,
        fewest,
        True,
    )


def expert_records(
    models: Mapping[str, DenseModel],
    cards: Mapping[str, DomainCard],
    old: Sequence[ExpertRecord] = (),
) -> list[ExpertRecord]:
    """Return what the sidecar keeps of experts, with the hashes of their FFN tensors.

    Args:
        models: by the experts' names.
        cards: that say which domains these are; an expert without one is named by its domain.
        old: experts that stay beside them.

    Raises:
        DataError: a card of other weights.
        CheckpointError: a card whose domain can't be a folder's name.
        ConfigError: a domain that another expert has.
    """
    taken = {expert.domain: expert.name for expert in old}
    records = []
    for name, model in models.items():
        sha256 = sha256_of_tensors(model.reader, model.ffn_names())
        domain = name
        card = cards.get(name)
        if card:
            check_card(name, card, sha256)
            domain = card.domain
        # a card comes from elsewhere, and names a folder of text
        if not EXPERT_NAME.fullmatch(domain):
            raise CheckpointError(
                f"expert {name}: the domain {domain[:100]!r} of its card is no name of one; "
                "expected letters, digits, '_', '.', '-'"
            )
        if domain in taken:
            raise ConfigError(
                f"expert {name} is of the domain {domain}, as the expert {taken[domain]} is; "
                "expected a domain of its own: give it another name in the domain card"
            )
        taken[domain] = name
        source = portable(model.directory)
        records.append(ExpertRecord(name, domain, source, sha256, stated_license(model.directory)))
    return records


def note_other_seeds(seed: DenseModel, cards: Mapping[str, DomainCard]) -> None:
    """Say on stderr which cards name another seed than the one that is given.

    Not refused: a seed that was saved in another dtype is another by its hash alone, and
    `check_related` tells those that are others by their weights.
    """
    known = {name: card.seed_sha256 for name, card in cards.items() if card.seed_sha256}
    if not known:
        return
    own = ffn_sha256(seed)
    for name, sha256 in known.items():
        if sha256 != own:
            print(
                f"note: expert {name}: its card names another seed (FFN sha256 {sha256[:12]}) "
                f"than {seed.directory} ({own[:12]}); their weights are related all the same",
                file=sys.stderr,
                flush=True,
            )


def _check_values(part: Part, bad: int, nonzero: bool) -> None:
    where = f"{part.who} ({part.reader.directory}): tensor {part.name}"
    if bad:
        raise CheckpointError(
            f"{where} has {bad} values that are NaN or infinite; "
            "expected finite weights, use a sound state of that model"
        )
    # A bias of zeros is how Qwen2 starts; a weight of zeros was never trained or never written.
    if not nonzero and part.name.endswith(".weight") and not part.zeros:
        raise CheckpointError(
            f"{where} has only zeros; expected trained weights, use a sound state of that model"
        )


class _Health:
    """Counts of what is wrong with one part's values, over all slices."""

    def __init__(self) -> None:
        self.bad, self.nonzero = 0, False

    def see(self, rows: Tensor) -> None:
        """Count values of one slice."""
        finite = int(torch.isfinite(rows).sum())
        self.bad += rows.numel() - finite
        self.nonzero = self.nonzero or bool(rows.any())


def _blend_rows(
    blend: Blend,
    health: Sequence[_Health],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows [start, stop) of a blend in `dtype`.

    One part's slice is in memory at a time, beside the sum.
    """
    first = blend.parts[0]
    total = first.reader.read_rows(first.name, start, stop)
    health[0].see(total)
    if len(blend.parts) == 1 and first.weight == blend.divisor == 1.0:
        # a copy never goes through fp32 and back: it keeps every bit
        return total.mul_(blend.scale).to(dtype)
    # fp32 whatever the parts are: bf16 would round each summand
    total = total.float() * first.weight
    for part, seen in zip(blend.parts[1:], health[1:], strict=True):
        rows = part.reader.read_rows(part.name, start, stop)
        seen.see(rows)
        total += rows.float() * part.weight
    return (total / blend.divisor * blend.scale).to(dtype)


def _write_blend(
    writer: TensorWriter, name: str, shape: tuple[int, ...], blend: Blend, dtype: torch.dtype
) -> None:
    """Stream one tensor, a slice of rows at a time; values are checked on the way."""
    health = [_Health() for _ in blend.parts]
    result = _Health()
    for start, stop in row_slices(shape):
        rows = _blend_rows(blend, health, start, stop, dtype)
        result.see(rows)
        writer.write_rows(name, start, rows)
    for part, seen in zip(blend.parts, health, strict=True):
        _check_values(part, seen.bad, seen.nonzero)
    # parts that are finite can overflow in the sum, doubled, or in a narrower dtype
    if result.bad:
        who = blend.parts[0].who
        raise CheckpointError(
            f"{name}: {result.bad} values overflow {dtype}; {who} has weights too large"
        )


def write_tensors(
    directory: Path,
    plan: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, Blend | Tensor],
    label: str,
    config: ConfigJson,
) -> None:
    """Write the model file(s) of a checkpoint, one slice of one tensor in memory at a time.

    Args:
        directory: empty, not yet renamed.
        plan: dtype, as safetensors names it, and shape of each tensor, in file order.
        tensors: where each comes from.
        label: name in the progress line.
        config: config.json of the checkpoint, whose form decides how tensors lie in the file.

    Raises:
        CheckpointError: NaN, infinite or all-zero weights (names model, tensor and count), no
            space, a tensor that `tensors` lacks.
    """
    # vectors first: a form that translates norms needs them before the matrices behind them
    order = sorted(plan.items(), key=lambda item: len(item[1][1]) > 1)
    with (
        open_writer(directory, plan, config) as writer,
        Progress(label, len(plan), "tensors") as progress,
    ):
        for name, (dtype, shape) in order:
            tensor = tensors.get(name)
            if isinstance(tensor, Blend):
                _write_blend(writer, name, shape, tensor, DTYPES[dtype])
            elif tensor is not None:
                writer.write(name, tensor.to(DTYPES[dtype]))
            # one that is missing is named by the writer, with the others, as it closes
            progress.advance()


def write_model(
    directory: Path,
    config: ConfigJson,
    dtype: str,
    tensors: Mapping[str, Blend | Tensor],
    label: str,
) -> None:
    """Write config.json and the model file(s) of a Nexus checkpoint.

    Args:
        config: config.json of the output.
        dtype: of all its weights, as safetensors names it.

    `directory`, `tensors`, `label` and errors: `write_tensors`.
    """
    write_json(directory / "config.json", config)
    plan = {name: (dtype, entry.shape) for name, entry in stored(config).items()}
    write_tensors(directory, plan, tensors, label, config)


def read_generation_config(source: Path) -> ConfigJson | None:
    """Return generation_config.json where there is one.

    Raises:
        UnsupportedModelError: it asks for code of its own.
    """
    name = "generation_config.json"
    if not (source / name).is_file():
        return None
    value = read_json_object(source, name)
    refuse_hooks(value, str(source / name))
    return value
