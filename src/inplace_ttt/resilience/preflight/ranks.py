"""Check the ranks of a job before training; each rank reports on itself and on the link from its neighbor."""

import hashlib
import os
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import inplace_ttt
from inplace_ttt.config import one_line
from inplace_ttt.environment import World
from inplace_ttt.packages import version
from inplace_ttt.resilience.preflight.node import State, examine
from inplace_ttt.resilience.rendezvous import Rendezvous, join
from inplace_ttt.resilience.watchdog import Watchdog

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "triton", "nvidia-nccl-cu13")
PINGS = 5  # exchanges per rank to compare clocks


@dataclass
class Report:
    """Hold the results of one rank."""

    rank: int
    host: str
    versions: dict[str, str]
    gpu: str | None = None  # name and memory; None: CPU
    free: float = 1.0  # fraction of GPU memory that is free
    ecc: int = 0  # uncorrected memory errors
    flops: float = 0.0  # FLOP/s of the matrix product
    wrong: bool = False  # the result of the matrix product is wrong
    clock: float = 0.0  # seconds ahead of rank 0
    folder: str | None = None  # what is wrong with the run folder; None: nothing
    reduce_bandwidth: float = 0.0  # bus bandwidth of an all-reduce in bytes/s
    link: float = 0.0  # bytes/s received from the previous rank
    neighbour: str = ""  # host of the previous rank
    broken: list[str] = field(default_factory=list)  # failed checks of the node


@dataclass(frozen=True)
class Place:
    """Describe this rank: its index, its device and its group for control messages."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # gloo, for objects on the CPU

    def gather(self, value) -> list:
        """Return the values of all ranks, in the order of ranks. All ranks must call it."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


def reports_of_all(folder: Path, minutes: float, on_hang: Callable[[str], None]) -> list[Report]:
    """Run the checks on all ranks that torchrun started; return the reports of all ranks, on every rank.

    ``on_hang`` is called with a message if a rank is lost, or stuck for ``minutes``; it must end the process.
    """
    world = World.from_environment()
    rendezvous = Rendezvous(world, minutes) if world.size > 1 else None
    with Watchdog.join(world, 60 * minutes, on_hang, rendezvous) as watchdog:
        watchdog.set_phase("joining the other ranks")
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(world.local_rank)
        try:
            join(world, rendezvous, "nccl" if on_gpu else "gloo", timedelta(minutes=1.5 * minutes))
            watchdog.share_secret()
            found = _look(folder, watchdog.set_phase)
            watchdog.set_phase("leaving")
            dist.destroy_process_group()
        except RuntimeError as error:
            on_hang(f"contact with another rank was lost: {watchdog.explain_loss() or one_line(error)}")
            raise
        return found


def _look(folder: Path, set_phase: Callable[[str], None]) -> list[Report]:
    rank, size, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    place = Place(rank, size, local, device, dist.new_group(backend="gloo"))
    set_phase("checking its own node")
    report = Report(rank, socket.gethostname(), versions())
    if local == 0:
        report.broken = [f"{one.part}: {one.found}" for one in examine() if one.state is State.BROKEN]
    if device.type == "cuda":
        _gpu(report, local)
    set_phase("a matrix product")
    _arithmetic(report, device)
    set_phase("comparing clocks")
    report.clock = _clock(place)
    set_phase(f"writing to '{folder}'")
    report.folder = _shared(folder, place)
    set_phase("an all-reduce")
    report.reduce_bandwidth = _all_reduce(place)
    set_phase("the ring's links")
    report.link = _link(place)
    hosts = place.gather(report.host)
    report.neighbour = hosts[(rank - 1) % size]
    return place.gather(report)


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes."""
    found = {"Python": platform.python_version(), "CUDA": str(torch.version.cuda), "code": _code()}
    for package in PACKAGES:
        found[package] = version(package) or "none"
    if torch.cuda.is_available():
        found["driver"] = _smi("driver_version", 0)
    return found


def _code() -> str:
    """Return a short checksum of the sources of this package."""
    package, sums = Path(inplace_ttt.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sums.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return sums.hexdigest()[:12]


def _smi(query: str, gpu: int) -> str:
    """Return the output of an nvidia-smi query; empty if it fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", str(gpu)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _gpu(report: Report, local_rank: int) -> None:
    properties = torch.cuda.get_device_properties(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    report.gpu, report.free = f"{properties.name} {properties.total_memory / 2**30:.0f} GiB", free / total
    uncorrected = _smi("ecc.errors.uncorrected.volatile.total", local_rank)
    report.ecc = int(uncorrected) if uncorrected.isdigit() else 0


def _arithmetic(report: Report, device: torch.device) -> None:
    """Time a matrix product and check its result; it uses small integers, which every dtype represents exactly."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    row = (torch.arange(n, device=device) % 3 - 1).to(dtype)
    a, b = row.repeat(n, 1), row[:, None].repeat(1, n)  # every entry of the product is the sum of row * row
    product = a @ b
    report.wrong = not bool((product == (row.float() @ row.float()).to(dtype)).all())
    times = [_seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(10)]
    report.flops = 2 * n**3 / min(times)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _clock(place: Place) -> float:
    """Return the seconds by which this rank's clock is ahead of rank 0, from the fastest of several exchanges."""
    told = torch.zeros(1, dtype=torch.float64)
    if place.rank == 0:
        for other in range(1, place.size):
            for _ in range(PINGS):
                dist.recv(told, other, group=place.control)
                told[0] = time.time()
                dist.send(told, other, group=place.control)
        return 0.0
    exchanges = []
    for _ in range(PINGS):
        before, started = time.time(), time.perf_counter()
        dist.send(told, 0, group=place.control)
        dist.recv(told, 0, group=place.control)
        took = time.perf_counter() - started
        exchanges.append((took, before + took / 2 - told.item()))
    return min(exchanges)[1]


def _shared(folder: Path, place: Place) -> str | None:
    """Check that every node can read and write the run folder. Return what is wrong on this rank, or None."""
    created, text = [None, None], os.urandom(8).hex()
    if place.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=".preflight_", dir=folder)
            (Path(made) / "first").write_text(text)
            created = [made, text]
        except OSError as error:
            created = [None, f"'{folder}' cannot be written ({error.strerror})"]
    dist.broadcast_object_list(created, src=0, group=place.control)
    if created[0] is None:
        return created[1] if place.rank == 0 else None
    meeting, fault = Path(created[0]), None
    if place.local_rank == 0:
        try:
            if _patiently(meeting / "first") != created[1]:
                fault = (
                    f"'{folder}' differs from that of the first node: put run.dir on a file system that all nodes share"
                )
            else:
                (meeting / f"rank_{place.rank}").write_text(created[1])
        except OSError as error:
            fault = f"'{folder}' cannot be written ({error.strerror})"
    faults = place.gather(fault)
    if place.rank == 0:
        for path in meeting.iterdir():
            path.unlink()
        meeting.rmdir()
    return faults[place.rank]


def _patiently(path: Path) -> str | None:
    """Return the content of a file that another node has just written; None after 5 seconds."""
    for _ in range(50):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    return None


def _payload(place: Place) -> Tensor:
    size = 2**28 if place.device.type == "cuda" else 2**20
    return torch.zeros(size // 4, device=place.device)


def _all_reduce(place: Place) -> float:
    if place.size == 1:
        return 0.0
    tensor = _payload(place)
    dist.all_reduce(tensor)
    seconds = min(_seconds(lambda: dist.all_reduce(tensor), place.device) for _ in range(5))
    return 2 * (place.size - 1) / place.size * tensor.nbytes / seconds


def _link(place: Place) -> float:
    """Measure bytes/s from the previous rank. Neighboring links run in turns, to be independent."""
    if place.size == 1:
        return 0.0
    tensor, after, before = _payload(place), (place.rank + 1) % place.size, (place.rank - 1) % place.size
    found = 0.0
    last_alone = place.size % 2 == 1
    for phase in range(3 if last_alone else 2):
        sends = _phase(place.rank, place.size) == phase
        receives = _phase(before, place.size) == phase
        for attempt in range(5):  # the first attempt includes connection setup
            if sends:
                dist.send(tensor, after)
            elif receives:
                took = _seconds(lambda: dist.recv(tensor, before), place.device)
                found = max(found, tensor.nbytes / took if attempt else 0.0)
            _seconds(lambda: None, place.device)
            dist.barrier(group=place.control)
    return found


def _phase(sender: int, size: int) -> int:
    """Return the turn in which a rank sends to the next one; no rank sends and receives in the same turn."""
    return 2 if size % 2 and sender == size - 1 else sender % 2
