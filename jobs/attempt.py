"""A command as a job runs it: again where it fails, within a time limit, asked to end before it is killed."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from jobs.cluster import STOPPING
from jobs.job import Job
from pipeline.command import TAKEN

GRACE = STOPPING - 15.0  # seconds from asking a command to end to killing it; the rest is for saying how it ended
LINGER = 5.0  # seconds that output may come after a command has ended
MISTAKE = 2
FINAL = (MISTAKE, 130, 143)
"""Exit statuses that trying again would not change: a user's mistake, Ctrl-C, SIGTERM. Once machines were taken away
(`TAKEN`), a mistake is that the cluster has too few, which it may have again."""
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
_prctl = ctypes.CDLL(None).prctl


class Outcome(NamedTuple):
    """How a command ended: exit status, seconds, its last line, and whether its time was up or it was told to stop."""

    status: int
    seconds: float
    last: str
    why: Literal["", "time limit", "stopped"]


def attempt(words: Sequence[str], job: Job, listen: Callable[[str], None]) -> Outcome:
    """Run a command until it succeeds, as often as the job allows, within its time limit over all attempts."""
    started, taken = time.monotonic(), False
    for number in range(job.retry.times + 1):
        left = None if job.time_limit is None else job.time_limit - (time.monotonic() - started)
        outcome = execute([sys.executable, *words], left, listen)
        final = outcome.status in FINAL and not (taken and outcome.status == MISTAKE)
        if outcome.status == 0 or outcome.why or final or number == job.retry.times:
            break
        taken = taken or outcome.status == TAKEN
        print(f"attempt {number + 1} failed ({outcome.last}); the next in {job.retry.wait:g} s", flush=True)
        time.sleep(job.retry.wait)
    return outcome._replace(seconds=time.monotonic() - started)


def execute(words: Sequence[str], limit: float | None, listen: Callable[[str], None]) -> Outcome:
    """Run a command once; its lines go to standard output and to `listen`.

    At its limit, and on SIGTERM or Ctrl-C to this process, it is asked to end and killed `GRACE` seconds later. It is
    asked to end, too, where this thread ends without waiting for it, as where the process is killed.
    """
    started = time.monotonic()
    print("$ " + shlex.join(["python", *words[1:]]), flush=True)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, preexec_fn=partial(_end_after, os.getpid()),
    )  # fmt: skip
    why: list[Literal["time limit", "stopped"]] = []
    timers: list[threading.Timer] = []

    def end(cause: Literal["time limit", "stopped"]) -> None:
        if why:
            return
        why.append(cause)
        process.terminate()
        timers.append(threading.Timer(GRACE, lambda: _kill(process)))
        timers[-1].start()

    if limit is not None:
        timers.append(threading.Timer(max(0.0, limit), end, ["time limit"]))
        timers[-1].start()
    before = {s: signal.signal(s, lambda *_: end("stopped")) for s in (signal.SIGTERM, signal.SIGINT)}
    last = [""]

    def relay() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last[0] = line.strip() or last[0]
            listen(line.strip())

    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    try:
        status = process.wait()
        reader.join(LINGER)
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _kill(process)  # whatever it left running, which may hold its output open
        reader.join(LINGER)
    if status < 0:
        last[0] = f"killed by {signal.Signals(-status).name}" + (f" after: {last[0]}" if last[0] else "")
    return Outcome(128 - status if status < 0 else status, time.monotonic() - started, last[0], why[0] if why else "")


def _end_after(parent: int) -> None:
    """Have the system send this process SIGTERM once its parent is no more; it is in no group that dies with it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before it was heard
        os.kill(os.getpid(), signal.SIGTERM)


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
