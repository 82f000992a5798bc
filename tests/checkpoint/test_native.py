"""A family's own model with Qwen2-MoE's blocks: registered, saved and loaded like any other."""

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ds.checkpoint.native import empty_dense, empty_mixture, mixture_classes
from nexus_ds.checkpoint.qwen2_moe import stored

CONFIG = dict(
    model_type="nexus_qwen3",
    vocab_size=31,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_experts=3,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    moe_intermediate_size=40,
    shared_expert_intermediate_size=40,
)


@torch.no_grad()
def test_the_auto_classes_load_what_was_saved(tmp_path):
    config_class, causal_class = mixture_classes("qwen3")
    values = {key: value for key, value in CONFIG.items() if key != "model_type"}
    torch.manual_seed(0)
    model = causal_class(config_class(**values)).eval()
    # a dense family's class does not draw the experts' stacks: nobody starts from a new one
    for weight in model.parameters():
        weight.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: entry.shape for name, entry in stored(CONFIG).items()}
    assert AutoConfig.from_pretrained(tmp_path).model_type == "nexus_qwen3"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(24)[None]
    found = loaded(tokens).logits
    assert torch.isfinite(found).all() and torch.equal(found, model(tokens).logits)


def test_empty_models_hold_no_weight():
    dense = empty_dense(CONFIG, False, torch.bfloat16)
    mixture = empty_mixture(CONFIG, False, torch.bfloat16)
    for model in (dense, mixture):
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        assert model.model.rotary_emb.inv_freq.device.type == "cpu"
        assert next(model.parameters()).dtype is torch.bfloat16
    assert not [name for name, _ in dense.named_parameters() if ".mlp." in name]
