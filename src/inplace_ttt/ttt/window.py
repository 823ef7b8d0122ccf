"""Hold windows of chunk weights, which a scan passes to the matrix products, and the pool of their memory."""

from dataclasses import dataclass, field

from torch import Tensor

from inplace_ttt.ttt.plan import Span
from inplace_ttt.ttt.products import span_products, stack_spans


@dataclass(frozen=True)
class Window:
    """Hold some chunks, in token order, and the weight that each of them uses."""

    chunks: tuple[Span, ...]
    weights: Tensor  # (chunks, rows, f)

    def apply(self, x: Tensor, out: Tensor, *, transpose: bool, alpha: float = 1.0, add: bool = False) -> None:
        """Set ``out_t = alpha * W_i x_t`` for the tokens t of each chunk i.

        Args:
            x: (s, k).
            out: (s, n), written in place at the chunks' tokens.
            transpose: True: weights are (chunks, n, k), as in a linear layer; False: (chunks, k, n), and W_i^T is used.
            add: add to ``out`` instead of overwriting it.
        """
        for group, factors in span_products(self.chunks, self.weights):  # one product per group
            if transpose:
                factors = factors.mT
            if len(group) == 1:
                tokens = slice(*group[0])
                out[tokens].addmm_(x[tokens], factors[0], beta=add, alpha=alpha)
            else:
                stack_spans(out, group).baddbmm_(stack_spans(x, group), factors, beta=add, alpha=alpha)


@dataclass
class WindowPool:
    """Own the memory of chunk weights, and reuse it for the next window.

    Memory from ``take`` is valid until ``release``. With ``keep`` memory is not reused: it is valid as long as it is
    referenced.
    """

    keep: bool = False
    free: list[Tensor] = field(default_factory=list)  # one-dimensional, unused
    lent: list[Tensor] = field(default_factory=list)  # one-dimensional, in use until ``release``

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return uninitialised memory of a shape, with the dtype and device of ``like``."""
        numel = 1
        for size in shape:
            numel *= size
        if self.keep:
            return like.new_empty(shape)
        fitting = [memory for memory in self.free if memory.numel() >= numel and memory.dtype == like.dtype]
        if fitting:
            memory = min(fitting, key=Tensor.numel)
            self.free = [other for other in self.free if other is not memory]
        else:
            self.free.clear()  # too small to be used again
            memory = like.new_empty(numel)
        self.lent.append(memory)
        return memory[:numel].view(shape)

    def release(self) -> None:
        """Mark all memory from ``take`` as unused."""
        self.free += self.lent
        self.lent.clear()

    def give(self, weights: Tensor) -> None:
        """Add the memory of weights that are no longer used."""
        self.free.append(weights.view(-1))
