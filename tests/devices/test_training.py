"""A training step on a pretend GPU: values as on the CPU, one device, and how often the host waits.

From the tokens of a micro-batch to the gradients, with the loss head and the sums that are logged;
then the loop around it and a validation. What ZeRO does is left out: DeepSpeed's optimizers lay
parameters into one storage, which tensors that wrap others don't have; what they need of a model is
that parameters and buffers are on the device (tests/runtime/test_deepspeed_internals.py).
"""

from types import SimpleNamespace

import deepspeed.comm
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_linear, make_nexus
from deepspeed.moe import ep_kernels
from pretend import GPU, TwoDevices, gpu, module_to_gpu, on_device, to_gpu, unwatched, values

from nexus_ds.checkpoint.build import load_stock
from nexus_ds.data.mixture import Sample
from nexus_ds.model.head import next_token_loss, use_loss_head
from nexus_ds.runtime import deepspeed_internals as internals
from nexus_ds.runtime.attention import attend_whole_windows
from nexus_ds.runtime.bad_batches import BadBatches
from nexus_ds.runtime.engine import Batch, moe_layers
from nexus_ds.runtime.loop import Run
from nexus_ds.runtime.nexus_moe import Placement
from nexus_ds.runtime.parallel_model import load_nexus
from nexus_ds.runtime.tally import Tally
from nexus_ds.settings import Config, RouterConfig

CONTEXT = {"router_input": "context", "row_norm": "fixed"}
LAYERS = 2
TOKENS = torch.randint(31, (4, 13), generator=torch.Generator().manual_seed(3))
DOMAINS = torch.tensor([2, 0, 1, 0])
# What the host waits for in a pass forward and backward, by layer.
LOOP = {"experts.forward: to host": LAYERS}  # counts of rows: the loop over experts is the host's
SPLIT = {"auto_ep_layer._split_plan_from_expert_counts: to host": LAYERS}  # rows for each rank


@pytest.fixture(autouse=True)
def rank(monkeypatch):
    """This rank computes on the pretend GPU."""
    monkeypatch.setattr(internals, "on_cpu", lambda: False)
    monkeypatch.setattr(internals, "device", lambda: GPU)


@pytest.fixture
def triton(monkeypatch):
    """Stands for DeepSpeed's kernel of a GPU that says which row goes where; nobody waits for it.

    Without Triton DeepSpeed asks the device for every number, three an expert.
    """

    def fill(counts, starts, places, *sizes):
        assert all(map(on_device, (counts, starts, places)))
        with unwatched():
            found = ep_kernels.fill_indices_cpu(*map(values, (counts, starts, places)), *sizes)
        return to_gpu(found)

    monkeypatch.setattr(ep_kernels, "fill_indices_wrapper", fill)


def mixture(tmp_path, kind="token", grouped=False, ranks=1):
    """Return a mixture for training, on the CPU; grouped products want bf16."""
    form = CONTEXT if kind == "context" else {}
    make = make_linear if kind == "linear" else make_nexus
    checkpoint = make(tmp_path / f"{kind}-{grouped}", top_k=2, **form)
    dtype = torch.bfloat16 if grouped else torch.float32
    losses = RouterConfig(load_balance=0.1, z_loss=0.01)
    return prepared(load_nexus(checkpoint, dtype, Placement(3, ranks), losses, grouped))


def prepared(model):
    """Do what start_engine does before it hands a model to DeepSpeed."""
    use_loss_head(model)
    attend_whole_windows(model)
    return model.train()


def passes(model, device):
    """Pass forward and backward, sum up what is logged; return the sums."""
    tokens, domains = TOKENS.to(device), DOMAINS.to(device)
    layers = moe_layers(model)
    tally = Tally(3, 3 if layers else 0, device)
    loss, losses_BS = next_token_loss(model, tokens)
    tally.add(losses_BS, domains, layers)
    loss.backward()
    return tally


def on_both(model):
    """Return the waits of a pass on the GPU, whose results are those of the CPU.

    In bf16 a token between two experts may take the other one, so that only the loss is compared.
    """
    expected = passes(model, torch.device("cpu"))
    gradients = [parameter.grad for parameter in model.parameters()]
    module_to_gpu(model)
    with gpu() as watch:
        found = passes(model, GPU)
    exact = next(model.parameters()).dtype == torch.float32
    tolerance = 1e-6 if exact else 1e-2
    torch.testing.assert_close(values(found.loss_D), expected.loss_D, rtol=tolerance, atol=1e-4)
    if exact:
        torch.testing.assert_close(values(found.routed_DE), expected.routed_DE)
        torch.testing.assert_close(values(found.router_4), expected.router_4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert on_device(parameter.grad)
        if exact:
            torch.testing.assert_close(values(parameter.grad), gradient, rtol=1e-4, atol=1e-6)
    # The pass's own two copies stand for those of the loop, which are looked at below.
    assert watch.waits.pop("test_training.passes: to device") == 2
    return dict(watch.waits)


@pytest.mark.parametrize("kind", ["token", "context", "linear"])
def test_a_pass_of_a_mixture_with_the_loop_over_experts(tmp_path, kind):
    assert on_both(mixture(tmp_path, kind)) == LOOP


@pytest.mark.parametrize("kind", ["token", "context", "linear"])
def test_a_pass_of_a_mixture_with_grouped_products_waits_for_nothing(tmp_path, triton, kind):
    assert on_both(mixture(tmp_path, kind, grouped=True)) == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_waits_as_often_again(tmp_path, reentrant):
    model = mixture(tmp_path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert on_both(model) == {wait: 2 * times for wait, times in LOOP.items()}


def test_a_pass_of_a_dense_model_waits_for_nothing(dense_dir):
    assert on_both(prepared(load_stock(dense_dir, torch.float32))) == {}


def test_logits_of_all_tokens_beside_the_loss_head(dense_dir):
    """As the export asks for them."""
    model = module_to_gpu(prepared(load_stock(dense_dir, torch.float32)))
    with gpu() as watch, torch.no_grad():
        assert on_device(model(input_ids=to_gpu(TOKENS), use_cache=False).logits)
    assert not watch.waits


def left_behind(model, name):
    """Return a model on the GPU whose buffers of this name are still the host's."""
    module_to_gpu(model)
    for module in model.modules():
        if name in module._buffers:
            module._buffers[name] = values(module._buffers[name])
    return model


def test_a_buffer_left_on_the_host_is_seen(tmp_path):
    """What the tests above are worth: DeepSpeed leaves those of a partitioned model there."""
    with gpu(), pytest.raises(TwoDevices):
        passes(left_behind(mixture(tmp_path), "domain_inputs"), GPU)


def test_the_angles_of_positions_left_on_the_host_are_waited_for_in_every_pass(tmp_path):
    """transformers copies them where they are needed, so that nothing fails."""
    model = left_behind(mixture(tmp_path), "inv_freq")
    with gpu() as watch:
        passes(model, GPU)
    assert watch.waits["modeling_qwen2_moe.forward: to device"] == 1


# Expert parallelism -------------------------------------------------------------------------------


def mirrored(output, rows, output_split_sizes=None, input_split_sizes=None, group=None, **how):
    """Stand for an all-to-all with a second rank that has the same tokens.

    It sends what this rank sends to itself. What its experts make of this rank's rows is not known
    here: zeros. So shapes and devices are those of two ranks, and values are not.
    """
    assert on_device(output) and on_device(rows), "NCCL takes tensors of its device alone"
    own = output_split_sizes[0] if output_split_sizes else len(output) // 2
    output.zero_()
    output[:own].copy_(rows[:own])
    other = output[own:]
    if len(other) <= own or output_split_sizes is None:
        other.copy_(rows[: len(other)])
    return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_pass_over_two_ranks_waits_once_a_layer_for_the_rows_of_each(
    tmp_path, monkeypatch, triton, grouped
):
    """Two real ranks are tests/runtime/test_parity.py's; gloo would take tensors of the host."""
    monkeypatch.setattr(dist, "all_to_all_single", mirrored)
    monkeypatch.setattr(deepspeed.comm, "all_to_all_single", mirrored)
    model = mixture(tmp_path, grouped=grouped, ranks=2)
    for layer in moe_layers(model):
        layer.ep_group = "of two"
    module_to_gpu(model)
    with gpu() as watch:
        passes(model, GPU)
    assert all(on_device(parameter.grad) for parameter in model.parameters())
    assert watch.waits.pop("test_training.passes: to device") == 2
    assert dict(watch.waits) == SPLIT | ({} if grouped else LOOP)


# The loop -----------------------------------------------------------------------------------------


class Engine:
    """Stands for DeepSpeed's: passes go to the model, a step forgets the gradients.

    DeepSpeed waits in its own step for the gradients' norm and for whether they overflowed.
    """

    def __init__(self, model):
        self.module, self.device, self.made = model, GPU, []
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def train(self):
        self.module.train()

    def eval(self):
        self.module.eval()

    def backward(self, loss):
        loss.backward()

    def step(self):
        """Note what the loop has made for the next pass already."""
        self.made.append(self.run.ahead and self.run.ahead[:2])
        self.module.zero_grad()

    def get_global_grad_norm(self):
        return 1.0


class Samples:
    """Sample n is a window of the n-th domain and following numbers."""

    def sample(self, number):
        return Sample(number % 3, number, np.arange(number, number + 13) % 31)


@pytest.fixture
def run(tmp_path):
    """A run of two micro-batches a step, without DeepSpeed and without files."""
    run = object.__new__(Run)
    model = module_to_gpu(mixture(tmp_path))
    config = Config()
    config.training.steps, config.training.batch_size = 3, 4
    windows = np.arange(5 * 13).reshape(5, 13) % 31
    vars(run).update(
        config=config,
        rank=0,
        world=1,
        batch=Batch(2, 2),
        total=3,
        device=GPU,
        engine=Engine(model),
        layers=moe_layers(model),
        domains=["alpha", "beta", "gamma"],
        bad=BadBatches(config, None),
        experts=["alpha", "beta", "gamma"],
        expert_domains=["alpha", "beta", "gamma"],
        data=SimpleNamespace(sampler=Samples(), validation={"alpha": windows, "beta": windows}),
    )
    run.engine.run = run
    return run


def test_a_step_copies_its_tokens_without_waiting_and_makes_them_ahead(run):
    with gpu() as watch:
        tally = run._tally()
        for step in range(3):
            run._step(step, tally)
    passes_done = 3 * 2
    assert dict(watch.waits) == {wait: passes_done * times for wait, times in LOOP.items()}
    ahead = [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert run.engine.made == [*ahead, None]  # nothing beyond the last step
    assert values(tally.tokens_D).tolist() == [48.0] * 3  # samples 0 to 11 of 12 tokens


class Log:
    """Keeps what is logged."""

    def __init__(self):
        self.kept = []

    def log(self, kind, step, values, line):
        self.kept.append((kind, values))

    def say(self, message):
        raise AssertionError(message)

    def eta(self, step):
        return ""


def test_a_log_line_waits_a_few_times_however_many_steps_it_is_of(run):
    with gpu() as watch:
        tally = run._tally()
        run._step(0, tally)
        watch.waits.clear()
        log = Log()
        run.log(1, tally, 1.0, 1.0, 1, log)
    assert sum(watch.waits.values()) <= 9
    assert log.kept[0][1]["router"]["load_max"] <= 1


def test_a_validation_waits_for_its_numbers_at_its_end_alone(run):
    with gpu() as watch:
        log = Log()
        run.validate(0, log)
    passes_done = 2 * 3  # two domains of five windows
    for wait, times in LOOP.items():
        assert watch.waits.pop(wait) == passes_done * times
    assert {wait.split(".")[0] for wait in watch.waits} == {"tally"}
    assert sum(watch.waits.values()) <= 5
    assert log.kept[0][1]["loss"].keys() == {"alpha", "beta"}


def test_ranks_agree_on_a_stop_with_one_wait(monkeypatch, run):
    """Once a step, whose end the host waits for anyhow: every n steps would let signals wait."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    with gpu() as watch:
        assert internals.all_reduce_max(15.0) == 15.0
    assert dict(watch.waits) == {"deepspeed_internals.all_reduce_max: value": 1}
