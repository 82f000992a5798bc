"""Made-up results of a comparison, in the shape and the size of real ones, and ways to look into
them; no number here was ever measured."""

import copy
import csv
import random
from statistics import fmean

import numpy as np

from nexus_ds.experiments.comparison.result_file import Results

OLD, NEW, PRETRAINING = ["wikipedia", "arxiv", "books", "stackexchange"], ["github"], ["c4"]
BUDGETS = [0, 25_000, 50_000, 100_000]
# name: (label, group, distance to Nexus on old domains, FLOPs, active parameters, own share)
METHODS = {
    "seed": ("Seed", "reference", 0.900, 0.0, 530_000, None),
    "branch wikipedia": ("Branch wikipedia", "dense", 1.200, 1.27e12, 530_000, None),
    "branch arxiv": ("Branch arxiv", "dense", 0.800, 1.27e12, 530_000, None),
    "union": ("Dense on the union", "dense", -0.060, 5.7e12, 530_000, None),
    "average": ("Plain average", "dense", 0.615, 5.1e12, 530_000, None),
    "btm": ("Output ensemble (BTM)", "dense", -0.120, 5.1e12, 2_120_000, None),
    "sparse_upcycling": ("Sparse upcycling", "upcycled", 0.240, 0.9e12, 752_000, 0.31),
    "scratch": ("MoE from scratch", "upcycled", 1.300, 0.9e12, 752_000, 0.27),
    "btx": ("BTX", "router", 0.080, 6.0e12, 752_000, 0.35),
    "linear": ("Linear router", "router", 0.034, 6.0e12, 752_000, 0.40),
    "linear_fit": ("Linear router, label fit", "router", 0.001, 6.0e12, 752_000, 0.57),
    "hidden_mean": ("Mean hidden states", "router", 0.030, 6.0e12, 752_000, 0.49),
    "ridge": ("Ridge (DUME)", "router", 0.012, 6.0e12, 752_000, 0.55),
    "embedding_rows": ("Rows = embeddings", "router", 0.050, 6.0e12, 752_000, 0.33),
    "nexus_paper": ("Nexus, as printed", "router", 0.041, 6.0e12, 752_000, 0.36),
    "nexus": ("Nexus", "router", 0.0, 6.0e12, 752_000, 0.57),
}
# name: (label, starts from, new loss at once, new loss at last, old loss on top, share, leak)
EXTENSIONS = {
    "nexus_append": ("Nexus, append", "nexus", 6.405, 4.796, 0.018, 0.08, 0.07),
    "nexus_refit": ("Nexus, refit", "nexus", 6.148, 4.669, 0.0, 0.59, 0.09),
    "nexus_contrastive": ("Nexus, contrastive", "nexus", 6.362, 4.759, 0.020, 0.19, 0.04),
    "linear_reset": ("Linear, reset", "linear", 6.344, 4.753, 0.108, 0.23, 0.22),
    "linear_random": ("Linear, random row", "linear_fit", 6.381, 4.805, 0.024, 0.07, 0.08),
    "linear_hidden": ("Linear, mean hidden row", "linear_fit", 6.105, 4.684, 0.069, 0.70, 0.31),
    "linear_fit": ("Linear, label fit", "linear_fit", 6.173, 4.681, 0.007, 0.58, 0.09),
    "ridge": ("Ridge (DUME)", "ridge", 6.241, 4.708, 0.078, 0.56, 0.11),
}


def _compute(flops, active):
    total = 530_000 if active <= 530_000 else max(active, 1_194_000)
    return {
        "training_flops": flops,
        "training_tokens": int(flops / 3e6),
        "parameters": {"total": total, "active": active},
        "seconds": flops / 5e10,
    }


def _routing(domains, experts, own):
    rest = (1 - own) / (len(experts) - 1)
    return {
        d: {e: own if e == d else rest if d in experts else 1 / len(experts) for e in experts}
        for d in domains
    }


def _method(name, seeds, noise, variant="", shift=0.0):
    label, group, distance, flops, active, own = METHODS[name]
    entry = {
        "name": name,
        "label": label,
        "variant": variant,
        "about": f"What {label} is, in one sentence.",
        "group": group,
        "compute": _compute(flops, active),
        "seeds": {},
    }
    for seed in seeds:
        level = {
            "wikipedia": 4.7,
            "arxiv": 4.4,
            "books": 4.9,
            "stackexchange": 4.4,
            "c4": 5.0,
            "github": 7.0,
        }
        loss = {
            d: v + distance + shift + 0.03 * seed + noise.gauss(0, 0.006) for d, v in level.items()
        }
        if name.startswith("branch "):
            loss[name.removeprefix("branch ")] -= 1.6
        entry["seeds"][str(seed)] = {
            "loss": loss,
            "own_share": own,
            "gate": own and own + 0.05,
            "routing": own and _routing(level, OLD, own + noise.gauss(0, 0.01)),
            "untrained": own
            and {"loss": {d: v + 0.9 for d, v in loss.items()}, "own_share": own - 0.06},
        }
    return entry


def _extension(name, seeds, noise, added="github", variant=""):
    label, start, first, last, old, share, leak = EXTENSIONS[name]
    entry = {
        "name": name,
        "label": label,
        "variant": variant,
        "about": f"What {label} does.",
        "added": added,
        "starts_from": start,
        "compute": _compute(7.5e12, 752_000),
        "seeds": {},
    }
    for seed in seeds:
        budgets = {}
        for step, budget in enumerate(BUDGETS):
            part = 1 - 0.4**step if step else 0.0
            loss = dict.fromkeys(
                added.split("+"), first + (last - first) * part / 0.936 + noise.gauss(0, 0.012)
            )
            loss |= {
                d: 4.72 + old + (0.06 if step else 0.0) + 0.03 * seed + noise.gauss(0, 0.004)
                for d in OLD
            }
            budgets[str(budget)] = {
                "loss": loss,
                "share": min(0.8, share + 0.06 * step + noise.gauss(0, 0.01)),
                "leak": leak + 0.01 * step,
                "own_share": 0.53,
            }
        entry["seeds"][str(seed)] = {"budgets": budgets}
    return entry


def evaluation(experts, layers=3, seed=0):
    """An entry of an evaluation's summary: routing by layer and cosines before and after P."""
    values = np.random.default_rng(seed)
    domains = [*OLD, *PRETRAINING, *NEW]
    share = np.stack(
        [values.dirichlet(np.where(np.array(experts) == d, 6.0, 1.0), layers) for d in domains],
        axis=1,
    )
    unit = values.normal(size=(len(experts), 16))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = (unit @ unit.T).tolist()
    routing = {
        d: dict(zip(experts, share[:, i].mean(axis=0).tolist(), strict=True))
        for i, d in enumerate(domains)
    }
    return {
        "checkpoint": {},
        "tokens_per_second": 1000.0,
        "experts": experts,
        "expert_domains": experts,
        "layers": list(range(layers)),
        "routing": routing,
        "own_share": {e: routing[e][e] for e in experts},
        "leak": {},
        "share_by_layer": share.tolist(),
        "gate_by_layer": np.full((layers, len(domains)), 0.6).tolist(),
        "cosine": {
            "names": experts,
            "embeddings": cosine,
            "inputs": cosine,
            "rows": [cosine] * layers,
            "centred_rows": [cosine] * layers,
        },
    }


def with_longer_seed(found, shift=0.3):
    """Add a variant whose seed model read ten times as much: losses of seed, dense and Nexus."""
    for entry in [e for e in found["contenders"] if not e["variant"]]:
        if entry["name"] in ("seed", "union", "btm", "nexus"):
            longer = copy.deepcopy(entry)
            longer["variant"] = "longer"
            nearer = 0.05 if entry["name"] == "nexus" else 0.0
            for scores in longer["seeds"].values():
                scores["loss"] = {d: v - shift - nearer for d, v in scores["loss"].items()}
            found["contenders"].append(longer)
    found["variants"]["longer"] = {"overrides": ["stages.seed.training.tokens=5300000"]}
    found["seed_tokens"] = {"": 530_000, "longer": 5_300_000}
    return found


def results(seeds=(0, 1, 2), variants=True, evaluations=True):
    """The results of a whole comparison."""
    noise = random.Random(7)
    methods = [_method(name, seeds, noise) for name in METHODS]
    settings = {
        "low_balance": ["router.load_balance=0.0005"],
        "equal_data": ["data.mixture=uniform"],
    }
    if variants:
        for number, variant in enumerate(settings):
            methods += [
                _method(n, seeds, noise, variant, 0.02 * number) for n in ("nexus", "linear")
            ]
    extensions = [_extension(name, seeds, noise) for name in EXTENSIONS]
    if variants:
        extensions.append(_extension("nexus_refit", seeds, noise, variant="low_balance"))
    return {
        "recipe": "compare-tiny",
        "seeds": list(seeds),
        "seconds": 1500.0,
        "machine": "2 CPU cores, 8 GB",
        "data": {"path": "data", "windows": 48, "length": 128},
        "domains": {
            "old": OLD,
            "pretraining": PRETRAINING,
            "new": NEW,
            "scored": [*OLD, *PRETRAINING, *NEW],
        },
        "contenders": methods,
        "extensions": extensions,
        "evaluations": {
            "nexus": evaluation(OLD),
            "extended: nexus_refit": evaluation([*OLD, *NEW], seed=1),
        }
        if evaluations
        else {},
        "variants": {name: {"overrides": words} for name, words in settings.items()}
        if variants
        else {},
        "not_run": [
            {
                "name": "nexus_context",
                "why": "the recipe leaves it out: it needs a router that reads context",
            }
        ],
    }


def read(found):
    """Return results (JSON) as the reports read them."""
    return Results.from_json(found)


def seeds_of(found, kind, name, variant="", budget=None):
    """Return what was measured of one row of `found[kind]`, a dictionary a seed."""
    (entry,) = [e for e in found[kind] if e["name"] == name and e["variant"] == variant]
    seeds = list(entry["seeds"].values())
    return seeds if budget is None else [seed["budgets"][budget] for seed in seeds]


def mean_loss(seeds, domains):
    return [fmean(seed["loss"][domain] for domain in domains) for seed in seeds]


def rows_of(path):
    """Return the lines of a CSV, a dictionary each."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def assert_row(table, row, expected):
    """Check all cells of the rows that begin with `row`; `expected` names every column, in
    order."""
    assert list(table.header) == list(expected)
    (line,) = [line for line in table.rows if line[: len(row)] == row]
    assert list(line) == list(expected.values())
