"""The dense families that can become experts; another one is a file beside this and a line here."""

from nexus_ds.checkpoint.families.llama import LLAMA
from nexus_ds.checkpoint.families.mistral import MISTRAL
from nexus_ds.checkpoint.families.qwen2 import QWEN2
from nexus_ds.checkpoint.families.qwen3 import QWEN3

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3)
FAMILIES = {family.name: family for family in _ALL}
"""By `model_type`."""
