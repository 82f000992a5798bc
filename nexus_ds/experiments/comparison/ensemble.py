"""BTM's ensemble (Li et al., arXiv 2208.03306): all branches, weighted by how well they explain
the text so far.

    p(x_t | x_<t) = sum_i w_i(t) p_i(x_t | x_<t)
    w_i(t) = softmax_i of sum over s < t of log p_i(x_s | x_<s)

The prior is uniform and the posterior is that of the window so far, so nothing is fitted on text of
the future.
Shapes: N models, W windows, T tokens, V words of the vocabulary.
Not covered: a prior estimated on validation text, leaving out models of small weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ds.checkpoint.loading import load_model


def posterior_loss(losses_NWT: Tensor) -> Tensor:
    """Return the ensemble's loss [W, T] from its members' losses of each token (nats)."""
    # Sums over thousands of tokens are compared: single precision would decide between branches.
    log_p_NWT = -losses_NWT.double()
    # Of the tokens before each one, so that no token chooses who predicts it.
    before_NWT = log_p_NWT.cumsum(-1) - log_p_NWT
    log_w_NWT = before_NWT.log_softmax(0)
    return -(log_w_NWT + log_p_NWT).logsumexp(0)


@torch.inference_mode()
def window_losses(directory: Path, windows_WT: np.ndarray, batch: int = 8) -> Tensor:
    """Return the loss of each next token, [W, T], of windows [W, T + 1]."""
    model = load_model(directory, "auto")
    parts = []
    for start in range(0, len(windows_WT), batch):
        some_WT = windows_WT[start : start + batch]
        # Token files are mapped from disk in a type that torch's cross-entropy does not take.
        part_WT = np.ascontiguousarray(some_WT, dtype=np.int64)
        tokens = torch.from_numpy(part_WT).to(model.device)
        inputs = tokens[:, :-1]
        targets = tokens[:, 1:]
        output = model(input_ids=inputs, use_cache=False)
        logits_WTV = output.logits.float()
        # Classes come second there.
        logits_WVT = logits_WTV.transpose(1, 2)
        losses_WT = F.cross_entropy(logits_WVT, targets, reduction="none")
        parts.append(losses_WT.cpu())
    return torch.cat(parts)


def ensemble_losses(models: Sequence[Path], windows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the ensemble's mean loss (nats per token) on each domain's windows."""
    texts = np.concatenate(list(windows.values()))
    # One model at a time is in memory.
    members = [window_losses(path, texts) for path in models]
    losses_WT = posterior_loss(torch.stack(members))
    counts = [len(of_domain) for of_domain in windows.values()]
    parts = losses_WT.split(counts)
    found = {}
    for domain, part_WT in zip(windows, parts, strict=True):
        found[domain] = float(part_WT.mean())
    return found
