"""One rank of a training run (not a test): trains as train.py does, exports, and keeps the engine's
own logits.

python train_worker.py LOGITS_FILE DS_JSON section.key=value ...
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.config import load_config
from nexus_ds.launch import adopt_launcher, end
from nexus_ds.pipeline import resolve
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.loop import Run
from nexus_ds.runtime.metrics import Metrics
from nexus_ds.runtime.signals import StopRequest


def main():
    logits_file, ds_json, *words = sys.argv[1:]
    here = adopt_launcher()
    rank = here.rank
    config = resolve(load_config("demo", words))
    internals.start(2)
    run = Run(config, ds_json, here)
    metrics = Metrics(run.work, "worker", 0, run.total, rank == 0)
    run.loop(0, metrics, StopRequest())
    probe = (
        torch.arange(24).remainder(run.engine.module.config.vocab_size).view(2, 12).to(run.device)
    )
    run.engine.eval()
    with torch.no_grad():
        logits = run.engine(input_ids=probe, use_cache=False).logits.float()
    if rank == 0:
        torch.save({"probe": probe.cpu(), "logits": logits.cpu()}, logits_file)
    run.save(run.total)
    run.finish(metrics)
    metrics.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
