"""The oracle: a Nexus model in plain PyTorch, written from the paper and from the files, with
nothing of nexus_ds in it.

    y = E_0(x) + sum over the top-k of p_i E_i(x),   p = softmax(x e_1, ..., x e_n),   e_i = W_2
    swiglu(W_1 d_i)

Attention, norms and embeddings are those of stock transformers; every feed-forward block is
replaced. Parameters have the names that they have under DeepSpeed. One process, all experts.
Shapes: B batch, S sequence, T = B*S tokens, E routed experts, K chosen, H hidden, F inner width, M
domain embedding.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DISK = "model.layers.{}.mlp."


class FeedForward(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(linear, weights)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


def domain_inputs(tensors, centre):
    """What P reads [E, M]: the domains' vectors, or these normalised, less their centre, and
    normalised again."""
    vectors = tensors["vectors"].float()
    if not centre:
        return vectors
    moved = vectors / vectors.norm(dim=-1, keepdim=True) - tensors["centre"].float()
    return moved / moved.norm(dim=-1, keepdim=True)


class Projection(nn.Module):
    """P: the paper's two maps with SwiGLU in between; with `log_norm`, rows of one length behind
    one more map."""

    def __init__(self, weights):
        super().__init__()
        self.maps = nn.ModuleList(linear(weights[f"maps.{index}.weight"]) for index in range(2))
        self.log_norm = nn.Parameter(weights["log_norm"].clone()) if "log_norm" in weights else None
        self.out = linear(weights["out.weight"]) if "log_norm" in weights else None

    def forward(self, d_EM):
        a, b = self.maps[0](d_EM).chunk(2, dim=-1)
        embeddings_EH = self.maps[1](F.silu(a) * b)
        if self.log_norm is None:
            return embeddings_EH
        unit_EH = embeddings_EH.float() / embeddings_EH.float().norm(dim=-1, keepdim=True)
        return self.out((unit_EH * self.log_norm.float().exp()).to(embeddings_EH.dtype))


class Router(nn.Module):
    """Rows P(D), or free ones; reads tokens, or with `mean` the running mean of a text's hidden
    states."""

    def __init__(self, projection, inputs_EM, gate, mean):
        super().__init__()
        self.projection, self.gate = projection, gate
        self.mean = None if mean is None else nn.Parameter(mean.clone())
        self.register_buffer("domain_inputs", inputs_EM, persistent=False)

    def rows(self, dtype):
        return (
            self.gate.weight
            if self.projection is None
            else self.projection(self.domain_inputs.to(dtype))
        )

    def read(self, x_BSH):
        if self.mean is None:
            return x_BSH.flatten(0, 1)
        means = [x_BSH[:, : end + 1].float().mean(1) for end in range(x_BSH.shape[1])]
        mean_TH = torch.stack(means, dim=1).flatten(0, 1)
        scaled_TH = mean_TH / (mean_TH.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (scaled_TH - self.mean.float()).to(x_BSH.dtype)


class Experts(nn.Module):
    """Stacked as DeepSpeed stacks them: w1 gate, w3 up [E, F, H], w2 down [E, H, F]."""

    def __init__(self, w1, w2, w3):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.stack(weights)) for weights in (w1, w2, w3))

    def forward(self, x, expert):
        return F.linear(F.silu(x @ self.w1[expert].T) * (x @ self.w3[expert].T), self.w2[expert])


def load_balancing(p_TE, chosen_TK):
    """E * sum_i f_i P_i (Switch Transformer): f_i the share of all assignments, a constant; P_i the
    mean probability."""
    experts = p_TE.shape[1]
    share_E = torch.stack([(chosen_TK == expert).float().mean() for expert in range(experts)])
    return experts * (share_E * p_TE.mean(dim=0)).sum()


def z_loss(logits_TE):
    """Mean over tokens of (log sum exp)^2 (ST-MoE)."""
    return logits_TE.float().exp().sum(dim=-1).log().square().mean()


class Carry(torch.autograd.Function):
    """Hands a tensor on; its backward pass gives a loss the gradient `scale`, in a recomputed pass
    too."""

    @staticmethod
    def forward(ctx, tensor, loss, scale):
        ctx.scale = scale
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.tensor(ctx.scale, device=gradient.device), None


class Layer(nn.Module):
    """One layer: [B, S, H] -> [B, S, H]; `auxiliary` is the weighted sum of its losses in the last
    pass.

    Their gradient comes with that of the output, `loss_scale` times; with 0 the caller adds
    `auxiliary` to his own loss.
    """

    def __init__(self, router, experts, shared_experts, top_k, coefficients):
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.top_k, self.load_balance, self.z_loss = (
            top_k,
            coefficients.load_balance,
            coefficients.z_loss,
        )
        self.selected, self.gate, self.auxiliary, self.loss_scale = None, None, None, 1.0

    def forward(self, x_BSH):
        x_TH = x_BSH.flatten(0, 1)
        logits_TE = F.linear(self.router.read(x_BSH), self.router.rows(x_TH.dtype))
        p_TE = logits_TE.float().softmax(dim=-1)
        gate_TK, self.selected = p_TE.topk(self.top_k, dim=-1)
        self.auxiliary = self.load_balance * load_balancing(
            p_TE, self.selected
        ) + self.z_loss * z_loss(logits_TE)
        if self.auxiliary.requires_grad:
            gate_TK = Carry.apply(gate_TK, self.auxiliary, self.loss_scale)
        self.gate = gate_TK.to(x_TH.dtype)  # transformers rounds the gate to the model's precision
        y_TH = self.shared_experts(x_TH)
        for expert in range(p_TE.shape[1]):
            token, slot = torch.where(self.selected == expert)
            y_TH = y_TH.index_add(
                0, token, self.experts(x_TH[token], expert) * self.gate[token, slot, None]
            )
        return y_TH.view_as(x_BSH)


def _layer(disk, router_file, record, index, dtype, coefficients):
    """Read one layer; a stock Qwen2-MoE halves the shared expert (sigmoid of ~0), so its down_proj
    is doubled on disk."""
    prefix = DISK.format(index)

    def ffn(place):
        return [
            disk[f"{prefix}{place}.{part}.weight"].to(dtype)
            for part in ("gate_proj", "up_proj", "down_proj")
        ]

    gate, up, down = zip(
        *(ffn(f"experts.{expert}") for expert in range(len(router_file["vectors"]))), strict=True
    )
    shared = ffn("shared_expert")
    inside = f"layers.{index}."
    weights = {
        n.removeprefix(inside): t.to(dtype) for n, t in router_file.items() if n.startswith(inside)
    }
    nexus, mean = record["kind"] == "nexus", disk.get(f"{prefix}gate.mean")
    router = Router(
        Projection(weights) if nexus else None,
        domain_inputs(router_file, record["centre"]) if nexus else None,
        None if nexus else linear(disk[f"{prefix}gate.weight"].to(dtype)),
        None if mean is None else mean.to(dtype),
    )
    return Layer(
        router,
        Experts(gate, down, up),
        FeedForward([*shared[:2], shared[2] / 2]),
        record["top_k"],
        coefficients,
    )


def load(directory, dtype, coefficients):
    """Return the model of a Nexus checkpoint; `coefficients` has load_balance and z_loss."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    directory = Path(directory)
    record = json.loads((directory / "nexus.json").read_text())["router"]
    assert (record["projection"] == "swiglu" and record["depth"] == 2) or record[
        "kind"
    ] == "linear", "not the paper's P"
    values = json.loads((directory / "config.json").read_text()) | {"model_type": "qwen2_moe"}
    model = Qwen2MoeForCausalLM.from_pretrained(
        directory, config=Qwen2MoeConfig(**values), dtype=dtype
    )
    disk = {
        n: t
        for path in sorted(directory.glob("model*.safetensors"))
        for n, t in load_file(path).items()
    }
    router_file = load_file(directory / "nexus" / "nexus_router.safetensors")
    for index, block in enumerate(model.model.layers):
        block.mlp = _layer(disk, router_file, record, index, dtype, coefficients)
    return model


def losses(model, tokens_BS):
    """Return the mean cross-entropy of the next tokens of windows [B, S+1], and the sum of the
    layers' own losses."""
    logits = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits.float()
    log_p = logits.log_softmax(-1).gather(-1, tokens_BS[:, 1:, None])
    return -log_p.mean(), sum(layer.mlp.auxiliary for layer in model.model.layers)


def adamw(masters, training, lr_scale):
    """Return AdamW on `masters` (by name): matrices decayed, vectors and the router not, the router
    at its own rate."""

    def group(names, decay, lr):
        return {"params": [masters[name] for name in names], "weight_decay": decay, "lr": lr}

    router = [name for name in masters if ".mlp.router." in name]
    rest = [name for name in masters if name not in router]
    vectors = [name for name in rest if name.endswith(("norm.weight", "bias"))]
    groups = [
        group([name for name in rest if name not in vectors], training.weight_decay, training.lr),
        group(vectors, 0.0, training.lr),
        group(router, 0.0, training.lr * lr_scale),
    ]
    return torch.optim.AdamW(groups, betas=(training.beta1, training.beta2), eps=1e-8)
