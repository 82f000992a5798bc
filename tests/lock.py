"""requirements.lock: every package that is installed, by version and hash; what is known of them.

    python tests/lock.py write    resolves requirements.txt anew (make lock)
    python tests/lock.py audit    asks pip-audit for known weaknesses of what is locked (make audit)

For Linux on x86-64 and Python 3.11. torch is not in it, nor what torch alone asks for on GPUs: its
builds for CPUs and for each CUDA have one version and other hashes, on other indexes. `make locked`
takes torch from the index of your pip, and all else by its hash.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS, LOCK = ROOT / "requirements.txt", ROOT / "requirements.lock"
LEFT_OUT = ("torch", "triton", "nvidia-", "cuda-")
HEAD = """\
# Made by `make lock` for Linux on x86-64 and Python 3.11, of requirements.txt. Without torch, whose
# builds for CPUs and GPUs have one version and other hashes.
"""
# It has weaknesses that everybody knows: who says that it has none knows nothing of any package.
CANARY = "jinja2==2.10 --hash=sha256:" + "0" * 64 + "\n"


def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")


def locked(report):
    """Return the lines of the lock file for pip's report of what it would install."""
    lines = []
    for item in report["install"]:
        name = canonical(item["metadata"]["name"])
        if name.startswith(LEFT_OUT):
            continue
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={item['metadata']['version']} --hash=sha256:{digest}\n")
    return sorted(lines)


def write():
    """Let pip resolve the pins, install nothing, and write what it would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", report, "-r", PINS]
        subprocess.run(command, check=True)
        lines = locked(json.loads(report.read_text()))
    LOCK.write_text(HEAD + "".join(lines))


def weak(requirements):
    """Ask pip-audit; return its exit code and what it says.

    Every package has to be known to the registry, else the code is not 0 (--strict).
    """
    command = [sys.executable, "-m", "pip_audit", "--strict", "--require-hashes", "--disable-pip"]
    command += ["--progress-spinner=off", "--format=json", "-r", requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def audit():
    """Return 0 if no weakness is known of what is locked; 1 if one is, or nobody can tell."""
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary.txt"
        canary.write_text(CANARY)
        _, said, why = weak(canary)
    if "CVE-" not in said and "PYSEC-" not in said and "GHSA-" not in said:
        print(
            "audit: FAILED, nothing was audited: this registry tells no weakness even of "
            f"{CANARY.split()[0]}, which has some: {why.strip()[-300:]}"
        )
        return 1
    code, said, why = weak(LOCK)
    if code == 0:
        count = LOCK.read_text().count("==")
        print(f"audit: no known weakness of {count} packages (without torch)")
        return 0
    print(f"audit: FAILED\n{said}\n{why}")
    return 1


if __name__ == "__main__":
    sys.exit({"write": write, "audit": audit}[sys.argv[1]]())
