"""The verb `preflight`: check nodes, versions, devices, disk and network in seconds, before a job's
expensive part.

Every rank runs it, as srun starts it; outside of SLURM it checks this machine with one rank.
Not covered: memory on machines without GPUs, which `plan` does not predict.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from nexus_ds.command_lines import DS_JSON
from nexus_ds.config import load_config
from nexus_ds.console import print_text
from nexus_ds.launch import meeting_point, position
from nexus_ds.pipeline import BRANCH, MOE, STEP_KINDS, TRAINED, WIDE_STAGES, resolve
from nexus_ds.words import add_stage_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_stage_arguments(parser, STEP_KINDS, "stage that is about to run")
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for ranks (default: 60)",
    )


def run(args: argparse.Namespace) -> int:
    """Check; print what was found, or every problem."""
    from nexus_ds.runtime.node_checks import Needs, PreflightError, check, needs_of

    stage = TRAINED.get(args.name, MOE)
    overrides = [*args.overrides, f"stage={stage}"]
    if stage == BRANCH and not any(text.startswith("branch=") for text in overrides):
        overrides.append("branch=any")  # all branches are of one size
    config = resolve(load_config(args.config, overrides))
    ds_json = ""
    if stage in WIDE_STAGES:
        ds_json = args.deepspeed or str(DS_JSON)
    here = position()
    address, port = meeting_point(here)
    try:
        # Only what trains needs devices and memory.
        planned = partial(needs_of, config, here, ds_json)
        needs = planned if args.name in TRAINED else lambda gpu, host: Needs()
        line = check(Path(config.pipeline.run), here, address, port, args.wait, needs)
    except PreflightError as error:
        if str(error):
            raise
        return 1  # rank 0 says why
    if here.rank == 0:
        print_text(line)
    return 0
