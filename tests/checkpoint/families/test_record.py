"""The table of a family's tensors, held to an empty model of transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.dense_settings import settings
from nexus_ds.checkpoint.families.record import dense_weights
from nexus_ds.checkpoint.families.table import FAMILIES
from nexus_ds.checkpoint.views import file_shapes, origins

SIZES = dict(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_the_tensors_of_an_empty_model(family, tied):
    sizes = dict(SIZES, tie_word_embeddings=tied)
    # embeddings of padding must be among the few tokens
    sizes |= {"head_dim": 8} if family in ("ministral", "hunyuan_v1_dense") else {}
    sizes |= {"pad_token_id": 0} if FAMILIES[family].defaults.get("pad_token_id") else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    config = dict(model_type=family, **sizes)
    found = settings(config)
    table = dense_weights(found)
    assert file_shapes(origins(config, found), found) == expected
    assert {weight.part for name, weight in table.items() if ".mlp." not in name} == {""}
    assert all(weight.part for name, weight in table.items() if ".mlp." in name)
