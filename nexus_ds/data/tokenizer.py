"""A byte-level BPE tokenizer for a new model, trained on its own text.

Not covered: other kinds of tokenizers, chat templates, adding tokens to an existing tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nexus_ds.data.offline import stay_offline
from nexus_ds.errors import ConfigError, DataError
from nexus_ds.outputs import new_directory

END_OF_TEXT = "<|endoftext|>"
MODEL_MAX_LENGTH = 1 << 20  # the model's max_position_embeddings is the real limit
SMALLEST_VOCABULARY = 257  # 256 bytes and END_OF_TEXT


def train_tokenizer(texts: Iterator[str], vocabulary: int, out: Path) -> None:
    """Train a byte-level BPE on `texts` and write it so that `AutoTokenizer.from_pretrained(out)` loads it offline.

    Any text round-trips: all 256 bytes are tokens. The same texts give the same files. Token 0 is `<|endoftext|>`,
    used as the end of a document and as padding.

    Args:
        texts: training text; it is read once.
        vocabulary: size including the end-of-text token and the 256 bytes. Little text can give fewer.
        out: new directory.

    Raises:
        ConfigError: `vocabulary` is too small.
        DataError: no text.
        OutputExistsError: `out` exists.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary {vocabulary} is too small for a byte-level tokenizer; expected at least {SMALLEST_VOCABULARY}"
        )
    stay_offline()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # a set: sorted, or the ids would vary
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("no text to train a tokenizer on; check the data's path and domains")
    with new_directory(out) as temporary:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=MODEL_MAX_LENGTH,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(temporary)
