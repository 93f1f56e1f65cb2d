"""The shortest command needs no network, and nothing here calls home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WATCH = """
import socket

def told(what):
    with open({log!r}, "a") as file:
        file.write(f"{{what}}\\n")

def connect(self, address, before=socket.socket.connect):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
        told(address)
        raise OSError("no network here")
    return before(self, address)

def getaddrinfo(host, *more, before=socket.getaddrinfo, **options):
    if host and host not in ("localhost", socket.gethostname()) and not str(host)[0].isdigit():
        told(host)
        raise OSError("no network here")
    return before(host, *more, **options)

socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
told("watching")
"""


@pytest.mark.parametrize(
    "engine", [pytest.param("local", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.ray)]
)
def test_a_run_speaks_to_nobody_outside(tmp_path, engine):
    log = tmp_path / "network.log"
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    switches = {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED", "MLFLOW_TRACKING_URI"}
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    environment |= {"PYTHONPATH": f"{tmp_path / 'watch'}:{ROOT}:{ROOT / 'ssl'}", "HOME": str(tmp_path)}
    words = ["--backbone", "lenet5", "--image-size", "32", "--epochs", "1", "--limit", "64", "--engine", engine]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.pretrain", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(log.read_text().splitlines()) == {"watching"}
