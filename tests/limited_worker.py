"""Run verbs under a limit of memory: python limited_worker.py ALLOWED OUT < WORDS

ALLOWED: bytes of each verb above what the process has when it begins; 0: no limit. WORDS: JSON, the
words of several command lines; `whole DIR` loads a checkpoint as it is. OUT gets their exit codes
and what they printed.
"""

import contextlib
import gc
import io
import json
import resource
import sys
from pathlib import Path

import torch
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401

import nexus_ds.commands.evaluate
import nexus_ds.commands.extend
import nexus_ds.evaluation.perplexity
import nexus_ds.upcycling.extend  # noqa: F401
from nexus_ds.__main__ import main
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.room import is_out_of_memory


def limit(allowed):
    """Let this process write to no more than `allowed` bytes beyond those it has."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    used = next(line for line in status.splitlines() if line.startswith("VmData"))
    size = (int(used.split()[1]) << 10) + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


def run(words):
    printed = io.StringIO()
    if allowed:
        limit(allowed)
    if words[0] == "whole":
        try:
            load_model(Path(words[1]))
        except Exception as error:
            return is_out_of_memory(error), type(error).__name__
        return False, ""
    with contextlib.redirect_stdout(printed):
        code = main(words)
    return code, printed.getvalue()


if __name__ == "__main__":
    allowed, out = int(sys.argv[1]), Path(sys.argv[2])
    # what the first product allocates is the library's
    torch.ones(64, 64) @ torch.ones(64, 64)
    out.write_text(json.dumps([run(words) for words in json.load(sys.stdin)]))
