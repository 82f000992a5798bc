"""The programs that a mixture can be exported for: what each takes, refuses, and was seen to do.

One table, of which the verb `export` and the page about serving are made; no torch. A fact is of
the version that it names: `run` means that its output was compared with transformers', `read` that
its loader and model were read.
Not covered: writing (`directory`, `gguf_file`), quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nexus_ds.checkpoint.config_json import ConfigJson
from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import FULL, DenseSettings
from nexus_ds.checkpoint.forms import MIXTURES, NATIVE, PLAIN, QWEN3_NEXT
from nexus_ds.checkpoint.problems import Problems
from nexus_ds.errors import ServingError

QWEN2_MOE = PLAIN[0]
STOCK = (QWEN2_MOE, QWEN3_NEXT)
"""Forms that programs other than this one know."""
NATIVE_FORMS = (NATIVE + "olmo2",)
"""Native forms that vLLM was run with; it is not said to take the others."""
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
        """The kind of its RoPE."""
        return str(self.sizes.rope["rope_type"])

    @property
    def windows(self) -> bool:
        """Whether any layer has sliding-window attention."""
        return self.sizes.sliding_window is not None


Holds = Callable[[Mixture], bool]


@dataclass(frozen=True)
class Rule:
    """A kind of mixture that a program would compute wrongly, or not load."""

    what: str
    """The kind, as the page's table has it."""
    why: str
    """What the program would do; a sentence that begins with it."""
    holds: Holds


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
    return mixture.form == QWEN2_MOE and sizes.query_width != sizes.hidden_size


def _kinds(*names: str) -> Holds:
    return lambda mixture: mixture.rope in names


def _two_lists(mixture: Mixture) -> bool:
    rope = mixture.sizes.rope
    return mixture.rope == "longrope" and rope["short_factor"] != rope["long_factor"]


# A yarn without it has a factor that follows from the others, which all programs compute.
def _stated_factor(mixture: Mixture) -> bool:
    return mixture.rope == "yarn" and mixture.sizes.rope.get("attention_factor") is not None


def _is_next(mixture: Mixture) -> bool:
    return mixture.form == QWEN3_NEXT


def _is_native(mixture: Mixture) -> bool:
    return mixture.form in NATIVE_FORMS


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

# Three programs have the same reason, so it stands once.
_ODD_HEADS = Rule(
    "heads that are not hidden size / number of heads wide",
    "takes that width for a Qwen2-MoE's heads",
    _odd_heads,
)
_TRANSFORMERS_4 = Target(
    name="transformers4",
    program="transformers",
    version="4.57.6",
    seen="run",
    writes="the weights; RoPE in the spelling of 4; no cache where that of 4 is wrong",
    command="AutoModelForCausalLM.from_pretrained('DIR')",
    rules=(
        Rule(
            "windows in some layers",
            "gives all layers the window",
            _some_windows,
        ),
        Rule(
            _ODD_HEADS.what,
            "refuses it",
            _odd_heads,
        ),
    ),
    notes=(
        Rule(
            "Qwen3",
            "generates without a cache: its own looks for linear attention",
            _is_next,
        ),
        Rule(
            "windows in all layers",
            "generates without a cache",
            _windows_everywhere,
        ),
    ),
)
_VLLM = Target(
    name="vllm",
    program="vLLM",
    version="0.32.0",
    seen="run",
    forms=(*STOCK, *NATIVE_FORMS),
    writes="the weights with an index, zero biases of q, k and v where it has some, lm_head",
    command="vllm serve DIR",
    rules=(
        _ODD_HEADS,
        Rule(
            "windows in some layers",
            "gives no layer a window",
            _some_windows,
        ),
        Rule(
            "RoPE of type dynamic",
            "stretches it once for all texts",
            _kinds("dynamic"),
        ),
        Rule(
            "RoPE of type longrope with two lists of factors",
            "takes the long ones for all texts where it serves long ones",
            _two_lists,
        ),
    ),
    notes=(
        Rule(
            "a form of its own",
            "knows it where nexus_ds is installed beside it",
            _is_native,
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
        _ODD_HEADS,
        Rule(
            "sliding windows",
            "gives no layer a window",
            _any_window,
        ),
        Rule(
            "RoPE of type dynamic",
            "stretches it once for all texts",
            _kinds("dynamic"),
        ),
        Rule(
            "RoPE of type longrope with two lists of factors",
            "takes one for all texts of a batch",
            _two_lists,
        ),
        Rule(
            "RoPE of type yarn with attention_factor",
            "does not read that key",
            _stated_factor,
        ),
    ),
    notes=(
        Rule(
            "every mixture",
            "renormalises gates with --moe-runner-backend flashinfer_trtllm, which it chooses for "
            "a Qwen3-Next on Blackwell by itself: start it with triton",
            _always,
        ),
    ),
)
# Ollama runs llama.cpp: what one gets wrong the other does.
_GGUF_RULES = (
    Rule(
        "llama3's RoPE or sliding windows beside biases of q, k and v",
        "has an architecture for either, not for both",
        _biases_where_none_are,
    ),
    Rule(
        "sliding windows beside RoPE that is stretched",
        "stretches it only in layers without a window",
        _stretched_windows,
    ),
    Rule(
        "RoPE of type yarn with more than a factor",
        "was seen with its own numbers alone",
        _own_yarn,
    ),
    Rule(
        "RoPE of type dynamic",
        "has no such RoPE",
        _kinds("dynamic"),
    ),
    Rule(
        "RoPE of type longrope",
        "reads no factors for each length there",
        _kinds("longrope"),
    ),
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
