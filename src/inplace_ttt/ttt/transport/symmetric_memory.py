"""Transport blocks between GPUs of one host: each rank writes blocks directly into the receiver's memory.

Each rank owns symmetric memory that the ranks before and after it have mapped, one half for each of them. Copy engines
move the blocks, and CUDA streams write flags and wait for them, so a transfer needs no SM (except to convert the dtype
of a message). NCCL's transfers are kernels, which wait for running products to end and occupy SMs while they wait for
their peer.
"""

import functools
import logging
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BLOCKS = 1024  # flags per neighbour
_ARRIVED, _TAKEN = 0, 1  # flags: the neighbour's block has arrived; the neighbour has copied our block out


class SymmetricMemoryTransport:
    """Transfer blocks through symmetric memory (see ``Transport``).

    ``number`` selects a block's slot. A sender waits until the receiver has copied the previous block out of the slot.
    All ranks of the group must construct it together, with equal ``numels``, the number of elements of each slot.
    """

    def __init__(self, group: dist.ProcessGroup, numels: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric_memory

        self.rank, self.dtype = group.rank(), dtype
        self.numels = numels
        self.starts = [sum(numels[:number]) for number in range(len(numels))]
        side = sum(numels) * dtype.itemsize
        flags = 2 * 2 * MAX_BLOCKS * 4  # sides x kinds x blocks x bytes
        offset = -(-2 * side // 16) * 16
        memory = symmetric_memory.empty(offset + flags, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
        self.handle = symmetric_memory.rendezvous(memory, group)
        self.handle.barrier()  # all ranks have cleared their flags
        torch.cuda.synchronize(device)

        ranks = [peer for peer in (self.rank - 1, self.rank, self.rank + 1) if 0 <= peer < group.size()]
        self.memory = memory
        self.blocks = {peer: self.handle.get_buffer(peer, (2, sum(numels)), dtype) for peer in ranks}
        first = offset // 4  # index of the first flag
        self.flags = {peer: self.handle.get_buffer(peer, (1,), torch.int32, first).data_ptr() for peer in ranks}
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.posted: dict[tuple[int, int], Tensor] = {}
        self.sent: list[Tensor] = []
        self.counts: dict[tuple[str, int, int], int] = {}

    def post_recv(self, peer: int, number: int, block: Tensor) -> None:
        """See ``Transport.post_recv``."""
        self.posted[peer, number] = block

    def wait_recv(self, peer: int, number: int) -> None:
        """See ``Transport.wait_recv``."""
        count = self._count("received", peer, number)
        stream = torch.cuda.current_stream()
        _wait_until(stream, self._flag(self.rank, peer, _ARRIVED, number), count)
        block = self.posted.pop((peer, number))
        block.copy_(self._place(self.rank, peer, number).view(block.shape))
        _write(stream, self._flag(peer, self.rank, _TAKEN, number), count)

    def send(self, peer: int, number: int, block: Tensor) -> None:
        """See ``Transport.send``."""
        count = self._count("sent", peer, number)
        message = block.to(self.dtype)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _wait_until(self.stream, self._flag(self.rank, peer, _TAKEN, number), count - 1)
            self._place(peer, self.rank, number).view(block.shape).copy_(message)
            _write(self.stream, self._flag(peer, self.rank, _ARRIVED, number), count)
        self.sent.append(message)

    def flush(self) -> None:
        """Do nothing: kernels do not delay copy engines."""

    def wait_sends(self) -> None:
        """See ``Transport.wait_sends``."""
        torch.cuda.current_stream().wait_stream(self.stream)
        self.sent.clear()

    def _count(self, what: str, peer: int, number: int) -> int:
        """Count an event ('sent' or 'received') of a slot, and return its count."""
        count = self.counts[what, peer, number] = self.counts.get((what, peer, number), 0) + 1
        return count

    def _place(self, owner: int, sender: int, number: int) -> Tensor:
        """Return the slot of a sender's block in the memory of its owner."""
        start = self.starts[number]
        return self.blocks[owner][int(sender > owner), start : start + self.numels[number]]

    def _flag(self, owner: int, writer: int, kind: int, number: int) -> int:
        """Return the address of the flag, in the owner's memory, that a neighbour writes."""
        return self.flags[owner] + 4 * ((2 * int(writer > owner) + kind) * MAX_BLOCKS + number)


@functools.cache
def _driver():
    """Return the bindings of the CUDA driver, a dependency of torch for GPUs."""
    from cuda.bindings import driver

    return driver


def _wait_until(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Make the stream wait until the 32-bit value at ``address`` is at least ``value``."""
    at_least = _driver().CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    _check(*_driver().cuStreamWaitValue32(stream.cuda_stream, address, value, at_least))


def _write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Make the stream write a 32-bit value to ``address``."""
    plainly = _driver().CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
    _check(*_driver().cuStreamWriteValue32(stream.cuda_stream, address, value, plainly))


def _check(status) -> None:
    if status != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"a stream wait or write failed in the CUDA driver: {status.name}")


_transports: dict[tuple, SymmetricMemoryTransport] = {}


def symmetric_memory_transport(
    group: dist.ProcessGroup, numels: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> SymmetricMemoryTransport | None:
    """Return the group's transport for these block sizes, or None if its ranks cannot map each other's memory.

    All ranks of the group must call it with equal arguments. The first call constructs the transport.
    """
    if device.type != "cuda" or len(numels) > MAX_BLOCKS or not _is_possible(group):
        return None
    key = group, numels, dtype
    if key not in _transports:
        _transports[key] = SymmetricMemoryTransport(group, numels, dtype, device)
    return _transports[key]


@functools.cache
def _is_possible(group: dist.ProcessGroup) -> bool:
    """Return True if the ranks of a group are on one host and can map each other's memory. All ranks must call it."""
    # Every block has one receiver: multicast objects are not needed
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    hosts = [None] * group.size()
    dist.all_gather_object(hosts, host, group=group)
    if len(set(hosts)) > 1:
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        SymmetricMemoryTransport(group, (16,), torch.float32, device)
        failure = None
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    failures = [None] * group.size()
    dist.all_gather_object(failures, failure, group=group)
    if any(failures):
        if group.rank() == 0:
            reason = next(filter(None, failures))
            logging.getLogger(__name__).warning(
                "the GPUs of this host cannot map each other's memory, so carries are sent as NCCL messages: %s", reason
            )
        return False
    return True
