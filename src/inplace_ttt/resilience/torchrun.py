"""Have torchrun print the sentence of a rank that failed, last and once, instead of a traceback.

torchrun's agent raises ChildFailedError, and Python prints where in torch it did. The agent loads the entry points of
the group ``torchrun.handlers`` (pyproject.toml); this one registers a rendezvous like the others there, and where the
agent starts a script of ``launch/`` sets how its exceptions are shown. Without it torchrun's summary quotes the same
sentence, from the error file that ``exits.fail`` writes. torchrun's exit code is 1 either way.
"""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

RESUME_HINT = "the same command goes on from what was saved"
MARK = "inplace_ttt_exit_code"  # key of an error file's extraInfo: the message is a sentence for the user
_NOISY = tuple(
    f"torch.distributed.elastic.{module}"
    for module in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler")
)


def rendezvous() -> Callable:
    """Return the creator of a rendezvous that is torchrun's static one; set how the agent's exceptions are shown."""
    if _starts_our_script(sys.argv):
        sys.excepthook = _show
        for name in _NOISY:  # they tell of each process that is ended because another one was
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
    """Return what ranks of ours said of their end, each sentence once; the first one to fail comes last."""
    failures = sorted(getattr(error, "failures", {}).items(), key=lambda one: one[1].timestamp, reverse=True)
    codes = {rank: _code(failure.message) for rank, failure in failures}
    is_explained = any(code in (2, 3) for code in codes.values())  # then torchrun has ended the others, by SIGTERM
    said = []
    for rank, failure in failures:
        if codes[rank] is not None:
            said.append(failure.message["message"])
        elif failure.exitcode < 0 and not (is_explained and -failure.exitcode == signal.SIGTERM):
            # it could not say anything
            name = next((one.name for one in signal.Signals if one == -failure.exitcode), -failure.exitcode)
            said.append(f"stopped: rank {rank} was ended by {name}; {RESUME_HINT}")
    return list(dict.fromkeys(said))[-4:]


def _code(message) -> int | None:
    """Return the exit code that a rank of ours has noted in its error file; None for others."""
    return message.get("extraInfo", {}).get(MARK) if isinstance(message, dict) else None
