"""Checks written checkpoints against passes that another process has seen (not a test).

python export_worker.py SEEN_FILE OUT_JSON DIRECTORY ...

The environment chooses the kernels. OUT_JSON gets for each directory what was found: the refusal,
or the agreement; and `old`, the 0.9 quantile of the tokens' differences of logits over the largest,
which once was to be at most 0.02.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.checkpoint.streaming import streamed_model
from nexus_ds.errors import CheckpointError
from nexus_ds.runtime.export_check import Seen, check_computes


def old_measure(directory, seen):
    with torch.no_grad():
        model = streamed_model(directory, torch.bfloat16, torch.device("cpu"))
        logits_SV = model(input_ids=seen.tokens_1S, use_cache=False).logits[0].float()
    differences_S = (logits_SV - seen.logits_SV).abs().amax(-1) / seen.logits_SV.abs().max()
    return float(differences_S.quantile(0.9))


def main():
    seen_file, out, *directories = sys.argv[1:]
    passes = {name: Seen(**values) for name, values in torch.load(seen_file).items()}
    found = {}
    for directory in map(Path, directories):
        seen = passes[directory.name.split("-")[0]]
        try:
            entry = {"refused": "", **vars(check_computes(directory, torch.bfloat16, seen))}
            entry["old"] = old_measure(directory, seen)
        except CheckpointError as error:
            entry = {"refused": str(error)}
        found[directory.name] = entry
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
