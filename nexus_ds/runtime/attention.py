"""Attention over whole windows, for which the host asks the device nothing.

In every pass transformers looks whether several texts are packed into a window, by positions that
begin anew, and the host waits for the answer. In training a window is one text to attention.
Not covered: sliding windows, which need a mask; attention other than SDPA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_WINDOWS = "nexus_whole_windows"
"""Name under which transformers knows SDPA as an attention that it makes no mask for."""


def attend_whole_windows(model: PreTrainedModel) -> None:
    """Let each token of a window see those before it, without a mask and without padding.

    Nothing changes but the question: SDPA gets no mask after it either, and is causal then. A model
    that has sliding windows, or another attention than SDPA, stays as it is.

    Args:
        model: of transformers, dense or a mixture. It is no longer right for padded text.
    """
    config = model.config
    sliding = getattr(config, "sliding_window", None)
    if config._attn_implementation != "sdpa" or sliding:
        return
    AttentionInterface.register(WHOLE_WINDOWS, sdpa_attention_forward)
    config._attn_implementation = WHOLE_WINDOWS
