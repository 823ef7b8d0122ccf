"""Describe what tells one family of models from another."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inplace_ttt.models.mapping import ParamMapping

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class Family:
    """Describe a family: decoder-only, RMSNorm before attention and MLP, rotary positions, a gated MLP with SiLU."""

    name: str  # model.family, and model_type in config.json
    architecture: str  # its class in transformers
    config_class: str  # that of its configuration
    megatron: dict[str, Any]  # arguments of Megatron's TransformerConfig
    rows: tuple[ParamMapping, ...] = ()  # of the weight map, in every layer, beside those that all families have
    # keys of config.json that may have one value alone; they are written, too
    fixed: dict[str, Any] = field(default_factory=dict)
    has_windows: bool = False  # config.json can say that layers attend to a window
    # size of a head where config.json does not say it, from hidden_size and num_attention_heads
    head_dim: Callable[[int, int], int] = lambda hidden, heads: max(1, hidden // heads)
