"""Connect the ranks of a job through a store, opened by torchrun or by rank 0."""

import errno
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from inplace_ttt.config import UserError, first_line
from inplace_ttt.environment import World, master_address

ANSWERS = 15.0  # timeout in seconds for torchrun's store, which exists before the ranks start


class Rendezvous:
    """Open connections to the job's store."""

    def __init__(self, world: World, minutes: float):
        """Connect to the store; open it on rank 0 if torchrun has not. ``minutes``: timeout for rank 0 and other ranks.

        Raises UserError if the store cannot be opened or reached.
        """
        self.world, self.seconds = world, 60 * minutes
        self.address, self.port = master_address()
        self.by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._server = self._listen() if world.rank == 0 and not self.by_agent else None
        self.store = self.connect()

    def connect(self) -> dist.Store:
        """Return a new connection, on which calls block each other. Raises UserError if the store cannot be reached."""
        self._wait_for_listener()
        try:
            store = dist.TCPStore(
                self.address, self.port, is_master=False, timeout=timedelta(seconds=ANSWERS), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise self._no_answer(f"it is not a store: {first_line(error)[:120]}") from error
        store.set_timeout(timedelta(seconds=max(self.seconds, ANSWERS)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"inplace_ttt/{attempt}", store)

    def _wait_for_listener(self) -> None:
        """Wait until the port is open. (torch's own client prints a stack trace if it is not.)

        torchrun's agent opens it before its ranks start. If rank 0 opens it, rank 0 may start later than this rank.
        """
        patience = ANSWERS if self.by_agent else max(self.seconds, ANSWERS)
        started, said = time.monotonic(), False
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=2.0).close()
                return
            except OSError as error:
                waited = time.monotonic() - started
                if waited > patience:
                    raise self._no_answer(error.strerror or str(error)) from error
            if waited > ANSWERS and not said:
                place = f"{self.address}:{self.port}"
                print(f"rank {self.world.rank} waits for rank 0 at {place}", file=sys.stderr, flush=True)
                said = True
            time.sleep(0.2)

    def _no_answer(self, why: str) -> UserError:
        return UserError(
            f"no response from MASTER_ADDR={self.address} MASTER_PORT={self.port} ({why}): start all ranks of the job, "
            f"with one torchrun per node"
        )

    def wait_for_all(self) -> None:
        """Wait until every rank has called this. Raises UserError, naming the missing ranks, after the timeout."""
        self.store.set(f"here/{self.world.rank}", "")
        started, said = time.monotonic(), False
        while True:
            missing = [rank for rank in range(self.world.size) if not self.store.check([f"here/{rank}"])]
            waited = time.monotonic() - started
            if not missing:
                return
            few = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
            named = f"{len(missing)} of {self.world.size} ranks ({few})"
            if waited > self.seconds:
                raise UserError(
                    f"{named} did not connect to MASTER_ADDR={self.address} MASTER_PORT={self.port} within "
                    f"{self.seconds / 60:.1f} minutes: start WORLD_SIZE={self.world.size} ranks"
                )
            if waited > ANSWERS and not said and self.world.local_rank == 0:
                print(f"waiting for {named}", file=sys.stderr, flush=True)
                said = True
            time.sleep(min(0.02 + waited / 10, 1.0))

    def _listen(self) -> dist.Store:
        """Open the store on MASTER_ADDR only; torch would listen on all addresses of this host."""
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(1024)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"MASTER_PORT={self.port} is in use on this host: choose another port") from error
            raise UserError(
                f"MASTER_ADDR={self.address} is not an address of this host, which has RANK=0 ({error.strerror}): use "
                f"one of its addresses"
            ) from error
        return dist.TCPStore(
            self.address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def join(world: World, rendezvous: Rendezvous | None, backend: str, timeout: timedelta) -> None:
    """Create the default process group; without a rendezvous, for one process and without opening a port."""
    if rendezvous is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    rendezvous.wait_for_all()
    store = dist.PrefixStore("default_pg", rendezvous.store)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
