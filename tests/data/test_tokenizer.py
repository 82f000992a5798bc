import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ds.data.tokenizer import train_tokenizer
from nexus_ds.errors import ConfigError, DataError, OutputExistsError
from tests.data.conftest import sentences


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
    code = f"from pathlib import Path; from nexus_ds.data.tokenizer import train_tokenizer as t; t(iter({texts!r}), 300, Path('tok'))"
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
