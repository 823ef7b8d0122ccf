"""Transport state blocks between two context-parallel ranks.

p2p                 non-blocking point-to-point messages of the group's backend
symmetric_memory    direct copies into memory that the GPUs of one host map into each other
"""

from typing import Protocol

from torch import Tensor

# Values of fast_weight_linear's ``prefix``
PREFIXES = ("ring", "ring_messages")


class Transport(Protocol):
    """Transfer numbered blocks between two ranks of a group; ``peer`` is a rank in the group.

    In each direction the receiver waits for blocks in the order in which they are sent.
    """

    def post_recv(self, peer: int, number: int, block: Tensor) -> None:
        """Prepare to receive a block into the memory of ``block``."""

    def wait_recv(self, peer: int, number: int) -> None:
        """Make the current stream wait until the block has arrived."""

    def send(self, peer: int, number: int, block: Tensor) -> None:
        """Start to send a block. Its memory must not change until ``wait_sends``."""

    def flush(self) -> None:
        """Make the current stream wait for sends that later kernels would delay. Call it before large products."""

    def wait_sends(self) -> None:
        """Make the current stream wait for all started sends."""
