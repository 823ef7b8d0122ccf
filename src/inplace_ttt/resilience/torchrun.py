"""Shorten the error output of torchrun: print the message of the failed rank as last line, without a traceback.

torchrun's agent raises ChildFailedError, and Python prints its traceback. The agent loads the entry points of the group
``torchrun.handlers`` (pyproject.toml). The one here registers a rendezvous like the others, and sets ``sys.excepthook``
if the agent starts a script of ``launch/``. Without it, torchrun's summary quotes the same message from the error file
that ``exits.fail`` writes. torchrun's exit code is 1 in both cases.
"""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

RESUME_HINT = "rerun the same command to resume"
MARK = "inplace_ttt_exit_code"  # key in extraInfo of an error file: the exit code of a rank that reported its error
_NOISY = tuple(
    f"torch.distributed.elastic.{module}"
    for module in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler")
)


def rendezvous() -> Callable:
    """Return the factory of torchrun's static rendezvous; install the exception hook if a script here is started."""
    if _starts_our_script(sys.argv):
        sys.excepthook = _show
        for name in _NOISY:  # they log every process that is terminated after a failure
            logging.getLogger(name).addFilter(lambda record: record.levelno < logging.WARNING)
    return _create


def _create(parameters):
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler

    return create_rdzv_handler(parameters)


def _starts_our_script(arguments: list[str]) -> bool:
    if "inplace_ttt.train" in arguments:  # -m
        return True
    for argument in map(Path, arguments[1:]):
        root = argument.absolute().parent.parent
        if argument.suffix in (".py", ".sh") and (root / "src/inplace_ttt").is_dir():
            return True
        if argument.name == "rank.sh" and (root.parent / "src/inplace_ttt").is_dir():
            return True
    return False


def _show(kind: type[BaseException], error: BaseException, trace) -> None:
    said = _sentences(error)
    if kind.__name__ == "SignalException":
        said = [f"stopped by {getattr(error, 'sigval', None) and error.sigval.name}"]
    if not said:
        sys.__excepthook__(kind, error, trace)
        return
    sys.stdout.flush()
    print("\n".join(said), file=sys.stderr, flush=True)


def _sentences(error: BaseException) -> list[str]:
    """Return the messages of failed ranks without duplicates; that of the first failure comes last."""
    failures = sorted(getattr(error, "failures", {}).items(), key=lambda one: one[1].timestamp, reverse=True)
    codes = {rank: _code(failure.message) for rank, failure in failures}
    is_explained = any(code in (2, 3) for code in codes.values())  # torchrun then ended the others with SIGTERM
    said = []
    for rank, failure in failures:
        if codes[rank] is not None:
            said.append(failure.message["message"])
        elif failure.exitcode < 0 and not (is_explained and -failure.exitcode == signal.SIGTERM):
            # a killed rank reports nothing itself
            name = next((one.name for one in signal.Signals if one == -failure.exitcode), -failure.exitcode)
            said.append(f"stopped: rank {rank} was killed by {name}; {RESUME_HINT}")
    return list(dict.fromkeys(said))[-4:]


def _code(message) -> int | None:
    """Return the exit code in the error file of a rank; None if ``exits.fail`` did not write the file."""
    return message.get("extraInfo", {}).get(MARK) if isinstance(message, dict) else None
