"""One rank of a run that is watched (not a test): what train.py trains, and what the engine was
given at each step.

python loop_worker.py OUT section.key=value ...      under the launcher's variables; writes
OUT-<rank>.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.config import load_config
from nexus_ds.launch import position
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import loop
from nexus_ds.train import end


class Watched(loop.Run):
    """Notes each sample that is drawn, and after each step the optimizer's groups."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = {"samples": [[] for _ in range(self.total)], "groups": []}
        draw = self.data.sampler.sample
        size = self.config.training.batch_size

        def sample(number):
            self.seen["samples"][number // size].append(number)
            return draw(number)

        self.data.sampler.sample = sample

    def _step(self, step, tally):
        norm = super()._step(step, tally)
        keys = ("lr", "lr_scale", "weight_decay")
        groups = self.engine.optimizer.param_groups
        self.seen["groups"].append(
            [{"name": g["name"]} | {key: g[key] for key in keys} for g in groups]
        )
        return norm

    def finish(self, metrics):
        super().finish(metrics)
        Path(f"{sys.argv[1]}-{self.rank}.json").write_text(json.dumps(self.seen))


def main():
    config = resolve(load_config("demo", sys.argv[2:]))
    loop.Run = Watched
    return loop.train(config, "", position())


if __name__ == "__main__":
    end(main())
