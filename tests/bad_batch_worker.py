"""One rank of a training that meets bad batches (not a test).

python bad_batch_worker.py KIND STEPS [deepspeed=FILE] section.key=value ...

under the launcher's variables.

KIND at each of STEPS (2,3): loss: one sequence of the last rank has a loss that is NaN; gradient:
all losses are numbers, but not what is made of them; expert: the last rank's own experts alone get
an infinite gradient; omitted: the step is not done at all, which is what the others must amount to.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.config import load_config
from nexus_ds.errors import NexusError
from nexus_ds.launch import position
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import deepspeed_internals, loop
from nexus_ds.runtime.engine import moe_layers
from nexus_ds.train import end

KIND = sys.argv[1]
STEPS = {int(step) for step in sys.argv[2].split(",") if step}
JSON = [word.removeprefix("deepspeed=") for word in sys.argv if word.startswith("deepspeed=")]
SETTINGS = [word for word in sys.argv[3:] if not word.startswith("deepspeed=")]
HERE = position()
LAST = HERE.rank == HERE.world - 1
honest = loop.next_token_loss
now = {"step": -1, "pass": 0}


def poisoned(engine, tokens_BS, learned_BS=None):
    loss, losses_BS = honest(engine, tokens_BS, learned_BS)
    if engine.module.training and now["step"] in STEPS and LAST:
        now["pass"] += 1
        if KIND == "loss" and now["pass"] == 1:
            losses_BS = losses_BS.clone()
            losses_BS[0] = float("nan")
            return loss * float("nan"), losses_BS
        if KIND == "gradient":
            return loss * 1e30 * 1e30, losses_BS
    return loss, losses_BS


class Poisoned(loop.Run):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        if KIND == "expert" and LAST:
            for layer in moe_layers(self.engine.module):
                layer.experts.w1.register_hook(self.infinite)

    def infinite(self, gradient):
        return torch.full_like(gradient, float("inf")) if now["step"] in STEPS else gradient

    def _step(self, step, tally):
        now.update({"step": step, "pass": 0})
        if KIND == "omitted" and step in STEPS:
            deepspeed_internals.set_counters(self.engine, step + 1)
            return 1.0
        return super()._step(step, tally)


def main():
    loop.next_token_loss = poisoned
    loop.Run = Poisoned
    try:
        return loop.train(resolve(load_config("demo", SETTINGS)), "".join(JSON), HERE)
    except NexusError as error:
        print(f"NEXUS {type(error).__name__}: {error}", flush=True)
        return 1


if __name__ == "__main__":
    end(main())
