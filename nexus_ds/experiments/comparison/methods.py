"""The methods: every way to one model out of the same data that we know of, and every way to add an
expert to it.

Each is a line of a table: where it starts from, and the settings in which it differs from the
recipe. A recipe chooses among them by `compare.contenders` and `compare.extensions`.
Not covered: ways that need another architecture at inference (BAM's attention experts, stitch
layers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nexus_ds.errors import ConfigError
from nexus_ds.words import nearest

# Free expert embeddings are weights like others and learn at the model's own rate; the default
# scale is one for the projection P.
FREE_EMBEDDINGS = ("router.kind=linear", "router.lr_scale=1")


NONE = "none"
"""Chooses nothing: an empty list chooses everything."""


@dataclass(frozen=True)
class Method:
    """One way to a model of all domains."""

    name: str
    label: str
    about: str
    group: str
    """reference | dense | upcycled | router: which part of the table it stands in."""
    routed: str = ""
    """What becomes routed experts: branches | copies (of the seed) | random | branches+seed; empty:
    not a mixture."""
    settings: tuple[str, ...] = ()
    matched: bool = False
    """Whether it trains for as many floating-point operations as Nexus and its branches
    together."""


@dataclass(frozen=True)
class Extension:
    """One way to add an expert to a trained mixture."""

    name: str
    label: str
    about: str
    starts_from: str
    """The method whose mixture is extended."""
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = field(default=())
    """Of the verb `extend`."""


def _warm_start(name: str) -> tuple[str, ...]:
    """Return the settings of free expert embeddings with this warm start."""
    return (*FREE_EMBEDDINGS, f"router.warm_start={name}")


METHODS = [
    Method("seed", "seed", "The dense model that everything starts from.", "reference"),
    Method(
        "branches",
        "dense branches",
        "One dense model a domain, the seed trained on that domain alone.",
        "reference",
    ),
    Method(
        "union",
        "dense, all data",
        "One dense model trained on the mixture with the whole budget: as many operations "
        "as Nexus and its branches together.",
        "dense",
        matched=True,
    ),
    Method(
        "average",
        "dense merging",
        "The plain mean of the seed and its branches; no training.",
        "dense",
    ),
    Method(
        "btm",
        "BTM ensemble",
        "All branches at once, their probabilities weighted by the posterior of their domain "
        "given the text so far; no training, all branches active.",
        "dense",
    ),
    Method(
        "scratch",
        "MoE from scratch",
        "The same mixture, all weights random, trained for the mixture's budget.",
        "upcycled",
        "random",
        _warm_start("none"),
    ),
    Method(
        "sparse_upcycling",
        "sparse upcycling",
        "Every routed expert starts as a copy of the seed's; trained for the mixture's budget.",
        "upcycled",
        "copies",
        _warm_start("none"),
    ),
    Method(
        "sparse_upcycling_matched",
        "sparse upcycling, matched",
        "Sparse upcycling with the whole budget: as many "
        "operations as Nexus and its branches together.",
        "upcycled",
        "copies",
        _warm_start("none"),
        matched=True,
    ),
    Method(
        "btx",
        "BTX",
        "Branch-Train-MiX as published: the seed is a routed expert like the others, no shared "
        "expert, top-2, free router rows.",
        "upcycled",
        "branches+seed",
        (*_warm_start("none"), "model.shared_expert=none", "router.top_k=2"),
    ),
    Method(
        "linear",
        "linear router",
        "The Nexus paper's baseline: shared seed FFN, free router rows that start at random.",
        "router",
        "branches",
        _warm_start("none"),
    ),
    Method(
        "linear_fit",
        "linear, label fit",
        "Free rows, fitted to tell domains apart before training.",
        "router",
        "branches",
        _warm_start("label_fit"),
    ),
    Method(
        "hidden_mean",
        "mean hidden state",
        "Free rows that start as the mean hidden state of each domain's text (mergekit's way).",
        "router",
        "branches",
        _warm_start("hidden_mean"),
    ),
    Method(
        "ridge",
        "ridge",
        "Free rows that start as the closed-form ridge regression of domain labels on hidden "
        "states (DUME's way).",
        "router",
        "branches",
        _warm_start("ridge"),
    ),
    Method(
        "embedding_rows",
        "embeddings as rows",
        "Free rows that start as the domain embeddings themselves (FlexOlmo's "
        "way), put to the model's width by a fixed random map.",
        "router",
        "branches",
        _warm_start("embedding"),
    ),
    Method(
        "nexus_paper",
        "Nexus, as printed",
        "Rows P(d) as the paper prints them: no warm start, P at the model's own "
        "learning rate, N(0, 0.02).",
        "router",
        "branches",
        ("router.kind=nexus", "router.warm_start=none", "router.init=normal", "router.lr_scale=1"),
    ),
    Method(
        "nexus",
        "Nexus",
        "Rows P(d) with the package's defaults.",
        "router",
        "branches",
        ("router.kind=nexus",),
    ),
    Method(
        "nexus_context",
        "Nexus, context router",
        "Rows P(d) with a linear P and fixed length, read by the running mean "
        "of the hidden states; P also sees text of the seed's domains that get no expert.",
        "router",
        "branches",
        (
            "router.kind=nexus",
            "router.input=context",
            "router.projection=linear",
            "router.row_norm=fixed",
            "router.warm_start=closed_form",
        ),
    ),
]

EXTENSIONS = [
    Extension(
        "linear_reset",
        "linear, reset",
        "The Nexus paper's baseline: all rows of the linear router start anew.",
        "linear",
        FREE_EMBEDDINGS,
        ("--linear-init", "reset", "--no-refit"),
    ),
    Extension(
        "linear_random",
        "linear, random row",
        "Old rows stay, the new one is random.",
        "linear_fit",
        FREE_EMBEDDINGS,
        ("--no-refit",),
    ),
    Extension(
        "linear_hidden",
        "linear, mean hidden state",
        "Old rows stay, the new one is the mean hidden state of the new text.",
        "linear_fit",
        _warm_start("hidden_mean"),
    ),
    Extension(
        "linear_ridge",
        "linear, ridge",
        "All rows by ridge regression of domain labels (DUME's way).",
        "linear_fit",
        _warm_start("ridge"),
    ),
    Extension(
        "linear_fit",
        "linear, label fit",
        "All rows fitted to tell the domains apart, the new one too.",
        "linear_fit",
        _warm_start("label_fit"),
    ),
    Extension(
        "nexus_append",
        "Nexus, append",
        "The paper's way: the new row is P(d_new), nothing else.",
        "nexus",
        (),
        ("--no-refit",),
    ),
    Extension(
        "nexus_contrastive",
        "Nexus, contrastive",
        "P warmed up on chunks of the old text (the seed's too), then P(d_new): "
        "the new text is embedded, never read.",
        "nexus",
        ("router.warm_start=chunks",),
    ),
    Extension(
        "nexus_refit",
        "Nexus, refit",
        "The package's default: P fitted again, with the new text.",
        "nexus",
        ("router.warm_start=label_fit",),
    ),
    Extension(
        "nexus_zero_shot",
        "Nexus, context, zero-shot",
        "The context router with P refreshed on old text (the seed's "
        "too), then P(d_new): the new text is embedded, never read.",
        "nexus_context",
        (
            "router.input=context",
            "router.projection=linear",
            "router.row_norm=fixed",
            "router.warm_start=closed_form",
        ),
    ),
    Extension(
        "nexus_context_refit",
        "Nexus, context, refit",
        "The context router, P fitted again with the new text.",
        "nexus_context",
        (
            "router.input=context",
            "router.projection=linear",
            "router.row_norm=fixed",
            "router.warm_start=label_fit",
        ),
    ),
]


def chosen_methods(names: list[str]) -> list[Method]:
    """Return the methods of these names, all for an empty list; ConfigError for an unknown one."""
    _check(names, [method.name for method in METHODS], "compare.contenders")
    return [method for method in METHODS if method.name in names or not names]


def chosen_extensions(names: list[str]) -> list[Extension]:
    """Return the extensions of these names, all for an empty list; ConfigError for an unknown
    one."""
    _check(names, [extension.name for extension in EXTENSIONS], "compare.extensions")
    return [extension for extension in EXTENSIONS if extension.name in names or not names]


def check_settings(settings: Mapping[str, Sequence[str]]) -> None:
    """Check `compare.contender_settings`, overrides by contender.

    Raises:
        ConfigError: an unknown contender, or a setting that defines it.
    """
    key = "compare.contender_settings"
    _check(settings, [method.name for method in METHODS], key)
    for method in METHODS:
        defining = {word.partition("=")[0]: word for word in method.settings}
        for word in settings.get(method.name, ()):
            name = word.partition("=")[0]
            if name in defining:
                raise ConfigError(
                    f"{key}: found {word} for {method.name}, which is defined by {defining[name]}; "
                    "leave it out, or take another contender"
                )


def _check(names: Iterable[str], known: list[str], key: str) -> None:
    for name in names:
        if name not in (*known, NONE):
            raise ConfigError(f"{key}: unknown name {name!r}{nearest(name, known)}")
