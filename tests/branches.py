"""A seed, its branches and their domain embeddings on disk, and the mixture that they make."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import shaken
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint.families.record import EMBEDDING, HEAD
from nexus_ds.config import load_config
from nexus_ds.data.domains import (
    DomainEmbeddings,
    read_domain_embeddings,
    write_domain_embeddings,
)
from nexus_ds.outputs import new_directory
from nexus_ds.upcycling.upcycle import upcycled

NAMES = ("alpha", "beta", "gamma")
LAYERS = 2
ROWS = 31  # of the embeddings
RECIPE = """
training: {steps: 1}
data: {sequence_length: 32, workers: 1}
router: {fit_steps: 30, fit_windows: 8}
"""


def branch(source, out, seed, dtype=torch.float32):
    """Save a branch of `source`, whose every weight differs."""
    shutil.copytree(source, out)
    changed = {
        name: t.to(dtype) for name, t in shaken(load_file(out / "model.safetensors"), seed).items()
    }
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, dtype=str(dtype).removeprefix("torch."))
    return out


def embed(path, names, data, seed=0, width=8, revision="1" * 64):
    """Write random domain embeddings of `names`."""
    vectors = np.random.default_rng(seed).normal(size=(len(names), width)).astype(np.float32)
    documents = dict.fromkeys(names, 5)
    embeddings = DomainEmbeddings(
        list(names), vectors, "tiny", revision, 16, 4, documents, 0, str(data)
    )
    write_domain_embeddings(path, embeddings, overwrite=True)
    return path


def grow(directory, tokens, rows=None):
    """Add tokens at the end, and rows of embeddings and head for them (or for padding)."""
    path = directory / "tokenizer.json"
    definition = json.loads(path.read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    for index, token in enumerate(tokens, start=ROWS):
        definition["added_tokens"].append({"id": index, "content": token, "special": True, **flags})
    path.write_text(json.dumps(definition))
    more = (rows or ROWS + len(tokens)) - ROWS

    def add_rows(tensors):
        for name in {EMBEDDING, HEAD} & set(tensors):
            tensors[name] = torch.cat([tensors[name], torch.randn(more, 16)])

    edit_tensors(directory, add_rows)
    edit_config(directory, vocab_size=ROWS + more)


def make_parts(folder: Path, dense_dir: Path, text_folder: Path):
    """Save in `folder` a seed, three branches, domain embeddings and a recipe."""
    large = {
        name: 10 * t if t.ndim == 2 else t
        for name, t in load_file(dense_dir / "model.safetensors").items()
    }
    shutil.copytree(dense_dir, folder / "dense")
    save_file(large, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    branch(folder / "dense", folder / "seed", 9)
    (folder / "seed" / "generation_config.json").write_text('{"eos_token_id": 0}')
    for index, name in enumerate(NAMES):
        branch(folder / "seed", folder / name, index)
    embed(folder / "domains.safetensors", NAMES, text_folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def upcycle(parts, *words, experts=None, seed="seed", **options):
    """Write the mixture of a seed and its branches to `out`, without a warm start; return what was
    written."""
    config = load_config(str(parts / "recipe.yaml"), list(words))
    embeddings = read_domain_embeddings(parts / "domains.safetensors")
    branches = experts or {name: parts / name for name in NAMES}
    new = upcycled(parts / seed, branches, embeddings, config, **options)
    with new_directory(parts / "out") as directory:
        new.write(directory, None, config.router, config.seed)
    return new


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def stock(directory):
    """Return a checkpoint as stock transformers loads it."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def left_over(parts):
    return [path.name for path in parts.iterdir() if "out" in path.name]


def edit_config(directory, **keys):
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
