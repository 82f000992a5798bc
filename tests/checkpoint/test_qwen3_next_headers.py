"""Norms of a Qwen3-Next in numpy: torch's bits; blocks of rows; what has another norm or a gate."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import qwen2_moe, qwen3_next_headers
from nexus_ds.checkpoint.qwen3_next_headers import NORMS, centred, centred_pair, head_is_tied
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError
from tests.checkpoint.test_dense import with_tensors
from tests.checkpoint.test_qwen3_next import SIZES, mixture

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16"}
STEPS = [2.0**-exponent for exponent in (7, 8, 9, 16, 23, 24, 25)]
"""To the neighbours in either dtype, to halves of that, and farther."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def centred_by_torch(weight_H):
    """The same arithmetic in torch, which rounds to the dtype by itself."""
    exact_H = weight_H.double()
    plain_H = (exact_H - 1).to(weight_H.dtype).double()
    _, exponent_H = torch.frexp(exact_H.abs())
    into_H = torch.ldexp(exact_H.sign(), exponent_H - 1)
    powers_H = torch.where(plain_H + 1 == exact_H, torch.ones_like(into_H), into_H)
    stored_H = exact_H / powers_H - 1
    return stored_H.to(weight_H.dtype), powers_H.to(weight_H.dtype)


def error_by_torch(weight_D, power, dtype):
    kept_D = (weight_D * power - 1).to(dtype).double() + 1
    return (kept_D / power - weight_D).abs() / weight_D.abs().clamp_min(1e-30)


def pair_by_torch(query_D, key_D):
    dtype, q_D, k_D = query_D.dtype, query_D.double(), key_D.double()
    powers = [2.0**exponent for exponent in range(-8, 9)]
    errors = []
    for power in powers:
        of_query, of_key = (
            error_by_torch(w, s, dtype) for w, s in ((q_D, power), (k_D, 1 / power))
        )
        first, second = torch.maximum(of_query, of_key).chunk(2)
        errors.append(torch.maximum(first, second))
    best = torch.stack(errors).argmin(0)
    power_D = torch.tensor(powers, dtype=torch.float64)[best].repeat(2)
    return (q_D * power_D - 1).to(dtype), (k_D / power_D - 1).to(dtype)


def check_bits(found, expected):
    """Hold numbers of numpy to a tensor's, bit by bit: minus zero is another than zero."""
    numbers = expected.float().numpy()
    np.testing.assert_array_equal(found, numbers)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(numbers))
    assert found.dtype == np.float32


def every_half():
    """Return all numbers that bf16 has, infinities and NaN among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    return bits.to(torch.int16).view(torch.bfloat16)


def neighbours():
    """Return fp32 beside powers of two, of either sign, and what is 1 away from these."""
    multiples = torch.arange(-20, 21, dtype=torch.float64)
    beside = torch.cat([1 + multiples * step for step in STEPS])
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    near = torch.outer(powers, beside).flatten().float()
    return torch.cat([near, -near, 1 + near, near - 1])


def any_bits():
    drawn = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (300_000,), dtype=torch.int32, generator=drawn)
    return bits.view(torch.float32)


@pytest.mark.parametrize("values", [every_half, neighbours, any_bits])
@pytest.mark.parametrize("dtype", KINDS, ids=KINDS.values())
def test_what_is_centred_has_the_bits_of_torch(values, dtype):
    """float64 becomes bf16 by way of fp32, as in torch."""
    weight_H = values().to(dtype)
    found = centred(weight_H.float().numpy(), KINDS[dtype])
    for one, expected in zip(found, centred_by_torch(weight_H), strict=True):
        # where the weight is NaN or infinite there is no power, nor anything to keep
        real = torch.isfinite(weight_H)
        check_bits(one[real.numpy()], expected[real])


def test_rounding_twice_is_what_torch_does_too():
    """1 + 2^-8 + 2^-40 lies above the middle of two bf16, its fp32 on it."""
    exact = np.array([1 + 2.0**-8 + 2.0**-40])
    held = qwen3_next_headers.rounded(exact.astype(np.float32), "BF16")
    assert held == torch.from_numpy(exact).bfloat16().float().numpy() == 1.0


@pytest.mark.parametrize("dtype", KINDS, ids=KINDS.values())
def test_pairs_have_the_bits_of_torch(dtype):
    drawn = torch.Generator().manual_seed(0)
    odd, found = torch.cat([neighbours(), every_half().float()]), []
    odd = odd[torch.isfinite(odd)]
    for width in (2, 12, 64, 128, 50_000):
        # as after training: most near 1, some negative, some zero
        usual = torch.exp(torch.randn(2, width, generator=drawn) * 0.8)
        usual[:, ::7] *= -1
        usual[:, 1] = 0.0
        rare = odd[torch.randint(len(odd), (2, width), generator=drawn)]
        found += [usual.to(dtype), rare.to(dtype)]
    for query_D, key_D in found:
        numbers = (one.float().numpy() for one in (query_D, key_D))
        stored = centred_pair(*numbers, KINDS[dtype])
        for one, expected in zip(stored, pair_by_torch(query_D, key_D), strict=True):
            check_bits(one, expected)


@pytest.mark.parametrize("dtype", KINDS, ids=KINDS.values())
def test_centred_norms_lose_no_bit(dtype):
    weight = torch.randn(4096, generator=torch.Generator().manual_seed(0)) ** 3 * 4
    weight[:3] = torch.tensor([0.0, -1.25, 0.1])
    weight = weight.to(dtype).double().numpy()
    stored, powers = centred(weight.astype(np.float32), KINDS[dtype])
    assert ((1 + stored.astype(np.float64)) * powers == weight).all()
    assert (np.exp2(np.log2(np.abs(powers)).round()) == np.abs(powers)).all()
    # what can stay does: only channels that would lose bits take a power
    assert powers[:3].tolist() == [1.0, 1.0, 0.0625]


@pytest.fixture(scope="module")
def out(tmp_path_factory, dense_dir):
    """A mixture in bf16 with tied embeddings."""
    root = tmp_path_factory.mktemp("qwen3-next")
    mixture(root, dense_dir, "qwen3", SIZES | {"tie_word_embeddings": True}, "bf16", 1)
    return root / "out"


def test_blocks_end_anywhere(out, monkeypatch):
    """Within a head, at its end, behind the gate: the bytes are the same."""
    _, reader = qwen2_moe.open_moe(out)
    whole = {name: b"".join(reader.chunks(name)) for name in reader.names()}
    for rows in (1, 5, 12, 13):
        monkeypatch.setattr(qwen3_next_headers, "BLOCK", rows * SIZES["hidden_size"])
        assert whole == {name: b"".join(reader.chunks(name)) for name in reader.names()}


@pytest.mark.parametrize("rows", [1, 12, 512])
@pytest.mark.parametrize("head", [0, 3])
def test_every_heads_gate_is_looked_at(out, tmp_path, monkeypatch, head, rows):
    first = (2 * head + 1) * SIZES["head_dim"]
    odd = with_tensors(out, tmp_path / "odd", lambda t: t[Q_PROJ][first + 5].add_(0.5))
    monkeypatch.setattr(qwen3_next_headers, "BLOCK", rows * SIZES["hidden_size"])
    with pytest.raises(CheckpointError, match=r"output gate in .*q_proj.weight is not zero"):
        list(qwen2_moe.open_moe(odd)[1].chunks(Q_PROJ))


@pytest.mark.parametrize("edit", [torch.Tensor.float, lambda norm: norm[1:]])
def test_norms_of_another_kind_than_the_models_are_named(out, tmp_path, edit):
    odd = with_tensors(out, tmp_path / "odd", lambda tensors: None)
    own = load_file(odd / NORMS)
    save_file(own | {NORM: edit(own[NORM]).contiguous()}, odd / NORMS)
    _, reader = qwen2_moe.open_moe(odd)
    for name in (NORM, Q_PROJ):
        with pytest.raises(CheckpointError, match=f"{NORM} is not that of {NORMS}"):
            list(reader.chunks(name))


def test_a_copy_of_the_embeddings_is_known(out, tmp_path):
    assert head_is_tied(out, out)
    odd = with_tensors(out, tmp_path / "odd", lambda t: t["lm_head.weight"][30, 31:].add_(0.5))
    assert not head_is_tied(odd, out)


def test_what_is_overwritten_is_read_back(out, tmp_path):
    """A router's rows by the norm's powers, an output projection by its factor."""
    copy = with_tensors(out, tmp_path / "copy", lambda tensors: None)
    reader = TensorReader.of(qwen2_moe.open_moe(copy)[1])
    for name in (qwen2_moe.gate_name(1), O_PROJ):
        fresh = torch.randn(reader.info(name).shape).bfloat16()
        reader.overwrite(name, fresh)
        assert torch.equal(reader.read(name), fresh)
        assert not torch.equal(TensorReader(copy).read(name), fresh)
