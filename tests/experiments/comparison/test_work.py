"""The small pieces: random models, spoilt embeddings, and their command line."""

import json

import numpy as np
import torch

from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.data.domains import DomainEmbeddings, read_domain_embeddings, write_domain_embeddings
from nexus_ds.experiments.comparison.work import embedding, main, random_dense

RECIPE = """
training: {steps: 1}
model: {hidden_size: 16, heads: 2, layers: 2, ffn_size: 24, dtype: fp32}
seed: 3
"""


def test_random_models_differ_in_their_ffns_alone(tmp_path, dense_dir):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    for number in (0, 1):
        random_dense(str(tmp_path / str(number)), str(recipe), str(dense_dir), number)
    a, b = (TensorReader(tmp_path / str(number)) for number in (0, 1))
    for name in a.names():
        assert torch.equal(a.read(name), b.read(name)) == (".mlp." not in name), name
        assert ".mlp." not in name or abs(float(a.read(name).std()) - 0.02) < 0.004


def test_spoilt_embeddings(tmp_path):
    vectors = np.eye(3, 8, dtype=np.float32)
    given = DomainEmbeddings(
        ["a", "b", "c"], vectors, "tiny", "1" * 64, 256, 2, {"a": 1, "b": 1, "c": 1}, 0, "data"
    )
    write_domain_embeddings(tmp_path / "d.safetensors", given)
    changed = {}
    for change in ("shuffled", "random", "noise"):
        embedding(
            str(tmp_path / f"{change}.safetensors"), str(tmp_path / "d.safetensors"), change, seed=1
        )
        changed[change] = read_domain_embeddings(tmp_path / f"{change}.safetensors")
        assert changed[change].names == given.names
    assert np.array_equal(changed["shuffled"].vectors, vectors[[2, 0, 1]])
    kept = {
        name: float((changed[name].vectors * vectors).sum(1).mean()) for name in ("random", "noise")
    }
    assert abs(kept["random"]) < 0.5 < kept["noise"] < 0.95
    assert np.allclose(np.linalg.norm(changed["random"].vectors, axis=1), 1, atol=1e-5)


def test_a_lone_domain_can_only_be_shuffled_with_chance(tmp_path):
    alone = DomainEmbeddings(
        ["a"], np.eye(1, 8, dtype=np.float32), "t", "1" * 64, 256, 2, {"a": 1}, 0, "data"
    )
    write_domain_embeddings(tmp_path / "d.safetensors", alone)
    embedding(str(tmp_path / "s.safetensors"), str(tmp_path / "d.safetensors"), "shuffled", seed=1)
    assert not np.allclose(
        read_domain_embeddings(tmp_path / "s.safetensors").vectors, alone.vectors
    )


def test_its_command_line(tmp_path, capsys):
    assert main([]) == 2 and "expected a name (tokenizer, average" in capsys.readouterr().err
    assert main(["dance", "{}"]) == 2 and "dance" in capsys.readouterr().err
    assert (
        main(
            ["average", json.dumps({"out": str(tmp_path / "x"), "models": [str(tmp_path / "no")]})]
        )
        == 1
    )
    assert capsys.readouterr().err.startswith("average: ")
