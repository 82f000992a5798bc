"""What each program is said to take and to refuse: every rule, by the mixture that it is about."""

from dataclasses import replace

import pytest

from nexus_ds.checkpoint.qwen2_moe import moe_config
from nexus_ds.commands.export import PROGRAMS
from nexus_ds.errors import ServingError
from nexus_ds.serving.targets import TARGETS, Mixture, notes_on, refuse_unservable
from tests.checkpoint import test_dense
from tests.checkpoint.test_older_stacks import KINDS

STRETCHED = dict(
    KINDS,
    **{
        "qwen3.5-odd": (
            "qwen3_5_text",
            KINDS["qwen3.5"][1] | dict(layer_types=["full_attention", *["linear_attention"] * 2]),
        ),
        "linear-sliding": (
            "mistral",
            dict(
                sliding_window=6,
                rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
            ),
        ),
        "yarn-factor": (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="yarn",
                    rope_theta=500.0,
                    factor=4.0,
                    original_max_position_embeddings=16,
                    attention_factor=1.5,
                )
            ),
        ),
    },
)
REFUSED = {
    "transformers4": {
        "qwen2-sliding": "windows in some layers: transformers 4.57.6 gives all layers the window",
        "llama-head-dim": "heads that are not hidden size / number of heads wide: "
        "transformers 4.57.6 refuses it",
    },
    "vllm": {
        "qwen2-sliding": "windows in some layers: vLLM 0.32.0 gives no layer a window",
        "llama-head-dim": "vLLM 0.32.0 takes that width for a Qwen2-MoE's heads",
        "dynamic": "RoPE of type dynamic: vLLM 0.32.0 stretches it once for all texts",
        "longrope": "with two lists of factors: vLLM 0.32.0 takes the long ones for all texts",
        "longrope-factor": "RoPE of type longrope with two lists of factors: vLLM 0.32.0 takes",
        "phi-4-mini": "RoPE of type longrope with two lists of factors: vLLM 0.32.0 takes",
    },
    "sglang": {
        "qwen2-sliding": "sliding windows: SGLang 0.5.23 gives no layer a window",
        "mistral-sliding": "sliding windows: SGLang 0.5.23 gives no layer a window",
        "llama-head-dim": "SGLang 0.5.23 takes that width for a Qwen2-MoE's heads",
        "dynamic": "RoPE of type dynamic: SGLang 0.5.23 stretches it once for all texts",
        "longrope": "with two lists of factors: SGLang 0.5.23 takes one for all texts of a batch",
        "longrope-factor": "RoPE of type longrope with two lists of factors: SGLang 0.5.23 takes",
        "phi-4-mini": "RoPE of type longrope with two lists of factors: SGLang 0.5.23 takes",
        "linear-sliding": "sliding windows: SGLang 0.5.23 gives no layer a window",
        "yarn-factor": "RoPE of type yarn with attention_factor: SGLang 0.5.23 does not read",
        "qwen3.5-odd": "full attention in other layers than every n-th: SGLang 0.5.23 has it in",
    },
    "llamacpp": {
        "qwen3.5": "linear attention: llama.cpp 0.5.0 renormalises gates",
        "qwen3.5-odd": "linear attention: llama.cpp 0.5.0 renormalises gates",
        "qwen2-sliding": "llama3's RoPE or sliding windows beside biases of q, k and v: "
        "llama.cpp 0.5.0 has an architecture for either, not for both",
        "dynamic": "RoPE of type dynamic: llama.cpp 0.5.0 has no such RoPE",
        "longrope": "RoPE of type longrope: llama.cpp 0.5.0 reads no factors",
        "longrope-factor": "RoPE of type longrope: llama.cpp 0.5.0 reads no factors",
        # part of a head turns
        "glm": "RoPE of type longrope: llama.cpp 0.5.0 reads no factors",
        "phi-4-mini": "RoPE of type longrope: llama.cpp 0.5.0 reads no factors",
        "yarn-factor": "RoPE of type yarn with more than a factor: llama.cpp 0.5.0 was seen",
        "linear-sliding": "sliding windows beside RoPE that is stretched: llama.cpp 0.5.0",
    },
    "hub": {},
}
REFUSED["ollama"] = {
    kind: said.replace("llama.cpp 0.5.0", "Ollama with llama.cpp b10091")
    for kind, said in REFUSED["llamacpp"].items()
}
ALL = test_dense.KINDS | STRETCHED
WITH_SAID = {
    ("transformers4", "qwen3"): "generates without a cache",
    ("transformers4", "qwen3-tied"): "generates without a cache",
    ("transformers4", "mistral-sliding"): "windows in all layers: transformers 4.57.6 generates",
    ("transformers4", "linear-sliding"): "windows in all layers: transformers 4.57.6 generates",
}


def mixture(kind, router_input="token"):
    family, more = ALL[kind]
    config = {"model_type": family, **test_dense.SIZES, "vocab_size": 31, "rms_norm_eps": 1e-6}
    return Mixture.of(moe_config(config | more, 3, 1, router_input))


def of_olmo(number=2):
    config = {
        "model_type": f"olmo{number}",
        **test_dense.SIZES,
        "vocab_size": 31,
        "rms_norm_eps": 1e-6,
    }
    return Mixture.of(moe_config(config, 3, 1))


def test_the_verb_offers_what_the_table_has():
    assert set(PROGRAMS) == set(TARGETS) == set(REFUSED)
    assert all(name == target.name and target.version for name, target in TARGETS.items())


@pytest.mark.parametrize("name", REFUSED)
def test_just_what_a_program_gets_wrong_is_refused_by_name_and_version(name):
    refused = REFUSED[name]
    for kind in ALL:
        if kind not in refused:
            refuse_unservable(TARGETS[name], mixture(kind), "m")
            continue
        with pytest.raises(ServingError) as error:
            refuse_unservable(TARGETS[name], mixture(kind), "m")
        assert str(error.value).startswith("m: ") and refused[kind] in str(error.value)
        assert "use another program" in str(error.value) and "--for hub" in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_every_rule_is_about_a_kind_that_is_tried(name):
    for rule in TARGETS[name].rules:
        kinds = [mixture(kind) for kind in REFUSED[name]] + [of_olmo(3)]
        assert any(rule.holds(kind) for kind in kinds), rule.what
    kinds = [mixture(kind) for kind in ALL] + [of_olmo(), mixture("llama", "context")]
    for note in TARGETS[name].notes:
        assert any(note.holds(kind) for kind in kinds), note.what


def test_a_router_of_its_own_is_for_vllm_and_this_program():
    own = mixture("llama", "context")
    for name in ("hub", "vllm"):
        refuse_unservable(TARGETS[name], own, "m")
    known, price = notes_on(TARGETS["vllm"], own)
    assert "vLLM 0.32.0 knows it where nexus_ds is installed beside it" in known
    assert "running mean: vLLM 0.32.0 keeps two vectors of the hidden size more" in price
    with pytest.raises(ServingError, match="takes that width for a Qwen2-MoE's heads"):
        refuse_unservable(TARGETS["vllm"], mixture("llama-head-dim", "context"), "m")
    for name in sorted(set(TARGETS) - {"hub", "vllm"}):
        with pytest.raises(ServingError, match="a model of type 'nexus_moe' is unknown to") as e:
            refuse_unservable(TARGETS[name], own, "m")
        assert TARGETS[name].version in str(e.value) and "qwen2_moe, qwen3_next" in str(e.value)


def test_rope_by_kinds_of_layers_is_refused_before_its_kind_is_asked_for():
    """Of a form that vLLM was not run with, and of one that it might be said to take."""
    own = of_olmo(3)
    refuse_unservable(TARGETS["hub"], own, "m")
    with pytest.raises(ServingError, match="'nexus_olmo3' is unknown to vLLM"):
        refuse_unservable(TARGETS["vllm"], own, "m")
    wider = replace(TARGETS["vllm"], forms=(*TARGETS["vllm"].forms, "nexus_olmo3"))
    named = "RoPE that differs between kinds of layers: vLLM"
    with pytest.raises(ServingError, match=named):
        refuse_unservable(wider, own, "m")


def test_a_form_of_its_own_is_for_vllm_and_this_program():
    own = of_olmo()
    for name in ("hub", "vllm"):
        refuse_unservable(TARGETS[name], own, "m")
    [said] = notes_on(TARGETS["vllm"], own)
    assert "vLLM 0.32.0 knows it where nexus_ds is installed beside it" in said
    for name in sorted(set(TARGETS) - {"hub", "vllm"}):
        with pytest.raises(ServingError, match="a model of type 'nexus_olmo2' is unknown to"):
            refuse_unservable(TARGETS[name], own, "m")


def test_several_reasons_are_told_at_once():
    family, more = KINDS["dynamic"]
    ALL["both"] = family, more | {"head_dim": 12}
    with pytest.raises(ServingError, match="2 things to mend; nothing was written") as error:
        refuse_unservable(TARGETS["vllm"], mixture("both"), "m")
    del ALL["both"]
    assert "1. m: heads" in str(error.value) and "2. m: RoPE of type dynamic" in str(error.value)


def test_what_is_right_in_some_uses_is_said():
    for kind in ALL:
        said = " ".join(notes_on(TARGETS["transformers4"], mixture(kind)))
        assert WITH_SAID.get(("transformers4", kind), "") in said
        assert bool(said) == (("transformers4", kind) in WITH_SAID), kind
    [said] = notes_on(TARGETS["sglang"], mixture("llama"))
    assert "flashinfer_trtllm" in said and notes_on(TARGETS["vllm"], mixture("llama")) == []
    [said] = notes_on(TARGETS["vllm"], mixture("qwen3.5"))
    assert "linear attention: vLLM 0.32.0 keeps its state in bf16: start it with" in said
