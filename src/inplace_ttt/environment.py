"""Check the environment of a process: torchrun's variables, the network, and system limits.

torchrun sets RANK, WORLD_SIZE and similar variables. Other launchers and shells set some of them, or leave old values.
They are checked before anything is opened, because PyTorch's error for a wrong value does not name the variable.
"""

import os
import resource
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from inplace_ttt.config.errors import UserError

MIN_OPEN_FILES = 256  # file descriptors that a rank needs: libraries, checkpoints, data loaders, connections
TARGET_OPEN_FILES = 65_536  # file descriptors that are requested from the system
DNS_TIMEOUT = 15.0  # seconds until the resolution of a host name counts as failed
TORCHRUN_HINT = "start with torchrun, which sets it, or unset WORLD_SIZE, RANK and LOCAL_RANK to run one process"


@dataclass(frozen=True)
class World:
    """Describe the rank of this process and the number of processes."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "World":
        """Read torchrun's variables. Without them the world is this single process.

        Raises UserError if a variable is missing, is not a number, or contradicts another; the message names it.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if os.environ.get("WORLD_SIZE", "1") == "1" and "RANK" not in os.environ and "LOCAL_RANK" not in os.environ:
            return cls(0, 1, 0)
        rank, size, local_rank = (_whole_number(name) for name in names)
        if size < 1:
            raise UserError(f"WORLD_SIZE={size} is not a number of processes: {TORCHRUN_HINT}")
        if rank >= size:
            raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}: {TORCHRUN_HINT}")
        on_node = _whole_number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
        if on_node > size:
            raise UserError(f"LOCAL_WORLD_SIZE={on_node} is above WORLD_SIZE={size}: {TORCHRUN_HINT}")
        if local_rank >= on_node:
            of = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
            raise UserError(f"LOCAL_RANK={local_rank} is not below {of}={on_node}: {TORCHRUN_HINT}")
        return cls(rank, size, local_rank)


def check_environment() -> None:
    """Raise UserError if system limits, shared memory or network variables would make the run fail later."""
    _allow_files()
    _check_shared_memory()
    level = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() not in ("", "OFF", "INFO", "DETAIL"):
        raise UserError(f"TORCH_DISTRIBUTED_DEBUG={level} is not a value that torch knows: use OFF, INFO or DETAIL")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        _check_interfaces(name)


def master_address() -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT. Raises UserError if one is missing or invalid, or the host has no address."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), os.environ.get("MASTER_PORT", "").strip()
    if not address:
        raise UserError(f"MASTER_ADDR is {_state('MASTER_ADDR')}, but must be the host of rank 0: {TORCHRUN_HINT}")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UserError(f"MASTER_PORT is {_state('MASTER_PORT')}, but must be a port from 1 to 65535: {TORCHRUN_HINT}")
    error = run_with_timeout(DNS_TIMEOUT, lambda: _resolution_error(address))
    if error != "":
        raise UserError(
            f"MASTER_ADDR={address} cannot be resolved ({error or f'no answer in {DNS_TIMEOUT:.0f} s'}): name a host "
            f"that this host can reach"
        )
    return address, int(port)


def run_with_timeout(seconds: float, action: Callable):
    """Return the result of an action, or None if it raises or takes longer than ``seconds``."""
    found = []

    def run() -> None:
        try:
            found.append(action())
        except Exception:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _whole_number(name: str) -> int:
    value = os.environ.get(name, "").strip()
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UserError(f"{name} is {_state(name)}, but must be a whole number: {TORCHRUN_HINT}")
    return int(value)


def _state(name: str) -> str:
    value = os.environ.get(name)
    return "not set" if value is None else "empty" if not value.strip() else f"'{value}'"


def _resolution_error(address: str) -> str:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or "it is not a valid host name"
    return ""


def _allow_files() -> None:
    """Raise the soft limit of open files up to TARGET_OPEN_FILES. Raises UserError if it stays below MIN_OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = TARGET_OPEN_FILES if hard == resource.RLIM_INFINITY else min(TARGET_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        raise UserError(
            f"only {soft} files can be open at a time (ulimit -n {soft}): raise the limit to {MIN_OPEN_FILES} or more"
        )


def _check_shared_memory() -> None:
    folder = "/dev/shm"
    if not os.path.isdir(folder):
        return  # a system that has it elsewhere
    try:
        state = os.statvfs(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used ({error.strerror}): repair it, processes share memory through it"
        ) from error
    if state.f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is read-only: mount it writable, processes share memory through it")


def _check_interfaces(name: str) -> None:
    """Raise UserError if a variable of gloo or NCCL names network interfaces that this host does not have."""
    value = os.environ.get(name)
    if not value or value.startswith("^"):  # NCCL: all interfaces except these
        return
    there = [interface for _, interface in socket.if_nameindex()]
    for wanted in value.split(","):
        exact = name.startswith("GLOO") or wanted.startswith("=")
        word = wanted.removeprefix("=").partition(":")[0]
        if not any(interface == word if exact else interface.startswith(word) for interface in there):
            raise UserError(
                f"{name}={value} names an interface that this host does not have: use one of {', '.join(there)}"
            )
