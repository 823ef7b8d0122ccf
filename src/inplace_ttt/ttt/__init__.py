"""The method: fast weights in the down-projection of a gated MLP (Feng et al., arXiv 2604.06169).

Everything here knows torch only: no Megatron, no files, no configuration.
"""

from inplace_ttt.ttt.function import Received, fast_weight_linear
from inplace_ttt.ttt.plan import LayoutError

__all__ = ["LayoutError", "Received", "fast_weight_linear"]
