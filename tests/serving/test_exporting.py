"""One call for all programs: what it writes for llama.cpp and Ollama, and what it refuses."""

import llama_cpp
import pytest
from branches import make_parts, upcycle
from conftest import save_tokenizer

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


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A mixture with windows in some of its layers."""
    folder = tmp_path_factory.mktemp("windowed")
    save_tokenizer(folder / "tokenizer")
    return make(folder, "qwen2-sliding", 3, 1)[0]


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_program_computes_wrongly_is_not_written_for_it(name, windowed, tmp_path):
    if name == "hub":
        assert export_to(windowed, TARGETS[name], tmp_path / "out").tensors > 30
        return
    # the table's own test has each rule's words
    with pytest.raises(ServingError, match=r"windows.* --for hub keeps the model as it is"):
        export_to(windowed, TARGETS[name], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_tokenizer_leaves_nothing(tmp_path, dense_dir, text_folder):
    llama_cpp.gguf()
    make_parts(tmp_path, dense_dir, text_folder)
    upcycle(tmp_path)
    with pytest.raises(ServingError, match=r"is of type WordLevel, which llama\.cpp has no"):
        export_to(tmp_path / "out", TARGETS["llamacpp"], tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
