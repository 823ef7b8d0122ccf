"""Define update rules: how a complete chunk changes the state of its document, and the matching gradients."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inplace_ttt.ttt.products import add_outer_sum
from inplace_ttt.ttt.window import Window


class UpdateRule:
    """Define the paper's rule (arXiv 2604.06169, section 3): ``S <- S + eta * sum_t v_t z_t^T``.

    S (d, f) is the state of a document: tokens use the weight ``W + S``. G (d, f) is dL/dS after a chunk, which the
    suffix scan carries from the end of the document to its start.

    To use another rule, override these methods and pass the rule to ``fast_weight_linear``; ``DecayedSum`` is an
    example. It runs on the torch backend. The methods can express rules of the form ``S <- A S + B(v, z)``:

    - A is a constant map that acts on each row of S alone, because ranks exchange S in blocks of rows. It must not
      depend on z or v: the backward carries dL/dS and does not keep S. (The delta rule's A depends on z.)
    - B is linear in v and in z. Its gradients follow from dL/dS after the chunk.
    - Parameters of a rule are constants; they get no gradient.

    Clipping and update ratios support only the paper's rule.
    """

    name: ClassVar[str] = "sum"
    # True: dL/dW is the sum of the suffix scan's states at document starts; False: a separate product computes dL/dW
    suffix_is_weight_gradient: ClassVar[bool] = True

    def update_state(self, state: Tensor, v: Tensor, z: Tensor, eta: float) -> None:
        """Apply the update of one chunk to the state, in place.

        Args:
            state: (rows, f).
            v: (t, rows), the chunk's targets.
            z: (t, f), the inputs of the chunk's down-projection.
        """
        add_outer_sum(state, v, z, eta)

    def update_suffix(self, suffix: Tensor, g: Tensor, z: Tensor) -> None:
        """Convert dL/dS after a chunk to dL/dS before it, in place.

        Args:
            suffix: (rows, f).
            g: (t, rows), the gradient of the chunk's outputs. It adds ``g^T z``, because the outputs use ``W + S``.
            z: (t, f), the inputs of the chunk's down-projection.
        """
        add_outer_sum(suffix, g, z)

    def target_gradients(self, window: Window, z: Tensor, dv: Tensor, eta: float) -> None:
        """Write the gradients of the chunks' targets to dv.

        Args:
            window: chunks with dL/dS after each of them, (chunks, rows, f).
            z: (s, f).
            dv: (s, rows).
        """
        window.apply(z, dv, transpose=True, alpha=eta)

    def add_input_gradients(self, window: Window, v: Tensor, dz: Tensor, eta: float) -> None:
        """Add to dz the gradients of the inputs z that come from the chunks' updates.

        Args:
            window: chunks with dL/dS after each of them, (chunks, rows, f).
            v: (s, rows).
            dz: (s, f).
        """
        window.apply(v, dz, transpose=False, alpha=eta, add=True)


@dataclass(frozen=True)
class ScanStep:
    """Apply a rule to the state of the prefix or the suffix scan, once per chunk."""

    rule: UpdateRule
    scale: float  # eta in the prefix scan, 1 in the suffix scan
    suffix: bool

    def __call__(self, state: Tensor, a: Tensor, z: Tensor) -> None:
        """Update the state (rows, f) in place; a (t, rows) holds targets or output gradients, z is (t, f)."""
        if self.suffix:
            self.rule.update_suffix(state, a, z)
        else:
            self.rule.update_state(state, a, z, self.scale)


class DecayedSum(UpdateRule):
    """Define a sum that decays with each chunk: ``S <- decay * S + eta * sum_t v_t z_t^T``. It is not in the paper.

    ``naive.decayed_fast_weight_linear`` is its definition.

    Example::

        >>> z, v, weight = torch.randn(100, 2, 8), torch.randn(100, 2, 4), torch.randn(4, 8)
        >>> decayed = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=10, rule=DecayedSum(0.9))
        >>> paper = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=10)
        >>> torch.allclose(decayed[:20], paper[:20]), torch.allclose(decayed[20:], paper[20:])
        (True, False)

    Args:
        decay: factor of the state, above 0 and at most 1 (1: the paper's rule).
    """

    name = "decayed sum"
    suffix_is_weight_gradient = False  # the suffix scan decays, dL/dW does not

    def __init__(self, decay: float):
        self.decay = decay

    def update_state(self, state: Tensor, v: Tensor, z: Tensor, eta: float) -> None:
        """Multiply the state by ``decay``, then add the chunk's update. See ``UpdateRule.update_state``."""
        add_outer_sum(state.mul_(self.decay), v, z, eta)

    def update_suffix(self, suffix: Tensor, g: Tensor, z: Tensor) -> None:
        """Multiply dL/dS by ``decay``, then add ``g^T z``. See ``UpdateRule.update_suffix``."""
        add_outer_sum(suffix.mul_(self.decay), g, z)


PAPER_RULE = UpdateRule()


def is_papers(rule: UpdateRule) -> bool:
    """Return True for the paper's rule, which the kernels, clipping, exported models and books support."""
    return type(rule) is UpdateRule
