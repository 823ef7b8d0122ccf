"""Choose the backend that computes the chunk weights of a rank's segments, with one interface.

torch     torch matrix products, for every device, dtype, shape and update rule
hopper    bf16 kernels for the paper's rule on H100 and H200
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from inplace_ttt.ttt.plan import Segment
from inplace_ttt.ttt.rule import ScanStep, UpdateRule, is_papers
from inplace_ttt.ttt.window import Window, WindowPool

BACKENDS = ("torch", "hopper")


class Backend(Protocol):
    """Scan documents chunk by chunk."""

    name: str
    window_bytes: int  # chunk weights held at a time if they are not kept; at least one chunk's
    exchange_window_bytes: int  # window_bytes for ranks that exchange carries: larger, because they wait for products
    keeps_by_default: bool  # True: keeping chunk weights for the backward saves time
    needs_alignment: bool  # True: rows of operands must start at multiples of 16 bytes

    def scan(
        self,
        segments: Sequence[Segment],
        base: Tensor | None,
        a: Tensor,
        z: Tensor,
        step: ScanStep,
        pool: WindowPool,
        *,
        carry_in: Tensor | None = None,
        carry_out: Tensor | None = None,
        total: Tensor | None = None,
        norms: Tensor | None = None,
        max_window_bytes: int | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Window]:
        """Yield the weight that each chunk uses, ``base`` + the state before the chunk, in the order of the segments.

        Chunks whose weight is zero are left out.

        Args:
            segments: parts of different documents in one batch row. Only the first may receive a carry, and only the
                last may send one.
            base: (rows, f) in z's dtype. None: zero.
            a: (s, rows), targets in the prefix scan, output gradients in the suffix scan.
            z: (s, f), inputs of the down-projection.
            step: updates the state with a chunk.
            pool: provides the memory of windows. Unless ``pool.keep``, a window is valid until the next one.
            carry_in: (rows, f) in the state's dtype, initial state of the first segment. None: zero.
            carry_out: (rows, f) in the state's dtype, receives the state after the last segment.
            total: (rows, f) in the state's dtype, to which the final states of documents that end here are added.
            norms: (documents that end here,) in the state's dtype, receives the squared norms of these states. Without
                total and norms, the update of a document's last chunk is not computed, because it is not used.
            max_window_bytes: limit of the weights of one window, exceeded if one chunk needs more. None:
                ``window_bytes``.
            out: (chunks or more, rows, f) in z's dtype, receives the weights of all chunks, as one window.
        """
        ...


def choose_backend(name: str, z: Tensor, d: int, chunk_size: int, eta: float, rule: UpdateRule) -> Backend:
    """Return a backend by name; ``auto``: the kernels if they support the operands, otherwise torch.

    Raises:
        ValueError: the name is not known, or its backend does not support the operands.
    """
    from inplace_ttt.ttt.backends.torch import TorchBackend

    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend='{name}' is not known: use one of {', '.join(('auto', *BACKENDS))}")
    if name == "torch" or (name == "auto" and not z.is_cuda):
        return TorchBackend()
    reason = hopper_unavailable_reason(z, d, chunk_size, eta, rule)
    if reason is None:
        from inplace_ttt.ttt.backends.hopper.scan import HopperBackend

        return HopperBackend()
    if name == "hopper":
        raise ValueError(f"backend='hopper' cannot be used: {reason}")
    _warn_once(f"fast weights run on plain torch products, which are several times slower than the kernels: {reason}")
    return TorchBackend()


def hopper_unavailable_reason(z: Tensor, d: int, chunk_size: int, eta: float, rule: UpdateRule) -> str | None:
    """Return the reason why the kernels do not support these operands, or None."""
    if not is_papers(rule):
        return f"they compute the paper's update rule, not '{rule.name}'"
    if not z.is_cuda:
        return f"operands are on the device '{z.device.type}'"
    try:
        from inplace_ttt.ttt.backends.hopper import scan
    except ImportError as error:
        return f"they cannot be loaded ({error})"
    return scan.unsupported_reason(z, d, chunk_size, eta)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
