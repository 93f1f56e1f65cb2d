"""What a training process needs of the world outside it, so that training imports neither Ray nor MLflow."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.packed import Packed
from pipeline.training.display import Status


@dataclass(frozen=True)
class Links:
    """How a worker reaches out; all but `fetch` are used by rank 0 only.

    Args:
        exchange: takes the newest status, returns whether the run is asked to stop.
        log: takes metrics by name and the images seen, for the tracking server.
        fetch: brings a packed set to this machine's disk and returns it as it is there.
    """

    exchange: Callable[[Status], bool]
    log: Callable[[dict[str, float], int], None]
    fetch: Callable[[Packed], Packed]
