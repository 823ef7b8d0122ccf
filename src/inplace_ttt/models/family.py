"""Describe the differences between model families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inplace_ttt.models.mapping import ParamMapping

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class Family:
    """Describe a family of decoder-only models with pre-RMSNorm, RoPE and a gated SiLU MLP."""

    name: str  # model.family, and model_type in config.json
    architecture: str  # model class in transformers
    config_class: str  # configuration class in transformers
    megatron: dict[str, Any]  # arguments of Megatron's TransformerConfig
    rows: tuple[ParamMapping, ...] = ()  # parameters of each layer that only this family has
    # keys of config.json with the only supported value; exports write them
    fixed: dict[str, Any] = field(default_factory=dict)
    has_windows: bool = False  # layers may use a sliding window
    # default of head_dim, from hidden_size and num_attention_heads
    head_dim: Callable[[int, int], int] = lambda hidden, heads: max(1, hidden // heads)
