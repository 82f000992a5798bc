"""Tokenizers: of other models, as transformers loads them, and a byte-level BPE for a new model.

Not covered: training other kinds of tokenizers, chat templates, adding tokens to an existing
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nexus_ds.data.offline import stay_offline
from nexus_ds.errors import CheckpointError, ConfigError, DataError
from nexus_ds.outputs import new_directory, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# transformers takes a second to load, which verbs without a tokenizer should not pay; and it must
# come after `stay_offline`, whose variable it reads once.

END_OF_TEXT = "<|endoftext|>"
MODEL_MAX_LENGTH = 1 << 20  # the model's max_position_embeddings is the real limit
SMALLEST_VOCABULARY = 257  # 256 bytes and END_OF_TEXT
LAST_ID = 1 << 24
"""The largest id of a token that is read. The largest vocabularies have a million. Every id below
the last that means nothing the library lists: of the id 2**31, in a file of 1 kB, that is 8 GB."""
CONFIG = "tokenizer_config.json"
ANY_CLASS = "PreTrainedTokenizerFast"
"""The class that transformers 4 and 5 know and that takes tokenizer.json as it stands. Others have
ideas of their own of it: a Llama's puts a beginning before a text in 4 where it does not in 5, and
the class that 5 writes for it (TokenizersBackend) is unknown to 4."""
EXTRA = "extra_special_tokens"  # a list in transformers 5, which 4 does not load


def open_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a directory as transformers loads it.

    Offline, and without code of the directory.

    Raises:
        CheckpointError: none there, none of the `tokenizers` library, or one that doesn't load;
            says what is missing. Or ids beyond LAST_ID.
    """
    if not Path(directory).is_dir():
        raise CheckpointError(
            f"no tokenizer at {directory}; expected a directory with tokenizer.json"
        )
    stay_offline()
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # it warns of a model that it does not know, where only a tokenizer is asked for
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        # it makes one of three tokens up
        if not any((Path(directory) / name).is_file() for name in names):
            raise FileNotFoundError(f"none of {', '.join(sorted(names))} is there")
        if not tokenizer.is_fast:
            raise TypeError(f"{type(tokenizer).__name__} is not one of the tokenizers library")
    except Exception as error:
        # transformers raises whatever the first of its loaders met
        raise CheckpointError(
            f"{directory}: no tokenizer that can be loaded {_reason(directory, error)}"
        ) from error
    refuse_far_ids(tokenizer.backend_tokenizer, directory)
    return cast("PreTrainedTokenizerFast", tokenizer)


def refuse_far_ids(backend: Tokenizer, directory: Path) -> None:
    """Raise CheckpointError for a token of an id beyond LAST_ID; before anything is saved of it."""
    vocabulary = backend.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(last, 0) > LAST_ID:
        raise CheckpointError(
            f"{directory}: the tokenizer has the token id {vocabulary[last]} ({last!r}), expected "
            f"at most {LAST_ID}; mend the vocabulary in its tokenizer.json or vocab.json"
        )


def _reason(directory: Path, error: Exception) -> str:
    """Return why a tokenizer doesn't load and what to do."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    packages = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    # of sentencepiece's files transformers names a wrong package
    missing = [name for name, there in packages.items() if not there]
    models = sorted(path.name for path in Path(directory).glob("*.model"))
    if missing and models and not (Path(directory) / "tokenizer.json").is_file():
        return f"without the packages that read {models[0]}: pip install {' '.join(missing)}"
    said = " ".join(str(error).split())[:300]
    return (
        f"({said}); expected tokenizer.json and tokenizer_config.json, as save_pretrained writes "
        "them; copy them there"
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many token ids a model must embed: ids may have gaps, added tokens count."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def for_any_class(
    tokenizer: PreTrainedTokenizerFast, config: dict[str, object]
) -> dict[str, object]:
    """Return a tokenizer_config.json with which transformers 4 and 5 read a tokenizer.json alike.

    Args:
        tokenizer: as transformers 5 loads it.
        config: what its tokenizer_config.json says.
    """
    found = {key: value for key, value in config.items() if key != EXTRA or isinstance(value, dict)}
    if tokenizer.extra_special_tokens:
        # the name of both for more tokens without a role
        found["additional_special_tokens"] = [
            str(token) for token in tokenizer.extra_special_tokens
        ]
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, key)
        # its old class may have known them without being told
        if token is not None and not found.get(key):
            found[key] = str(token)
    # Unsaid, 4 would return token types, which a decoder does not take.
    for key in ("model_input_names", "padding_side", "clean_up_tokenization_spaces"):
        found.setdefault(key, getattr(tokenizer, key))
    return found | {"tokenizer_class": ANY_CLASS}


def train_tokenizer(texts: Iterator[str], vocabulary: int, out: Path) -> None:
    """Train a byte-level BPE on `texts` and write it as `AutoTokenizer` loads it offline.

    Any text round-trips: all 256 bytes are tokens. The same texts give the same files. Token 0 is
    `<|endoftext|>`, used as the end of a document and as padding.

    Args:
        texts: training text; it is read once.
        vocabulary: size including the end-of-text token and the 256 bytes. Little text can give
            fewer.
        out: new directory.

    Raises:
        ConfigError: `vocabulary` is too small.
        DataError: no text.
        OutputExistsError: `out` exists.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary {vocabulary} is too small for a byte-level tokenizer; "
            f"expected at least {SMALLEST_VOCABULARY}"
        )
    stay_offline()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # the library's alphabet is a set: unsorted, ids would differ from run to run
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
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
        finished = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=MODEL_MAX_LENGTH,
            clean_up_tokenization_spaces=False,
        )
        finished.save_pretrained(temporary)
        saved = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
        write_json(temporary / CONFIG, for_any_class(finished, saved))
