"""What the verbs take: sizes as the verbs themselves find them, ways by the same rule, and
estimates that are followed."""

import argparse
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import moe_model, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.pieces import need_of
from nexus_ds.commands import evaluate, extend, generate
from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.planning import verbs as planning
from nexus_ds.planning.export import export_check
from nexus_ds.planning.layout import Machine
from nexus_ds.planning.memory import disk
from nexus_ds.planning.sizes import sizes_of
from nexus_ds.planning.verbs import assumed, need_of_sizes, verbs


def machine(memory, gpus=1, host=0.0):
    speeds = {"link": 1e9, "gpu_link": 1e9, "tflops": 100.0}
    return Machine(gpus=gpus, gpu_memory=memory, nodes=1, host_memory=host, **speeds)


def planned(memory, *overrides, gpus=1, host=0.0):
    config = load_config("nexus-2.8b", list(overrides))
    return verbs(config, sizes_of(config), machine(memory, gpus, host), 2, 1e9)


def of(found, name, model="mixture"):
    return next(verb for verb in found if (verb.name, verb.model) == (name, model))


def both_needs(directory, *overrides):
    """Return what `plan` counts of a checkpoint, and what `evaluate` finds in its files."""
    config = load_config("demo", [f"model.path={directory}", *overrides])
    counted = need_of_sizes(sizes_of(config), 4)
    return asdict(counted), asdict(need_of(directory, "fp32", torch.device("cuda")))


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_that_a_checkpoint_has(tmp_path, tied):
    out = tmp_path / "m"
    form = {"tie_word_embeddings": tied, "num_hidden_layers": 3}
    moe_model(save_tokenizer(out), experts=4, top_k=2, **form).save_pretrained(out)
    counted, read = both_needs(out)
    assert counted == pytest.approx(read)
    words = 4 * 16 * read["vocabulary"]
    assert read["resident"] == words + 4 * 16
    assert read["outside"] == read["resident"] + (0 if tied else words)


@pytest.mark.parametrize("kind", ["nexus_dir", "dense_dir", "context_dir"])
def test_sizes_of_every_kind_are_those_that_a_checkpoint_has(kind, request):
    directory = request.getfixturevalue(kind)
    stage = ["stage=seed"] if kind == "dense_dir" else []
    counted, read = both_needs(directory, *stage)
    assert counted == pytest.approx(read)


@pytest.mark.parametrize(("family", "scored"), [("gemma2", 2), ("gemma3_text", 0)])
def test_scores_count_where_no_fused_kernel_computes_them(family, scored, tmp_path):
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    config = AutoConfig.for_model(family, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    counted, read = both_needs(tmp_path, "stage=seed")
    assert counted == pytest.approx(read)
    assert read["score"] == scored * 12
    need = need_of(tmp_path, "fp32", torch.device("cuda"))
    alone = replace(need, score=0.0)
    assert need.working(3, 64) == alone.working(3, 64) + 3 * 64 * 64 * read["score"]


def test_a_shared_expert_of_zeros_is_computed(tmp_path):
    sizes = sizes_of(load_config("nexus-2.8b"))
    assert need_of_sizes(replace(sizes, shared=False), 2) == need_of_sizes(sizes, 2)


def test_at_24_gb_the_mixture_is_whole_and_the_extended_one_is_streamed():
    found = planned(24e9)
    whole, streamed = of(found, "evaluate"), of(found, "evaluate", "extended")
    assert whole.how == "whole" and 18.2e9 < whole.gpu_bytes < 21e9
    assert streamed.how == "layer by layer" and streamed.gpu_bytes < 6e9
    assert of(found, "generate", "extended").how == "layer by layer"
    assert of(planned(80e9), "evaluate", "extended").how == "whole"


def test_every_verb_that_touches_a_model_is_there_and_has_its_numbers():
    found = planned(24e9)
    names = {verb.name for verb in found}
    assert names == {
        "embed",
        "tokens",
        "upcycle",
        "export",
        "evaluate",
        "generate",
        "extend",
        "extend --verdict",
        "remove",
        "remove --data",
        "adopt",
    }
    for verb in found:
        assert verb.host_bytes > 0 and verb.seconds > 0 and verb.cpu_seconds > 0 and verb.sizes
    # written layer by layer: never a whole model in main memory
    assert all(of(found, name).host_bytes < 10e9 for name in ("upcycle", "export", "remove"))


def test_the_check_of_an_export_is_planned_once():
    """`plan` without --verbs tells the same of it."""
    sizes = sizes_of(load_config("nexus-2.8b"))
    check, verb = export_check(sizes, 2), of(planned(24e9), "export")
    assert verb.gpu_bytes == check.gpu_bytes
    assert verb.host_bytes == check.host_bytes + planning.TEXT_BYTES
    written = disk(sizes, 2, 0)["export"]
    assert verb.seconds == pytest.approx(check.seconds + written / planning.DISK_SPEED)


def test_more_gpus_score_faster_and_a_small_host_streams():
    one, eight = (of(planned(80e9, gpus=count), "evaluate") for count in (1, 8))
    assert eight.seconds < one.seconds
    assert of(planned(80e9, host=10e9), "evaluate").how == "layer by layer"


def test_main_memory_that_nobody_told_of_never_streams():
    """At some sizes what is loaded, over the margin and times the margin, is less than itself."""
    config = load_config("nexus-2.8b")
    for ffn in range(4096, 6144, 64):
        found = verbs(config, replace(sizes_of(config), layers=5, ffn=ffn), machine(200e9), 2, 1e9)
        assert of(found, "evaluate").how == of(found, "generate").how == "whole"


def test_without_a_gpu_main_memory_holds_the_model_in_fp32():
    sizes = sizes_of(load_config("nexus-2.8b"))
    need = need_of_sizes(sizes, 4)
    found = planned(24e9)
    assert of(found, "evaluate").cpu_bytes == planning.TEXT_BYTES + need.whole(8, 2048)
    small = planned(24e9, host=24e9)
    one = of(small, "generate").cpu_bytes
    assert need.outside + need.layer < one < 10e9
    # every token reads the files
    assert of(small, "generate").cpu_seconds > of(found, "generate").cpu_seconds
    assert of(small, "evaluate").cpu_seconds > of(found, "evaluate").cpu_seconds
    for verb in found:
        assert verb.cpu_bytes >= verb.host_bytes or verb.how == "whole"


def test_warm_starts_by_chunks_hold_their_states_in_main_memory():
    few = of(planned(24e9), "upcycle")
    many = of(planned(24e9, "router.warm_start=chunks"), "upcycle")
    # hidden states and what the router reads: 512 windows of 512 tokens of 4 domains, 2560 wide
    states = 2 * 512 * 512 * 4 * 2560 * 4
    assert states < many.host_bytes < states + 5e9
    # a layer in fp32 and the activations of 8 windows; no logits
    sizes = sizes_of(load_config("nexus-2.8b"))
    need = need_of_sizes(sizes, 4)
    assert many.gpu_bytes == need.layer + 8 * 512 * need.token < 4e9
    # few windows: what a router reads of them is on the GPU, and not in main memory
    tokens = load_config("nexus-2.8b").router.fit_windows * 512 * 4
    assert few.gpu_bytes == many.gpu_bytes + tokens * need.hidden
    words = sizes.vocabulary * 2560 * (2 + 4)
    projections = 4 * sizes.counts()["projection"]
    held = planning.TEXT_BYTES + projections + tokens * need.hidden + words
    assert few.host_bytes == held
    cold = of(planned(24e9, "router.warm_start=none"), "upcycle")
    assert "no text" in cold.sizes and cold.gpu_bytes == 0


def test_the_stage_extend_is_the_same_mixture_and_a_dense_one_is_refused():
    assert [verb.gpu_bytes for verb in planned(24e9, "stage=extend")] == [
        verb.gpu_bytes for verb in planned(24e9)
    ]
    with pytest.raises(ConfigError, match="plan --verbs is about a mixture, stage=seed is a dense"):
        planned(24e9, "stage=seed")


def test_plan_counts_with_the_sizes_that_verbs_take():
    parsers = {}
    for verb in (evaluate, extend, generate):
        parsers[verb] = argparse.ArgumentParser()
        verb.add_arguments(parsers[verb])
    found = planned(80e9)
    windows = of(found, "evaluate").sizes
    default = parsers[evaluate].get_default
    assert windows == f"4 x {default('windows')} windows of 2048, {default('batch')} at once"
    assert parsers[extend].get_default("windows") == default("windows")
    added = parsers[generate].get_default("tokens")
    assert of(found, "generate").sizes == f"{planning.PROMPT} tokens and {added} more"


@pytest.mark.parametrize("name", sorted(assumed()))
def test_every_estimate_changes_something(name, monkeypatch):
    def numbers():
        found = planned(24e9) + planned(80e9)
        keys = [field.name for field in fields(found[0])]
        return [getattr(verb, key) for verb in found for key in keys]

    before = numbers()
    monkeypatch.setattr(planning, name, getattr(planning, name) * 2)
    assert numbers() != before
