"""A dense model on disk: its tensors held against its config.json, no weight in memory, no torch.

`open_dense` refuses by name what can't become an expert, all of it at once.
Not covered: quantised models, tied weights other than the embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ds.checkpoint.config_json import ConfigJson, read_config
from nexus_ds.checkpoint.dense_settings import filled, refuse_unsupported, settings
from nexus_ds.checkpoint.families.record import (
    EMBEDDING,
    HEAD,
    DenseSettings,
    Family,
    dense_weights,
)
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.checkpoint.views import file_shapes, origins, underlying, viewed
from nexus_ds.checkpoint.wrappers import text_config, text_tensors
from nexus_ds.errors import CheckpointError, UnsupportedModelError

MODEL_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_HEAD = 1 << 16  # channels of a head; real ones have some hundreds
# Endings of the names of weights that some model of a known family may have, and a Qwen2-MoE can't.
HOMELESS = ("o_proj.bias", "mlp.down_proj.bias", "q_norm.weight")


@dataclass(frozen=True)
class DenseModel:
    """A dense model on disk, its configuration and headers checked; no weight is in memory."""

    directory: Path
    config: ConfigJson
    """config.json as it stands on disk, of a model that sees its text's (`wrappers`), but for
    `tie_word_embeddings`, which is as the file of weights has it."""
    family: str
    """A key of FAMILIES."""
    reader: Headers
    """Under the names of `dense_weights`, whatever names the family has (`views`)."""
    dtype: str
    """Of all weights, as safetensors names it: F32 | BF16 | F16."""
    settings: DenseSettings

    def ffn_names(self) -> list[str]:
        """Return the names of all FFN weights."""
        return [name for name, weight in dense_weights(self.settings).items() if weight.part]

    def in_file(self) -> DenseModel:
        """Return the model with its tensors as they lie in the file, where a view hides them."""
        own = replace(self.settings, tied_embeddings=_tied(self.config))
        return replace(self, reader=underlying(self.reader), settings=own)


def _tied(config: ConfigJson) -> bool:
    """Return whether the embeddings are the head in the file; a view may show two of them."""
    return bool(filled(config)["tie_word_embeddings"])


def as_stored(config: ConfigJson, reader: Headers) -> ConfigJson:
    """Return config.json with embeddings tied only if no other head is in the file.

    A head that differs from the embeddings is what transformers computes with, whatever
    config.json says.
    """
    if not config.get("tie_word_embeddings") or not {EMBEDDING, HEAD} <= set(reader.names()):
        return config
    embedding, head = reader.info(EMBEDDING), reader.info(HEAD)
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    # a piece at a time: whole, both may be larger than memory
    pieces = zip(reader.chunks(EMBEDDING), reader.chunks(HEAD), strict=True) if same else ()
    equal = same and all(ours == theirs for ours, theirs in pieces)
    return config if equal else config | {"tie_word_embeddings": False}


def check_tensors(
    reader: Headers, shapes: dict[str, tuple[int, ...]], tied: bool, fp32: Collection[str] = ()
) -> str:
    """Check names, shapes and dtypes of a model's tensors against its configuration.

    Args:
        reader: the model's tensors.
        shapes: what the configuration makes of them.
        tied: whether the embeddings are the head, too.
        fp32: tensors that may be in fp32 beside others of 16 bits.

    Returns:
        The one dtype of all but these, as safetensors names it.

    Raises:
        UnsupportedModelError: weights that a Qwen2-MoE has no place for, or of several or of other
            dtypes.
        CheckpointError: tensors that are missing, unknown or of another shape.
            Where there are several mistakes, all are told, in an error of the first one's type.
    """
    problems = Problems()
    with problems.collected():
        _check_names(reader, shapes, tied)
    there = [name for name in shapes if name in reader]
    with problems.collected():
        _check_shapes(reader, {name: shapes[name] for name in there})
    dtype = ""
    told = [name for name in there if name not in fp32 or reader.info(name).dtype != "F32"]
    if told:
        with problems.collected():
            dtype = _one_dtype(reader, told)
    problems.refuse()
    return dtype


def _check_shapes(reader: Headers, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = []
    for name, shape in shapes.items():
        found = reader.info(name).shape
        if found != shape:
            wrong.append(f"{name} {found}, expected {shape}")
    if wrong:
        raise CheckpointError(
            f"{reader.directory}: {len(wrong)} tensors have another shape than config.json says: "
            f"{'; '.join(wrong[:5])}"
        )


def _check_names(reader: Headers, shapes: Mapping[str, object], tied: bool) -> None:
    where = reader.directory
    # A tied model may repeat its head, and older files hold RoPE's frequencies: transformers reads
    # neither.
    ignored = {HEAD} if tied else set()
    extra = []
    for name in reader.names():
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            extra.append(name)
    homeless = [name for name in extra if name.endswith(HOMELESS)]
    if homeless:
        raise UnsupportedModelError(
            f"{where}: a Qwen2-MoE has no place for {homeless[0]} and {len(homeless) - 1} like it"
        )
    missing = [name for name in shapes if name not in reader]
    parts = []
    for kind, names in (("missing", missing), ("unknown", extra)):
        if names:
            parts.append(f"{len(names)} {kind}: {', '.join(names[:5])}")
    if parts:
        raise CheckpointError(
            f"{where}: the tensors are not those of its config.json; {'; '.join(parts)}"
        )


def _one_dtype(reader: Headers, names: Iterable[str]) -> str:
    where = reader.directory
    dtypes = {reader.info(name).dtype: name for name in names}
    if len(dtypes) > 1:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise UnsupportedModelError(
            f"{where}: weights of several dtypes: {listed}; "
            "save the model in one, fp32, bf16 or fp16"
        )
    dtype = next(iter(dtypes))
    if dtype not in MODEL_DTYPES:
        raise UnsupportedModelError(
            f"{where}: weights are {dtype}; save the model in fp32, bf16 or fp16 first"
        )
    return dtype


def _without_ignored(reader: Headers, family: Family) -> Headers:
    """Return a file's tensors without those that transformers' class passes over."""
    if not family.ignored:
        return reader
    return reader.renamed({n: n for n in reader.names() if not n.startswith(family.ignored)})


def _check_heads(settings: DenseSettings, where: str) -> None:
    # A view lists the channels of a head: a false number would fill the memory.
    if settings.head_dim > MAX_HEAD:
        raise CheckpointError(
            f"{where}: heads of {settings.head_dim} channels, expected at most {MAX_HEAD}; the "
            "configuration is damaged"
        )


def open_dense(directory: Path) -> DenseModel:
    """Open a dense model and check that it can become an expert.

    Its config.json and tensor headers alone are read.

    Raises:
        CheckpointError: not a model directory, damaged, or its tensors are not those that
            config.json describes.
        UnsupportedModelError: a family, bias, activation, dtype or code hook that a Qwen2-MoE can't
            express.
            Where there are several mistakes, all are told, in an error of the first one's type.
    """
    directory = Path(directory)
    whole = read_config(directory)
    config = text_config(whole)
    where = str(directory / "config.json")
    problems = Problems()
    with problems.collected():
        refuse_unsupported(config, where)
    # of an unknown family nothing more can be asked
    if config.get("model_type") not in FAMILIES:
        problems.refuse()
    with problems.collected():
        reader = text_tensors(Headers(directory), whole)
        reader = _without_ignored(reader, FAMILIES[config["model_type"]])
        config = as_stored(config, reader)
        normal = settings(config, where)
        _check_heads(normal, where)
        found = origins(config, normal)
        fp32 = {name for name, weight in dense_weights(normal).items() if weight.fp32}
        dtype = check_tensors(reader, file_shapes(found, normal), _tied(config), fp32)
    problems.refuse()
    view = viewed(reader, found, normal)
    return DenseModel(directory, config, config["model_type"], view, dtype, normal)
