"""What a checkpoint is, read from headers, its sidecar and a sample of bytes; without torch.

In a second or two at any size: of the router's rows some layers and columns are compared with P(D)
(`expert_rows`), of the tokenizer the vocabulary is read (`vocabulary`), no weight in full.
Not covered: whether all its values are sensible, and all its bytes those that were written
(`verification`).
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ds.checkpoint.config_json import ConfigJson, count, read_config, read_generation_config
from nexus_ds.checkpoint.dense import as_stored
from nexus_ds.checkpoint.dense_settings import as_its_class_has_it, settings
from nexus_ds.checkpoint.expert_rows import RouterFile, check_rows, open_router, unit
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES, QWEN3_NEXT
from nexus_ds.checkpoint.headers import Headers
from nexus_ds.checkpoint.older_stacks import unlike_transformers_4
from nexus_ds.checkpoint.qwen2_moe import (
    check_experts,
    check_shared_gates,
    gate_name,
    open_moe,
    parameter_counts,
)
from nexus_ds.checkpoint.records import ADOPT, SIDECAR, Manifest, is_nexus, read_manifest
from nexus_ds.checkpoint.tokenizer import chat_templates
from nexus_ds.checkpoint.values import read_values
from nexus_ds.checkpoint.vocabulary import read_vocabulary
from nexus_ds.config import read_yaml
from nexus_ds.errors import CheckpointError, UnsupportedModelError

Facts = dict[str, Any]
"""JSON."""
# Of mixtures of any family, which no table describes: most name their experts' weights like this.
ROUTED = re.compile(r"\.mlp\.experts\.([0-9]{1,9})\.")
SIZES = {  # our name: config.json's
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def count_parameters(reader: Headers, config: ConfigJson) -> dict[str, int]:
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


def _rows(router: RouterFile, weights: Headers, layers: int) -> str:
    """Return what the router's rows are, for people; damaged ones are told of, not refused."""
    # whoever inspects a damaged checkpoint wants to see the rest of it too
    try:
        check = check_rows(router, weights, layers, quick=True)
    except CheckpointError as error:
        return f"DAMAGED: {error}"
    if check.worst:
        worst = ", ".join(f"layer {layer} by {x:.1e}" for layer, x in check.worst.items())
        return (
            f"DAMAGED: rows differ from P(D): {worst} of the largest entry, expected at most "
            f"{check.tolerance:.1e}; model and sidecar are not of one training; {ADOPT}"
        )
    width = weights.info(gate_name(0)).shape[1]
    if len(check.layers) == layers and check.columns == width:
        return "equal to P(D)"
    return (
        f"equal to P(D) in {len(check.layers)} of {layers} layers, "
        f"{check.columns} of {width} columns"
    )


def _gates(reader: Headers, layers: int) -> str:
    try:
        check_shared_gates(reader, layers)
    except CheckpointError as error:
        return f"TRAINED ELSEWHERE: {error}"
    return "constant"


def _cosines(rows_EH: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows [E, E], to three places."""
    unit_EH = unit(rows_EH.astype(np.float64))
    return np.round(unit_EH @ unit_EH.T, 3)


def _row_facts(weights: Headers, layers: int) -> Facts:
    """Return lengths and directions of the stored rows, by layer; zeros or damage show as such."""
    norms, alike = [], []
    # rows are few: all of them are read, of all layers
    for layer in range(layers):
        rows_EH = read_values(weights, gate_name(layer))
        norms.append([round(float(x), 4) for x in np.sqrt(np.square(rows_EH).sum(-1))])
        cosines_EE = _cosines(rows_EH)
        # each row with itself tells nothing
        others = cosines_EE[~np.eye(len(cosines_EE), dtype=bool)]
        alike.append(round(float(others.mean()), 3) if len(others) else None)
    return {"row_norms": norms, "row_cosines": alike}


def _router_facts(
    directory: Path, manifest: Manifest, weights: Headers, layers: int
) -> tuple[Facts, Facts]:
    """Return what is known of the router and of the domains that it tells apart."""
    facts: Facts = vars(manifest.router).copy()
    names = [expert.domain for expert in manifest.experts]
    try:
        router = open_router(directory, manifest)
    except CheckpointError as error:
        return facts | {"rows": f"DAMAGED: {error}"}, {}
    free = manifest.router.kind != "nexus"
    facts["rows"] = "free" if free else _rows(router, weights, layers)
    facts |= _row_facts(weights, layers)
    cosines = dict(zip(names, _cosines(router.vectors_EM).tolist(), strict=True))
    return facts, {"names": names, "cosines": cosines}


def _agreement(manifest: Manifest, config: ConfigJson) -> str:
    """Return whether sidecar and config.json tell of the same mixture."""
    said = {
        "num_experts": len(manifest.experts),
        "num_experts_per_tok": manifest.router.top_k,
    }
    wrong = [
        f"{key} is {config.get(key)} in config.json, {expected} in the sidecar"
        for key, expected in said.items()
        if config.get(key) != expected
    ]
    return f"DAMAGED: {'; '.join(wrong)}" if wrong else "sidecar and config.json agree"


def _nexus_info(directory: Path, reader: Headers, config: ConfigJson) -> Facts:
    manifest = read_manifest(directory)
    encoder = manifest.encoder
    where = str(directory / "config.json")
    settings(config, where)  # whose messages have no directory below
    check_experts(config, len(reader.names()), where)
    layers = config["num_hidden_layers"]
    total, active = parameter_counts(config, manifest.shared_expert == "seed")
    weights = reader
    # its rows are stored in other units: this form alone is translated
    if config["model_type"] == QWEN3_NEXT:
        _, weights = open_moe(directory)
    router, domains = _router_facts(directory, manifest, weights, layers)
    return {
        "experts": [vars(expert).copy() for expert in manifest.experts],
        "router": router,
        "domains": domains,
        "sidecar": _agreement(manifest, config),
        "encoder": None if encoder is None else vars(encoder).copy(),
        "lineage": [step.entry() for step in manifest.lineage],
        "shared_expert": manifest.shared_expert,
        "shared_expert_gate": _gates(reader, layers),
        "parameters": {"total": total, "active": active},
        "transformers_4": "; ".join(unlike_transformers_4(config)) or "as 5",
        "versions": manifest.versions,
    }


def _moe_info(config: ConfigJson, where: str) -> Facts:
    experts = count(config, "num_experts", where)
    if not experts:
        return {"routed_experts": 0}
    return {
        "routed_experts": experts,
        "top_k": count(config, "num_experts_per_tok", where),
        "ffn_size": count(config, "moe_intermediate_size", where),
        "shared_ffn_size": count(config, "shared_expert_intermediate_size", where),
    }


def _tokenizer(directory: Path) -> Facts:
    """Return what the tokenizer's files say; the same fingerprint in whatever form they are."""
    # a model without one can be looked at all the same
    try:
        found = read_vocabulary(directory)
    except CheckpointError as error:
        return {"form": f"DAMAGED: {error}"}
    if found is None:
        return {"form": "none"}
    facts = {"form": found.form, "tokens": len(found.tokens), "fingerprint": found.fingerprint}
    return facts | found.roles


def _generation(directory: Path) -> Facts | str:
    try:
        found = read_generation_config(directory)
    except (CheckpointError, UnsupportedModelError) as error:
        return f"REFUSED: {error}"
    # who wrote it says nothing of what it does
    return {k: v for k, v in (found or {}).items() if k != "transformers_version"} or "none"


def _template(directory: Path) -> str:
    """Return where the chat templates are, with a hash that tells them apart."""
    found = chat_templates(directory)
    texts = [
        f"{name} {hashlib.sha256(str(t).encode()).hexdigest()[:8]}" for name, t in found.items()
    ]
    return ", ".join(texts) or "none"


def _computation(config: ConfigJson, where: str) -> Facts:
    """Return what else decides what a model of a known family computes."""
    if config.get("model_type") not in (*FAMILIES, *MIXTURES):
        return {}
    try:
        found = settings(config, where)
    except (CheckpointError, UnsupportedModelError) as error:
        return {"settings": f"REFUSED: {error}"}
    return {
        "head_dim": found.head_dim,
        **as_its_class_has_it(config),
        "qkv_bias": found.qkv_bias,
        "sliding_window": found.sliding_window,
    }


def _sequence_length(directory: Path) -> int | None:
    """Return the tokens of a training window; None where training.yaml doesn't tell."""
    path = directory / "training.yaml"
    if not path.is_file():
        return None
    # written by this program, but a checkpoint from elsewhere may have a file of this name
    saved = read_yaml(path)
    if not isinstance(saved, dict):
        return None
    data = saved.get("data")
    if not isinstance(data, dict):
        return None
    length = data.get("sequence_length")
    return length if type(length) is int and length > 0 else None


def _kind(config: ConfigJson) -> str:
    return "mixture of experts" if config.get("num_experts") else "dense"


def _stored_info(reader: Headers, config: ConfigJson) -> Facts:
    """Return what the headers of the model's files say."""
    tensors = [reader.info(name) for name in reader.names()]
    dtypes = {tensor.dtype for tensor in tensors}
    return {
        "dtype": "+".join(sorted(dtypes)),
        "parameters": count_parameters(reader, config),
        "bytes": sum(tensor.end - tensor.start for tensor in tensors),
        "files": len(reader.files()),
    }


def describe(directory: Path) -> Facts:
    """Return the model info of one checkpoint, all of it JSON.

    Kind, family, dtype, sizes, parameters; of a Nexus checkpoint also experts and origin.

    Raises:
        CheckpointError: no model directory, or damaged files.
        UnsupportedModelError: a configuration that asks for code of the checkpoint or of a hub.
    """
    directory = Path(directory)
    config = read_config(directory)
    reader = Headers(directory)
    config = as_stored(config, reader)
    nexus = is_nexus(directory)
    info: Facts = {
        "directory": str(directory),
        "kind": "Nexus" if nexus else _kind(config),
        "family": config.get("model_type", "unknown"),
        **_stored_info(reader, config),
        **{ours: config.get(theirs) for ours, theirs in SIZES.items()},
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_computation(config, str(directory / "config.json")),
        **_moe_info(config, str(directory / "config.json")),
        "sequence_length": _sequence_length(directory),
        "tokenizer": _tokenizer(directory),
        "chat_template": _template(directory),
        "generation_config": _generation(directory),
    }
    # a Nexus checkpoint's own counts take the place of those above
    if nexus:
        info |= _nexus_info(directory, reader, config)
    elif config.get("model_type") in MIXTURES:
        info["extendable"] = f"no, it has no {SIDECAR}: {ADOPT}"
    return info
