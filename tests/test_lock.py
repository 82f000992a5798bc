"""The lock file has what requirements.txt pins, by hash; an audit that saw nothing fails."""

import re

import lock
import pytest
from lock import HEAD, LOCK, PINS, audit, canonical, locked

LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")


def pins():
    found = (line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    return {canonical(name): version.split()[0] for name, version in found}


def test_the_lock_has_every_pin_but_torch_with_a_hash():
    text = LOCK.read_text()
    assert text.startswith(HEAD)
    lines = text.removeprefix(HEAD).splitlines()
    found = {match[1]: match[2] for line in lines if (match := LINE.fullmatch(line))}
    assert len(found) == len(lines) and lines == sorted(lines)
    wanted = pins()
    del wanted["torch"]
    assert {name: found.get(name) for name in wanted} == wanted, "make lock"


def test_what_is_torchs_alone_is_left_out():
    def item(name):
        info = {"archive_info": {"hashes": {"sha256": "0" * 64}}}
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    names = ["PyYAML", "torch", "nvidia-nccl-cu13", "typing_extensions", "triton", "cuda-bindings"]
    lines = locked({"install": [item(name) for name in names]})
    assert [line.partition("==")[0] for line in lines] == ["pyyaml", "typing-extensions"]


@pytest.mark.parametrize(
    ("canary", "found", "code", "said"),
    [
        ((1, "", "not found on PyPI"), (0, "", ""), 1, "FAILED, nothing was audited: .*not found"),
        ((0, '{"dependencies": [{"vulns": []}]}', ""), (0, "", ""), 1, "FAILED, nothing"),
        ((1, "CVE-2024-22195", ""), (1, "GHSA-x", "1 found"), 1, "audit: FAILED\nGHSA-x\n1 found"),
        ((1, "PYSEC-1", ""), (1, "", "click: not found"), 1, "audit: FAILED\n\nclick"),
        ((1, "PYSEC-1", ""), (0, "{}", ""), 0, r"no known weakness of \d\d packages"),
    ],
)
def test_an_audit_that_could_see_nothing_fails(monkeypatch, capsys, canary, found, code, said):
    monkeypatch.setattr(lock, "weak", lambda path: found if path == LOCK else canary)
    assert audit() == code
    assert re.search(said, capsys.readouterr().out)
