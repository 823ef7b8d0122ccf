"""Windows of chunk weights: what a backend's scan hands to the products, and who owns their memory."""

from dataclasses import dataclass, field

from torch import Tensor

from inplace_ttt.ttt.plan import Span
from inplace_ttt.ttt.products import span_products, stack_spans


@dataclass(frozen=True)
class Window:
    """Some chunks, in token order, and the weight that each of them uses."""

    chunks: tuple[Span, ...]
    weights: Tensor  # (chunks, rows, f)

    def apply(self, x: Tensor, out: Tensor, *, transpose: bool, alpha: float = 1.0, add: bool = False) -> None:
        """Set ``out_t = alpha * W_i x_t`` for the tokens t of each chunk i, or with ``W_i^T``.

        Args:
            x: (s, k).
            out: (s, n), written in place at the chunks' tokens.
            transpose: W_i is (n, k) as in a linear layer; otherwise (k, n).
            add: add to what ``out`` holds.
        """
        for group, factors in span_products(self.chunks, self.weights):  # one product for all of them
            if transpose:
                factors = factors.mT
            if len(group) == 1:
                tokens = slice(*group[0])
                out[tokens].addmm_(x[tokens], factors[0], beta=add, alpha=alpha)
            else:
                stack_spans(out, group).baddbmm_(stack_spans(x, group), factors, beta=add, alpha=alpha)


@dataclass
class WindowPool:
    """Own the memory of chunk weights, and use it again for the next window.

    ``take`` lends memory until ``release``; with ``keep`` nothing is released, and every window lives as long as
    whoever holds it.
    """

    keep: bool = False
    free: list[Tensor] = field(default_factory=list)  # flat
    lent: list[Tensor] = field(default_factory=list)

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
            self.free.clear()  # smaller ones would only stand beside it
            memory = like.new_empty(numel)
        self.lent.append(memory)
        return memory[:numel].view(shape)

    def release(self) -> None:
        """Take back all that was lent."""
        self.free += self.lent
        self.lent.clear()

    def give(self, weights: Tensor) -> None:
        """Add memory that is no longer used."""
        self.free.append(weights.view(-1))
