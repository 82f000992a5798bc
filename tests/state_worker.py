"""One rank of a run that saves and resumes (not a test).

python state_worker.py CHECKPOINT STATES OUT KEY=VALUE ...      under the launcher's variables

save=3,6 saves after these steps; until=6 ends there; copy=DIR saves what was resumed once more in
another folder; export=DIR writes the checkpoint at the end, with wrong=1 after making the engine
compute something else. OUT.json gets the losses by step, the step that was resumed, and the
messages.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from parity import batches, start, train_step

from nexus_ds.checkpoint.build import DTYPES
from nexus_ds.checkpoint.records import TrainStep
from nexus_ds.errors import NexusError
from nexus_ds.launch import end, position
from nexus_ds.runtime import states, watchdog
from nexus_ds.runtime.export import export


def main():
    checkpoint, folder, out, *words = sys.argv[1:]
    engine, config, batch, options = start(checkpoint, words)
    layout = (
        f"{dist.get_world_size()} ranks, expert parallel {config.parallel.expert}, "
        f"ZeRO stage {options['stage']}"
    )
    description = {"layout": layout, "config": {"training.lr": config.training.lr}}
    first, messages = states.resume(engine, Path(folder), description)
    if "copy" in options:
        states.save(engine, Path(options["copy"]), first, description, 9)
    data = batches(engine.module.config.vocab_size, config.training.batch_size)
    wanted = [int(step) for step in options.get("save", "").split(",") if step]
    losses = {}
    for step in range(first, int(options.get("until", first))):
        losses[step] = train_step(engine, config, batch, data[step])
        if step + 1 in wanted:
            states.save(engine, Path(folder), step + 1, description, int(options.get("keep", 9)))
    if "export" in options:
        config.model.path = checkpoint
        if "wrong" in options:
            engine.module.lm_head.register_forward_hook(
                lambda module, inputs, logits: logits.flip(-1)
            )
        export(
            engine,
            config,
            DTYPES[config.model.dtype],
            Path(options["export"]),
            data[0, :2, :-1],
            TrainStep(stage="moe", steps=first, tokens=0, mixture={}),
        )
    if dist.get_rank() == 0:
        Path(f"{out}.json").write_text(
            json.dumps({"first": first, "messages": messages, "losses": losses})
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        # Who waits at the store for a rank that was killed learns of it by the watchdog alone.
        with watchdog.watched(position(), 2):
            main()
    except NexusError as error:
        print(f"NEXUS {type(error).__name__}: {error}", flush=True)
        end(1)
    end(0)
