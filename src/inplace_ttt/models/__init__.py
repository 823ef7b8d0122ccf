"""List the model families. A new one needs a file like ``qwen3.py``, a line here and two exported classes."""

from inplace_ttt.config import Model
from inplace_ttt.models.family import Family
from inplace_ttt.models.llama import LLAMA
from inplace_ttt.models.qwen2 import QWEN2
from inplace_ttt.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN3, QWEN2, LLAMA)}


def family_of(model: Model) -> Family:
    """Return the family of a model."""
    return FAMILIES[model.family]


def has_qk_norm(model: Model) -> bool:
    """Return True if queries and keys have a norm."""
    return bool(family_of(model).megatron.get("qk_layernorm"))
