"""The README.md of a checkpoint: what is read of others'."""

import pytest

from nexus_ds.checkpoint.model_card import metadata_of, stated_license


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", {"license": "mit", "tags": ["a"]}),
        ("# Model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nmit\n---\n", {}),
    ],
)
def test_metadata(tmp_path, text, found):
    assert metadata_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert metadata_of(tmp_path) == found
    assert stated_license(tmp_path) == found.get("license", "")
