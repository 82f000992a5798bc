"""Job graphs of the tiny comparison, whose jobs nobody runs."""

from pathlib import Path

from nexus_ds.experiments.comparison.build import build

OUT = Path("comparison")


def made(*overrides, recipe="compare-tiny"):
    return build(recipe, ["compare.seeds=[0]", *overrides], OUT)


def jobs(found, part):
    return [job for job in found.builder.jobs.values() if part in job.name]
