"""How workers that share one machine meet: through a file, where Ray's own way listens to everybody."""

import tempfile
import uuid
from pathlib import Path
from typing import Any


def on_one_machine(backend: str, timeout_s: int) -> Any:
    """Ray's `TorchConfig` without the `TCPStore` of rank 0, which torch lets listen on all addresses of a machine."""
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

    class Meeting(_TorchBackend):
        """Has the workers of a group meet in a file of its own."""

        def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
            folder = Path(tempfile.gettempdir(), "ray-train")
            folder.mkdir(exist_ok=True)
            place = folder / f"meeting-{uuid.uuid4().hex}"
            worker_group.execute(_set_torch_distributed_env_vars)
            ray.get([
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{place}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ])  # fmt: skip

    class OnOneMachine(TorchConfig):
        """Sets the group of processes up by `Meeting`."""

        @property
        def backend_cls(self) -> type[Meeting]:
            return Meeting

    return OnOneMachine(backend=backend, timeout_s=timeout_s)
