"""Connect the ranks of a job through a store: torchrun's, or one that the first rank opens."""

import errno
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from inplace_ttt.config import UserError, first_line
from inplace_ttt.environment import World, master_address

ANSWERS = 15.0  # seconds in which torchrun's store answers, for its agents are there before the ranks


class Rendezvous:
    """Open connections to the job's store."""

    def __init__(self, world: World, minutes: float):
        """``minutes``: how long to wait for the first rank where torchrun has not opened the store.

        Raises UserError where the store cannot be opened or reached.
        """
        self.world, self.seconds = world, 60 * minutes
        self.address, self.port = master_address()
        self.by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._server = self._listen() if world.rank == 0 and not self.by_agent else None
        self.store = self.connect()

    def connect(self) -> dist.Store:
        """Return a new connection. Calls on one block each other."""
        self._wait_for_listener()
        try:
            store = dist.TCPStore(
                self.address, self.port, is_master=False, timeout=timedelta(seconds=ANSWERS), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise self._no_answer(f"it is no store: {first_line(error)[:120]}") from error
        store.set_timeout(timedelta(seconds=max(self.seconds, ANSWERS)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"inplace_ttt/{attempt}", store)

    def _wait_for_listener(self) -> None:
        """Return when something listens there. torchrun's agent does before its ranks start; the first rank, where it
        opens the store, may start later than this one. (torch's own client prints its stack where nobody listens.)"""
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
                print(f"rank {self.world.rank} waits for the first rank at {place}", file=sys.stderr, flush=True)
                said = True
            time.sleep(0.2)

    def _no_answer(self, why: str) -> UserError:
        return UserError(
            f"nothing answers at MASTER_ADDR={self.address} MASTER_PORT={self.port} ({why}): start all ranks of the "
            f"job, by one torchrun on each node"
        )

    def wait_for_all(self) -> None:
        """Return when every rank has come here. Raises UserError naming those that do not."""
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
                    f"{named} have not come to MASTER_ADDR={self.address} MASTER_PORT={self.port} in "
                    f"{self.seconds / 60:.1f} minutes: start WORLD_SIZE={self.world.size} ranks"
                )
            if waited > ANSWERS and not said and self.world.local_rank == 0:
                print(f"waiting for {named}", file=sys.stderr, flush=True)
                said = True
            time.sleep(min(0.02 + waited / 10, 1.0))

    def _listen(self) -> dist.Store:
        """Open the store on one address alone: torch would listen on all that this host has."""
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
                f"MASTER_ADDR={self.address} is no address that this host, which has RANK=0, can listen on "
                f"({error.strerror}): name an address of it"
            ) from error
        return dist.TCPStore(
            self.address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def join(world: World, rendezvous: Rendezvous | None, backend: str, timeout: timedelta) -> None:
    """Form the default process group, by the rendezvous, or alone without opening any port."""
    if rendezvous is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    rendezvous.wait_for_all()
    store = dist.PrefixStore("default_pg", rendezvous.store)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
