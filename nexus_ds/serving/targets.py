"""The programs that a mixture can be exported for: what each takes, refuses, and was seen to do.

One table, of which the verb `export` and the page about serving are made; no torch. A fact is of
the version that it names: `run` means that its output was compared with transformers', `read` that
its loader and model were read.
Not covered: writing (`directory`, `gguf_file`), quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nexus_ds.checkpoint.config_json import CONTEXT_MODEL, ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import FULL, LINEAR, DenseSettings
from nexus_ds.checkpoint.forms import MIXTURES, NATIVE, PLAIN, QWEN3_NEXT
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.errors import ServingError

QWEN2_MOE = PLAIN[0]
STOCK = (QWEN2_MOE, QWEN3_NEXT)
"""Forms that programs other than this one know."""
NATIVE_FORMS = (NATIVE + "olmo2",)
"""Native forms that vLLM was run with; it is not said to take the others."""
BY_LAYER = "by kinds of layers"
UNCHANGED = "--for hub keeps the model as it is, for transformers 5"


@dataclass(frozen=True)
class Mixture:
    """What rules ask of a mixture."""

    config: ConfigJson
    sizes: DenseSettings

    @classmethod
    def of(cls, config: ConfigJson) -> Mixture:
        """Return the mixture of a complete config.json."""
        return cls(config, settings(config))

    @property
    def form(self) -> str:
        """Its `model_type`."""
        return str(self.config["model_type"])

    @property
    def rope(self) -> str:
        """The kind of its RoPE; BY_LAYER where kinds of layers have their own."""
        return str(self.sizes.rope.get("rope_type", BY_LAYER))

    @property
    def windows(self) -> bool:
        """Whether any layer has sliding-window attention."""
        return self.sizes.sliding_window is not None


Holds = Callable[[Mixture], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of mixture that some programs have trouble with."""

    what: str
    """As the page's table has it."""
    holds: Holds


@dataclass(frozen=True)
class Rule:
    """A kind of mixture that a program would compute wrongly, or not load."""

    kind: Kind
    why: str
    """What the program would do; a sentence that begins with it."""

    @property
    def what(self) -> str:
        """The kind, in words."""
        return self.kind.what

    def holds(self, mixture: Mixture) -> bool:
        """Whether a mixture is of the kind."""
        return self.kind.holds(mixture)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One program."""

    name: str
    """As `--for` has it."""
    program: str
    version: str
    """The one that was looked at."""
    seen: str
    """run | read."""
    forms: tuple[str, ...] = STOCK
    """`model_type`s that it takes."""
    writes: str
    """What the exported directory has, for people."""
    command: str
    """Starts it; DIR is what was written."""
    rules: tuple[Rule, ...] = ()
    notes: tuple[Rule, ...] = field(default=())
    """What is right, but not in every use; said and not refused."""


# Kinds of mixtures --------------------------------------------------------------------------------


# FULL is a layer without a window; those of one kind are all that some programs know.
def _some_windows(mixture: Mixture) -> bool:
    return mixture.windows and FULL in mixture.sizes.layer_types


def _windows_everywhere(mixture: Mixture) -> bool:
    return mixture.windows and FULL not in mixture.sizes.layer_types


def _any_window(mixture: Mixture) -> bool:
    return mixture.windows


def _odd_heads(mixture: Mixture) -> bool:
    sizes = mixture.sizes
    # a Qwen3-Next's classes read head_dim everywhere
    return mixture.form in PLAIN and sizes.query_width != sizes.hidden_size


def _rope_is(name: str) -> Holds:
    return lambda mixture: mixture.rope == name


def _two_lists(mixture: Mixture) -> bool:
    rope = mixture.sizes.rope
    return mixture.rope == "longrope" and rope["short_factor"] != rope["long_factor"]


# A yarn without it has a factor that follows from the others, which all programs compute.
def _stated_factor(mixture: Mixture) -> bool:
    return mixture.rope == "yarn" and mixture.sizes.rope.get("attention_factor") is not None


def _linear(mixture: Mixture) -> bool:
    return LINEAR in mixture.sizes.layer_types


def next_without_linear(mixture: Mixture) -> bool:
    """Return whether it is a Qwen3-Next without a layer of linear attention: one of Qwen3."""
    return mixture.form == QWEN3_NEXT and not _linear(mixture)


def _odd_order(mixture: Mixture) -> bool:
    if not _linear(mixture):
        return False
    every = mixture.config["full_attention_interval"]
    numbered = enumerate(mixture.sizes.layer_types, start=1)
    return any((kind == FULL) != (layer % every == 0) for layer, kind in numbered)


def _is_own(mixture: Mixture) -> bool:
    return mixture.form in (CONTEXT_MODEL, *NATIVE_FORMS)


def _reads_context(mixture: Mixture) -> bool:
    return mixture.form == CONTEXT_MODEL


def _always(mixture: Mixture) -> bool:
    return True


def _biases_where_none_are(mixture: Mixture) -> bool:
    # llama.cpp has windows and factors in an architecture without biases
    special = mixture.windows or mixture.rope == "llama3"
    return special and mixture.sizes.qkv_bias


def _stretched_windows(mixture: Mixture) -> bool:
    return mixture.windows and mixture.rope != "default"


def _own_yarn(mixture: Mixture) -> bool:
    # betas, mscale or a factor of its own: none of these was tried
    usual = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    stated = {key for key, value in mixture.sizes.rope.items() if value is not None}
    return mixture.rope == "yarn" and not stated <= usual


# The table ----------------------------------------------------------------------------------------

# Several programs have trouble with the same kind: its name and its test stand once.
_ODD_HEADS = Kind("heads that are not hidden size / number of heads wide", _odd_heads)
_SOME_WINDOWS = Kind("windows in some layers", _some_windows)
_WINDOWS_EVERYWHERE = Kind("windows in all layers", _windows_everywhere)
_ANY_WINDOW = Kind("sliding windows", _any_window)
_DYNAMIC = Kind("RoPE of type dynamic", _rope_is("dynamic"))
_ROPES = Kind("RoPE that differs between kinds of layers", _rope_is(BY_LAYER))
_LONGROPE = Kind("RoPE of type longrope", _rope_is("longrope"))
_TWO_LISTS = Kind("RoPE of type longrope with two lists of factors", _two_lists)
_STATED_FACTOR = Kind("RoPE of type yarn with attention_factor", _stated_factor)
_OWN_YARN = Kind("RoPE of type yarn with more than a factor", _own_yarn)
_STRETCHED_WINDOWS = Kind("sliding windows beside RoPE that is stretched", _stretched_windows)
_BIASES = Kind(
    "llama3's RoPE or sliding windows beside biases of q, k and v", _biases_where_none_are
)
_QWEN3 = Kind("Qwen3", next_without_linear)
_LINEAR = Kind("linear attention", _linear)
_ODD_ORDER = Kind("full attention in other layers than every n-th", _odd_order)
_OWN_FORM = Kind("a form of its own", _is_own)
_CONTEXT = Kind("a router that reads a running mean", _reads_context)
_EVERY = Kind("every mixture", _always)

_WIDTH = Rule(_ODD_HEADS, "takes that width for a Qwen2-MoE's heads")
_TRANSFORMERS_4 = Target(
    name="transformers4",
    program="transformers",
    version="4.57.6",
    seen="run",
    writes="the weights; RoPE in the spelling of 4; no cache where that of 4 is wrong",
    command="AutoModelForCausalLM.from_pretrained('DIR')",
    rules=(
        Rule(_SOME_WINDOWS, "gives all layers the window"),
        Rule(_ODD_HEADS, "refuses it"),
    ),
    notes=(
        Rule(_QWEN3, "generates without a cache: its own looks for linear attention"),
        Rule(_WINDOWS_EVERYWHERE, "generates without a cache"),
    ),
)
_VLLM = Target(
    name="vllm",
    program="vLLM",
    version="0.32.0",
    seen="run",
    forms=(*STOCK, CONTEXT_MODEL, *NATIVE_FORMS),
    writes="the weights with an index, zero biases of q, k and v where it has some, lm_head",
    command="vllm serve DIR",
    rules=(
        _WIDTH,
        Rule(_SOME_WINDOWS, "gives no layer a window"),
        Rule(_DYNAMIC, "stretches it once for all texts"),
        Rule(_TWO_LISTS, "takes the long ones for all texts where it serves long ones"),
        Rule(_ROPES, "was not run with it"),
    ),
    notes=(
        Rule(_OWN_FORM, "knows it where nexus_ds is installed beside it"),
        Rule(_CONTEXT, "keeps two vectors of the hidden size more of each token in each layer"),
        # its pull request 34489: of a Qwen3.5 it reads that in config.json
        Rule(
            _LINEAR,
            "keeps its state in bf16: start it with --mamba-ssm-cache-dtype float32",
        ),
    ),
)
_SGLANG = Target(
    name="sglang",
    program="SGLang",
    version="0.5.23",
    seen="read",
    writes="the weights, lm_head",
    command="python -m sglang.launch_server --model-path DIR --moe-runner-backend triton",
    rules=(
        _WIDTH,
        Rule(_ANY_WINDOW, "gives no layer a window"),
        Rule(_DYNAMIC, "stretches it once for all texts"),
        Rule(_TWO_LISTS, "takes one for all texts of a batch"),
        Rule(_STATED_FACTOR, "does not read that key"),
        Rule(_ODD_ORDER, "has it in every n-th"),
    ),
    notes=(
        Rule(
            _EVERY,
            "renormalises gates with --moe-runner-backend flashinfer_trtllm, which it chooses for "
            "a Qwen3-Next on Blackwell by itself: start it with triton",
        ),
    ),
)
# Ollama runs llama.cpp: what one gets wrong the other does.
_GGUF_RULES = (
    Rule(_LINEAR, "renormalises gates in the architecture that has it"),
    Rule(_BIASES, "has an architecture for either, not for both"),
    Rule(_STRETCHED_WINDOWS, "stretches it only in layers without a window"),
    Rule(_OWN_YARN, "was seen with its own numbers alone"),
    Rule(_DYNAMIC, "has no such RoPE"),
    Rule(_LONGROPE, "reads no factors for each length there"),
)
_LLAMACPP = Target(
    name="llamacpp",
    program="llama.cpp",
    version="0.5.0",
    seen="run",
    writes="one GGUF file in the weights' dtype, router in fp32; quantise it with llama-quantize",
    command="llama-server --model DIR/model.gguf",
    rules=_GGUF_RULES,
)
_OLLAMA = Target(
    name="ollama",
    program="Ollama",
    version="with llama.cpp b10091",
    seen="read",
    writes="that GGUF file, and a Modelfile with the chat template in Ollama's language",
    command="ollama create NAME --file DIR/Modelfile",
    rules=_GGUF_RULES,
)
_HUB = Target(
    name="hub",
    program="the hub",
    version="model cards of 2026",
    seen="read",
    forms=MIXTURES,
    writes="all of the checkpoint, to be extended by others too; card and license; no local path",
    command="hf upload OWNER/NAME DIR",
)
TARGETS = {
    target.name: target for target in (_TRANSFORMERS_4, _VLLM, _SGLANG, _LLAMACPP, _OLLAMA, _HUB)
}
"""By the name that `--for` has."""


# Asking it ----------------------------------------------------------------------------------------


def _described(target: Target) -> str:
    return f"{target.program} {target.version}"


def refuse_unservable(target: Target, mixture: Mixture, where: str) -> None:
    """Raise ServingError, by name, for all that a program would not compute as transformers 5 does.

    Args:
        target: the program.
        mixture: what is to be exported.
        where: start of the messages.
    """
    problems = Problems()
    if mixture.form not in target.forms:
        raise ServingError(
            f"{where}: a model of type {mixture.form!r} is unknown to {_described(target)}, which "
            f"takes {', '.join(target.forms)}; {UNCHANGED}"
        )
    # all at once: whoever mends one is not told of the next afterwards
    for rule in target.rules:
        if rule.holds(mixture):
            problems.add(
                ServingError(
                    f"{where}: {rule.what}: {_described(target)} {rule.why}; "
                    f"use another program, or a model without; {UNCHANGED}"
                )
            )
    problems.refuse()


def notes_on(target: Target, mixture: Mixture) -> list[str]:
    """Return what to know before using a program on a mixture that it takes."""
    held = [note for note in target.notes if note.holds(mixture)]
    return [f"{note.what}: {_described(target)} {note.why}" for note in held]
