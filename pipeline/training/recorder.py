"""What rank 0 keeps of a run while it trains: the metrics file, MLflow, the status line, when a checkpoint is due."""

import time
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.training.checkpoints import Checkpoints, Keep, read_facts
from pipeline.training.display import Status
from pipeline.training.health import Care, Health
from pipeline.training.links import Links
from pipeline.training.run_folder import MetricsFile, RunFolder
from pipeline.training.shares import Share

MAX_POINTS = 2000  # values of one metric that MLflow is given over a run


class Recorder:
    """Collects one row a step.

    Args:
        health: judges the steps, and names the vital signs that are shown.
        seen, planned: images.
        batch_size: global.
        said: what is to be told first.
    """

    def __init__(
        self, folder: RunFolder, config: Config, links: Links, health: Health,
        *, seen: int, planned: int, batch_size: int, said: list[str],
    ) -> None:  # fmt: skip
        self.folder, self.config, self.links, self.health = folder, config, links, health
        self.batch_size = batch_size
        self.stride = max(1, planned // batch_size // MAX_POINTS)
        self.status = Status(seen=seen, planned=planned, epochs=int(config.epochs or 1), messages=said)
        epoch = planned / int(config.epochs or 1)
        keep = Keep(config.keep, (config.keep_every or 0.0) * epoch, config.keep_best)
        self.checkpoints = Checkpoints(folder, keep)
        self.best = max((facts.get("knn_top1", -1.0) for facts in read_facts(folder).values()), default=-1.0)
        self.first_loss = self.last_loss = float("nan")
        self.trained = self.waited = 0.0
        self.steps = self.black = 0
        self._knn: tuple[int, float] | None = None
        self._trouble: str | None = None
        self._care: Care | None = None  # interventions to be written
        self._waiting = False  # for something that could not be written
        self._window: list[tuple[float, float, float, int]] = []
        self._saved_at = time.monotonic()
        folder.tidy()
        self.file = MetricsFile(folder, until=seen)
        self._stand(seen)
        for row in self.file.rows():  # a process that was killed may have kept some from the tracking server
            self._log(row, {})

    def rewind(self, seen: int) -> None:
        """Forget what was recorded after `seen` images."""
        self.file.cut(seen)
        if seen < self.status.seen:
            self.links.rewind(seen)
        self._stand(seen)

    def _stand(self, seen: int) -> None:
        self.status.seen = seen
        rows = [row for row in self.file.rows() if "loss" in row]
        if rows:
            self.first_loss, self.last_loss = rows[0]["loss"], rows[-1]["loss"]

    def step(self, row: dict[str, float], *, seconds: float, waited: float) -> None:
        """Record one optimiser step.

        Args:
            row: images seen, loss, learning rate, gradient norm and the objective's scalars.
            seconds: the step took, waiting included.
            waited: of these, for data.
        """
        seen = int(row["images"])
        self.file.add(row)
        self.last_loss = row["loss"]
        if self.first_loss != self.first_loss:
            self.first_loss = row["loss"]
        self.trained += seconds
        self.waited += waited
        self.steps += 1
        self._window = [*self._window, (row["loss"], seconds, waited, self.batch_size)][-50:]
        losses, spent, waits, images = (sum(column) for column in zip(*self._window))
        status = self.status
        status.seen, status.loss = seen, losses / len(self._window)
        status.images_per_second, status.data_wait = images / spent, waits / spent
        status.signs = {sign.name: row[sign.name] for sign in self.health.signs if sign.name in row}
        status.alarms = self.health.alarms
        self._log(row, {"images_per_second": status.images_per_second, "data_wait": status.data_wait})

    def decode_errors(self, count: int, path: Path) -> None:
        """Record how often an image could not be decoded until now, and tell of the first."""
        if count and not self.black:
            self.say(f"warning: an image of {path} cannot be decoded, and is seen black; pack the images anew")
        self.black = max(self.black, count)

    def skip(self, seen: int) -> None:
        """Record a batch that was left out."""
        self.file.add({"images": seen, "skipped": 1})
        self.status.seen = seen

    def say(self, *sentences: str) -> None:
        """Tell the user, once."""
        self.status.messages.extend(sentences)

    def asked_to_stop(self) -> bool:
        """Hand the newest status out; whether the run is asked to stop."""
        self.complain()
        self.say(*self.health.messages)
        self.health.messages.clear()
        return self.links.exchange(self.status)

    def knn(self, top1: float, seen: int) -> None:
        """Record an online k-NN accuracy."""
        self.status.knn = (top1, seen)
        self._knn = (seen, top1)
        self.file.add({"images": seen, "knn_online": top1})
        self.links.log({"knn_online": top1}, seen)

    def checkpoint_due(self) -> bool:
        """Whether `--checkpoint-every` minutes have passed since the last one, or the k-NN accuracy is the best yet."""
        best = self.config.keep_best and self._knn is not None and self._knn[1] > self.best
        return best or time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_every

    def checkpoint(self, state: dict[str, Any], share: Share | None = None) -> None:
        """Begin to write a checkpoint, or rank 0's share of it, after all that was recorded until it."""
        facts: dict[str, Any] = {"well": self.health.well}
        if self._knn and self._knn[0] == self.status.seen:
            facts["knn_top1"] = self._knn[1]
            self.best = max(self.best, self._knn[1])
        self._knn = None
        self.flush()
        self.checkpoints.save(self.status.seen, state, share, **facts)
        self._saved_at = time.monotonic()

    def treated(self, care: Care) -> None:
        """Write the interventions down, now or as soon as it can be done."""
        self._care = care
        self.flush()

    def flush(self) -> None:
        """Write what was recorded; on a full disk, or where storage does not answer, it waits for the next time."""
        started = time.perf_counter()
        try:
            self.settle()
        except Exception as error:  # each kind of storage has its own
            if not self._waiting:
                self.say(f"warning: what was recorded could not be written ({error}); it waits in memory")
            self._waiting = True
        self.checkpoints.held += time.perf_counter() - started

    def settle(self) -> None:
        """Write what was recorded.

        Raises:
            Exception: it cannot be written, and stays in memory.
        """
        if self._care:
            self._care.write(self.folder)
            self._care = None
        self.file.flush()
        self._waiting = False

    def complain(self) -> None:
        """Say once that checkpoints cannot be written, and once that they can again."""
        trouble = self.checkpoints.trouble
        if trouble and not self._trouble:
            self.say(f"warning: {trouble}; training goes on, and tries again with the next")
        elif self._trouble and not trouble:
            self.say("checkpoints can be written again")
        self._trouble = trouble

    def summary(self) -> dict[str, Any]:
        """The part of `summary.json` that the training knows."""
        return {
            "images_seen": self.status.seen,
            "images_per_second": self.steps * self.batch_size / self.trained if self.trained else None,
            "data_wait": self.waited / self.trained if self.trained else None,
            "loss_first": self.first_loss,
            "loss_last": self.last_loss,
            "vital_signs": dict(self.status.signs),
            "alarms": list(self.status.alarms),
            "decode_errors": self.black,
            "training_seconds": self.trained,
            "checkpoint_wait": self.checkpoints.held / self.trained if self.trained else None,
        }

    def _log(self, row: dict[str, float], rates: dict[str, float]) -> None:
        """Give the tracking server its share of the rows."""
        seen = int(row["images"])
        if (seen // self.batch_size) % self.stride == 0 or seen >= self.status.planned or "knn_online" in row:
            self.links.log({**{key: value for key, value in row.items() if key != "images"}, **rates}, seen)
