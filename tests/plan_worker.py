"""One rank whose memory is counted (not a test): two optimizer steps of a Nexus checkpoint under
DeepSpeed.

python plan_worker.py CHECKPOINT OUT DEEPSPEED_JSON KEY=VALUE ...      under the launcher's
variables

Writes OUT.RANK.json in bytes, of the second step between backward pass and update, when everything
is there at once: `states` (all live tensors but the buckets), its parts `weights`, `gradients`,
`optimizer` and `other`, `buckets` (on the way to other ranks or the CPU), and `activations`: what
the forward pass kept for the backward pass, with `head` of it.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from parity import settings

from nexus_ds.checkpoint.build import DTYPES
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.launch import end
from nexus_ds.model.head import next_token_loss
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import (
    check_layout,
    deepspeed_config,
    placement,
    set_learning_rate,
    start_engine,
)
from nexus_ds.runtime.parallel_model import keep_whole, load_nexus


def storages(tensors):
    """Return {address: bytes} of the distinct memory behind tensors."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def flatten(value):
    """Yield the tensors in nested lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from flatten(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flatten(item)


def parts_of(engine):
    """Return the tensors of each part, found by where DeepSpeed keeps them; what is found nowhere
    counts as `other`."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    masters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    buckets = [optimizer.ipg_buckets[key].buffer for key in optimizer.ipg_buckets]
    buckets += [
        getattr(optimizer, f"temp_grad_buffer_for_{place}_offload", None)
        for place in ("cpu", "gpu")
    ]
    flat = [
        getattr(optimizer, name, None)
        for name in ("bit16_groups_flat", "param_groups_fp16_flat_cpu_memory")
    ]
    kept = [
        getattr(optimizer, name, None)
        for name in ("averaged_gradients", "grad_partitions_flat_buffer")
    ]
    return {
        "weights": [
            *parameters,
            *(getattr(p, "ds_tensor", None) for p in parameters),
            *flatten(flat),
        ],
        "optimizer": [
            *masters,
            *flatten([dict(state) for state in optimizer.optimizer.state.values()]),
        ],
        "gradients": [*(p.grad for p in [*parameters, *masters]), *flatten(kept)],
        "buckets": list(flatten([list(b) if isinstance(b, list) else b for b in buckets])),
    }


def count(engine):
    """Return bytes of the parts, and of everything that stays alive: gloo's threads let go of what
    was sent a moment later."""
    least, looks = count_now(engine), 0
    while looks < 5:
        time.sleep(0.1)
        found, looks = count_now(engine), looks + 1
        if found["states"] < least["states"]:
            least, looks = found, 0
    return least


def count_now(engine):
    """Return bytes of the parts, and of everything that is alive."""
    gc.collect()
    parts, seen, found = parts_of(engine), set(), {}
    for name, tensors in parts.items():
        memory = {a: n for a, n in storages(tensors).items() if a not in seen}
        seen |= memory.keys()
        found[name] = sum(memory.values())
    alive = storages(
        [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        + list(engine.module.parameters())
    )
    found["other"] = sum(n for a, n in alive.items() if a not in seen)
    found["states"] = found["weights"] + found["optimizer"] + found["gradients"] + found["other"]
    return found


def count_before_reducing(engine, found):
    """Count at the end of the backward pass: ZeRO-1's gradients are whole until they are reduced
    there."""
    reduce = engine.optimizer.reduce_gradients

    def counted(*arguments, **options):
        found.update(count(engine))
        return reduce(*arguments, **options)

    engine.optimizer.reduce_gradients = counted


class Kept:
    """Counts the memory that a forward pass keeps for the backward pass, once for each storage,
    without parameters."""

    def __init__(self, engine):
        self.known = storages(engine.module.parameters())
        self.tensors = []

    def __call__(self, tensor):
        # an alias: the storage stays alive, so that no address is used twice
        self.tensors.append(tensor.detach())
        return tensor

    def bytes(self, vocabulary):
        """Return bytes of all, and of those that have a row for each word: the gradient of the
        output layer's weight."""
        found = {a: n for a, n in storages(self.tensors).items() if a not in self.known}
        wide = storages([t for t in self.tensors if t.ndim == 2 and len(t) == vocabulary])
        return sum(found.values()), sum(n for a, n in wide.items() if a not in self.known)


def forward(engine, windows, kept=None):
    if kept is None:
        return next_token_loss(engine, windows)[0]
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        return next_token_loss(engine, windows)[0]


def main():
    checkpoint, out, ds_json, *words = sys.argv[1:]
    options = dict(w.split("=", 1) for w in words if "." not in w.partition("=")[0])
    config = settings([w for w in words if "." in w.partition("=")[0]])
    if "group" in options:  # elements at which DeepSpeed cuts groups of experts
        split_params_into_different_moe_groups_for_optimizer.__defaults__ = (int(options["group"]),)
    internals.start(5)
    rank, world = dist.get_rank(), dist.get_world_size()
    values = json.loads(ds_json)
    experts = len(read_sidecar(Path(checkpoint)).experts)
    stage, batch = check_layout(values, config, world, world, experts)
    where = placement(config.parallel, experts, rank, world, world)
    partition = (
        internals.partitioner(deepspeed_config(values, config, batch)) if stage == 3 else keep_whole
    )
    dtype, grouped = DTYPES[config.model.dtype], bool(config.parallel.grouped_mm)
    engine = start_engine(
        load_nexus(Path(checkpoint), dtype, where, config.router, grouped, partition),
        values,
        config,
        batch,
    )
    vocabulary = engine.module.config.vocab_size
    data = torch.randint(
        vocabulary,
        (batch.micro, config.data.sequence_length + 1),
        generator=torch.manual_seed(rank),
    )
    engine.train()
    found = {}
    for step in range(2):
        set_learning_rate(engine, config.training.lr)
        for part in range(batch.accumulation):
            last = part == batch.accumulation - 1
            kept = Kept(engine) if step == 1 and last else None
            loss = forward(engine, data, kept)
            if kept:
                found["activations"], found["head"] = kept.bytes(vocabulary)
                kept.tensors.clear()
            if kept and stage == 1:
                count_before_reducing(engine, found)
            engine.backward(loss)
            del loss
            if kept and stage > 1:
                found |= count(engine)
            engine.step()
    Path(f"{out}.{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
