"""A made-up evaluation of four models; no number here was ever measured."""

import math

import numpy as np

from nexus_ds.evaluation.perplexity import Cosines, Routing, Scores
from nexus_ds.report.summary import Measured, Setup

SETUP = Setup("demo", ["a", "b"], windows=4, length=8)
# layer, text, expert
SHARE = np.array([[[0.6, 0.4], [0.1, 0.9]], [[0.8, 0.2], [0.3, 0.7]], [[0.7, 0.3], [0.5, 0.5]]])
GATE = np.array([[0.5, 0.6], [0.55, 0.65], [0.6, 0.7]])  # layer, text


def measured(loss, routed, gate=GATE, tokenizer="t"):
    """A model whose windows have the losses `loss[domain]`."""
    domains = list(loss)
    routing = None
    if routed:
        d = len(domains)
        routing = Routing(
            domains, ["first", "second"], ["a", "b"], [0, 2, 5], SHARE[:, :d], np.array(gate)[:, :d]
        )
    eye = np.eye(2)
    step = {
        "verb": "upcycle",
        "note": "<&>",
        "fit": {"before": 0.45294, "after": 0.5},
        "experts": ["a", "b"],
        "x": None,
    }
    info = {
        "kind": "Nexus" if routed else "dense",
        "family": "x",
        "dtype": "F32",
        "routed_experts": 2 if routed else 0,
        "top_k": 1 if routed else None,
        "parameters": {"total": 10, "active": 5},
        "lineage": [step],
        "tokenizer": tokenizer,
    }
    cosine = None
    if routed:
        tables = [(eye + k / 10).tolist() for k in range(6)]
        rows, centred = np.array(tables[2:4]), np.array(tables[4:6])
        cosine = Cosines(
            ["first", "second"], np.array(tables[0]), np.array(tables[1]), rows, centred
        )
    windows = {domain: np.array(values) for domain, values in loss.items()}
    return Measured(
        info,
        Scores(windows, dict.fromkeys(loss, 16), 100.25 if routed else 300.0, routing),
        cosine,
    )


LOSSES = {
    "seed": {"a": [2.0, 2.2, 1.8, 2.0], "b": [3.0, 3.0, 3.0, 3.0]},
    "before": {"a": [2.0, 2.2, 1.8, 2.0], "b": [3.0, 3.4, 2.6, 3.0]},
    "after": {"a": [1.1, 1.2, 0.9, 0.8], "b": [3.1, 3.6, 2.8, 2.9]},
    "branch": {"a": [1.5, 1.5, 1.5, 1.5], "b": [4.0, 4.0, 4.0, 4.0]},
}
# after - before: a: -0.9 -1.0 -0.9 -1.2, mean -1.0, deviations 0.1 0 0.1 -0.2; b: 0.1 0.2 0.2 -0.1,
# mean 0.1
ERROR_A = math.sqrt((0.01 + 0 + 0.01 + 0.04) / 3 / 4)
ERROR_B = math.sqrt((0 + 0.01 + 0.01 + 0.04) / 3 / 4)


def models(saturated=False):
    gate = np.full((3, 2), 0.99) if saturated else GATE
    return {
        name: measured(loss, name in ("before", "after"), gate if name == "after" else GATE)
        for name, loss in LOSSES.items()
    }
