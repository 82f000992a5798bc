"""One rank of parity runs (not a test): trains Nexus checkpoints under DeepSpeed and writes losses
and gradients.

python parity.py RUNS.json      under the launcher's variables RANK, WORLD_SIZE, MASTER_*

RUNS.json lists {checkpoint, out, words: [KEY=VALUE, ...]}; one after the other, since starting
ranks takes longer than a run.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.checkpoint.build import DTYPES
from nexus_ds.checkpoint.sidecar import read_sidecar
from nexus_ds.config import _apply, parse_override
from nexus_ds.launch import end
from nexus_ds.model.head import next_token_loss
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import (
    Batch,
    check_layout,
    deepspeed_config,
    moe_layers,
    placement,
    set_learning_rate,
    start_engine,
)
from nexus_ds.runtime.parallel_model import keep_whole, load_nexus
from nexus_ds.settings import Config

STEPS = 10


def settings(words):
    config = Config()
    config.training.steps, config.training.lr, config.training.clip = STEPS, 1e-2, 0.5
    config.model.dtype, config.router.lr_scale, config.router.load_balance = "fp32", 0.5, 0.1
    config.router.z_loss = 0.01
    for word in words:
        _apply(config, parse_override(word), "")
    return config


def batches(vocabulary, size, length=12):
    """Return the same global batches everywhere: [STEPS, size, length + 1]."""
    return torch.randint(
        vocabulary, (STEPS, size, length + 1), generator=torch.Generator().manual_seed(5)
    )


def deepspeed_json(stage, offload=""):
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else tiny weights are never partitioned
    if offload:  # "optimizer" or "parameters": the latter with the former, as DeepSpeed wants it
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def gradients(engine):
    """Return every gradient in full on rank 0, experts in expert order, under the reference's
    names."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        found[name] = gradient.detach().float().cpu().clone()
    for index, layer in enumerate(moe_layers(engine.module)):
        place = layer.placement
        for stacked in ("w1", "w2", "w3"):
            name = f"model.layers.{index}.mlp.experts.{stacked}"
            local = found[name]
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, local.contiguous())
            slots = torch.cat(parts[: place.ep_size])
            vacant = [s for s in range(place.slots) if place.expert_at(s) is None]
            assert all(bool((slots[s] == 0).all()) for s in vacant), "a vacant slot has a gradient"
            found[name] = slots[[place.slot(e) for e in range(place.experts)]]
    return found


def start(checkpoint, words):
    """Join the ranks and start an engine; return it, its configuration, how the batch is cut, and
    the other words."""
    options = dict(w.split("=", 1) for w in words if "." not in w.partition("=")[0])
    config = settings([w for w in words if "." in w.partition("=")[0]])
    stage, accumulation = int(options.get("stage", 2)), int(options.get("accumulation", 1))
    internals.start(2)
    rank, world = dist.get_rank(), dist.get_world_size()
    kind = config.training.activation_checkpointing.replace("auto", "none")
    batch = Batch(config.training.batch_size // world // accumulation, accumulation, kind)
    experts = len(read_sidecar(Path(checkpoint)).experts)
    values = deepspeed_json(stage, options.get("offload", ""))
    check_layout(values, config, world, world, experts)
    where = placement(config.parallel, experts, rank, world, world)
    partition = (
        internals.partitioner(deepspeed_config(values, config, batch)) if stage == 3 else keep_whole
    )
    grouped, dtype = bool(config.parallel.grouped_mm), DTYPES[config.model.dtype]
    model = load_nexus(Path(checkpoint), dtype, where, config.router, grouped, partition)
    engine = start_engine(model, values, config, batch)
    assert "torch._inductor.compile_fx" not in sys.modules, (
        "a rank waits seconds for a compiler that nothing here uses"
    )
    return engine, config, batch, options


def train_step(engine, config, batch, windows, before_step=None):
    """Do one optimizer step on this rank's share of `windows`; return the mean loss over all
    ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine.train()
    set_learning_rate(engine, config.training.lr)
    total, share = 0.0, len(windows) // world
    for part in range(batch.accumulation):
        first = rank * share + part * batch.micro
        loss, _ = next_token_loss(engine, windows[first : first + batch.micro])
        engine.backward(loss)
        if before_step and part == batch.accumulation - 1:
            before_step()
        engine.step()
        total += float(loss) / batch.accumulation
    value = torch.tensor([total / world], dtype=torch.float64)
    dist.all_reduce(value)
    return float(value)


def run(checkpoint, out, words):
    """Train one layout and write what rank 0 saw."""
    engine, config, batch, options = start(checkpoint, words)
    data = batches(engine.module.config.vocab_size, config.training.batch_size)
    if "same" in options:  # one window for all passes and ranks
        data = data[:, :1].expand_as(data)
    losses, norms, first = [], [], {}
    for step in range(int(options.get("steps", STEPS))):
        keep = (lambda: first.update(gradients(engine))) if step == 0 else None
        losses.append(train_step(engine, config, batch, data[step], keep))
        norms.append(float(engine.get_global_grad_norm()))
    if dist.get_rank() == 0:
        torch.save(first, f"{out}.pt")
        Path(f"{out}.json").write_text(json.dumps({"losses": losses, "norms": norms}))
    engine.destroy()


def main():
    for run_of in json.loads(Path(sys.argv[1]).read_text()):
        run(**run_of)
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end(0)
