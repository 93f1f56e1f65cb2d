"""Load of this machine while a run trains: processor, memory, disk, network and GPU, under MLflow's names.

MLflow's own thread counts measurements instead of images, and ends for good when the store fails once: its monitors are
asked here, by the thread of the `Tracker`.
"""

import time
from typing import Any


class Load:
    """Measures every so many seconds.

    Args:
        uri: the store, with which MLflow makes its monitors.
        every: seconds.
    """

    def __init__(self, uri: str, every: float) -> None:
        self._uri, self._every = uri, every
        self._monitor: Any = None
        self._measured = time.monotonic()

    def measure(self) -> dict[str, float]:
        """The load since the last measurement, empty where that was just now."""
        if self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor("", tracking_uri=self._uri)
        if time.monotonic() - self._measured < self._every:
            return {}
        self._measured = time.monotonic()
        self._monitor.collect_metrics()
        measured = self._monitor.aggregate_metrics()
        for part in self._monitor.monitors:
            part.clear_metrics()
        return {f"system/{name}": value for name, value in measured.items()}
