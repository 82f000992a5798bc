"""What a checkpoint is, read from its headers and its sidecar without loading a weight.

Not covered: whether its tensors hold sensible numbers (`evaluate` finds out).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from nexus_ds.checkpoint.config_json import ConfigJson, count, read_config
from nexus_ds.checkpoint.dense import as_stored
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.older_stacks import unlike_transformers_4
from nexus_ds.checkpoint.qwen2_moe import check_shared_gates, parameter_counts
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.config import parse_yaml
from nexus_ds.errors import CheckpointError, UnsupportedModelError

# Of mixtures of any family, which no table describes: most name their experts' weights like this.
ROUTED = re.compile(r"\.mlp\.experts\.(\d+)\.")
SIZES = {  # our name: config.json's
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def count_parameters(reader: TensorReader, config: ConfigJson) -> dict[str, int]:
    """Return {"total", "active"} of a checkpoint of any family.

    Active counts, of the routed experts, the top-k that a token visits. Tied embeddings count once,
    also where both are on disk.
    """
    # a file that says so and has only a head counts that
    tied = bool(config.get("tie_word_embeddings")) and EMBEDDING in reader
    total = 0
    routed = 0
    experts: set[int] = set()
    for name in reader.names():
        if tied and name == HEAD:
            continue
        shape = reader.info(name).shape
        size = math.prod(shape)
        total += size
        expert = ROUTED.search(name)
        if expert:
            routed += size
            experts.add(int(expert[1]))
    if not experts:
        return {"total": total, "active": total}
    top_k = count(config, "num_experts_per_tok", str(reader.directory / "config.json"), 1)
    # experts of one model are of one size
    idle = routed * (len(experts) - top_k) // len(experts)
    return {"total": total, "active": total - idle}


def _rows(directory: Path, kind: str) -> str:
    """Return what the router's rows are, for people; damaged ones are told of, not refused."""
    # whoever inspects a damaged checkpoint wants to see the rest of it too
    try:
        verify_expert_embeddings(directory)
    except CheckpointError as error:
        return f"DAMAGED: {error}"
    return "equal to P(D)" if kind == "nexus" else "free"


def _gates(reader: TensorReader, layers: int) -> str:
    try:
        check_shared_gates(reader, layers)
    except CheckpointError as error:
        return f"TRAINED ELSEWHERE: {error}"
    return "constant"


def _nexus_info(directory: Path, reader: TensorReader, config: ConfigJson) -> dict[str, Any]:
    sidecar = read_sidecar(directory)
    router, encoder = sidecar.router, sidecar.encoder
    settings(config, str(directory / "config.json"))  # whose messages have no directory below
    total, active = parameter_counts(config, sidecar.shared_expert == "seed")
    return {
        "experts": [vars(expert).copy() for expert in sidecar.experts],
        "router": vars(router) | {"rows": _rows(directory, router.kind)},
        "encoder": None if encoder is None else vars(encoder).copy(),
        "lineage": [step.entry() for step in sidecar.lineage],
        "shared_expert": sidecar.shared_expert,
        "shared_expert_gate": _gates(reader, config["num_hidden_layers"]),
        "parameters": {"total": total, "active": active},
        "transformers_4": "; ".join(unlike_transformers_4(config)) or "as 5",
        "versions": sidecar.versions,
    }


def _moe_info(config: ConfigJson, where: str) -> dict[str, Any]:
    experts = count(config, "num_experts", where)
    if not experts:
        return {"routed_experts": 0}
    return {
        "routed_experts": experts,
        "top_k": count(config, "num_experts_per_tok", where),
        "ffn_size": count(config, "moe_intermediate_size", where),
        "shared_ffn_size": count(config, "shared_expert_intermediate_size", where),
    }


def _tokenizer(directory: Path) -> str:
    # a model without one can be looked at all the same
    try:
        return read_tokenizer(directory).fingerprint
    except (CheckpointError, UnsupportedModelError):
        return "none"


def _sequence_length(directory: Path) -> int | None:
    """Return the tokens of a training window; None where training.yaml doesn't tell."""
    path = directory / "training.yaml"
    if not path.is_file():
        return None
    # written by this program, but a checkpoint from elsewhere may have a file of this name
    saved = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(saved, dict):
        return None
    data = saved.get("data")
    if not isinstance(data, dict):
        return None
    length = data.get("sequence_length")
    return length if type(length) is int and length > 0 else None


def _kind(config: ConfigJson) -> str:
    return "mixture of experts" if config.get("num_experts") else "dense"


def _stored_info(reader: TensorReader, config: ConfigJson) -> dict[str, Any]:
    """Return what the headers of the model's files say."""
    tensors = [reader.info(name) for name in reader.names()]
    dtypes = {tensor.dtype for tensor in tensors}
    return {
        "dtype": "+".join(sorted(dtypes)),
        "parameters": count_parameters(reader, config),
        "bytes": sum(tensor.end - tensor.start for tensor in tensors),
    }


def describe(directory: Path) -> dict[str, Any]:
    """Return the model info of one checkpoint, all of it JSON.

    Kind, family, dtype, sizes, parameters; of a Nexus checkpoint also experts and origin.

    Raises:
        CheckpointError: no model directory, or damaged files.
        UnsupportedModelError: a configuration that asks for code of the checkpoint or of a hub.
    """
    directory = Path(directory)
    config = read_config(directory)
    reader = TensorReader(directory)
    config = as_stored(config, reader)
    nexus = is_nexus(directory)
    info: dict[str, Any] = {
        "directory": str(directory),
        "kind": "Nexus" if nexus else _kind(config),
        "family": config.get("model_type", "unknown"),
        **_stored_info(reader, config),
        **{ours: config.get(theirs) for ours, theirs in SIZES.items()},
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_moe_info(config, str(directory / "config.json")),
        "sequence_length": _sequence_length(directory),
        "tokenizer": _tokenizer(directory),
    }
    # a Nexus checkpoint's own counts take the place of those above
    if nexus:
        info |= _nexus_info(directory, reader, config)
    return info
