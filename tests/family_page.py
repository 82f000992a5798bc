"""Write docs/families.md out of the tables that the tests run by:
`PYTHONPATH=. python tests/family_page.py`.

A family's row comes from `FAMILIES` and from the rows of KINDS and ROWS that have it; a bound is
the one that the test asserts; programs are those of `TARGETS`, of which docs/serving.md has the
versions. tests/test_family_page.py holds the page to this.
"""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

from test_families import AGREEMENT, ROWS
from test_readme import KINDS as IN_README

from nexus_ds.checkpoint import families
from nexus_ds.checkpoint.families.record import Family
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.forms import NATIVE as NATIVE_PREFIX
from nexus_ds.checkpoint.wrappers import WRAPPERS
from nexus_ds.serving.targets import TARGETS
from tests.checkpoint.test_dense import FP32, KINDS
from tests.checkpoint.test_native import KINDS as NATIVE
from tests.checkpoint.test_qwen3_5 import KINDS as HYBRID
from tests.checkpoint.test_qwen3_next import BF16, GRADIENTS, NOISE
from tests.checkpoint.test_views import KINDS as VIEWED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"


class Claim(NamedTuple):
    """What is exact in a form, and the test that says so."""

    form: str
    exact: str
    to: str
    test: str


DENSE = "tests/checkpoint/test_dense.py::"
VIEWS = "tests/checkpoint/test_views.py::"
NEXT = "tests/checkpoint/test_qwen3_next.py::"
LINEAR = "tests/checkpoint/test_qwen3_5.py::"
OWN = "tests/checkpoint/test_native.py::"
OLDER = "tests/checkpoint/test_older_stacks.py::"
FORMULA = "the formula on the dense family's own class of transformers"
CLAIMS = (
    Claim(
        "Llama, Mistral, Qwen2",
        f"fp32 logits to {FP32:g} of the largest, top-1 and top-2",
        FORMULA,
        DENSE + "test_stock_transformers_computes_the_formula",
    ),
    Claim(
        "the others of `qwen2_moe`",
        f"fp32 logits, top-1 and top-2, to {NOISE:g} times what the family differs from itself by "
        "(eager and sdpa, or an ulp more of its embeddings or its queries' weights); bf16, top-1 "
        "and top-2: mostly bit by bit, or the median error to fp32 at most "
        f"{BF16:g} times the reference's own",
        FORMULA,
        VIEWS + "test_stock_transformers_computes_the_formula",
    ),
    Claim(
        "the others of `qwen2_moe`",
        "left padding; greedy tokens with and without a cache",
        FORMULA,
        VIEWS + "test_with_left_padding_and_with_a_cache_it_is_the_same",
    ),
    Claim(
        "the others of `qwen2_moe`",
        "a config.json as transformers 4 wrote it: the same settings, weights and logits",
        "the family's own class of transformers",
        VIEWS + "test_older_spellings_are_the_same_model",
    ),
    Claim(
        "Phi-4-mini",
        "fp32 logits to 1e-05, of fewer and of more positions than those of its first training",
        FORMULA,
        VIEWS + "test_phi_4_minis_rope_below_and_above_the_positions_of_its_first_training",
    ),
    Claim(
        "Granite, Phi-3, Gemma 2, Cohere 2",
        f"a branch's training: all losses to 1e-05 of them, its weights to {AGREEMENT:g}",
        "the same steps in plain PyTorch on the family's own class",
        "tests/test_families.py::test_a_branch_is_trained_with_its_familys_own_loss",
    ),
    Claim(
        "qwen2_moe",
        "gradients, and losses of ten steps of AdamW",
        "plain PyTorch",
        "tests/runtime/test_parity.py::test_losses_and_gradients_equal_the_reference",
    ),
    Claim(
        "qwen3_next",
        f"fp32 logits to {NOISE:g} times what eager and sdpa differ by, top-1 and top-2",
        FORMULA,
        NEXT + "test_stock_transformers_computes_the_formula",
    ),
    Claim(
        "qwen3_next",
        f"bf16 logits: median error to fp32 at most {BF16:g} times the reference's own",
        FORMULA,
        NEXT + "test_stock_transformers_computes_the_formula",
    ),
    Claim(
        "qwen3_next",
        "left padding; greedy tokens with and without a cache",
        FORMULA,
        NEXT + "test_with_left_padding_and_with_a_cache_it_is_the_same",
    ),
    Claim(
        "qwen3_next",
        f"gradients of all weights, experts and P to {GRADIENTS:g} of the largest",
        FORMULA,
        NEXT + "test_training_computes_the_reference_and_its_gradients",
    ),
    Claim(
        "qwen3_next",
        "every tensor, bit by bit",
        "the dense models it was made of",
        NEXT + "test_it_is_read_back_bit_by_bit",
    ),
    Claim(
        "qwen3_next",
        f"trained weights to {AGREEMENT:g}",
        "ZeRO-1 and ZeRO-3, with and without expert parallelism, to one another",
        "tests/test_families.py::test_a_family_trains_alike_in_every_layout",
    ),
    Claim(
        "Qwen3.5",
        f"fp32 logits to {NOISE:g} times what the family differs from itself by (eager and sdpa, "
        "or an ulp more of its embeddings or its queries' weights), top-1 and top-2; bf16, top-2: "
        "mostly bit by bit",
        FORMULA,
        LINEAR + "test_stock_transformers_computes_the_formula",
    ),
    Claim(
        "Qwen3.5",
        "left padding; greedy tokens with and without a cache",
        FORMULA,
        LINEAR + "test_with_left_padding_and_with_a_cache_it_is_the_same",
    ),
    Claim(
        "Qwen3.5",
        f"gradients of all weights, experts and P to {GRADIENTS:g} of the largest",
        FORMULA,
        LINEAR + "test_training_computes_the_reference_and_its_gradients",
    ),
    Claim(
        "Qwen3.5",
        "every tensor, bit by bit",
        "the dense models it was made of",
        LINEAR + "test_it_is_read_back_bit_by_bit",
    ),
    Claim(
        "nexus_<family>",
        f"fp32 logits to {NOISE:g} times what the family differs from itself by (eager and sdpa, "
        "or an ulp more of its embeddings or its queries' weights), top-1 and top-2; bf16, top-2: "
        "mostly bit by bit",
        FORMULA,
        OWN + "test_transformers_computes_the_formula",
    ),
    Claim(
        "nexus_<family>",
        "left padding; greedy tokens with and without a cache",
        FORMULA,
        OWN + "test_with_left_padding_and_with_a_cache_it_is_the_same",
    ),
    Claim(
        "nexus_<family>",
        f"gradients of all weights, experts and P to {GRADIENTS:g} of the largest",
        FORMULA,
        OWN + "test_training_computes_the_reference_and_its_gradients",
    ),
    Claim(
        "nexus_<family>",
        "every tensor, bit by bit",
        "the dense models it was made of",
        OWN + "test_it_is_read_back_bit_by_bit",
    ),
    Claim(
        "nexus_<family>",
        f"trained weights to {AGREEMENT:g}",
        "ZeRO-1 and ZeRO-3, with and without expert parallelism, to one another",
        "tests/test_families.py::test_a_family_trains_alike_in_every_layout",
    ),
    Claim(
        "all",
        "a finished training: logits of what was written",
        "the engine that trained it",
        "tests/test_train.py::"
        "test_a_trained_checkpoint_computes_the_engines_logits_in_stock_transformers",
    ),
)


def pinned(file, package):
    """Return the version of a package that a file of requirements names."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / file).read_text(), re.M)[1]


OWN_FORM = "nexus_<family>"
LOST = {
    "qwen2_moe": "Of Llama, Mistral, Qwen2, Ministral, Seed-OSS, Phi-3 and Phi-4 nothing. The "
    "shared expert's down_proj is stored doubled (its gate is 1/2). GLM-4 and ERNIE 4.5: the order "
    "of a head's channels, which no score sees. Granite: tied embeddings, since embeddings and "
    "head take different multipliers, of which those that are no power of two round once. "
    "Phi-4-mini: the factor that RoPE gives to channels that turn (1.19) is in q_proj, squared, "
    "rounded once. Phi-3 and Phi-4-mini with two lists of factors: generation with a cache across "
    "the positions of the first training (4,096); their own class computes the cache anew there. "
    "What is written says so.",
    "qwen3_next": "Size: q_proj is stored with as many zeros, a tied head is written out. q_norm "
    "and k_norm are rounded in the model file, by less than bf16 costs, where no power of two "
    "saves it; as they were they stand in nexus/, which every verb here reads. "
    "Windows, biases in the attention and the router of contexts are refused. Of Qwen3.5 "
    "nothing but what sees and what predicts further tokens (mtp); its decays (A_log) and the norm "
    "over its states stand in fp32, as they are published.",
    "nexus_<family>": "Nothing of the model; programs without nexus_ds. The router of contexts is "
    "refused, and a pair that can't learn: without a shared expert and with top-1, where a norm "
    "over the FFN's output takes the gate's scale away.",
}


def described():
    """Return the first line of the module of each family, by `model_type`."""
    found = {}
    for entry in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{entry.name}")
        line = module.__doc__.splitlines()[0]
        for value in vars(module).values():
            if isinstance(value, Family):
                # a module may import another's family; its own name decides
                found[value.name] = (
                    line if value.name == entry.name else found.get(value.name, line)
                )
    return found


def table(header, rows):
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tested(family):
    """Return a family's variants whose logits are compared, and where all verbs take it."""
    variants = [kind for kind, (of, *_) in (KINDS | VIEWED | NATIVE).items() if of == family]
    variants += HYBRID if family == "qwen3_5_text" else []
    if family in ROWS:
        return ", ".join(variants), "tests/test_families.py"
    known = {name.lower() for name, _, _ in IN_README}
    return ", ".join(variants) or "none", "tests/test_readme.py" if family in known else "none"


def form_of(family):
    """Return the name of the form of a family's mixture."""
    return family.mixture or OWN_FORM


def programs(form):
    """Return the programs that take a form, of native ones with the families that were run."""
    native = {NATIVE_PREFIX + name for name, family in FAMILIES.items() if not family.mixture}
    wanted = native if form == OWN_FORM else {form}
    found = []
    for target in TARGETS.values():
        mine = [name for name in target.forms if name in wanted]
        # a place to keep models, which runs none
        if mine and target.name != "hub":
            which = "" if set(mine) == wanted else f" ({', '.join(f'`{name}`' for name in mine)})"
            # 5 needs no export
            program = {"transformers4": "transformers 4"}.get(target.name, target.program)
            found.append(program + which)
    return ", ".join(found)


def page():
    """Return docs/families.md."""
    words = described()
    forms = list(dict.fromkeys(form_of(family) for family in FAMILIES.values()))
    rows = [
        [f"`{name}`", words[name], f"`{form_of(family)}`", *tested(name)]
        for name, family in FAMILIES.items()
    ]
    exact = [
        [f"`{claim.form}`" if claim.form in forms else claim.form, *claim[1:3], f"`{claim.test}`"]
        for claim in CLAIMS
    ]
    taking = "\n".join(f"* `{form}`: {programs(form)}" for form in forms)
    return f"""# Dense families, and which programs take their mixtures

Made by `tests/family_page.py` out of the tables that the tests run by; don't edit it here.

## Families

The seed and its branches are of one family, and their mixture is written in its form. The variants
are rows of the test whose bound the next table gives. All verbs are run on tiny models where the
last column names a test; of the others what is written is compared, and no training was run.

{table(["model_type", "what it is", "form", "variants compared", "all verbs"], rows)}

Another `model_type` is refused by name, with the reason where one is known. Of models that see
({", ".join(f"`{name}`" for name in WRAPPERS)})
`upcycle` and `extend` read the text, which computes what the whole model does of a text alone
(`tests/checkpoint/test_wrappers.py`); to train or run one, save its language model on its own.

## What is exact, and to what

{table(["form", "exact", "to", "test"], exact)}

## Programs

transformers 5 takes every form, `nexus_*` after `import nexus_ds.hf`. Others take an export of it:

{taking}

Which version was looked at, what each refuses and how to export says
[one table](serving.md#which-program-takes-what).

With `router.input=context` the form is `nexus_moe`, which transformers 5 takes after
`import nexus_ds.hf`, and [vLLM](serving.md#routers-that-read-a-running-mean) where nexus_ds is
installed beside it.

## What is lost

{table(["form", "lost"], [[f"`{form}`", LOST[form]] for form in forms])}
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
