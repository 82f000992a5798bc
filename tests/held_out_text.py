"""Text of documents long enough for measures over them, and a model with a tokenizer of bytes."""

import itertools
import json

import numpy as np
import torch

from nexus_ds.data.tokenizer import train_tokenizer

SYLLABLES = ("bamo", "tiru", "kelo", "susa", "nopi", "dage", "feli", "vonu")
WORDS = [a + b for a, b in itertools.product(SYLLABLES, SYLLABLES[:6])]


def document(generator, count):
    """Return `count` words in sentences; the first words are the most frequent."""
    ranks = np.minimum(generator.geometric(0.06, count) - 1, len(WORDS) - 1)
    words = [WORDS[rank] for rank in ranks]
    return " ".join(f"{word}." if place % 8 == 7 else word for place, word in enumerate(words))


def write_text(root, domains=("alpha", "beta"), documents=6, words=150):
    """Write both splits of some domains; a short document is among those held out."""
    for number, domain in enumerate(domains):
        generator = np.random.default_rng(number)
        (root / domain).mkdir(parents=True)
        for split in ("train", "validation"):
            texts = [document(generator, words) for _ in range(documents)]
            lines = [json.dumps({"text": text}) for text in [*texts, "too short"]]
            (root / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_model(out, seed=0, vocabulary=300):
    """Save a random Llama with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = np.random.default_rng(9)
    train_tokenizer(iter([document(generator, 2000)]), vocabulary, out)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,  # so that it prefers something
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out
