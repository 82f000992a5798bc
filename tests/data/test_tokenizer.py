import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds.checkpoint.tokenizer import read_tokenizer
from nexus_ds.data.encoding import load_tokenizer
from nexus_ds.data.tokenizer import (
    LAST_ID,
    for_any_class,
    open_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from nexus_ds.errors import CheckpointError, ConfigError, DataError, OutputExistsError
from tests.data.conftest import save_sentencepiece, sentences


def test_it_loads_offline_with_transformers_and_round_trips_any_text(tokenizer_dir: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in ("the cat sat", "  def f(x):\n\treturn 'ä' + \"∑\"  # 🙂\n", "<p>a , b .</p>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_same_text_gives_the_same_files_in_another_process(tokenizer_dir: Path, tmp_path: Path):
    texts = sentences(1, 50)
    code = (
        "from pathlib import Path; from nexus_ds.data.tokenizer import train_tokenizer as t; "
        f"t(iter({texts!r}), 300, Path('tok'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for file in tokenizer_dir.iterdir():
        assert (tmp_path / "tok" / file.name).read_bytes() == file.read_bytes()


def test_bad_input(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"vocabulary 256 is too small .* at least 257"):
        train_tokenizer(iter(["a"]), 256, tmp_path / "a")
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(iter([]), 300, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(OutputExistsError, match="exists already"):
        train_tokenizer(iter(["a"]), 300, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


# Opening one --------------------------------------------------------------------------------------


def test_a_directory_without_a_tokenizer_is_not_given_one_that_is_made_up(tmp_path: Path):
    """Of a class alone transformers makes a tokenizer of three tokens."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    message = (
        r"no tokenizer that can be loaded \(none of tokenizer.json, tokenizer.model is there\); "
        r"expected tokenizer"
    )
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"no tokenizer at .*nowhere; expected a directory with tokenizer.json",
    ):
        open_tokenizer(tmp_path / "nowhere")


def test_a_tokenizer_of_another_library_is_refused(tokenizer_dir: Path, tmp_path: Path):
    shutil.copytree(tokenizer_dir, tmp_path / "canine")
    (tmp_path / "canine" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CanineTokenizer"}'
    )
    with pytest.raises(
        CheckpointError, match="CanineTokenizer is not one of the tokenizers library"
    ):
        open_tokenizer(tmp_path / "canine")


def test_code_of_a_tokenizer_is_not_run(tokenizer_dir: Path, tmp_path: Path):
    source = shutil.copytree(tokenizer_dir, tmp_path / "evil")
    (source / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((source / "tokenizer_config.json").read_text())
    for name, hooks in (
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Evil", "code.Evil"]}),
        ("config.json", {"AutoConfig": "code.Evil", "AutoTokenizer": "code.Evil"}),
    ):
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        given = (
            config | {"tokenizer_class": "Evil"}
            if name.startswith("tok")
            else {"model_type": "evil"}
        )
        (source / name).write_text(json.dumps(given | {"auto_map": hooks}))
        try:
            open_tokenizer(source)
        except CheckpointError as error:
            assert "no tokenizer that can be loaded" in str(error)
        assert not (tmp_path / "canary").exists()


def test_ids_with_gaps_are_counted_to_the_last(tokenizer_dir: Path, tmp_path: Path):
    shutil.copytree(tokenizer_dir, tmp_path / "gap")
    definition = json.loads((tmp_path / "gap" / "tokenizer.json").read_text())
    definition["model"]["vocab"]["far"] = 400
    (tmp_path / "gap" / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = open_tokenizer(tmp_path / "gap")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (301, 401)


@pytest.mark.parametrize("index", [LAST_ID + 1, 1 << 31])
def test_an_id_that_takes_gigabytes_to_save_is_refused(
    tokenizer_dir: Path, tmp_path: Path, index: int
):
    """2**31 in a file of 1 kB took 8 GB and 18 s: the library lists every id that means nothing."""
    shutil.copytree(tokenizer_dir, tmp_path / "far")
    definition = json.loads((tmp_path / "far" / "tokenizer.json").read_text())
    definition["model"]["vocab"]["far"] = index
    (tmp_path / "far" / "tokenizer.json").write_text(json.dumps(definition))
    message = (
        rf"far: the tokenizer has the token id {index} \('far'\), expected at most 16777216; "
        "mend the vocabulary in its tokenizer.json or vocab.json"
    )
    for read in (open_tokenizer, load_tokenizer, read_tokenizer):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "far")
    # beside a config.json it is read without transformers
    (tmp_path / "far" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tmp_path / "far")


def test_a_sentencepiece_file_is_read(tmp_path: Path):
    tokenizer = open_tokenizer(save_sentencepiece(tmp_path))
    ids = tokenizer("the cat sat").input_ids
    assert (ids[0], tokenizer.bos_token_id, tokenizer.decode(ids[1:])) == (1, 1, "the cat sat")


@pytest.mark.slow
def test_the_package_that_reads_sentencepiece_files_is_named(tmp_path: Path):
    save_sentencepiece(tmp_path / "tok")
    code = (
        "import sys; sys.modules['sentencepiece'] = None; from pathlib import Path\n"
        "from nexus_ds.data.tokenizer import open_tokenizer\nopen_tokenizer(Path('tok'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stderr.strip().splitlines()[-1]
    assert said.endswith(
        "tok: no tokenizer that can be loaded without the packages that read tokenizer.model: "
        "pip install sentencepiece"
    )


def test_transformers_4_is_told_a_class_that_it_knows_and_what_a_decoder_takes(tmp_path):
    train_tokenizer(iter(["some text"]), 300, tmp_path / "t")
    said = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["model_input_names"] == ["input_ids", "attention_mask"]


def test_what_a_configuration_says_is_kept_for_any_class(tmp_path):
    train_tokenizer(iter(["some text"]), 300, tmp_path / "t")
    tokenizer = open_tokenizer(tmp_path / "t")
    named = {"extra_special_tokens": {"image_token": "<i>"}, "padding_side": "left", "x": 1}
    said = for_any_class(tokenizer, named)
    assert {key: said[key] for key in named} == named
    # a list is of transformers 5 alone
    assert "extra_special_tokens" not in for_any_class(tokenizer, {"extra_special_tokens": ["a"]})
