"""What a training process needs of the world outside it, so that training imports neither Ray nor MLflow."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.training.display import Status


def nowhere(*told: object) -> None:
    """Takes what nobody is to be told."""


@dataclass(frozen=True)
class Links:
    """How rank 0 reaches out.

    Args:
        exchange: takes the newest status, returns whether the run is asked to stop.
        log: takes metrics by name and the images seen, for the tracking server.
        rewind: takes the images seen that training goes back to, from where it computes other values.
    """

    exchange: Callable[[Status], bool]
    log: Callable[[dict[str, float], int], None] = nowhere
    rewind: Callable[[int], None] = nowhere
