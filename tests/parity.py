"""One rank of a parity run (not a test): trains a Nexus checkpoint under DeepSpeed and writes losses and gradients.

python parity.py CHECKPOINT OUT KEY=VALUE ...      under the launcher's variables RANK, WORLD_SIZE, MASTER_*
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nexus_ds.config import Config, _apply, parse_override
from nexus_ds.model.build import DTYPES, load_nexus
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.engine import Batch, moe_layers, placement, set_learning_rate, start_engine, token_losses

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
    return torch.randint(vocabulary, (STEPS, size, length + 1), generator=torch.Generator().manual_seed(5))


def deepspeed_json(stage, offload=False):
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else tiny weights are never partitioned
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def gradients(engine):
    """Return every gradient in full on rank 0, experts in expert order, under the reference's names."""
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


def main():
    checkpoint, out, *words = sys.argv[1:]
    stage = int(next((w.partition("=")[2] for w in words if w.startswith("stage=")), 2))
    accumulation = int(next((w.partition("=")[2] for w in words if w.startswith("accumulation=")), 1))
    offload = any(w == "offload=1" for w in words)
    words = [w for w in words if "." in w.partition("=")[0]]
    config = settings(words)
    internals.start(2)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = config.training.batch_size
    batch = Batch(size // world // accumulation, accumulation)
    from nexus_ds.model.checkpoint import read_sidecar

    where = placement(config.parallel, len(read_sidecar(Path(checkpoint)).experts), rank, world, world)
    model = load_nexus(
        Path(checkpoint), DTYPES[config.model.dtype], where, config.router, bool(config.parallel.grouped_mm)
    )
    engine = start_engine(model, deepspeed_json(stage, offload), config, batch)
    data = batches(model.config.vocab_size, size)
    losses, norms, first = [], [], None
    for step in range(STEPS):
        engine.train()
        set_learning_rate(engine, config.training.lr)
        total = 0.0
        share = size // world
        for part in range(accumulation):
            start = rank * share + part * batch.micro
            loss = token_losses(engine, data[step, start : start + batch.micro]).mean()
            engine.backward(loss)
            if step == 0 and part == accumulation - 1:
                first = gradients(engine)
            engine.step()
            total += float(loss) / accumulation
        value = torch.tensor([total / world], dtype=torch.float64)
        dist.all_reduce(value)
        losses.append(float(value))
        norms.append(float(engine.get_global_grad_norm()))
    if rank == 0:
        torch.save(first, f"{out}.pt")
        Path(f"{out}.json").write_text(json.dumps({"losses": losses, "norms": norms}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
