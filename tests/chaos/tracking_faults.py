"""MLflow goes away and comes back: a real `mlflow server` on loopback, killed and started again under real runs.

Every function raises `AssertionError` where a value is missing in MLflow, stands there twice, or the run did not end as
it should. `seconds` of a row are those from the moment that the server answered again until it had everything.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.chaos.runs import BATCH, Place, Row

FOREVER = ("--epochs", "3400")  # 20,000 steps, of which MLflow is given every tenth
PATIENCE = 400.0  # seconds to wait for anything on a busy machine


class Server:
    """`mlflow server` on a loopback port of its own, over a store that outlives it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder / 'mlflow.db'}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start and wait until it answers; gives that moment, of the monotonic clock."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "ab") as out:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=1):
                    return time.monotonic()
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"mlflow server did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and all of its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Kill it, without a word to anybody."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None


class Run:
    """`python -m pipeline.pretrain` in a process of its own, telling a server."""

    def __init__(self, place: Place, server: Server) -> None:
        self.place, self.server = place, server
        self.folder, self.cache = place.folder / "runs" / "one", place.folder / "cache"
        self.log = place.folder / "said"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For a process of its own."""
        return {**self.place.environment(), "MLFLOW_TRACKING_URI": self.server.uri}

    def begin(self, *words: str, patience: float | None = None, first: str = "") -> None:
        """Start, or go on; `patience` takes the place of `Tracker.PATIENCE`, seconds; `first` is run before it."""
        start = f"{first}\nimport sys; from pipeline import pretrain, tracking; "
        start += f"tracking.Tracker.PATIENCE = {patience}; " if patience else ""
        command = [sys.executable, "-c", start + "sys.exit(pretrain.main())", *self.place.words("one", *words)]
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, preexec_fn=_one_core)

    def end(self) -> int:
        """Wait for its end; the exit status."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for its end; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.end()

    def deliver(self) -> subprocess.CompletedProcess[str]:
        """`python -m pipeline.tracking` on the run."""
        command = [sys.executable, "-m", "pipeline.tracking", str(self.folder)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)

    def rows(self) -> list[dict[str, Any]]:
        """What the run wrote down of each step."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines() if self.folder.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def trained(self, steps: int) -> bool:
        """Whether it has made so many steps."""
        try:
            return len(self.rows()) >= steps
        except FileNotFoundError:
            return False

    def said(self, pattern: str = "") -> str:
        """The lines it said that hold a pattern."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return "\n".join(line for line in lines if re.search(pattern, line))

    def check(self, status: str, spaced: int = 1) -> None:
        """Compare the store, read without its server, with what the run wrote down: every value once, in order.

        Args:
            status: the run's in MLflow.
            spaced: steps from one value to the next, as `pipeline.training.recorder` thins them.
        """
        from mlflow import MlflowClient

        client = MlflowClient(self.server.store)
        experiment = client.get_experiment_by_name("photos")
        assert experiment, "no run has arrived"
        found = client.search_runs([experiment.experiment_id])
        assert len(found) == 1, f"{len(found)} runs in place of one"
        history = client.get_metric_history(found[0].info.run_id, "loss")
        written = [(row["images"], row["loss"]) for row in self.rows() if (row["images"] // BATCH) % spaced == 0]
        assert [(m.step, m.value) for m in history] == written, f"{len(history)} values in place of {len(written)}"
        assert found[0].info.status == status, f"{found[0].info.status} in place of {status}"
        assert not (self.folder / "mlflow.spool").exists() or not (self.folder / "mlflow.spool").stat().st_size


def _one_core() -> None:
    """Threads that wait for each other on a busy machine would make steps of milliseconds take seconds."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def until(true: Callable[[], object], what: str) -> float:
    """Wait until something is true; gives that moment, of the monotonic clock."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic()


def down_at_the_start(place: Place) -> Row:
    """No server when the run begins; it comes while the run trains."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        run.begin(*FOREVER)
        until(lambda: run.trained(20), "20 steps without a server")
        up = server.start()
        done = until(lambda: run.said("answers again"), "everything delivered")
        assert run.stop() == 143
        run.check("KILLED", 10)
    finally:
        server.stop()
        run.process and run.process.kill()
    said = run.said("MLflow at")
    return Row("MLflow is down when a run begins", "no server; started after 20 steps", 0, done - up, said)


def down_in_the_middle(place: Place) -> Row:
    """The server is killed while the run trains, and started again."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        server.start()
        run.begin(*FOREVER)
        until(lambda: run.trained(20), "20 steps")
        server.stop()
        until(lambda: run.said("takes no entries"), "the loss of the server noticed")
        before = len(run.rows())
        until(lambda: run.trained(before + 30), "30 steps without a server")
        up = server.start()
        done = until(lambda: run.said("answers again"), "everything delivered")
        assert run.stop() == 143
        run.check("KILLED", 10)
    finally:
        server.stop()
        run.process and run.process.kill()
    injected = "SIGKILL to the server, restarted 30 steps later"
    return Row("MLflow goes away for a while", injected, 0, done - up, run.said("MLflow at"))


def down_at_the_end(place: Place) -> Row:
    """The server is killed while the run trains, and is still away when it ends; the command delivers later."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        server.start()
        run.begin("--epochs", "10")
        until(lambda: run.trained(10), "10 steps")
        server.stop()
        assert run.end() == 0, run.said()
        assert run.deliver().returncode == 1
        up = server.start()
        delivered = run.deliver()
        done = time.monotonic()
        assert delivered.returncode == 0, delivered.stderr
        run.check("FINISHED")
    finally:
        server.stop()
        run.process and run.process.kill()
    said = run.said("MLflow at") + "\n" + delivered.stdout.strip()
    injected = "SIGKILL to the server after 10 steps; started after the run's end, then python -m pipeline.tracking"
    return Row("MLflow is away when a run ends", injected, 0, done - up, said)


def never_there(place: Place) -> Row:
    """No server from beginning to end, an evaluation included; the command delivers later."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        run.begin("--epochs", "4")
        assert run.end() == 0, run.said()
        assert json.loads((run.folder / "summary.json").read_text())["mlflow_run_id"] is None
        evaluate = [sys.executable, "-m", "pipeline.evaluate", str(run.folder), "--protocols", "knn"]
        evaluate += ["--cache", str(run.cache)]
        judged = subprocess.run(evaluate, env=run.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert judged.returncode == 0, judged.stderr
        up = server.start()
        delivered = run.deliver()
        done = time.monotonic()
        assert delivered.returncode == 0, delivered.stderr
        again = run.deliver()
        assert "nothing waits" in again.stdout, again.stdout
    finally:
        server.stop()
        run.process and run.process.kill()
    from mlflow import MlflowClient

    client = MlflowClient(server.store)
    name = json.loads((run.folder / "summary.json").read_text())["mlflow_run_id"]
    found = client.search_runs([client.get_run(name).info.experiment_id])
    (child,) = [one for one in found if one.info.run_id != name]
    assert child.data.tags["mlflow.parentRunId"] == name
    assert "knn_top1" in child.data.metrics
    client.delete_run(child.info.run_id)
    run.check("FINISHED")
    said = "\n".join([run.said("MLflow at"), judged.stderr.strip(), delivered.stdout.strip()])
    injected = "no server from beginning to end; started afterwards, then python -m pipeline.tracking"
    return Row("MLflow is never there", injected, 0, done - up, said)


def down_and_the_run_killed(place: Place) -> Row:
    """A run begun without a server is killed; it is continued with one."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        run.begin("--epochs", "20", "--checkpoint-every", "0.05")
        until(lambda: list(run.folder.glob("checkpoints/*.pt")) and run.trained(20), "a checkpoint and 20 steps")
        run.stop(signal.SIGKILL)
        at = max(int(path.stem) for path in run.folder.glob("checkpoints/*.pt"))
        lost = run.rows()[-1]["images"] - at
        up = server.start()
        run.begin("--epochs", "20")
        assert run.end() == 0, run.said()
        done = time.monotonic()
        run.check("FINISHED")
    finally:
        server.stop()
        run.process and run.process.kill()
    said = run.said("MLflow at")
    injected = "no server, then SIGKILL to the run; both started again"
    return Row("MLflow is down and the run is killed", injected, lost, done - up, said)


def hangs(place: Place) -> Row:
    """The server takes connections and says nothing; then it is itself again."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    try:
        server.start()
        run.begin(*FOREVER)
        until(lambda: run.trained(20), "20 steps")
        server.signal(signal.SIGSTOP)
        begun, before = time.monotonic(), len(run.rows())
        until(lambda: run.said("takes no entries"), "the silence of the server noticed")
        assert len(run.rows()) > before, f"training stood still for {time.monotonic() - begun:.0f} s"
        server.signal(signal.SIGCONT)
        up = time.monotonic()
        done = until(lambda: run.said("answers again"), "everything delivered")
        assert run.stop() == 143
        run.check("KILLED", 10)
    finally:
        server.stop()
        run.process and run.process.kill()
    return Row("MLflow hangs", "SIGSTOP to the server, SIGCONT later", 0, done - up, run.said("MLflow at"))


def required_and_down(place: Place, *words: str, first: str = "") -> Row:
    """`--tracking required` refuses to begin without a server, and stops with a checkpoint where it stays away."""
    server = Server(place.folder / "server")
    run = Run(place, server)
    words = (*FOREVER, "--tracking", "required", *words)
    try:
        run.begin(*words)
        assert run.end() == 2, run.said()
        assert not run.folder.exists()
        refused = run.said("error: ")
        assert len(run.said().splitlines()) == 1, run.said()
        server.start()
        run.begin(*words, patience=3.0, first=first)
        until(lambda: run.trained(20), "20 steps")
        server.stop()
        assert run.end() == 1, run.said()
        seen = run.rows()[-1]["images"]
        assert [int(path.stem) for path in run.folder.glob("checkpoints/*.pt")] == [seen]
        server.start()
        delivered = run.deliver()
        assert delivered.returncode == 0, delivered.stderr
        run.check("KILLED", 10)
    finally:
        server.stop()
        run.process and run.process.kill()
    stopped = run.said("MLflow at .* (takes|has been|did)|stopped with|--resume")
    said = "\n".join([refused, stopped, delivered.stdout.strip()])
    injected = "--tracking required: no server; then SIGKILL to it while training (with 3 s in place of 10 minutes)"
    return Row("MLflow is required and away", injected, 0, None, said)


def required_and_down_on_a_cluster(place: Place) -> Row:
    """The same with two workers of Ray Train, of which one speaks to MLflow."""
    hook = place.folder / "hook" / "sitecustomize.py"
    hook.parent.mkdir(parents=True)
    hook.write_text(
        "import os\nif 'RAY_RAYLET_PID' in os.environ:\n    from pipeline import tracking\n"
        "    tracking.Tracker.PATIENCE = 3.0\n"
    )
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as apart:
        first = (
            f"import os\nos.environ['PYTHONPATH'] = {str(hook.parent)!r} + ':' + os.environ['PYTHONPATH']\n"
            f"os.environ['RAY_TMPDIR'] = {apart!r}\nos.environ.pop('RAY_ADDRESS', None)"
        )
        row = required_and_down(place, "--engine", "ray", "--workers", "2", first=first)
    return replace(row, fault=f"{row.fault}, on a cluster")


FAULTS = (
    down_at_the_start, down_in_the_middle, down_at_the_end, never_there, down_and_the_run_killed, hangs,
    required_and_down, required_and_down_on_a_cluster,
)  # fmt: skip
