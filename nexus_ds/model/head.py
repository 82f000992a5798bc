"""Output layer and cross-entropy in one module: logits of all tokens never stand in memory.

Tokens are taken in chunks; each chunk's logits become its losses and, in training, at once its
share of the gradients, so nothing as wide as the vocabulary is kept for the backward pass and no
matrix product is done twice. One module, so that ZeRO-3 gathers the (possibly tied) weight once a
pass and not once a chunk.
Shapes: B sequences, S tokens, T = B*S, H hidden size, V vocabulary.
Where some labels alone are learned, as answers of chats are, the losses and gradients of the others
are zeros, and the mean is over all tokens still: who trains knows how many labels the batches of
all ranks have together, and scales by it.
Not covered: output layers with a bias, a second backward pass through one forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ds.errors import ConfigError
from nexus_ds.model.chunks import chunk_tokens
from nexus_ds.model.scoring import Score, compiled_score, score

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


COMPILED_FROM = 16384
"""Words of a vocabulary from which `auto` compiles on GPUs: it costs seconds at each start, and
there is little to save in fewer logits. A choice; where it begins to pay was not measured."""
DIVISOR, FACTOR = "logits_scaling", "logit_scale"
"""Keys of a configuration: by what a model divides, or multiplies, what its output layer returns
(Granite; Cohere)."""
CAP = "final_logit_softcapping"
"""Likewise; a number c there lets a model return c tanh(logits / c) (Gemma)."""


class Finish(NamedTuple):
    """What a model of transformers does to what its output layer returns: divides, then caps."""

    divisor: float = 1.0
    cap: float | None = None
    """None: it caps nothing."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Finish:
        """Return what models of a configuration do."""
        divisor = getattr(config, DIVISOR, 1.0) / getattr(config, FACTOR, 1.0)
        return cls(divisor, getattr(config, CAP, None))

    def logits(self, logits: Tensor) -> Tensor:
        """Return a model's logits [.., V] of those of its output layer."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def _leave_out(learned_T: Tensor | None, rows: slice, losses_T: Tensor, error_cV: Tensor) -> None:
    """Set what is not learned of a chunk to zero, in place; None: all is learned."""
    if learned_T is None:
        return
    # A loss that is no number stays none: whoever counts bad batches has to see it.
    learned_c = learned_T[rows]
    losses_T[rows] *= learned_c
    error_cV *= learned_c[:, None]


class _MeanLoss(torch.autograd.Function):
    """(mean loss with its gradients, losses [T] without)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        learned_T: Tensor | None,
        score: Score,
        chunk: int,
        learn: bool,
    ) -> tuple[Tensor, Tensor]:
        losses_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        hidden_grad_TH = torch.empty_like(hidden_TH) if learn else None
        # In bf16 it is rounded once a chunk. In fp32 it would take another 2 bytes an element (0.5
        # GB at 256k x 1024) and its own traffic; larger chunks round it less often for nothing.
        weight_grad_VH = torch.zeros_like(weight_VH) if learn else None
        for first in range(0, len(targets_T), chunk):
            rows = slice(first, first + chunk)
            # The logits have no name: one would keep them until the end.
            losses_T[rows], error_cV = score(hidden_TH[rows] @ weight_VH.T, targets_T[rows], learn)
            _leave_out(learned_T, rows, losses_T, error_cV)
            if hidden_grad_TH is not None and weight_grad_VH is not None:
                torch.mm(error_cV, weight_VH, out=hidden_grad_TH[rows])
                weight_grad_VH.addmm_(error_cV.T, hidden_TH[rows])
            # else the next chunk's would be there beside it
            del error_cV
        if learn:
            ctx.save_for_backward(hidden_grad_TH, weight_grad_VH)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.mean(), losses_T

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        hidden_grad_TH, weight_grad_VH = ctx.saved_tensors
        # The gradients were made for the sum of the losses; the engine's factor comes with the
        # gradient of their mean. In place: a second backward pass is not covered.
        share = gradients[0] / len(hidden_grad_TH)
        hidden_grad_TH.mul_(share)
        weight_grad_VH.mul_(share)
        return hidden_grad_TH, weight_grad_VH, None, None, None, None, None


class LossHead(nn.Module):
    """An output layer [.., H] -> logits [.., V]; inside `scoring` it returns the mean loss instead.

    Args:
        weight_VH: the parameter, shared with the embedding where the two are tied.
        kernel: auto | eager | compiled; auto: compiled on GPUs from COMPILED_FROM words on, and
            eager, with a warning, where that fails.
        finish: what the model does to what this layer returns; default: nothing.
    """

    def __init__(
        self, weight_VH: nn.Parameter, kernel: str = "auto", finish: Finish | None = None
    ) -> None:
        super().__init__()
        self.weight = weight_VH
        self.finish = finish or Finish()
        self.kernel = kernel
        self.compiled: Score | None = None
        self.targets_BS: Tensor | None = None
        self.learned_BS: Tensor | None = None
        self.losses_BS: Tensor | None = None
        """Cross-entropy of each token of the last pass inside `scoring`, fp32, without gradient."""

    @contextmanager
    def scoring(self, targets_BS: Tensor, learned_BS: Tensor | None = None) -> Iterator[None]:
        """Let `forward` return the mean cross-entropy of hidden states [B, S, H], a fp32 scalar.

        Args:
            targets_BS: ids of the labels.
            learned_BS: which labels are learned, bool; the loss of the others is 0. None: all.
        """
        self.targets_BS = targets_BS
        self.learned_BS = learned_BS
        try:
            yield
        finally:
            self.targets_BS = None
            self.learned_BS = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, or inside `scoring` the mean loss.

        Raises:
            ConfigError: the kernel is `compiled`, and torch.compile fails.
        """
        if self.targets_BS is None:
            return F.linear(hidden, self.weight)
        learn = torch.is_grad_enabled()
        hidden_TH = hidden.flatten(0, -2)
        targets_T = self.targets_BS.reshape(-1)
        score, chunk = self._score(hidden_TH)
        divisor = self.finish.divisor
        if divisor != 1.0:
            # the loss is of the divided logits
            hidden_TH = hidden_TH / divisor
        learned_T = None
        if self.learned_BS is not None:
            learned_T = self.learned_BS.reshape(-1)
        mean, losses_T = _MeanLoss.apply(
            hidden_TH,
            self.weight,
            targets_T,
            learned_T,
            score,
            chunk,
            learn,
        )
        self.losses_BS = losses_T.view(self.targets_BS.shape)
        # the model divides the loss, which it takes for logits
        return mean * divisor

    def _score(self, hidden_TH: Tensor) -> tuple[Score, int]:
        """Return how a chunk is scored, and its tokens; compile at the first pass."""
        vocabulary = len(self.weight)
        worthwhile = hidden_TH.is_cuda and vocabulary >= COMPILED_FROM
        if self.kernel == "auto" and not worthwhile:
            self.kernel = "eager"
        if self.kernel == "eager":
            return partial(score, cap=self.finish.cap), chunk_tokens(vocabulary)
        chunk = chunk_tokens(vocabulary, hidden_TH.element_size())
        if self.compiled is None:
            rows = min(chunk, len(hidden_TH))
            try:
                like = hidden_TH.dtype, hidden_TH.device
                self.compiled = compiled_score(rows, vocabulary, *like, self.finish.cap)
            except ConfigError as error:
                if self.kernel == "compiled":
                    raise
                warnings.warn(f"{error}; until then the loss is slower", stacklevel=2)
                self.kernel = "eager"
                return self._score(hidden_TH)
        return self.compiled, chunk


def use_loss_head(model: PreTrainedModel, kernel: str = "auto") -> None:
    """Put a LossHead in place of a model's output layer; one with a bias stays as it is.

    Args:
        model: a transformers model.
        kernel: how a chunk of logits is scored, see LossHead.
    """
    if isinstance(model.lm_head, nn.Linear) and model.lm_head.bias is None:
        finish = Finish.of(model.config)
        model.lm_head = LossHead(model.lm_head.weight, kernel, finish)


@contextmanager
def _uncapped(config: PretrainedConfig) -> Iterator[None]:
    """Keep a model from capping what its head returns: it would take the loss for logits."""
    cap = getattr(config, CAP, None)
    if cap is None:
        yield
        return
    setattr(config, CAP, None)
    try:
        yield
    finally:
        setattr(config, CAP, cap)


def unmarked(tokens: Tensor) -> Tensor:
    """Return ids, of windows [..] in which ~id stands for an id that is no label."""
    return torch.where(tokens < 0, ~tokens, tokens)


def next_token_loss(
    model: Any, tokens_BS: Tensor, learned_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the next tokens: mean (fp32, to train on) and each one [B, S].

    Args:
        model: a transformers model or a DeepSpeed engine around one; without a LossHead all logits
            are materialised.
        tokens_BS: windows [B, S+1].
        learned_BS: which labels are learned, bool; the loss of the others is 0, and the mean over
            all labels still. None: all.
    """
    inputs_BS = tokens_BS[:, :-1]
    targets_BS = tokens_BS[:, 1:]
    whole = getattr(model, "module", model)
    head = whole.lm_head
    if isinstance(head, LossHead):
        with head.scoring(targets_BS, learned_BS), _uncapped(whole.config):
            # The head has put the loss where transformers passes on what it takes for logits.
            mean = model(input_ids=inputs_BS, use_cache=False).logits
        assert head.losses_BS is not None
        return mean, head.losses_BS
    logits = model(input_ids=inputs_BS, use_cache=False).logits
    logits_TV = logits.flatten(0, 1).float()
    losses_T = F.cross_entropy(logits_TV, targets_BS.flatten(), reduction="none")
    if learned_BS is not None:
        losses_T = losses_T * learned_BS.flatten()
    return losses_T.mean(), losses_T.detach().view(targets_BS.shape)
