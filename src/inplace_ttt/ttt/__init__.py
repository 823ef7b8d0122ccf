"""The method: fast weights in the down-projection of a gated MLP (Feng et al., arXiv 2604.06169).

Everything here knows torch only: no Megatron, no files, no configuration.
"""

from inplace_ttt.ttt.autograd import CarryCache
from inplace_ttt.ttt.bounded import bounded_fast_weight_linear
from inplace_ttt.ttt.ops import fast_weight_linear
from inplace_ttt.ttt.plan import LayoutError
from inplace_ttt.ttt.rule import UpdateRule
from inplace_ttt.ttt.state import FastWeightState
from inplace_ttt.ttt.target import ChunkTargets

__all__ = [
    "CarryCache",
    "ChunkTargets",
    "FastWeightState",
    "LayoutError",
    "UpdateRule",
    "bounded_fast_weight_linear",
    "fast_weight_linear",
]
