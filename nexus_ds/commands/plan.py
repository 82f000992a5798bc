"""The verb `plan`: memory, traffic and time of every layout, before anything is queued.

Not covered: tensor and pipeline parallelism, other jobs on the same nodes, reading text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus_ds.command_lines import typed_training
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.errors import ConfigError, LayoutError
from nexus_ds.outputs import refuse_existing, write_json
from nexus_ds.planning import assumptions, choose
from nexus_ds.planning.choose import Candidate
from nexus_ds.planning.export import export_check
from nexus_ds.planning.layout import Machine, deepspeed_json
from nexus_ds.planning.links import LinkAdvice
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import Sizes, sizes_of
from nexus_ds.planning.units import bits, parse_bytes, short
from nexus_ds.planning.verbs import Verb, assumed, verbs
from nexus_ds.progress import duration
from nexus_ds.report.page import Table, text_table
from nexus_ds.runtime.schedule import tokens_per_step, total_steps
from nexus_ds.settings import Config

# Layouts in the table; --json has all.
SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default="demo",
        help="recipe file or name (default: demo)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        required=True,
        metavar="N",
        help="GPUs of all nodes together",
    )
    parser.add_argument(
        "--gpu-memory",
        required=True,
        metavar="SIZE",
        help="of one GPU, for example 24GB or 80GiB",
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
        "--gpu-tflops",
        type=float,
        metavar="X",
        help="a GPU's peak in dense bf16 (default: 100)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the DeepSpeed JSON of the fastest layout that fits",
    )
    parser.add_argument(
        "--verbs",
        action="store_true",
        help="memory and time of every other verb at this size, instead of training's layouts",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings laid over the recipe",
    )


def machine_of(args: argparse.Namespace) -> Machine:
    """Return the machine that the options describe.

    Raises:
        ConfigError: a size or speed that can't be read.
        LayoutError: GPUs that don't spread over the nodes.
    """
    tflops = assumptions.DEFAULT_TFLOPS if args.gpu_tflops is None else args.gpu_tflops
    if not tflops > 0:
        raise ConfigError(f"--gpu-tflops: expected a number above 0, found {tflops}")

    def given(text: str | None, option: str, default: float) -> float:
        return parse_bytes(text, option) if text else default

    return Machine(
        gpus=args.gpus,
        gpu_memory=parse_bytes(args.gpu_memory, "--gpu-memory"),
        nodes=args.nodes,
        # 0: not checked
        host_memory=given(args.host_memory, "--host-memory", 0.0),
        link=given(args.link, "--link", assumptions.DEFAULT_LINK),
        gpu_link=given(args.gpu_link, "--gpu-link", assumptions.DEFAULT_GPU_LINK),
        tflops=tflops,
    )


def command(args: argparse.Namespace, candidate: Candidate, machine: Machine, ds_json: str) -> str:
    """Return the command that trains with a layout, quoted for a shell.

    On several nodes it stands in a job whose script exports MASTER_ADDR and MASTER_PORT.
    """
    launcher = ["deepspeed", "--num_gpus", str(machine.local)]
    # deepspeed starts ranks on one node; on several SLURM does
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
    args: argparse.Namespace,
    config: Config,
    sizes: Sizes,
    machine: Machine,
) -> dict[str, Any]:
    """Return the whole plan as JSON.

    Raises:
        LayoutError: the batch does not divide over the GPUs.
    """
    training, data = config.training, config.data
    found = choose.candidates(sizes, machine, config)
    best = found[0]
    tokens = total_steps(training, data) * tokens_per_step(training, data)
    width = choose.WIDTH[config.model.dtype]
    kept = disk(sizes, width, training.keep_last)
    plan: dict[str, Any] = {
        "parameters": sizes.counts(),
        "machine": vars(machine).copy(),
        "run": {
            "stage": config.stage,
            "tokens": tokens,
            "tokens_per_step": best.step.tokens,
            "dtype": config.model.dtype,
        },
        "disk_bytes": {name: round(size) for name, size in kept.items()},
        "export_check": export_check(sizes, width).to_json(),
        "layouts": [candidate.to_json(tokens) for candidate in found],
        "best": None,
        "one_more_expert": None,
        "links": LinkAdvice(sizes, machine, config).to_json(),
        "estimated": "bytes of the CUDA context and allocator, and all seconds, are estimates from "
        "`assumptions`",
        "assumptions": assumptions.table(),
    }
    if best.fits:
        plan["best"] = {
            "name": best.layout.name,
            "overrides": best.layout.overrides,
            "deepspeed": deepspeed_json(sizes, best.layout),
            "command": command(args, best, machine, str(args.write or "ds.json")),
        }
    # a dense model has no place for one
    if sizes.experts:
        more = choose.one_more_expert(sizes, machine, config, best)
        plan["one_more_expert"] = {
            **more.to_json(tokens),
            "parameters": sizes.counts()["one_expert"],
        }
    return plan


# Heading of each column, and how a layout's value is shown.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "layout": lambda layout: layout["name"],
    "micro": lambda layout: str(layout["micro_batch_size"]),
    "checkpoint": lambda layout: _yes(layout["activation_checkpointing"] != "none"),
    "GPU GB": lambda layout: f"{layout['gpu_bytes'] / 1e9:.1f}",
    "node GB": lambda layout: f"{layout['host_bytes'] / 1e9:.0f}",
    "GPU link B": lambda layout: short(layout["gpu_link_bytes_per_step"]),
    "node link B": lambda layout: short(layout["node_link_bytes_per_step"]),
    "s/step": lambda layout: f"{layout['step_seconds']:.3g}",
    "tok/s": lambda layout: f"{layout['tokens_per_second']:,.0f}",
    "days": lambda layout: f"{layout['days']:.3g}",
    "fits": lambda layout: _yes(layout["fits"]),
}


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(layouts: list[dict[str, Any]]) -> str:
    rows = [[shown(layout) for shown in COLUMNS.values()] for layout in layouts[:SHOWN]]
    text = text_table(Table(header=list(COLUMNS), rows=rows))
    more = len(layouts) - SHOWN
    return f"{text}\n({more} more with --json)" if more > 0 else text


def _parts(values: dict[str, float], unit: float = 1e9, form: str = ".2f") -> str:
    return ", ".join(f"{name} {value / unit:{form}}" for name, value in values.items() if value)


def _more(plan: dict[str, Any]) -> str:
    """Return what one more expert changes, in one line."""
    now, then = plan["layouts"][0], plan["one_more_expert"]
    fits = "still fits" if then["fits"] else "no longer fits: plan again with stage=extend"
    if not now["fits"]:
        fits = "does not fit either"

    def added(key: str) -> float:
        return then[key] - now[key]

    # fp32 master weights and both moments of AdamW
    state = plan["assumptions"]["ADAM_BYTES"] * then["parameters"]
    return (
        f"one more expert: {then['parameters'] / 1e6:+,.0f}M parameters, "
        f"{added('gpu_bytes') / 1e9:+.2f} GB a GPU, {added('host_bytes') / 1e9:+.1f} GB a node, "
        f"{state / 1e9:+.1f} GB a training state, {added('step_seconds'):+.2f} s a step; "
        f"the layout above {fits}"
    )


def _links(advice: dict[str, Any]) -> str:
    """Return, in one line, whether expert parallelism pays on the link, and where that changes."""
    words = {"expert_parallel": "expert parallelism", "zero_only": "ZeRO alone"}
    # the one to use first
    better, other = sorted(words, key=lambda way: way != advice["use"])
    fast, slow = advice[better], advice[other]
    line = (
        f"links: at {bits(advice['link'])} between {advice['between']} {words[better]} is the "
        f"faster: {fast['name']} {fast['step_seconds']:.3g} s a step, "
        f"{slow['name']} {slow['step_seconds']:.3g} s"
    )
    if not advice["flips"]:
        return f"{line}; so it is from 10 Mb to 10 Tb"
    for flip in advice["flips"]:
        line += f"; above {bits(flip['link'])} {words[flip['on_faster_links']]}"
    return line


def _size_lines(plan: dict[str, Any]) -> list[str]:
    """Return the lines about the model, the run and its disk space."""
    counts, run = plan["parameters"], plan["run"]
    check = plan["export_check"]
    millions = {name: f"{count / 1e6:,.0f}M" for name, count in counts.items()}
    disk = {name: f"{size / 1e9:,.1f} GB" for name, size in plan["disk_bytes"].items()}
    return [
        f"parameters: {millions['total']}, {millions['active']} active; "
        f"one expert {millions['one_expert']}; P adds {millions['projection']} in training",
        f"run: stage {run['stage']}, {run['tokens'] / 1e9:,.3g}B tokens, "
        f"{run['tokens_per_step']:,} a step, {run['dtype']}",
        f"disk: {disk['state']} a training state, {disk['states']} with those that are kept, "
        f"{disk['export']} the finished checkpoint",
        f"check of the finished checkpoint: {check['gpu_bytes'] / 1e9:.2f} GB of the first GPU "
        f"when training's activations are gone, {check['host_bytes'] / 1e9:.2f} GB of main "
        f"memory, about {check['seconds']:,.0f} s (estimated)",
    ]


def describe(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    first = plan["layouts"][0]
    lines = [
        *_size_lines(plan),
        "",
        _table(plan["layouts"]),
        "",
        f"{'fastest that fits' if plan['best'] else 'nothing fits; nearest'}: {first['name']}",
        f"GB a GPU: {_parts(first['gpu'])}",
        f"GB a node: {_parts(first['host'])}",
        f"seconds a step: {_parts(first['seconds'], 1, '.3g')}",
    ]
    if plan["one_more_expert"]:
        lines.append(_more(plan))
    if plan["links"]:
        lines.append(_links(plan["links"]))
    assumed = plan["assumptions"]
    lines.append(
        f"estimated, not measured: all seconds ({plan['machine']['tflops']:g} TFLOPS at "
        f"{assumed['MFU']:.0%}, links at {assumed['LINK_EFFICIENCY']:.0%}, see "
        "nexus_ds/planning/assumptions.py), CUDA context and allocator"
    )
    return "\n".join(lines)


def _check_file(out: Path | None) -> None:
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(
            f"--write: {out} is a directory; name a file, for example {out / 'ds.json'}"
        )
    # before anything is planned
    refuse_existing(out)


def _write(out: Path, plan: dict[str, Any]) -> None:
    """Write the DeepSpeed JSON; LayoutError if no layout fits, so that no job starts with it."""
    if plan["best"]:
        write_json(out, plan["best"]["deepspeed"])
        return
    nearest = plan["layouts"][0]
    raise LayoutError(
        f"no layout fits, so {out} was not written: {nearest['name']} comes nearest with "
        f"{nearest['gpu_bytes'] / 1e9:.1f} GB a GPU and {nearest['host_bytes'] / 1e9:.0f} GB a "
        "node; use more GPUs or shorter sequences, or look at the table without --write"
    )


# Heading of each column of --verbs, and how a verb's value is shown.
VERB_COLUMNS: dict[str, Callable[[Verb], str]] = {
    "verb": lambda verb: verb.name,
    "model": lambda verb: verb.model,
    "GPU GB": lambda verb: f"{verb.gpu_bytes / 1e9:.1f}",
    "host GB": lambda verb: f"{verb.host_bytes / 1e9:.1f}",
    "time": lambda verb: duration(verb.seconds),
    "CPU GB": lambda verb: f"{verb.cpu_bytes / 1e9:.1f}",
    "on CPUs": lambda verb: duration(verb.cpu_seconds),
    "how": lambda verb: verb.how,
    "for": lambda verb: verb.sizes,
}


def _run_verbs(args: argparse.Namespace, config: Config) -> int:
    """Print what the verbs take, as text or JSON."""
    if args.write:
        raise ConfigError("--write is a training layout's DeepSpeed JSON; leave --verbs out")
    machine = machine_of(args)
    sizes = sizes_of(config)
    tokens = total_steps(config.training, config.data) * tokens_per_step(
        config.training, config.data
    )
    found = verbs(config, sizes, machine, choose.WIDTH[config.model.dtype], tokens)
    if args.json:
        answer = {"verbs": [asdict(verb) for verb in found], "assumptions": assumed()}
        print_text(json.dumps(answer, indent=2))
        return 0
    rows = [[shown(verb) for shown in VERB_COLUMNS.values()] for verb in found]
    print_text(text_table(Table(header=list(VERB_COLUMNS), rows=rows)))
    print_text(
        "counted: bytes of weights, activations and hidden states, without CUDA's context of "
        f"{assumptions.CONTEXT_BYTES / 1e9:.1f} GB\nestimated, not measured: all times ("
        + ", ".join(f"{name} {value:g}" for name, value in assumed().items())
        + "; see nexus_ds/planning/verbs.py)"
    )
    return 0


def run(args: argparse.Namespace) -> int:
    """Print the plan; with --write, write the DeepSpeed JSON of the fastest layout that fits."""
    config = load_config(args.config, args.overrides)
    if args.verbs:
        return _run_verbs(args, config)
    # before layouts are tried: a taken file is told at once
    _check_file(args.write)
    machine = machine_of(args)
    plan = collect(args, config, sizes_of(config), machine)
    if args.write:
        _write(args.write, plan)
    if args.json:
        print_text(json.dumps(plan, indent=2, ensure_ascii=False))
        return 0
    print_text(describe(plan))
    best = plan["best"]
    if not best:
        print_text(
            "next: try more GPUs, a smaller data.sequence_length, or --host-memory of a larger node"
        )
    elif args.write:
        print_text(f"wrote {args.write}; next: {best['command']}")
    else:
        print_text(f"next: the same command with --write ds.json, then: {best['command']}")
    return 0
