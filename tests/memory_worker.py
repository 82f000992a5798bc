"""One rank that loads a large checkpoint layer by layer (not a test).

python memory_worker.py CHECKPOINT OUT KEY=VALUE ...      under the launcher's variables

Writes OUT.RANK.json in bytes: `before` (resident, everything imported and the ranks joined), `peak`
and `after` loading, `share` (this rank's part of the working weights), `layer` (all of the largest
layer), `read` (from the file system), and with initialize=1 also `engine` (resident once the
masters are there).
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch.distributed as dist
from parity import deepspeed_json, settings

from nexus_ds.checkpoint.build import DTYPES
from nexus_ds.checkpoint.sidecar import read_sidecar, verify_expert_embeddings
from nexus_ds.launch import end
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import Batch, deepspeed_config, placement, start_engine
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.runtime.portable_state import shapes


def status(key):
    """Return a field of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def bytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def main():
    checkpoint, out, *words = sys.argv[1:]
    options = dict(w.split("=", 1) for w in words if "." not in w.partition("=")[0])
    config = settings([w for w in words if "." in w.partition("=")[0]])
    internals.start(5)
    rank, world = dist.get_rank(), dist.get_world_size()
    batch, values = Batch(1, 1), deepspeed_json(3)
    partition = internals.partitioner(deepspeed_config(values, config, batch))
    verify_expert_embeddings(Path(checkpoint))
    place = placement(
        config.parallel, len(read_sidecar(Path(checkpoint)).experts), rank, world, world
    )
    gc.collect()
    dist.barrier()
    before, read = status("VmRSS"), bytes_read()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model = load_nexus(
        Path(checkpoint), DTYPES[config.model.dtype], place, config.router, False, partition
    )
    peak, after, read = status("VmHWM"), status("VmRSS"), bytes_read() - read
    size = DTYPES[config.model.dtype].itemsize
    whole = {name: math.prod(shape) * size for name, shape in shapes(model).items()}
    layer = sum(count for name, count in whole.items() if name.startswith("model.layers.0."))
    share = sum(p.ds_tensor.numel() * size for p in model.parameters())
    found = {
        "before": before,
        "peak": peak,
        "after": after,
        "share": share,
        "layer": layer,
        "read": read,
    }
    found["model"] = sum(whole.values())
    if options.get("initialize") == "1":
        engine = start_engine(model, values, config, batch)
        found |= {"engine": status("VmRSS"), "engine_peak": status("VmHWM")}
        del engine
    Path(f"{out}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
