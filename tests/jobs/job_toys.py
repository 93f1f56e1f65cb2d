"""What the tests of jobs share: a real Ray cluster with ports of its own, photographs, a command line, schemas."""

import contextlib
import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"
TINY = [
    *(
        "backbone=lenet5",
        "objective=mae",
        "image_size=16",
        "batch_size=16",
        "epochs=1",
        "limit=64",
        "loader=opencv",
        "engine=local",
    ),
    *(
        "knn_every=0",
        "precision=fp32",
        "options.decoder_width=16",
        "options.decoder_depth=1",
        "options.decoder_heads=2",
    ),
]


class Cluster(NamedTuple):
    """A running cluster: the address of its job API, and the home folder of what runs there."""

    address: str
    home: Path


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside of those that Ray gives its workers."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            opened = stack.enter_context(socket.socket())
            opened.bind(("127.0.0.1", 0))
            if not 10002 <= opened.getsockname()[1] <= 19999:
                found.append(opened.getsockname()[1])
        return found


def kill(process: subprocess.Popen) -> None:
    """End what `ray start --block` began, and it: SIGTERM would have it wait half a minute for its node to drain."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, 10)
    process.wait()


@contextlib.contextmanager
def cluster_of(home: Path, cpus: int = 2, **variables: str) -> Iterator[Cluster]:
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "ray-client-server-port", "metrics-export-port", "node-manager-port", "object-manager-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names))))
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets in it have short paths only
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": str(home), "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true", **variables,
    }  # fmt: skip
    log = home / "ray.log"
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
         "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={temporary}",
         "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0",
         *(f"--{name}={port}" for name, port in ports.items())],
        env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        until = time.monotonic() + 150
        while True:
            with contextlib.suppress(OSError):
                urlopen(f"{address}/api/version", timeout=5).close()
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield Cluster(address, home)
    finally:
        kill(process)
        shutil.rmtree(temporary, ignore_errors=True)


def photographs(folder: Path, numbers: range) -> Path:
    """Images of two classes, reddish and bluish, one to a number."""
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 120, (20, 24, 3), np.uint8)
        pixels[..., 2 * (i % 2)] += 120
        (folder / "rb"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "rb"[i % 2] / f"{i}.png")
    return folder


def python(*words: str, cwd: Path, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python …` with this checkout importable, apart from any cluster but the one that is named."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "RAY_AUTH_MODE": "disabled", **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def schema_of(kind: str) -> dict:
    """KubeRay's own schema, closed: a key it does not know is an error, as `kubectl apply --validate=strict` has it."""
    path = CRDS / f"ray.io_{kind}.yaml.gz"
    if not path.exists():
        pytest.skip("KubeRay's CustomResourceDefinitions are not beside this checkout")
    versions = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]["versions"]
    return closed(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"))


def closed(schema: dict) -> dict:
    if isinstance(schema, dict):
        if (
            "properties" in schema
            and "additionalProperties" not in schema
            and schema.get("x-kubernetes-preserve-unknown-fields") is None
        ):
            schema["additionalProperties"] = False
        if schema.pop("x-kubernetes-int-or-string", False):
            schema.pop("type", None)
        for value in schema.values():
            closed(value)
    elif isinstance(schema, list):
        for value in schema:
            closed(value)
    return schema
