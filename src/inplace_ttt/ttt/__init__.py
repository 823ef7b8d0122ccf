"""Compute In-Place Test-Time Training: fast weights in a gated MLP's down-projection (Feng et al., arXiv 2604.06169).

This package depends on torch only: it does not use Megatron, files or the configuration.
"""

from inplace_ttt.ttt.autograd import CarryCache
from inplace_ttt.ttt.bounded import bounded_fast_weight_linear
from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.plan import LayoutError
from inplace_ttt.ttt.rule import PAPER_RULE, DecayedSum, UpdateRule, is_papers
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets

__all__ = [
    "PAPER_RULE",
    "CarryCache",
    "ChunkTargets",
    "DecayedSum",
    "FastWeightState",
    "LayoutError",
    "UpdateRule",
    "bounded_fast_weight_linear",
    "fast_weight_linear",
    "is_papers",
]
