"""In Ray's controller: what happens to groups of workers, told to the hub as they come and go."""

import contextlib
import time
from typing import Any

from pipeline.cluster.worker import BEAT

LEAVING = 120.0  # seconds that a group is given to leave a checkpoint before one of another size takes its place


def witness(hub: Any) -> Any:
    """What Ray's controller calls as groups of workers come and go; it tells the hub."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class Witness(ControllerCallback, WorkerGroupCallback):
        """Tells the hub; a hub that is gone went with the driver, which ends the run itself."""

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(hub.starting.remote())

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if errors := {rank: _text(error) for rank, error in worker_group_status.errors.items()}:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(hub.fault.remote(errors))

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            sentence = f"there is room for {resize_decision.num_workers} workers: a checkpoint, and they go on"
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(hub.leave.remote("resize", sentence)):
                    until = time.monotonic() + LEAVING
                    while not ray.get(hub.has_left.remote()) and time.monotonic() < until:
                        time.sleep(BEAT / 5)

    return Witness()


def _text(error: BaseException) -> str:
    """What an error says, and its kind; of a failed health check, the reason."""
    if failure := getattr(error, "health_check_failure", None):
        return f"{failure}\n{type(failure).__name__}: {first_line(failure)}"
    return f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
