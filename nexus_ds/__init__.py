"""Nexus: one mixture-of-experts out of several dense language models, and more experts later."""

import os

__version__ = "0.1.0"

# Nothing is fetched unless the user asks with HF_HUB_OFFLINE=0. The libraries read this when they
# are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
