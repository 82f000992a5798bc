"""The table of settings: what each may be, and what is treated unlike the others."""

import dataclasses
import typing

import pytest

from nexus_ds.config import load_config
from nexus_ds.errors import ConfigError
from nexus_ds.settings import SETTINGS, Changes, Config, Scope, that_change

# With the decisions written down a second time, a change of one is a change of two lines.
CHANGES = {
    "course": """
        seed model.dtype data.sequence_length router.lr_scale router.load_balance router.z_loss
        training.tokens training.steps training.batch_size training.lr training.final_lr
        training.backbone_lr_scale training.shared_lr_scale
        training.freeze_old_experts
        training.warmup training.schedule training.anneal_tokens training.anneal_lr
        training.weight_decay training.beta1 training.beta2 training.clip
        training.eval_windows
    """,
    "new model": """
        model.hidden_size model.layers model.heads model.kv_heads model.ffn_size
        model.max_positions model.rope_theta model.tied_embeddings
    """,
    "execution": """
        training.micro_batch_size training.activation_checkpointing training.eval_every
        training.save_every training.gradient_dtype training.loss_kernel
        training.layer_kernels
        parallel.expert parallel.zero_stage parallel.grouped_mm
        pipeline.card model.license
    """,
    "nothing": """
        pipeline.parallel_branches data.workers training.log_every training.keep_last
        training.bad_batches
        parallel.timeout_minutes parallel.check_memory
    """,
}
RUN = """
    seed pipeline.* model.* router.* data.path data.max_bytes data.sequence_length data.on_bad_row
    data.workers data.bos data.chat
"""
STAGE = "model.path model.tokenizer"


def leaves(values, prefix=""):
    for entry in dataclasses.fields(values):
        value, key = getattr(values, entry.name), prefix + entry.name
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key


def test_every_setting_has_a_row_with_both_decisions():
    assert list(SETTINGS) == list(leaves(Config()))
    for key, rule in SETTINGS.items():
        assert rule.changes in typing.get_args(Changes), key
        assert rule.scope in typing.get_args(Scope), key


@pytest.mark.parametrize("changes", CHANGES)
def test_what_a_setting_changes(changes):
    assert set(that_change(changes)) == set(CHANGES[changes].split())


def test_what_holds_for_a_whole_run():
    shared = RUN.split()
    expected = {
        key
        for key in SETTINGS
        if (key in shared or f"{key.partition('.')[0]}.*" in shared) and key not in STAGE.split()
    }
    assert {key for key, rule in SETTINGS.items() if rule.scope == "run"} == expected


def test_defaults_keep_their_own_rules_and_are_not_shared():
    config = Config()
    config.training.steps = 1
    Config().pipeline.domains.append("other")
    assert Config().pipeline.domains == []
    for key, rule in SETTINGS.items():
        assert not rule.choices or load_config("demo", [f"{key}={rule.choices[0]}", "branch=x"])


@pytest.mark.parametrize("key", [key for key, rule in SETTINGS.items() if rule.choices])
def test_a_word_that_is_none_of_the_choices_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: unknown value 'zzz'; known: "):
        load_config("demo", [f"{key}=zzz"])


@pytest.mark.parametrize("key", [key for key, rule in SETTINGS.items() if rule.positive])
def test_a_number_that_has_to_be_above_zero(key):
    with pytest.raises(ConfigError, match=f"{key}: expected a number above 0, found 0"):
        load_config("demo", [f"{key}=0"])


@pytest.mark.parametrize("key", [key for key, rule in SETTINGS.items() if rule.between])
def test_a_number_out_of_its_bounds(key):
    least, most = SETTINGS[key].between
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=rf"{key}: expected a number in \[{least}, {most}\]"):
            load_config("demo", [f"{key}={value}"])
