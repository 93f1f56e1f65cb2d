"""What rank 0 keeps of a run while it trains: the metrics file, MLflow, the status line, when a checkpoint is due."""

import time
from typing import Any

from objectives.views import VitalSign
from pipeline.config import Config
from pipeline.training.display import Status
from pipeline.training.links import Links
from pipeline.training.run_folder import MetricsFile, RunFolder

MAX_POINTS = 2000  # values of one metric that MLflow is given over a run
PATIENCE = 20  # steps in a row outside its healthy range after which a vital sign is spoken of


class Recorder:
    """Collects one row a step.

    Args:
        signs: the objective's vital signs; those of its scalars are shown.
        seen, planned: images.
        batch_size: global.
    """

    def __init__(
        self, folder: RunFolder, config: Config, links: Links, signs: tuple[VitalSign, ...],
        *, seen: int, planned: int, batch_size: int,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.links = folder, config, links
        self.signs = {sign.name: sign for sign in signs}
        self.batch_size, self.started_at = batch_size, seen
        self.stride = max(1, planned // batch_size // MAX_POINTS)
        self.file = MetricsFile(folder, until=seen)
        self.status = Status(seen=seen, planned=planned, epochs=int(config.epochs or 1))
        self.first_loss = self.last_loss = float("nan")
        self.trained = self.waited = 0.0
        self.unwell = dict.fromkeys(self.signs, 0)
        self._window: list[tuple[float, float, float, int]] = []
        self._saved_at = time.monotonic()
        rows = [row for row in self.file.rows() if "loss" in row]
        if rows:
            self.first_loss, self.last_loss = rows[0]["loss"], rows[-1]["loss"]

    def step(self, seen: int, row: dict[str, float], *, seconds: float, waited: float) -> None:
        """Record one optimiser step.

        Args:
            row: loss, learning rate, gradient norm and the objective's scalars.
            seconds: the step took, waiting included.
            waited: of these, for data.
        """
        self.file.add({"images": seen, **row})
        self.last_loss = row["loss"]
        if self.first_loss != self.first_loss:
            self.first_loss = row["loss"]
        self.trained += seconds
        self.waited += waited
        self._window = [*self._window, (row["loss"], seconds, waited, self.batch_size)][-50:]
        losses, spent, waits, images = (sum(column) for column in zip(*self._window))
        status = self.status
        status.seen, status.loss = seen, losses / len(self._window)
        status.images_per_second, status.data_wait = images / spent, waits / spent
        status.signs = {name: row[name] for name in self.signs if name in row}
        self._watch(row)
        if (seen // self.batch_size) % self.stride == 0 or seen >= status.planned:
            rates = {"images_per_second": status.images_per_second, "data_wait": status.data_wait}
            self.links.log({**row, **rates}, seen)

    def asked_to_stop(self) -> bool:
        """Hand the newest status out; whether the run is asked to stop."""
        return self.links.exchange(self.status)

    def knn(self, top1: float, seen: int) -> None:
        """Record an online k-NN accuracy."""
        self.status.knn = (top1, seen)
        self.file.add({"images": seen, "knn_online": top1})
        self.links.log({"knn_online": top1}, seen)

    def checkpoint_due(self) -> bool:
        """Whether `--checkpoint-every` minutes have passed since the last one."""
        return time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_every

    def checkpoint(self, state: dict[str, Any]) -> str:
        """Write a checkpoint and all that was recorded until it."""
        self.file.flush()
        address = self.folder.save_checkpoint(self.status.seen, state, self.config.keep)
        self._saved_at = time.monotonic()
        return address

    def summary(self) -> dict[str, Any]:
        """The part of `summary.json` that the training knows."""
        trained = self.status.seen - self.started_at
        return {
            "images_seen": self.status.seen,
            "images_per_second": trained / self.trained if self.trained else None,
            "data_wait": self.waited / self.trained if self.trained else None,
            "loss_first": self.first_loss,
            "loss_last": self.last_loss,
            "vital_signs": dict(self.status.signs),
            "alarms": list(self.status.alarms),
            "training_seconds": self.trained,
        }

    def _watch(self, row: dict[str, float]) -> None:
        """Speak once of each vital sign that stays outside its healthy range."""
        for name, sign in self.signs.items():
            if name not in row:
                continue
            well = sign.low <= row[name] <= sign.high
            self.unwell[name] = 0 if well else self.unwell[name] + 1
            if self.unwell[name] == PATIENCE:
                self.status.messages.append(
                    f"warning: {name} is {row[name]:.3g}, healthy is {sign.low:g} to {sign.high:g}: {sign.meaning}"
                )
        self.status.alarms = [name for name, steps in self.unwell.items() if steps >= PATIENCE]
