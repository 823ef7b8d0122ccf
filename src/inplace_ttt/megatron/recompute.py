"""Compute activations again in the backward, instead of keeping them from the forward.

Inside ``recomputing()``, a tensor that a node of the graph saves for its backward is not kept if it is an output of
``recomputed(function, *inputs)``. The node keeps the call instead. When its backward asks for the tensor, the function
runs again on the same inputs, without gradients. An input may itself be such an output: it is then computed first. The
graph is built once, so nothing that follows the function runs a second time: with the SwiGLU product recomputed from
the output of fc1, fc2 is not recomputed, as it would be by a checkpoint around the MLP (Chen et al.,
arXiv 1604.06174). The functions must be deterministic and return new tensors, or views of their inputs.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as fp8_state
from torch import Tensor, nn

RECOMPUTE = "recompute"  # range in traces of torch.profiler


class _Call:
    """Compute the outputs of a function when the first of them is asked for, and keep them.

    The nodes that saved an output, and calls that have one as an input, refer to the call. The autograd engine drops a
    node's references once its backward has run; the last one frees the outputs.
    """

    def __init__(self, function: Callable, inputs: tuple):
        self.function, self.inputs = function, inputs
        self.precision = _precision()
        self.computed: tuple | None = None

    def output(self, number: int) -> Tensor:
        if self.computed is None:
            with torch.no_grad(), self.precision(), torch.profiler.record_function(RECOMPUTE):
                outputs = self.function(*(_unpack(one) for one in self.inputs))
            self.computed = outputs if isinstance(outputs, tuple) else (outputs,)
        return self.computed[number]


class _View:
    """Stand for a view of an output of a call."""

    def __init__(self, call: _Call, number: int, view: Tensor):
        self.call, self.number, self.place = call, number, (view.shape, view.stride(), view.storage_offset())

    def tensor(self) -> Tensor:
        return self.call.output(self.number).as_strided(*self.place)


class _Scope:
    """Find the outputs of the calls inside one ``recomputing()`` by their address.

    All are alive until its end, so no address is used twice.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[_Call, int, Tensor]] = {}

    def add(self, call: _Call, outputs: tuple, inputs: tuple) -> None:
        given = {_address(one) for one in inputs if isinstance(one, Tensor)}
        for number, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.nbytes and _address(output) not in given:
                self.outputs.setdefault(_address(output), (call, number, output.detach()))

    def pack(self, value: Any) -> Any:
        """Return what stands for a tensor: a view of an output, or the tensor itself if it is not such an output."""
        if type(value) is not Tensor or not value.nbytes:
            return value
        call, number, output = self.outputs.get(_address(value), (None, 0, value))
        return value if call is None or value.dtype != output.dtype else _View(call, number, value)


_scopes: list[_Scope] = []


@contextlib.contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Make ``recomputed`` effective inside. No effect without gradients, or if not ``enabled``."""
    if not (enabled and torch.is_grad_enabled()):
        yield
        return
    scope = _Scope()
    _scopes.append(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _scopes.pop().outputs.clear()  # the graph refers to the scope by its hooks


def recomputed(function: Callable, *inputs: Any) -> Any:
    """Return ``function(*inputs)``; its outputs are not kept for the backward of later functions.

    Args:
        function: returns a tensor or a tuple. Must be deterministic and depend on nothing else that changes until the
            backward has run.
    """
    outputs = function(*inputs)
    if _scopes and torch.is_grad_enabled():
        scope = _scopes[-1]
        call = _Call(function, tuple(scope.pack(_detached(one)) for one in inputs))
        scope.add(call, outputs if isinstance(outputs, tuple) else (outputs,), inputs)
    return outputs


def recompute_outputs(module: nn.Module) -> None:
    """Make all later calls of a module ``recomputed``. Its hooks do not run again."""
    module.forward = _Recomputed(module.forward)


class _Recomputed:
    def __init__(self, forward: Callable):
        self.forward = weakref.WeakMethod(forward)  # the module refers to this object

    def __call__(self, *inputs: Any) -> Any:
        return recomputed(self.forward(), *inputs)


def _unpack(value: Any) -> Any:
    return value.tensor() if isinstance(value, _View) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _precision() -> Callable[[], contextlib.AbstractContextManager]:
    """Return what enters Transformer Engine's present FP8 context again."""
    manager = getattr(fp8_state, "FP8GlobalStateManager", None)
    if manager is None or not manager.is_fp8_enabled():
        return contextlib.nullcontext
    recipe = manager.get_fp8_recipe()
    return lambda: fp8_state.fp8_autocast(enabled=True, fp8_recipe=recipe)
