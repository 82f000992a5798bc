"""What becomes of bytes on their way into a form's files: as the writer in torch has it, however
they are cut."""

import numpy as np
import pytest
import torch

from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import in_files, is_norm, repeated
from nexus_ds.checkpoint.forms import reordered
from nexus_ds.checkpoint.headers import ITEM_BYTES
from nexus_ds.checkpoint.laid import has_norms, targets_of, write_norms
from nexus_ds.checkpoint.new_files import NewFiles
from nexus_ds.checkpoint.qwen2_moe import moe_config, planned
from nexus_ds.checkpoint.qwen3_5 import runs_of
from nexus_ds.checkpoint.qwen3_next import open_writer
from nexus_ds.checkpoint.qwen3_next_headers import NORMS
from nexus_ds.checkpoint.tensors import DTYPES, bytes_of
from nexus_ds.outputs import write_at
from tests.checkpoint.test_qwen3_5 import SIZES as QWEN3_5

QWEN3 = dict(
    model_type="qwen3",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    hidden_act="silu",
    eos_token_id=0,
)
KINDS = {
    "qwen3, tied": QWEN3 | dict(tie_word_embeddings=True),
    "qwen3": QWEN3 | dict(tie_word_embeddings=False),
    "qwen3_5": QWEN3_5 | dict(model_type="qwen3_5_text"),
}


def made(kind, dtype):
    """Return config.json and plan of a mixture, and a value for each of its tensors."""
    config = moe_config(KINDS[kind], 3, 1, "token")
    plan = planned(config, dtype)
    draws = torch.Generator().manual_seed(0)
    values = {}
    for name, (own, shape) in plan.items():
        values[name] = torch.randn(shape, generator=draws).to(DTYPES[own])
    return config, plan, values


def by_torch(folder, config, plan, values):
    folder.mkdir()
    with open_writer(folder, plan, config) as writer:
        for name in sorted(plan, key=lambda name: not is_norm(name)):
            writer.write(name, values[name])


def put(target, position, data):
    for each in (target, *target.copies):
        for place, start, own in each.writes(position, data):
            write_at(place.descriptor, place.start + start, own, place.file)


def in_steps(target, data, step):
    assert len(data) == target.size
    for start in range(0, len(data), step):
        put(target, start, data[start : start + step])


def laid(folder, config, plan, values, numbers, half=False):
    """Write `numbers` of each tensor at once; of embeddings by halves, if asked for."""
    folder.mkdir()
    contents = {name: memoryview(bytes_of(values[name])).cast("B") for name in plan}

    def norms_to(places):
        for name, place in places.items():
            put(place, 0, contents[name])

    norms = write_norms(folder, plan, norms_to) if has_norms(config) else None
    with NewFiles(folder, in_files(plan, config), copies=repeated(config)) as files:
        for name, target in targets_of(files, plan, config, norms).items():
            step = numbers * ITEM_BYTES[target.dtype]
            data = contents[name]
            if norms is not None and is_norm(name):
                continue
            if half and name in (EMBEDDING, HEAD):
                middle = 7 * len(data) // len(values[name])
                for first, stop in ((0, middle), (middle, len(data))):
                    in_steps(target.part(first, stop), data[first:stop], step)
            else:
                in_steps(target, data, step)
        for name in files.plan:
            files.wrote(name)
    return norms


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("numbers", [5, 24 * 3 + 7, 1 << 17])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_writer_in_torch(tmp_path, kind, numbers, dtype):
    config, plan, values = made(kind, dtype)
    by_torch(tmp_path / "torch", config, plan, values)
    norms = laid(tmp_path / "laid", config, plan, values, numbers, half=True)
    a, b = (tmp_path / name / "model.safetensors" for name in ("torch", "laid"))
    if norms is None:
        assert a.read_bytes() == b.read_bytes()
        return
    assert (tmp_path / "torch" / NORMS).read_bytes() == (tmp_path / "laid" / NORMS).read_bytes()
    first, second = np.fromfile(a, np.uint8), np.fromfile(b, np.uint8)
    # norms themselves are made of the file of norms, see `writing`
    differ = np.flatnonzero(first != second)
    with NewFiles(tmp_path, in_files(plan, config), single="places.safetensors") as files:
        of_norms = np.zeros(len(first), bool)
        for name in files.plan:
            place = files.place(name)
            of_norms[place.start : place.end] = is_norm(name)
            files.wrote(name)
    assert of_norms[differ].all() and len(differ)


@pytest.mark.parametrize("kind", KINDS)
def test_all_bytes_of_the_files_are_some_tensors(tmp_path, kind):
    """What reads behind the writers waits for ranges: together they are the whole file."""
    config, plan, _ = made(kind, "BF16")
    assert bool(reordered(config) and runs_of(settings(config))) == (kind == "qwen3_5")
    norms = None
    if has_norms(config):
        norms = write_norms(tmp_path, plan, lambda places: None)
    with NewFiles(tmp_path, in_files(plan, config), copies=repeated(config)) as files:
        size = (tmp_path / "model.safetensors").stat().st_size
        for target in targets_of(files, plan, config, norms).values():
            files.frontier.landed(target)
        files.frontier.wait(tmp_path / "model.safetensors", size)
        for name in files.plan:
            files.wrote(name)


def test_a_tensor_of_several_places_has_no_rows_of_its_own(tmp_path):
    config, plan, _ = made("qwen3", "BF16")
    norms = write_norms(tmp_path, plan, lambda places: None)
    with NewFiles(tmp_path, in_files(plan, config)) as files:
        queries = targets_of(files, plan, config, norms)["model.layers.0.self_attn.q_proj.weight"]
        with pytest.raises(AssertionError, match="only rows of embeddings and head"):
            queries.part(0, 16)
        for name in files.plan:
            files.wrote(name)
