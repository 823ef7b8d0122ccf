"""Run a job of one or many ranks: connect them, run the watchdog, and report in one sentence why the job ends."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from inplace_ttt.config import Parallel
from inplace_ttt.environment import World
from inplace_ttt.resilience.exits import PATH_ERRNOS, PERMANENT_ERRNOS, fail, leave
from inplace_ttt.resilience.rendezvous import Rendezvous
from inplace_ttt.resilience.signals import StopRequest
from inplace_ttt.resilience.torchrun import RESUME_HINT
from inplace_ttt.resilience.watchdog import Watchdog

SLOW_PHASE_FACTOR = 6.0  # timeout of slow phases such as loading, over the watchdog's timeout
EXIT_INTERRUPTED = 130  # exit code of a job that was stopped on request before its end


# Phrases in errors of gloo and NCCL if the other rank of an operation is lost or does not respond
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "remote process exited")


def lost_rank(error: BaseException) -> str | None:
    """Return the line of an error about a lost connection to another rank, or None if the error has another cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if any(word in line for word in _LOST)), None)


class JobStopped(Exception):
    """End a job on all ranks, with a message for the user and an exit code."""

    def __init__(self, why: str, code: int = 3):
        super().__init__(why)
        self.code = code


@dataclass
class Job:
    """Hold the objects of a rank that exist before there are process groups."""

    world: World
    watchdog: Watchdog
    stop: StopRequest
    rendezvous: Rendezvous | None  # None: a single rank

    def start(self, parallel: Parallel, seed: int):
        """Form the process groups and return them (collective). ``seed`` seeds Megatron's random number generators."""
        from inplace_ttt.megatron import runtime

        self.watchdog.set_phase("joining the other ranks", SLOW_PHASE_FACTOR)
        groups = runtime.start(parallel, seed, self.world, self.rendezvous)
        self.watchdog.share_secret()
        return groups

    @property
    def store(self):
        """Return the store of the process group, which ranks can use for shared counters."""
        import torch.distributed as dist

        # torch has no public name for it
        return self.rendezvous.store if self.rendezvous else dist.distributed_c10d._get_default_store()

    def all_reduce_min(self, number: int) -> int:
        """Return the minimum of ``number`` over all ranks (collective)."""
        import torch.distributed as dist

        numbers = [number] * self.world.size
        dist.all_gather_object(numbers, number)
        return min(numbers)


def run_job(
    action: Callable[[Job], int],
    world: World,
    timeout_minutes: float,
    *,
    output: str,
    note_end: Callable[[str], None] = lambda why: None,
) -> int:
    """Run ``action`` on this rank and return its exit code.

    The code is the value that ``action`` returns, or 2: the user must change something; 3: the job stopped itself;
    4: a failure that may be temporary (another rank, a file system).

    Args:
        timeout_minutes: time without progress after which a rank ends the job.
        output: output folder in the user's terms, such as run.dir='runs/a', for messages.
        note_end: called on rank 0 with the reason of an early end.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException

    from inplace_ttt.megatron import runtime

    def stopped(why: str, code: int) -> int:
        watchdog.leave(why)
        if world.rank == 0:
            note_end(why)
            if code == EXIT_INTERRUPTED and world.size > 1:  # torchrun was stopped too and does not print it
                print(f"stopped: {why}", file=sys.stderr, flush=True)
        return fail(f"stopped: {why}", code)

    def hang(why: str) -> None:  # the watchdog thread calls it while the main thread hangs
        leave(stopped(f"{why}; {RESUME_HINT}", 4))

    rendezvous = None
    if world.size > 1 and not dist.is_initialized():
        rendezvous = Rendezvous(world, timeout_minutes)
    with StopRequest() as stop, Watchdog.join(world, 60 * timeout_minutes, hang, rendezvous) as watchdog:
        try:
            code = action(Job(world, watchdog, stop, rendezvous))
            watchdog.set_phase("leaving the process groups")
            runtime.stop()
            watchdog.finish()
            return code
        except JobStopped as why:
            return stopped(str(why), why.code)
        except (RuntimeError, CheckpointException) as error:
            said = lost_rank(error)
            if said is None:
                raise
            return stopped(
                f"contact with another rank was lost: {watchdog.explain_loss() or said[:200]}; {RESUME_HINT}", 4
            )
        except OSError as error:  # metrics, pictures, data; checkpoint errors are handled by the trainer
            if error.errno in PATH_ERRNOS:
                return stopped(f"{output} cannot be written to ({error}): move that file or folder away", 2)
            if error.errno in PERMANENT_ERRNOS:
                return stopped(f"{output} can no longer be written: {error}", 3)
            return stopped(f"a file operation failed: {error}; {RESUME_HINT}", 4)
