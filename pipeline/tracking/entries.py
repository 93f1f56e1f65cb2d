"""What a run says while it trains, entry by entry, and how its store gets it.

An entry is a plain dictionary, so that it can wait in a file: the value of a `metric`, an `artifact` (a file or folder
to keep), a `text` to keep as a file, a `rewind` to so many images, or the `status` in which the run ended.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import fsspec

from pipeline.tracking.store import accepted, connect, hopeless, now, short
from pipeline.tracking.tickets import REWOUND_TAG, resolve

METRICS_PER_REQUEST = 1000


def metrics_at(step: int, values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """An entry for each metric that has a value at `step` images seen."""
    time = now()
    return [
        {"metric": accepted(name), "value": float(value), "step": int(step), "time": time}
        for name, value in values.items()
        if value is not None
    ]


def first_request(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics at the head, as many as a request takes, or the one entry of another kind there."""
    metrics = list(takewhile(lambda entry: "metric" in entry, islice(entries, METRICS_PER_REQUEST)))
    return metrics or list(islice(entries, 1))


class Recipient:
    """A run in a store that answers.

    Args:
        uri: the store.
        run_id: the run's id, or its ticket: then the run is created now.
        ended: the run is over; else it is marked as running.

    Attributes:
        refused: metrics and files that the store never takes, each with the reason.
    """

    def __init__(self, uri: str, run_id: str, *, ended: bool) -> None:
        self._client = connect(uri)
        self.run_id = resolve(self._client, run_id)
        run = self._client.get_run(self.run_id)
        self.refused: dict[str, str] = {}
        self._stored = {metric.key: metric.step for metric in run.data._metric_objs}  # the last step of each metric
        if rewound := run.data.tags.get(REWOUND_TAG):
            self._stored = self._since(rewound)
        if run.info.status != "RUNNING" and not ended:
            self._client.update_run(self.run_id, status="RUNNING")

    def send(self, request: Sequence[Mapping[str, Any]]) -> None:
        """Send what `first_request` gave; what the store refuses is left out, and stands in `refused`."""
        taken = [entry for entry in request if entry.get("metric") not in self.refused]
        try:
            if taken:
                self._send(taken)
        except Exception as error:
            if not hopeless(error):
                raise
            if len(taken) == 1:
                self.refused.setdefault(_name(taken[0]), short(error))
                return
            self.send(taken[: len(taken) // 2])
            self.send(taken[len(taken) // 2 :])

    def _send(self, request: Sequence[Mapping[str, Any]]) -> None:
        entry = request[0]
        if "metric" in entry:
            self._log(request)
        elif "rewind" in entry:
            at = datetime.fromtimestamp(entry["time"] / 1000, UTC).isoformat(timespec="milliseconds")
            self._client.set_tag(self.run_id, REWOUND_TAG, f"to {entry['rewind']} images at {at}")
            self._stored = {name: min(step, entry["rewind"]) for name, step in self._stored.items()}
        elif "text" in entry:
            self._client.log_text(self.run_id, entry["text"], entry["file"])
        elif "artifact" in entry:
            with _local(entry["artifact"]) as path:
                upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                upload(self.run_id, str(path), entry["folder"])
        else:
            self._client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _log(self, entries: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        stored, new = dict(self._stored), []
        for entry in entries:
            if entry["step"] > stored.get(entry["metric"], -1):
                stored[entry["metric"]] = entry["step"]
                new.append(Metric(entry["metric"], entry["value"], entry["time"], entry["step"]))
        if new:
            self._client.log_batch(self.run_id, metrics=new)
        self._stored = stored

    def _since(self, rewound: str) -> dict[str, int]:
        """The last step of each metric on the way that counts since a rewind."""
        _, place, _, _, at = rewound.split()
        time = round(1000 * datetime.fromisoformat(at).timestamp())
        histories = {name: self._client.get_metric_history(self.run_id, name) for name in self._stored}
        return {
            name: max((m.step for m in history if m.step <= int(place) or m.timestamp >= time), default=-1)
            for name, history in histories.items()
        }


def _name(entry: Mapping[str, Any]) -> str:
    """What an entry is called where it is refused."""
    return str(entry.get("metric") or entry.get("file") or entry.get("artifact") or "the end of the run")


@contextmanager
def _local(address: str) -> Iterator[Path]:
    """The file at an address, on this machine's disk."""
    if "://" not in address:
        yield Path(address)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / address.rsplit("/", 1)[1]
        filesystem, inside = fsspec.core.url_to_fs(address)
        filesystem.get(inside, str(path))
        yield path
