"""What lies in a mixture's weight files, of tensors that have the dense family's names; no torch.

    qwen2_moe        a tied output layer once more
    qwen3_next       the queries' matrix twice as tall, for a gate; a tied output layer once more.
                     Of Qwen3.5: what `qwen3_5` says
    nexus_<family>   what the family's own model has, and no more

Not covered: what the values become there (`qwen3_next`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.forms import PLAIN, QWEN3_NEXT, reordered
from nexus_ds.checkpoint.headers import Plan
from nexus_ds.checkpoint.qwen3_5 import in_qwen3_next

FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Place:
    """How one tensor of a dense Qwen3, or of its experts, lies in a Qwen3-Next."""

    norm: str = ""
    """The norm whose powers of two its columns take; empty: none."""
    head: int = 0
    """Rows of a head after which as many zeros stand; 0: none do."""
    scale: float = 1.0

    def in_file(self, rows: int) -> int:
        """Return the row of the file that a row of the tensor has."""
        return rows + rows // self.head * self.head if self.head else rows


def place_of(name: str, head_dim: int) -> Place:
    """Return how a tensor lies in the file; norms are not asked for here."""
    layer = ".".join(name.split(".")[:3])
    part = name.removesuffix(".weight").rpartition(".")[2]
    if name == HEAD:
        return Place(FINAL_NORM)
    if part in ("q_proj", "k_proj", "v_proj"):
        return Place(f"{layer}.input_layernorm.weight", head_dim if part == "q_proj" else 0)
    if part == "o_proj":
        return Place(scale=2.0)
    # `gate` is the router; the shared expert's gate is a constant and stays one
    if part in ("gate_proj", "up_proj", "gate"):
        return Place(f"{layer}.post_attention_layernorm.weight")
    return Place()


def is_norm(name: str) -> bool:
    """Return whether a tensor is the weight of a norm."""
    return name.endswith("norm.weight")


def repeated(config: ConfigJson) -> dict[str, str]:
    """Return what a mixture's files hold once more: for each such name that of the tensor.

    It is the output layer where a Qwen2-MoE's embeddings are tied. transformers ties them in either
    case; llama.cpp and SGLang read it from the file alone. The cost is vocabulary times width: 0.5
    GB or 6% of four experts of Llama-3.2-1B. Readers do without it.
    """
    stock = config.get("model_type") == PLAIN[0]
    return {HEAD: EMBEDDING} if stock and settings(config).tied_embeddings else {}


def in_files(plan: Plan, config: ConfigJson) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what a mixture's weight files hold.

    Args:
        plan: dtype and shape of each tensor, by the dense family's names.
        config: config.json of the mixture.
    """
    if reordered(config):
        return in_qwen3_next(plan, config)
    if config.get("model_type") == QWEN3_NEXT:
        return _in_qwen3_next(plan, settings(config).head_dim)
    more = {name: plan[source] for name, source in repeated(config).items()}
    return {**plan, **more}


def _in_qwen3_next(plan: Plan, head_dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for name, (dtype, shape) in plan.items():
        wide = bool(place_of(name, head_dim).head) and not is_norm(name)
        found[name] = dtype, (shape[0] * 2, *shape[1:]) if wide else tuple(shape)
    found.setdefault(HEAD, found[EMBEDDING])
    return found
