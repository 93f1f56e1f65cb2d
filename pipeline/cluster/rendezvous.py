"""How workers that share one machine meet: through a file, where Ray's own way listens to everybody."""

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


@dataclass
class OnOneMachine(TorchConfig):
    """Ray's, without the `TCPStore` of rank 0, which torch lets listen on every address of the machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group of processes up."""
        return _Meeting


class _Meeting(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Have the workers of a group meet in a file of its own."""
        folder = Path(tempfile.gettempdir(), "ray-train")
        folder.mkdir(exist_ok=True)
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
            for place in [folder / f"meeting-{uuid.uuid4().hex}"]
            for rank in range(len(worker_group))
        ])  # fmt: skip
