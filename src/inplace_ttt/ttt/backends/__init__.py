"""Backends: how the chunk weights of a rank's segments are computed. All have one signature.

torch     matrix products of torch, on any device, in any dtype and shape, for any update rule
hopper    kernels for the paper's rule on H100 and H200, bf16
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from inplace_ttt.ttt.plan import Segment
from inplace_ttt.ttt.rule import ScanStep, UpdateRule
from inplace_ttt.ttt.window import Window, WindowPool

BACKENDS = ("torch", "hopper")


class Backend(Protocol):
    """Scans documents chunk by chunk."""

    name: str
    window_bytes: int  # of chunk weights at a time where they are not kept; one chunk's at least
    exchange_window_bytes: int  # the same where ranks exchange carries, and wait for each other's products
    keeps_by_default: bool  # whether keeping chunk weights for the backward saves time
    needs_alignment: bool  # whether rows of operands must start at multiples of 16 bytes

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
        """Yield, for each chunk in the order of the segments, the weight it uses: ``base`` + the state before it.

        Args:
            segments: parts of different documents, of one batch row. Only the first may receive a carry, and only the
                last may send one.
            base: (rows, f) in z's dtype. None: zero.
            a: (s, rows), what is written: targets on the prefix scan, output gradients on the suffix scan.
            z: (s, f).
            step: what a chunk does to the state.
            pool: lends the memory of the windows; unless it keeps them, a window is valid until the next one.
            carry_in: (rows, f) in the state's dtype, the state that the first segment starts from. None: zero.
            carry_out: (rows, f) in the state's dtype, filled with the state behind the last segment.
            total: (rows, f) in the state's dtype, to which the states of all documents that end here are added.
            norms: (documents that end here,) in the state's dtype, filled with the squared norms of these states.
                Without total and norms, what the last chunk of a document writes is not computed: nobody reads it.
            max_window_bytes: of the weights of one window; one chunk's at least. None: ``window_bytes``.
            out: (chunks or more, rows, f) in z's dtype, where the weights of all chunks go, as one window.

        Chunks whose weight is zero are left out.
        """
        ...


def choose_backend(name: str, z: Tensor, d: int, chunk_size: int, eta: float, rule: UpdateRule) -> Backend:
    """Return the backend of a name; ``auto``: the kernels where they can do what is asked, otherwise torch.

    Raises:
        ValueError: the name is not known, or its backend cannot do what is asked.
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
    _warn_once(f"fast weights run on plain torch products, several times slower than the kernels: {reason}")
    return TorchBackend()


def hopper_unavailable_reason(z: Tensor, d: int, chunk_size: int, eta: float, rule: UpdateRule) -> str | None:
    """Return why the kernels cannot take these operands, or None."""
    if type(rule) is not UpdateRule:
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
