"""What is summed of losses and routing: per domain, per expert, over layers and passes."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_ds.runtime.tally import Tally


def passed(selected, gate, balance, z):
    """Return a layer that routed tokens so."""
    seen = SimpleNamespace(
        selected_TK=torch.tensor(selected),
        gate_T1=torch.tensor(gate),
        load_balance=torch.tensor(balance),
        z=None if z is None else torch.tensor(z),
    )
    return SimpleNamespace(router=SimpleNamespace(latest=seen))


def test_a_tally_keeps_domains_and_experts_apart():
    """Two sequences of three tokens, of domain 2 and domain 0; two layers, top-1; three experts."""
    tally = Tally(3, 3, torch.device("cpu"))
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 7.0]])
    first = passed([[0], [1], [1], [2], [2], [2]], [0.5, 0.75, 0.25, 0.5, 0.5, 0.5], 1.5, 0.25)
    second = passed([[1], [1], [1], [2], [0], [0]], [1.0, 1.0, 1.0, 1.0, 0.5, 0.5], 2.5, 0.75)
    tally.add(losses, torch.tensor([2, 0]), [first, second])
    names, experts = ["a", "b", "c"], ["x", "y", "z"]
    assert tally.losses(names) == {"a": 5.0, "c": 2.0}
    assert tally.mean_loss() == 3.5
    routing = tally.routing(names, experts)
    assert routing == {
        "a": pytest.approx({"x": 2 / 6, "y": 0, "z": 4 / 6}),
        "c": pytest.approx({"x": 1 / 6, "y": 5 / 6, "z": 0}),
    }
    assert asdict(tally.router()) == pytest.approx(
        {
            "load_balance": 2.0,
            "z": 0.5,
            "gate": (0.5 + 5 / 6) / 2,
            "load_min": 3 / 12,
            "load_max": 5 / 12,
        }
    )
    tally.add(torch.full((1, 3), 11.0), torch.tensor([0]), [passed([[1]] * 3, [0.5] * 3, 3.5, 1.0)])
    assert tally.losses(names) == {"a": 8.0, "c": 2.0}
    assert tally.routing(names, experts)["a"] == pytest.approx({"x": 2 / 9, "y": 3 / 9, "z": 4 / 9})
    assert tally.router().load_balance == pytest.approx(2.5)


def test_losses_are_means_over_what_is_learned():
    tally = Tally(3, 0, torch.device("cpu"))
    losses = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    learned = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    tally.add(losses, torch.tensor([2, 0, 2]), [], learned)
    assert tally.losses(["a", "b", "c"]) == {"c": 3.0} and tally.mean_loss() == 3.0


def test_a_z_loss_that_no_router_computed_has_no_number():
    tally = Tally(1, 2, torch.device("cpu"))
    tally.add(torch.ones(1, 2), torch.tensor([0]), [passed([[0], [1]], [0.5, 0.5], 1.0, None)])
    assert tally.router().z is None and tally.router().load_balance == 1.0


def test_a_tally_counts_both_choices_of_a_token():
    tally = Tally(2, 4, torch.device("cpu"))
    chosen = [[0, 3], [3, 1], [2, 0], [2, 3]]
    tally.add(torch.ones(2, 2), torch.tensor([1, 0]), [passed(chosen, [0.5] * 4, 1.0, 1.0)])
    routing = tally.routing(["a", "b"], list("wxyz"))
    assert routing["b"] == {"w": 0.25, "x": 0.25, "y": 0.0, "z": 0.5}
    assert routing["a"] == {"w": 0.25, "x": 0.0, "y": 0.5, "z": 0.25}


def test_a_tally_of_a_dense_model_has_no_routing():
    tally = Tally(2, 0, torch.device("cpu"))
    tally.add(torch.ones(1, 4), torch.tensor([1]), [])
    assert tally.losses(["a", "b"]) == {"b": 1.0}
    assert tally.router() is None and tally.routing(["a", "b"], []) == {}


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def operations(layers):
    """Return the operations with which a tally adds a pass through so many layers."""
    tally = Tally(2, 4, torch.device("cpu"))
    routed = passed([[0, 3], [3, 1], [2, 0], [2, 3]], [0.5] * 4, 1.0, 1.0)
    with Operations() as noted:
        tally.add(torch.ones(2, 2), torch.tensor([1, 0]), [routed] * layers)
    return noted.names


def test_nothing_is_added_at_an_index():
    """On a GPU that is atomic: slow where a batch of tokens meets in a few cells, and in no certain
    order."""
    added = [name for name in operations(3) if "scatter" in name or "index" in name]
    assert not added


def test_a_layer_more_costs_two_operations_and_views():
    views = {"view", "_unsafe_view", "unsqueeze", "select", "slice", "alias"}
    one, three = ([n for n in operations(k) if n not in views] for k in (1, 3))
    assert (len(three) - len(one)) / 2 <= 2


def test_sums_stay_exact_beyond_what_fp32_counts():
    """As many tokens as fp32 counts are there already; then losses without a sum in fp32."""
    tally = Tally(1, 2, torch.device("cpu"))
    tally.tokens_D += 2.0**24
    tally.routed_DE += 2.0**24
    losses = torch.full((1, 3), 1 + 2.0**-23)
    tally.add(losses, torch.tensor([0]), [passed([[1]] * 3, [0.5] * 3, 1.0, 1.0)])
    assert tally.tokens_D.tolist() == [2.0**24 + 3]
    assert tally.routed_DE.tolist() == [[2.0**24, 2.0**24 + 3]]
    assert tally.loss_D.tolist() == [3 * (1 + 2.0**-23)]


def test_a_loss_that_is_no_number_stays_its_own_domains():
    tally = Tally(2, 0, torch.device("cpu"))
    tally.add(torch.tensor([[torch.inf], [2.0]]), torch.tensor([1, 0]), [])
    assert tally.losses(["a", "b"]) == {"a": 2.0, "b": torch.inf}
