"""The device that computes: a GPU where there is one, else the processor."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from pipeline import cluster
from pipeline.config import Config

Network = TypeVar("Network", bound=nn.Module)


def kind() -> str:
    """What this process has: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(name: str) -> torch.device:
    """This process's device of a kind: "cpu", or the current one of "cuda"."""
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def here() -> torch.device:
    """This process's device."""
    return device_of(kind())


def placed(network: Network, device: torch.device) -> Network:
    """A network on a device, the weights of its convolutions channels last, in which all of it then computes.

    On one busy core, without gradients, at 96 pixels: ResNet-18 95 images/s for 56, EfficientNet-B0 97 for 65,
    ConvNeXt-Atto 164 for 143, ViT-Ti/16 as many.
    """
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def device_name(name: str) -> str:
    """The GPU's name, or the processor's."""
    if name == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"


def threads_on(cores: int) -> int:
    """CPU threads to compute with on that many cores: fewer where `OMP_NUM_THREADS` says so.

    Two processes that each compute with a thread to every core wait for each other's threads, many times slower than
    on a core each. In a job's driver it is Ray that sets the variable, to 1, for all that it begins.
    """
    asked = "" if cluster.in_job() else os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def precision_of(config: Config, device: torch.device) -> Literal["bf16", "fp32"]:
    """What `--precision` means on a device: auto is bf16 where the device multiplies bf16 matrices in hardware."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at a time: on a GPU by its allocator, on a CPU resident, all told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
