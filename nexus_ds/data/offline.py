"""No network unless the user asks for it with HF_HUB_OFFLINE=0.

Not covered: libraries that open connections of their own, outside of huggingface_hub.
"""

from __future__ import annotations

import os
import sys


def stay_offline() -> bool:
    """Keep the Hugging Face libraries off the network; return whether they are off it.

    HF_HUB_OFFLINE=0 is the user's word that they may be on it.
    The libraries read the variable when they are first imported, which may have happened already:
    their copies are set too.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "0":
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return True
