"""Transport blocks by point-to-point messages of the process group's backend; NCCL runs them on separate streams."""

import torch
import torch.distributed as dist
from torch import Tensor


class P2PTransport:
    """Transfer blocks as messages in ``dtype`` (see ``Transport``)."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype):
        self.group, self.dtype = group, dtype
        self.posted: dict[tuple[int, int], tuple[Tensor, Tensor, dist.Work | None]] = {}
        self.sent: list[tuple[Tensor, dist.Work | None]] = []

    def post_recv(self, peer: int, number: int, block: Tensor) -> None:
        """See ``Transport.post_recv``."""
        message = block if block.dtype == self.dtype else torch.empty_like(block, dtype=self.dtype)
        work = dist.irecv(message, dist.get_global_rank(self.group, peer), group=self.group, tag=number)
        self.posted[peer, number] = block, message, work

    def wait_recv(self, peer: int, number: int) -> None:
        """See ``Transport.wait_recv``."""
        block, message, work = self.posted.pop((peer, number))
        work.wait()  # with NCCL the current stream waits, not the host
        if message is not block:
            block.copy_(message)

    def send(self, peer: int, number: int, block: Tensor) -> None:
        """See ``Transport.send``."""
        message = block.to(self.dtype)
        work = dist.isend(message, dist.get_global_rank(self.group, peer), group=self.group, tag=number)
        self.sent.append((message, work))

    def flush(self) -> None:
        """See ``Transport.flush``."""
        # NCCL kernels need SMs: if a large product starts first, they wait until it ends
        if dist.get_backend(self.group) == "nccl":
            self.wait_sends()

    def wait_sends(self) -> None:
        """See ``Transport.wait_sends``."""
        for _, work in self.sent:
            work.wait()
        self.sent.clear()
