"""Any checkpoint, dense or Nexus, as stock transformers runs it: for scoring and for generating.

Nothing leaves the machine, no code of the checkpoint is run, no tensor is initialised at random: a
checkpoint whose tensors don't fit its configuration is refused.

Not covered: models larger than one device (`pieces`), quantised weights, training (see build.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nexus_ds.checkpoint.config_json import (
    CONTEXT_MODEL,
    read_config,
)
from nexus_ds.checkpoint.forms import native_family
from nexus_ds.checkpoint.qwen2_moe import gate_name
from nexus_ds.checkpoint.records import is_nexus
from nexus_ds.checkpoint.sidecar import verify_expert_embeddings
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, ConfigError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRECISIONS = ("auto", "fp32", "stored")
# What transformers raises for damaged or contradictory files: it has no type of its own for them.
# What transformers and torch raise for a configuration that no model can be built of: a number too
# large for its place is an ArithmeticError, a padding token beyond the vocabulary an
# AssertionError.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


def device() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_transformers() -> None:
    """Leave progress bars and warnings to this program's own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def know_model_type(directory: Path) -> None:
    """Make transformers know the model of a checkpoint whose class is defined here.

    That is one with the router input `context`, or of a family's native form.
    """
    model_type = read_config(directory).get("model_type")
    family = native_family(model_type)
    if family:
        # as below
        from nexus_ds.checkpoint.native import mixture_classes

        mixture_classes(family)
    if model_type == CONTEXT_MODEL:
        # imports transformers' modelling code, which most checkpoints don't need yet
        from nexus_ds.checkpoint.hf_model import register

        register()


def computed_dtype(precision: str, place: torch.device) -> torch.dtype | None:
    """Return the dtype that a model computes in on a device; None: the stored one.

    Raises:
        ConfigError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: unknown value {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision == "fp32" or (precision == "auto" and place.type == "cpu"):
        return torch.float32
    return None


@contextmanager
def told_in_one_line(directory: Path) -> Iterator[None]:
    """Turn what transformers raises for files of a checkpoint into a CheckpointError.

    So that a damaged file is told like any other, without a traceback.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    # headers that its library refuses and this program reads: of odd metadata, or odd names
    except (*LOAD_ERRORS, StrictDataclassError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: transformers can't load this checkpoint: {one_line(error)}"
        ) from error


def check_loaded(directory: Path, info: Mapping[str, Iterable[object]]) -> None:
    """Refuse what transformers would mend with random numbers or drop in silence.

    Args:
        directory: of the checkpoint.
        info: names by kind of trouble, as transformers' `output_loading_info` has them.

    Raises:
        CheckpointError: there are such names.
    """
    troubles = {
        "missing_keys": "are missing",
        "unexpected_keys": "are not known to the model's family",
        "mismatched_keys": "have another shape than config.json says",
    }
    for key, said in troubles.items():
        found = info.get(key, ())
        # mismatched_keys come with both shapes: (name, shape, shape)
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found)
        if names:
            raise CheckpointError(
                f"{directory}: {len(names)} tensors {said}, the first: {names[0]!r}; "
                "expected exactly the tensors of config.json. Save or fetch the checkpoint again"
            )


def verified(directory: Path) -> None:
    """Check what transformers trusts or can't tell.

    Raises:
        CheckpointError: damaged, incomplete or pickled files; router rows that differ from P(D) of
            the sidecar.
        UnsupportedModelError: a configuration that asks for code of the checkpoint or of a hub.
    """
    know_model_type(directory)
    # checks headers, ranges and paths, which transformers trusts
    TensorReader(directory)
    # rows that P(D) does not give are another model's, or damaged: transformers can't tell
    if is_nexus(directory):
        verify_expert_embeddings(directory)


def load_model(directory: Path, precision: str = "auto", place: torch.device | None = None) -> Any:
    """Return a causal language model of stock transformers, in eval mode.

    Args:
        directory: a dense or a Nexus checkpoint.
        precision: fp32, stored (the dtype on disk), or auto: fp32 on a CPU, stored on a GPU.
        place: device; default the GPU if any.

    Raises:
        CheckpointError: damaged, incomplete or pickled files; router rows that differ from P(D) of
            the sidecar.
        UnsupportedModelError: a configuration that asks for code of the checkpoint or of a hub.
        ConfigError: unknown precision.
    """
    directory = Path(directory)
    place = place or device()
    dtype = computed_dtype(precision, place) or "auto"
    verified(directory)
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    with told_in_one_line(directory):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    check_loaded(directory, info)
    return model.to(place).eval()


def routers_of(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return a model's routers by their layers; none of a dense one.

    It is stock transformers that runs, so its modules are found by their names.
    """
    modules = dict(model.named_modules())
    routers: dict[int, nn.Module] = {}
    for layer in range(model.config.num_hidden_layers):
        name = gate_name(layer).removesuffix(".weight")
        if name in modules:
            routers[layer] = modules[name]
    return routers
