"""What a mixture's files hold: as many bytes as are counted before one is written."""

import json

import pytest
import torch

from nexus_ds.checkpoint.config_json import read_config
from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.checkpoint.file_layout import in_files, repeated
from nexus_ds.checkpoint.headers import Headers, tensor_bytes
from nexus_ds.checkpoint.qwen2_moe import stored
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.settings import Config
from nexus_ds.upcycling.new_checkpoint import bytes_of
from nexus_ds.upcycling.upcycle import upcycled
from tests.checkpoint.test_dense import dense, embeddings

NAMES = ("a", "b")


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-tied", "qwen3", "qwen3-tied"])
def test_the_files_are_as_large_as_was_counted(kind, tmp_path, dense_dir):
    rows = json.loads((dense_dir / "config.json").read_text())["vocab_size"]
    for seed, name in enumerate(("seed", *NAMES)):
        dense(kind, tmp_path / name, seed, rows, dense_dir)
    experts = {name: tmp_path / name for name in NAMES}
    config = Config()
    new = upcycled(tmp_path / "seed", experts, embeddings(NAMES), config)
    (tmp_path / "out").mkdir()
    new.write(tmp_path / "out", None, config.router, 0)
    headers = Headers(tmp_path / "out")
    infos = {name: headers.info(name) for name in headers.names()}
    on_disk = read_config(tmp_path / "out")
    plan = {name: ("F32", entry.shape) for name, entry in stored(on_disk).items()}
    assert in_files(plan, on_disk) == {n: (i.dtype, i.shape) for n, i in infos.items()}
    size = sum(tensor_bytes(info.dtype, info.shape) for info in infos.values())
    assert bytes_of(new.config, "F32") == size
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > size
    reader = TensorReader(tmp_path / "out")
    if kind == "qwen2-tied":
        assert torch.equal(reader.read(HEAD), reader.read(EMBEDDING))
    # what lies there twice, or is taller
    more = kind.endswith("-tied") or kind.startswith("qwen3")
    assert (size > sum(tensor_bytes(*entry) for entry in plan.values())) == more
    assert repeated(on_disk) == ({HEAD: EMBEDDING} if kind == "qwen2-tied" else {})
