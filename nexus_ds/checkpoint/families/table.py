"""The dense families that can become experts; another one is a file beside this and a line here."""

from nexus_ds.checkpoint.families.ernie4_5 import ERNIE4_5
from nexus_ds.checkpoint.families.glm import GLM
from nexus_ds.checkpoint.families.granite import GRANITE
from nexus_ds.checkpoint.families.llama import LLAMA
from nexus_ds.checkpoint.families.mistral import MINISTRAL, MISTRAL
from nexus_ds.checkpoint.families.olmo2 import OLMO2
from nexus_ds.checkpoint.families.phi3 import PHI3
from nexus_ds.checkpoint.families.qwen2 import QWEN2
from nexus_ds.checkpoint.families.qwen3 import QWEN3
from nexus_ds.checkpoint.families.seed_oss import SEED_OSS

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, MINISTRAL, GRANITE, SEED_OSS, GLM, ERNIE4_5, OLMO2)
FAMILIES = {family.name: family for family in _ALL}
"""By `model_type`."""
