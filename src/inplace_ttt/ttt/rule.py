"""The update rule: how a complete chunk changes the state of its document, and how the gradients follow."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inplace_ttt.ttt.products import add_outer_sum
from inplace_ttt.ttt.window import Window


class UpdateRule:
    """The paper's rule (arXiv 2604.06169, section 3): ``S <- S + eta * sum_t v_t z_t^T``.

    S (d, f) is the state of a document, which tokens see as ``W + S``. G (d, f) is dL/dS behind a chunk, which the
    suffix scan carries from the end of the document to its start. Another rule overrides these methods, runs on the
    torch backend, and is given to ``fast_weight_linear`` as ``rule``. It must be linear in S and act on each row of S
    alone, because rows travel between ranks in blocks. ``naive.decayed_fast_weight_linear`` is the definition of an
    example, which the tests implement. Clipping and the norms of updates are those of this rule alone.
    """

    name: ClassVar[str] = "sum"
    # dL/dW is the suffix scan's sum at the start of each document; False: it is computed by a product of its own
    suffix_is_weight_gradient: ClassVar[bool] = True

    def update_state(self, state: Tensor, v: Tensor, z: Tensor, eta: float) -> None:
        """Apply the update of one chunk to the state, in place.

        Args:
            state: (rows, f).
            v: (t, rows), the chunk's targets.
            z: (t, f), the inputs of its down-projection.
        """
        add_outer_sum(state, v, z, eta)

    def update_suffix(self, suffix: Tensor, g: Tensor, z: Tensor) -> None:
        """Turn dL/dS behind a chunk into dL/dS in front of it, in place.

        Args:
            suffix: (rows, f).
            g: (t, rows), the gradient of the chunk's outputs, which adds ``g^T z``: they use ``W + S``.
            z: (t, f).
        """
        add_outer_sum(suffix, g, z)

    def target_gradients(self, window: Window, z: Tensor, dv: Tensor, eta: float) -> None:
        """Write the gradients of the chunks' targets to dv.

        Args:
            window: chunks with dL/dS behind each of them, (chunks, rows, f).
            z: (s, f).
            dv: (s, rows).
        """
        window.apply(z, dv, transpose=True, alpha=eta)

    def add_input_gradients(self, window: Window, v: Tensor, dz: Tensor, eta: float) -> None:
        """Add to dz what the chunks' updates add to the gradients of their inputs.

        Args:
            window: chunks with dL/dS behind each of them, (chunks, rows, f).
            v: (s, rows).
            dz: (s, f).
        """
        window.apply(v, dz, transpose=False, alpha=eta, add=True)


@dataclass(frozen=True)
class ScanStep:
    """One direction of a rule: what a scan does to its state at each chunk."""

    rule: UpdateRule
    scale: float  # eta on the prefix scan, 1 on the suffix scan
    suffix: bool

    def __call__(self, state: Tensor, a: Tensor, z: Tensor) -> None:
        """Apply the step to the state, in place; a (t, rows) holds targets or output gradients."""
        if self.suffix:
            self.rule.update_suffix(state, a, z)
        else:
            self.rule.update_state(state, a, z, self.scale)


PAPER_RULE = UpdateRule()
