"""What every entry point shares: errors in one line, exit statuses, and an orderly end on Ctrl-C and SIGTERM."""

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.arguments import read
from pipeline.errors import UserError
from pipeline.redaction import redact

TAKEN = 75  # EX_TEMPFAIL of sysexits.h: too few machines are left, after a notice; the same command goes on later
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}


def command(kind: Any, name: str, function: Callable[[Any], int | None], argv: Sequence[str] | None) -> int:
    """Read a command line (None: this process's) into a dataclass, and call a function with it.

    Returns the exit status: what the function returns, 0 for None, else as of `guarded`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: function(read(kind, words, f"python -m {name}")) or 0, debug="--debug" in words)


def guarded(command: Callable[[], int], *, debug: bool = False) -> int:
    """The exit status of a command: its own, 2 for a mistake that the user can mend, 1 for any other failure, 141 where
    nobody reads on what it prints (`| head`).

    Errors are told in one line each; with `debug`, after their traceback. No credentials stand in either.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 128 + signal.SIGPIPE
        if debug:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            status, line = 130, "stopped"
        elif isinstance(error, UserError):
            status, line = 2, f"error: {error}"
        else:
            name = type(error).__name__
            status, line = 1, f"failed: {str(error) or name}{'' if debug else ' (--debug shows where)'}"
        print(redact(line), file=sys.stderr, flush=True)
        return status


def _unread() -> bool:
    """Whether nobody reads standard output any more; what is left of it is then given up."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def refuse_workers(engine: str, workers: int | None) -> None:
    """Raise `UserError` for so many workers as an evaluation's engine cannot have; None leaves it to the engine."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if engine == "local" and (workers or 1) > 1:
        raise UserError(f"--workers {workers}: --engine local is one process; use --engine ray")


class Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM; `cause` says which."""

    cause: signal.Signals | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within it, Ctrl-C and SIGTERM ask for an orderly end; a second Ctrl-C interrupts at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.cause = signal.Signals(number)
        stop.set()
        print(f"{stop.cause.name}: stopping after this step, with a checkpoint …", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in STOPPED}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
