"""The thread that sends what a run logs while it trains, so that no step waits for the store."""

import json
import logging
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.redaction import redact
from pipeline.tracking.entries import Recipient, first_request, metrics_at
from pipeline.tracking.load import Load
from pipeline.tracking.spool import Spool, spool_below_home, spool_of
from pipeline.tracking.store import now, short
from pipeline.tracking.tickets import PENDING

log = logging.getLogger(__name__)

MOST_WAITING = 1_000_000  # entries, some 350 MB: a day without a server at ten a second

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Sends what one run logs, in order, from a background thread.

    Args:
        uri: the store.
        run_id: what `start_run` or `resume_run` gave.
        run: the run's folder, in which entries wait while the store does not answer, so that they outlive the process:
            the next `Tracker` of the same run sends them (see `spool_of`). Left open, they wait below `~/.cache`.
        required: whether a store that stays away is a reason to stop, see `lost`.
        spool: of a run that is over, claimed by the caller: only what it holds is to be delivered.
        say: takes a sentence for the user: that the store went away, that it came back.
        system_metrics: seconds between two measurements of processor, memory, disk, network and GPU; 0 takes none.
        interval: seconds between two deliveries, and between two attempts while the store does not answer.
    """

    PATIENCE = 600.0
    """Seconds that `--tracking required` lets a store be away."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        run: str | None = None,
        system_metrics: float = 10.0,
        interval: float = 1.0,
        required: bool = False,
        spool: Spool | None = None,
        say: Callable[[str], object] = log.warning,
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._ended = spool is not None
        path = spool_below_home(f"{uri} {run_id}") if run is None else spool_of(run)
        self.spool = Spool(path, ended=False) if spool is None else spool
        self._run = run
        self._load = Load(uri, system_metrics) if system_metrics else None
        self._interval = interval
        self._required, self._say = required, say
        self._changed = threading.Condition()
        self._attempts = 0  # deliveries tried to the end, for `flush`
        self._hurry = False
        self._closed = False
        self._recipient: Recipient | None = None
        self._step = 0
        self._silent_since: float | None = None  # when the store failed to answer, if it has not since
        self._lost = False
        self._refused: set[str] = set()
        self._full = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether no store has taken the run yet, so that `run_id` is a ticket."""
        return self.run_id.startswith(PENDING)

    @property
    def lost(self) -> bool:
        """Whether the store is required and was once away for more than `PATIENCE` seconds."""
        since = self._silent_since
        self._lost = self._lost or (self._required and since is not None and time.monotonic() - since > self.PATIENCE)
        return self._lost

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Note metrics at `step` images seen; returns at once. None is left out; a metric's steps must grow, except
        after `rewind`."""
        entries = metrics_at(step, metrics)
        with self._changed:
            self._step = max(self._step, int(step))
            full = len(self.spool) >= MOST_WAITING
            if not full:
                self.spool.add(*entries)
            elif not self._full:
                self._say(f"MLflow at {redact(self.uri)} is away too long: metrics from step {step} on are lost.")
            self._full = full

    def rewind(self, step: int) -> None:
        """Note that the run goes back to `step` images seen, and that other values follow. A kill does not lose it."""
        with self._changed:
            self._step = int(step)
            self.spool.add({"rewind": int(step), "time": now()})
            self._write_spool()

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file, or a local folder, with the run, below `folder`; it must stay until it is sent."""
        address = str(path) if "://" in str(path) else str(Path(path).resolve())
        self._add({"artifact": address, "folder": folder or None})

    def log_backbone(self, weights: str | Path, config: Mapping[str, Any], usage: str = "") -> None:
        """Keep the trained backbone in the folder `backbone` of the run's artifacts.

        Plain files, readable without this project and safe to open: the weights (safetensors), `config.json` with what
        re-creates the module, and `usage` (lines to paste) as README.md.
        """
        self._add({"text": json.dumps(dict(config), indent=2, default=str) + "\n", "file": "backbone/config.json"})
        if usage:
            self._add({"text": usage, "file": "backbone/README.md"})
        self.log_artifact(weights, "backbone")

    def flush(self, timeout: float = 10.0) -> bool:
        """Send what is waiting; True once the store has it all.

        After `timeout` seconds, or when the store does not answer, what is left stands in the spool: call this before
        writing a checkpoint, and a killed process loses no entry from before it.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            wanted = self._attempts + 2  # the delivery under way may have begun before the last entry
            while self.spool and self._attempts < wanted and (left := deadline - time.monotonic()) > 0:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait(left)
            self._write_spool()
            return not self.spool

    def close(self, timeout: float = 10.0) -> None:
        """Send or keep what is waiting and end the thread; the run goes on, with another `Tracker`."""
        self._stop(self.flush(timeout))

    def finish(self, status: Status, timeout: float = 30.0) -> None:
        """End the run as FINISHED, FAILED or KILLED; waits at most `timeout` seconds for what is still to be sent."""
        self._add({"status": status, "time": now()})
        if self._stop(self.flush(timeout)):
            return
        way = f"see {self.spool.path}"
        if self._run:
            way = f"python -m pipeline.tracking {shlex.quote(self._run)} delivers them"
        self._say(f"MLflow at {redact(self.uri)} did not take the last {len(self.spool):,} entries; {way}.")

    def _stop(self, delivered: bool) -> bool:
        """End the thread and let go of the spool, which stays where it holds something."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._silent_since is None:
            self._thread.join(5.0)
        with self._changed:
            self.spool.close(delivered=delivered)
        return delivered

    def _add(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self.spool.add(entry)

    def _write_spool(self) -> None:
        """Have in the file what is waiting; the caller holds the lock."""
        if not self._closed:
            self.spool.write()

    # the thread

    def _work(self) -> None:
        while not self._closed:
            with self._changed:
                if not self._hurry:
                    self._changed.wait(self._interval)
                self._hurry = False
                if not self.spool.claim():  # another process delivers what waits from before, in its order
                    continue
            try:
                self._deliver()
            except Exception as error:
                self._fail(error)
            else:
                self._log_load()
            with self._changed:
                self._attempts += 1
                self._changed.notify_all()

    def _deliver(self) -> None:
        if self._recipient is None:
            self._recipient = Recipient(self.uri, self.run_id, ended=self._ended)
            self.run_id = self._recipient.run_id
        while request := self._next():
            try:
                self._recipient.send(request)
            finally:
                self._tell_refused(self._recipient.refused)
            with self._changed:
                self.spool.drop(len(request))
        if self._silent_since is not None:
            self._silent_since = None
            self._say(f"MLflow at {redact(self.uri)} answers again and has everything that waited.")

    def _tell_refused(self, refused: Mapping[str, str]) -> None:
        """Name once what the store never takes."""
        if new := [name for name in refused if name not in self._refused]:
            self._say(f"MLflow at {redact(self.uri)} refuses {', '.join(new)}, left out here: {refused[new[0]]}")
            self._refused.update(new)

    def _log_load(self) -> None:
        if self._load is None:
            return
        try:
            self.log(self._load.measure(), self._step)
        except Exception as error:  # a machine that hides its counters is no store that does not answer
            self._load = None
            self._say(f"the load of this machine is not recorded: {short(error)}")

    def _next(self) -> list[dict[str, Any]]:
        with self._changed:
            return first_request(self.spool)

    def _fail(self, error: Exception) -> None:
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            limit = f"; after {self.PATIENCE / 60:g} minutes the run stops, with a checkpoint" if self._required else ""
            if not self.spool.ending:  # else `finish` is about to say it
                self._say(f"MLflow at {redact(self.uri)} takes no entries ({short(error)}): they wait{limit}.")
        with self._changed:
            self._write_spool()
