"""Transports: how blocks of state travel between two context-parallel ranks.

p2p                 non-blocking sends and receives of the group's backend
symmetric_memory    memory that the GPUs of one host map into each other
"""

from typing import Protocol

from torch import Tensor

# Values of fast_weight_linear's ``prefix``
PREFIXES = ("ring", "ring_messages")


class Transport(Protocol):
    """Carries numbered blocks between two ranks of a group; ``peer`` is a rank of the group.

    In each direction blocks are sent, and waited for, in one order.
    """

    def post_recv(self, peer: int, number: int, block: Tensor) -> None:
        """Prepare to receive a block into this memory."""

    def wait_recv(self, peer: int, number: int) -> None:
        """Make everything that is launched next see the block."""

    def send(self, peer: int, number: int, block: Tensor) -> None:
        """Start to send a block, which must not change until ``wait_sends``."""

    def flush(self) -> None:
        """Make the device send what was launched before it goes on; called before large products."""

    def wait_sends(self) -> None:
        """Make everything that is launched next come after what was sent."""
