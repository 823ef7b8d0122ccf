"""Run megatron-core on a machine without CUDA.

On its training path megatron-core depends on CUDA in three ways: it creates tensors on device "cuda" or moves them
there, it checks that a tensor's type is "torch.cuda.FloatTensor", and it calls functions of ``torch.cuda`` for streams
and random numbers. A TorchFunctionMode handles the first two, and stubs replace the third. With CUDA this module does
nothing.
"""

import torch
from torch.overrides import TorchFunctionMode

_installed: TorchFunctionMode | None = None


def install() -> None:
    """Make megatron-core run on the CPU until the process ends. Call this before using megatron-core."""
    global _installed
    if _installed is not None or torch.cuda.is_available():
        return
    _stub_cuda()
    _use_own_adam()
    _use_own_norm()
    _installed = _CudaMeansCpu()
    _installed.__enter__()


def _is_cuda(device) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):  # pinned memory needs the CUDA driver
            kwargs["pin_memory"] = False
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        out = function(*args, **kwargs)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return out.replace("torch.", "torch.cuda.", 1)  # the optimizer compares type names
        return out


class _NoStream:
    """Replace a CUDA stream. The CPU executes in order, so there is nothing to wait for."""

    def wait_event(self, event) -> None:
        """Do nothing: the work before the event is already done."""

    def wait_stream(self, stream) -> None:
        """Do nothing: the work of the other stream is already done."""

    def synchronize(self) -> None:
        """Do nothing: all work is already done."""


def _stub_cuda() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: _NoStream()
    # the CPU has one random generator: Megatron's RNG tracker and its recompute use it
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _use_own_adam() -> None:
    """Make Megatron's optimizer use our Adam like Transformer Engine's and apex's; ``adam.py`` says why."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    from inplace_ttt.megatron.adam import Adam

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer.Adam = distrib_optimizer.Adam = Adam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = False


def _use_own_norm() -> None:
    """Compute gradient norms in fp64: on the CPU torch sums squares sequentially, so fp32 loses the sixth digit."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    def l2_norm(chunk_size, overflow, tensor_lists, per_tensor, *_):
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensor_lists[0]]
        return torch.linalg.vector_norm(torch.stack(norms)).float().view(1), None

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
