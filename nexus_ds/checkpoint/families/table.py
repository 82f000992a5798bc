"""The dense families that can become experts; another one is a file beside this and a line here."""

from nexus_ds.checkpoint.families.cohere2 import COHERE2
from nexus_ds.checkpoint.families.ernie4_5 import ERNIE4_5
from nexus_ds.checkpoint.families.exaone4 import EXAONE4
from nexus_ds.checkpoint.families.gemma import GEMMA
from nexus_ds.checkpoint.families.gemma2 import GEMMA2
from nexus_ds.checkpoint.families.gemma3_text import GEMMA3_TEXT
from nexus_ds.checkpoint.families.glm import GLM
from nexus_ds.checkpoint.families.glm4 import GLM4
from nexus_ds.checkpoint.families.granite import GRANITE
from nexus_ds.checkpoint.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from nexus_ds.checkpoint.families.llama import LLAMA
from nexus_ds.checkpoint.families.mistral import MINISTRAL, MISTRAL
from nexus_ds.checkpoint.families.olmo2 import OLMO2
from nexus_ds.checkpoint.families.olmo3 import OLMO3
from nexus_ds.checkpoint.families.phi3 import PHI3
from nexus_ds.checkpoint.families.qwen2 import QWEN2
from nexus_ds.checkpoint.families.qwen3 import QWEN3
from nexus_ds.checkpoint.families.qwen3_5_text import QWEN3_5_TEXT
from nexus_ds.checkpoint.families.seed_oss import SEED_OSS
from nexus_ds.checkpoint.families.smollm3 import SMOLLM3

_VIEWED = (PHI3, MINISTRAL, GRANITE, SEED_OSS, GLM, ERNIE4_5)
_GEMMAS = (GEMMA, GEMMA2, GEMMA3_TEXT)
_NATIVE = (OLMO2, OLMO3, SMOLLM3, EXAONE4, GLM4, HUNYUAN_V1_DENSE, *_GEMMAS, COHERE2)
_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_5_TEXT, *_VIEWED, *_NATIVE)
FAMILIES = {family.name: family for family in _ALL}
"""By `model_type`."""
