"""A checkpoint's layers one after the other on the device: models that are larger than its memory.

`streamed_model` returns what transformers would load, but for weights of its decoder layers: a
layer reads them when it is called and drops them when it is done. Everything that runs a model of
transformers (scoring, generation with its cache, lm-eval's tasks) runs this one, too, and computes
the same numbers. Each forward pass reads the whole checkpoint, so it should be of many sequences:
a layer takes them `rows` at a time, their hidden states wait in main memory.

Shapes: B sequences, S tokens, H hidden size, E routed experts, F inner width.
Not covered: families other than those of `families.FAMILIES` and their mixtures; reading the next
layer while one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nexus_ds.checkpoint.build import fill, transformers_config
from nexus_ds.checkpoint.dense import as_stored
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import MIXTURES
from nexus_ds.checkpoint.loading import check_loaded, told_in_one_line
from nexus_ds.checkpoint.native import make_buffers
from nexus_ds.checkpoint.qwen2_moe import expert_name
from nexus_ds.checkpoint.tensors import DTYPES, TensorReader
from nexus_ds.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Forward = Callable[..., Tensor]
LAYERS = "model.layers."
FREQUENCIES = "rotary_emb.inv_freq"
"""Of RoPE, in each layer of older files; transformers reads over them."""


class LayerReader:
    """Fills decoder layers of transformers with a checkpoint's weights."""

    def __init__(
        self,
        tensors: TensorReader,
        config: PretrainedConfig,
        dtype: torch.dtype,
        place: torch.device,
    ) -> None:
        """Read layers of a model of `config`; they compute in `dtype`, on `place`."""
        self.tensors = tensors
        self.config = config
        self.dtype = dtype
        self.place = place
        self.experts = config.num_experts if config.model_type in MIXTURES else 0

    def fill(self, block: nn.Module, layer: int) -> None:
        """Give a layer on the meta device its weights.

        Tensors are read one at a time: besides the layer, one of its matrices is in main memory.

        Raises:
            CheckpointError: tensors that the layer does not have, or lacks.
        """
        prefix = f"{LAYERS}{layer}."
        names = [
            name
            for name in self.tensors.names()
            if name.startswith(prefix) and not name.endswith(FREQUENCIES)
        ]
        routed = f"{prefix}mlp.experts."
        # A Qwen2-MoE of another form has dense layers in between.
        has_experts = bool(self.experts) and any(name.startswith(routed) for name in names)
        state = self._stacked(layer) if has_experts else {}
        for name in names:
            if not (has_experts and name.startswith(routed)):
                state[name.removeprefix(prefix)] = self._read(name)
        expected = {name for name, _ in block.named_parameters()}
        odd = sorted(expected ^ state.keys())
        if odd:
            raise CheckpointError(
                f"{self.tensors.directory}: layer {layer} lacks or should not have {odd[0]!r}; "
                "expected exactly the tensors of config.json. Save or fetch the checkpoint again"
            )
        block.load_state_dict(state, assign=True)
        block.requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        return self.tensors.read(name).to(self.place, self.dtype)

    def _stacked(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's experts as transformers stacks them: gate_proj on up_proj [E, 2F, H]."""
        ffn, hidden = self.tensors.info(expert_name(layer, 0, "gate_proj")).shape
        empty = partial(torch.empty, dtype=self.dtype, device=self.place)
        gate_up_EFH = empty((self.experts, 2 * ffn, hidden))
        down_EHF = empty((self.experts, hidden, ffn))
        for expert in range(self.experts):
            parts = {
                "gate_proj": gate_up_EFH[expert, :ffn],
                "up_proj": gate_up_EFH[expert, ffn:],
                "down_proj": down_EHF[expert],
            }
            for part, target in parts.items():
                target.copy_(self.tensors.read(expert_name(layer, expert, part)))
        return {"mlp.experts.gate_up_proj": gate_up_EFH, "mlp.experts.down_proj": down_EHF}


# One part of a model somewhere else --------------------------------------------------------------


def _part_of(value: object, count: int, part: slice, place: torch.device) -> object:
    """Return what a slice of `count` sequences needs of an argument, on the device."""
    if isinstance(value, tuple):
        return tuple(_part_of(item, count, part, place) for item in value)
    if not isinstance(value, Tensor):
        return value
    # What is the same for all sequences has one row; a vector is of tokens.
    if value.ndim > 1 and value.shape[0] == count:
        value = value[part]
    return value.to(place)


def _in_slices(forward: Forward, rows: int, place: torch.device) -> Forward:
    """Return a forward pass of a layer or norm, `rows` sequences at a time; states go in and out
    as they lie.

    With a cache all sequences go at once: it keeps them together.
    """

    def run(hidden_BSH: Tensor, **kwargs: object) -> Tensor:
        count = len(hidden_BSH)
        step = rows if kwargs.get("past_key_values") is None else count
        found_BSH = torch.empty_like(hidden_BSH)
        for start in range(0, count, step):
            part = slice(start, start + step)
            arguments = {name: _part_of(v, count, part, place) for name, v in kwargs.items()}
            found_BSH[part] = forward(hidden_BSH[part].to(place), **arguments)
        return found_BSH

    return run


def _streamed(block: nn.Module, layer: int, reader: LayerReader, rows: int) -> None:
    """Let a layer on the meta device read its weights when it is called, and drop them after."""
    sliced = _in_slices(block.forward, rows, reader.place)

    def run(hidden_BSH: Tensor, **kwargs: object) -> Tensor:
        reader.fill(block, layer)
        try:
            return sliced(hidden_BSH, **kwargs)
        finally:
            block.to("meta")

    block.forward = run


def _placed(module: nn.Module, place: torch.device) -> None:
    """Let a module outside of the layers run on the device, for states in main memory."""
    if place.type == "cpu":
        return
    forward = module.forward
    module.to(place)
    module.forward = lambda states: forward(states.to(place)).to(states.device)


# The model ---------------------------------------------------------------------------------------


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device, but for its buffers, which no file has."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    make_buffers(model)
    return model


def _stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return what a model has in files, with its shape: experts one by one, not stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        if not owner.endswith("mlp.experts"):
            shapes[name] = tuple(weight.shape)
            continue
        experts, height, width = weight.shape
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert in range(experts):
            for part in parts:
                shapes[f"{owner}.{expert}.{part}.weight"] = (height // len(parts), width)
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def _check_tensors(model: PreTrainedModel, tensors: TensorReader) -> None:
    """Refuse files that are not exactly a model's, as `load_model` does: before they are read."""
    expected = _stored_shapes(model)
    # a tied output layer may stand in the file once more
    passed_over = (FREQUENCIES, HEAD) if model.config.tie_word_embeddings else FREQUENCIES
    found = {
        name: tensors.info(name).shape for name in tensors.names() if not name.endswith(passed_over)
    }
    both = expected.keys() & found.keys()
    info = {
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": found.keys() - expected.keys(),
        "mismatched_keys": [name for name in both if expected[name] != found[name]],
    }
    check_loaded(tensors.directory, info)


def _generation_settings(model: PreTrainedModel, directory: Path) -> None:
    """Take over the checkpoint's generation_config.json, as transformers does."""
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with told_in_one_line(directory):
            found = GenerationConfig.from_pretrained(directory, local_files_only=True)
        model.generation_config = found


def streamed_model(
    directory: Path, dtype: torch.dtype | None, place: torch.device, rows: int = 8
) -> PreTrainedModel:
    """Return a checkpoint as a model of transformers, in eval mode, whose layers are not in memory.

    It stands on the CPU, whatever its layers compute on: it takes and returns tensors there.

    Args:
        directory: a dense or Nexus checkpoint, checked by the caller.
        dtype: to compute in; None: the stored one.
        place: where a layer computes.
        rows: sequences that a layer takes at once.

    Raises:
        UnsupportedModelError: a family whose layers are not known here.
        CheckpointError: tensors other than those of its config.json, or JSON that transformers
            can't load.
    """
    config = transformers_config(directory)
    kind = config.model_type
    if kind not in (*FAMILIES, *MIXTURES):
        raise UnsupportedModelError(
            f"{directory}: a model of type {kind!r} can't be run layer by layer; known: "
            f"{', '.join((*FAMILIES, *MIXTURES))}. Run it where it fits whole"
        )
    tensors = TensorReader(directory)
    dtype = dtype or config.dtype or DTYPES[tensors.info(EMBEDDING).dtype]
    reader = LayerReader(tensors, config, dtype, place)
    # A tied head that has another tensor all the same is none.
    said = {"tie_word_embeddings": config.tie_word_embeddings}
    config.tie_word_embeddings = as_stored(said, tensors)["tie_word_embeddings"]
    with told_in_one_line(directory):
        model = _skeleton(config, dtype)
    # A stack would take one row for all, and a layer too many would be left out.
    _check_tensors(model, tensors)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if name != "lm_head" or not config.tie_word_embeddings:
            fill(model, name, tensors, dtype)
    if config.tie_word_embeddings:
        embeddings = model.model.embed_tokens.weight
        # On another device the head is a copy of its own.
        model.lm_head.weight = nn.Parameter(embeddings.detach(), requires_grad=False)
    for layer, block in enumerate(model.model.layers):
        _streamed(block, layer, reader, rows)
    # It, too, is given all sequences that wait: at once, they would be on the device together.
    norm = model.model.norm.to(place)
    norm.forward = _in_slices(norm.forward, rows, place)
    _placed(model.lm_head, place)
    _generation_settings(model, directory)
    return model.eval()
