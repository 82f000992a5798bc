"""The verb `plan`: memory, traffic and time of every layout, before anything is queued.

Not covered: tensor and pipeline parallelism, other jobs on the same nodes, the time that reading
text takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_ds.command_lines import typed_training
from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.outputs import refuse_existing, write_json
from nexus_ds.settings import Config

if TYPE_CHECKING:
    from nexus_ds.planning.choose import Candidate
    from nexus_ds.planning.layout import Machine
    from nexus_ds.planning.sizes import Sizes

SHOWN = 12  # layouts in the table; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--config", metavar="RECIPE", default="demo", help="recipe file or name (default: demo)"
    )
    parser.add_argument(
        "--gpus", type=int, required=True, metavar="N", help="GPUs of all nodes together"
    )
    parser.add_argument(
        "--gpu-memory", required=True, metavar="SIZE", help="of one GPU, for example 24GB or 80GiB"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (default: 1)")
    parser.add_argument(
        "--link",
        metavar="SPEED",
        help="of a node to the others, for example 25Gb or 3GB (default: 100Gb)",
    )
    parser.add_argument(
        "--gpu-link", metavar="SPEED", help="of a GPU inside its node (default: 25GB, PCIe 4 x16)"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="main memory of a node (default: not checked)"
    )
    parser.add_argument(
        "--gpu-tflops", type=float, metavar="X", help="a GPU's peak in dense bf16 (default: 100)"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the DeepSpeed JSON of the fastest layout that fits",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the recipe"
    )


def machine_of(args: argparse.Namespace) -> Machine:
    """Return the machine that the options describe.

    Raises:
        ConfigError: a size or speed that can't be read.
        LayoutError: GPUs that don't spread over the nodes.
    """
    from nexus_ds.planning.assumptions import DEFAULT_GPU_LINK, DEFAULT_LINK, DEFAULT_TFLOPS
    from nexus_ds.planning.layout import Machine
    from nexus_ds.planning.units import parse_bytes

    tflops = DEFAULT_TFLOPS if args.gpu_tflops is None else args.gpu_tflops
    if not tflops > 0:
        raise ConfigError(f"--gpu-tflops: expected a number above 0, found {tflops}")
    return Machine(
        gpus=args.gpus,
        gpu_memory=parse_bytes(args.gpu_memory, "--gpu-memory"),
        nodes=args.nodes,
        host_memory=parse_bytes(args.host_memory, "--host-memory") if args.host_memory else 0.0,
        link=parse_bytes(args.link, "--link") if args.link else DEFAULT_LINK,
        gpu_link=parse_bytes(args.gpu_link, "--gpu-link") if args.gpu_link else DEFAULT_GPU_LINK,
        tflops=tflops,
    )


def command(args: argparse.Namespace, candidate: Candidate, machine: Machine, ds_json: str) -> str:
    """Return the command that trains with a layout, quoted for a shell.

    On several nodes it stands in a job whose script exports MASTER_ADDR and MASTER_PORT.
    """
    launcher = ["deepspeed", "--num_gpus", str(machine.local)]
    if machine.nodes > 1:
        launcher = [
            "srun",
            f"--nodes={machine.nodes}",
            f"--ntasks-per-node={machine.local}",
            "python",
        ]
    words = ["--config", args.config, *args.overrides, *candidate.layout.overrides]
    return typed_training(words, launcher=launcher, ds_json=ds_json)


def collect(
    args: argparse.Namespace, config: Config, sizes: Sizes, machine: Machine
) -> dict[str, Any]:
    """Return the whole plan as JSON.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """
    from nexus_ds.planning import assumptions, choose
    from nexus_ds.planning.layout import deepspeed_json
    from nexus_ds.planning.links import LinkAdvice
    from nexus_ds.planning.memory import disk
    from nexus_ds.runtime.schedule import tokens_per_step, total_steps

    found = choose.candidates(sizes, machine, config)
    best, width = found[0], choose.WIDTH[config.model.dtype]
    tokens = total_steps(config.training, config.data) * tokens_per_step(
        config.training, config.data
    )
    plan: dict[str, Any] = {
        "parameters": sizes.counts(),
        "machine": vars(machine).copy(),
        "run": {
            "stage": config.stage,
            "tokens": tokens,
            "tokens_per_step": best.step.tokens,
            "dtype": config.model.dtype,
        },
        "disk_bytes": {
            name: round(value)
            for name, value in disk(sizes, width, config.training.keep_last).items()
        },
        "layouts": [candidate.to_json(tokens) for candidate in found],
        "best": None,
        "one_more_expert": None,
        "links": LinkAdvice(sizes, machine, config).to_json(),
        "estimated": "bytes of the CUDA context and allocator, and all seconds, are estimates from `assumptions`",
        "assumptions": assumptions.table(),
    }
    if best.fits:
        plan["best"] = {
            "name": best.layout.name,
            "overrides": best.layout.overrides,
            "deepspeed": deepspeed_json(sizes, best.layout),
            "command": command(args, best, machine, str(args.write or "ds.json")),
        }
    if sizes.experts:
        more = choose.one_more_expert(sizes, machine, config, best)
        plan["one_more_expert"] = {
            **more.to_json(tokens),
            "parameters": sizes.counts()["one_expert"],
        }
    return plan


def _table(layouts: list[dict[str, Any]]) -> str:
    from nexus_ds.planning.units import short
    from nexus_ds.report.page import Table, text_table

    header = [
        "layout",
        "micro",
        "checkpoint",
        "GPU GB",
        "node GB",
        "GPU link B",
        "node link B",
        "s/step",
        "tok/s",
        "days",
        "fits",
    ]
    rows = [
        [
            c["name"],
            str(c["micro_batch_size"]),
            "no" if c["activation_checkpointing"] == "none" else "yes",
            f"{c['gpu_bytes'] / 1e9:.1f}",
            f"{c['host_bytes'] / 1e9:.0f}",
            short(c["gpu_link_bytes_per_step"]),
            short(c["node_link_bytes_per_step"]),
            f"{c['step_seconds']:.3g}",
            f"{c['tokens_per_second']:,.0f}",
            f"{c['days']:.3g}",
            "yes" if c["fits"] else "no",
        ]
        for c in layouts[:SHOWN]
    ]
    more = len(layouts) - SHOWN
    return text_table(Table(header=header, rows=rows)) + (
        f"\n({more} more with --json)" if more > 0 else ""
    )


def _parts(values: dict[str, float], unit: float = 1e9, form: str = ".2f") -> str:
    return ", ".join(f"{name} {value / unit:{form}}" for name, value in values.items() if value)


def _more(plan: dict[str, Any]) -> str:
    """Return what one more expert changes, in one line."""
    now, then = plan["layouts"][0], plan["one_more_expert"]
    fits = "still fits" if then["fits"] else "no longer fits: plan again with stage=extend"
    if not now["fits"]:
        fits = "does not fit either"
    state = plan["assumptions"]["ADAM_BYTES"] * then["parameters"]
    return (
        f"one more expert: {then['parameters'] / 1e6:+,.0f}M parameters, "
        f"{(then['gpu_bytes'] - now['gpu_bytes']) / 1e9:+.2f} GB a GPU, "
        f"{(then['host_bytes'] - now['host_bytes']) / 1e9:+.1f} GB a node, {state / 1e9:+.1f} GB a training state, "
        f"{then['step_seconds'] - now['step_seconds']:+.2f} s a step; the layout above {fits}"
    )


def _links(advice: dict[str, Any]) -> str:
    """Return, in one line, whether expert parallelism pays on the link, and where that changes."""
    from nexus_ds.planning.units import bits

    words = {"expert_parallel": "expert parallelism", "zero_only": "ZeRO alone"}
    better, other = sorted(words, key=lambda way: way != advice["use"])
    line = (
        f"links: at {bits(advice['link'])} between {advice['between']} {words[better]} is the faster: "
        f"{advice[better]['name']} {advice[better]['step_seconds']:.3g} s a step, {advice[other]['name']} "
        f"{advice[other]['step_seconds']:.3g} s"
    )
    if not advice["flips"]:
        return line + "; so it is from 10 Mb to 10 Tb"
    return line + "".join(
        f"; above {bits(f['link'])} {words[f['on_faster_links']]}" for f in advice["flips"]
    )


def describe(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    counts, disk, run = plan["parameters"], plan["disk_bytes"], plan["run"]
    best, first = plan["best"], plan["layouts"][0]
    lines = [
        f"parameters: {counts['total'] / 1e6:,.0f}M, {counts['active'] / 1e6:,.0f}M active; one expert "
        f"{counts['one_expert'] / 1e6:,.0f}M; P adds {counts['projection'] / 1e6:,.0f}M in training",
        f"run: stage {run['stage']}, {run['tokens'] / 1e9:,.3g}B tokens, {run['tokens_per_step']:,} a step, {run['dtype']}",
        f"disk: {disk['state'] / 1e9:,.1f} GB a training state, {disk['states'] / 1e9:,.1f} GB with those that are kept, "
        f"{disk['export'] / 1e9:,.1f} GB the finished checkpoint",
        "",
        _table(plan["layouts"]),
        "",
        f"{'fastest that fits' if best else 'nothing fits; nearest'}: {first['name']}",
        f"GB a GPU: {_parts(first['gpu'])}",
        f"GB a node: {_parts(first['host'])}",
        f"seconds a step: {_parts(first['seconds'], 1, '.3g')}",
    ]
    if plan["one_more_expert"]:
        lines.append(_more(plan))
    if plan["links"]:
        lines.append(_links(plan["links"]))
    machine = plan["machine"]
    lines.append(
        f"estimated, not measured: all seconds ({machine['tflops']:g} TFLOPS at {plan['assumptions']['MFU']:.0%}, links at "
        f"{plan['assumptions']['LINK_EFFICIENCY']:.0%}, see nexus_ds/planning/assumptions.py), CUDA context and allocator"
    )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the plan; with --write, write the DeepSpeed JSON of the fastest layout that fits."""
    from nexus_ds.planning.sizes import sizes_of

    config = load_config(args.config, args.overrides)
    if args.write:
        if args.write.is_dir():
            raise ConfigError(
                f"--write: {args.write} is a directory; name a file, for example {args.write / 'ds.json'}"
            )
        refuse_existing(args.write)
    machine = machine_of(args)
    plan = collect(args, config, sizes_of(config), machine)
    best = plan["best"]
    if args.write and not best:
        nearest = plan["layouts"][0]
        raise LayoutError(
            f"no layout fits, so {args.write} was not written: {nearest['name']} comes nearest with "
            f"{nearest['gpu_bytes'] / 1e9:.1f} GB a GPU and {nearest['host_bytes'] / 1e9:.0f} GB a node; use more GPUs or "
            "shorter sequences, or look at the table without --write"
        )
    if args.write:
        write_json(args.write, best["deepspeed"])
    if args.json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
        return 0
    print(describe(plan))
    if not best:
        print(
            "next: try more GPUs, a smaller data.sequence_length, or --host-memory of a larger node"
        )
    elif args.write:
        print(f"wrote {args.write}; next: {best['command']}")
    else:
        print(f"next: the same command with --write ds.json, then: {best['command']}")
    return 0
