"""Provide Triton kernels of what a layer computes beside matrix products.

Each module names the definition that it computes.
"""

import torch
from torch import Tensor


def fits(*tensors: Tensor) -> bool:
    """Return True if the kernels take these tensors: on a GPU, and not in fp64, because the kernels compute in fp32.

    Inside torch.compile (Megatron compiles the end of Gated DeltaNet) the definitions are compiled instead.
    """
    if torch.compiler.is_compiling():
        return False
    return all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)


def programs_of(tensor: Tensor, each: int = 8) -> int:
    """Return how many programs a kernel has that loops over all rows: ``each`` per multiprocessor of the device."""
    if not tensor.is_cuda:  # Triton's interpreter
        return 3
    return each * torch.cuda.get_device_properties(tensor.device).multi_processor_count
