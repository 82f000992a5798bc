"""One call for all programs: what it writes for llama.cpp and Ollama, and what it refuses."""

import llama_cpp
import pytest
from branches import make_parts, upcycle

from nexus_ds.errors import ServingError
from nexus_ds.serving.exporting import export_to
from nexus_ds.serving.targets import TARGETS
from tests.checkpoint.test_older_stacks import make
from tests.serving.test_gguf_words import WAYS, save_bpe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama's mixture with a tokenizer that llama.cpp knows."""
    llama_cpp.gguf()
    folder = tmp_path_factory.mktemp("made")
    save_bpe(folder / "tokenizer", *WAYS["gpt-2"])
    out, _ = make(folder, "llama", 3, 1)
    (out / "LICENSE").write_text("free")
    return out


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("llamacpp", ["LICENSE", "model.gguf"]),
        ("ollama", ["LICENSE", "Modelfile", "model.gguf"]),
    ],
)
def test_just_what_a_program_reads_is_there(name, files, made, tmp_path):
    exported = export_to(made, TARGETS[name], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert exported.tensors > 30
    assert any("no chat template" in note for note in exported.notes) == (name == "ollama")


def test_a_refused_tokenizer_leaves_nothing(tmp_path, dense_dir, text_folder):
    llama_cpp.gguf()
    make_parts(tmp_path, dense_dir, text_folder)
    upcycle(tmp_path)
    with pytest.raises(ServingError, match=r"is of type WordLevel, which llama\.cpp has no"):
        export_to(tmp_path / "out", TARGETS["llamacpp"], tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
