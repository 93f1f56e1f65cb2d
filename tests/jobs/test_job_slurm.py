"""The script for SLURM on machines: network namespaces of this one, each with processes and Ray of its own.

`srun` and `scontrol` are stand-ins: SLURM itself is not there. Ray, its `symmetric-run` and the training are real.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from job_toys import ROOT, TINY, photographs

from jobs import spec
from jobs.render import Arguments, render

FIRING = "20260101T000000Z"
UNSHARE = ("unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc")
MACHINES = """
set -eu
mkdir -p /tmp/ray
for number in 1 2; do
    own="$FOLDER/ray$number"
    UNSHARE bash -c 'mount --bind "$0" /tmp/ray; ip link set lo up; touch "$0.up"; exec sleep infinity' "$own" &
    until [ -e "$own.up" ]; do sleep 0.1; done
    echo "$(pgrep -P $!)" >>"$FOLDER/machines"
done
export ONE=$(sed -n 1p "$FOLDER/machines") TWO=$(sed -n 2p "$FOLDER/machines")
ip link add name eth0 netns "$ONE" type veth peer name eth0 netns "$TWO"
number=0
for machine in "$ONE" "$TWO"; do
    number=$((number + 1))
    nsenter --target "$machine" --net ip address add "10.77.0.$number/24" dev eth0
    nsenter --target "$machine" --net ip link set eth0 up
done
bash "$FOLDER/job.sh" && status=0 || status=$?
kill "$ONE" "$TWO"
exit $status
""".replace("UNSHARE", " ".join(UNSHARE))
SRUN = """#!/bin/bash
shift
on() { nsenter --target "$1" --net --pid --mount --wd "${@:2}"; }
[ "$SLURM_JOB_NUM_NODES" = 1 ] || on "$TWO" "$@" &
on "$ONE" "$@" && status=0 || status=$?
wait $! || status=$?
exit $status
"""
JOB = """
run: pretrain
arguments: {data: photos, storage: runs}
workers: WORKERS
resources: {cpus: 1}
after:
  - {run: evaluate, arguments: {run: "{run}", protocols: [knn]}}
"""


def separable() -> bool:
    """Whether this user may part machines off this one."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip", "mount", "pgrep")))
    return tools and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not separable(), reason="no namespaces for this user: `ray stop` would end all of Ray here")
@pytest.mark.parametrize("machines", [1, 2])
def test_the_script_trains_on_each_machine_and_evaluates_in_place(tmp_path: Path, monkeypatch, machines: int) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", range(40))
    for name in ("bin", "ray1", "ray2"):
        (tmp_path / name).mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 10.77.0.1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "night.yaml").write_text(JOB.replace("WORKERS", str(machines)))
    settings = tuple(word for word in TINY if not word.startswith("engine"))
    job = spec.load("night.yaml", settings)
    script = render(job, Arguments("night.yaml", "slurm", folder=str(tmp_path), set=settings))
    (tmp_path / "job.sh").write_text(script)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'ssl'}", "FIRING": FIRING,
        "FOLDER": str(tmp_path), "HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "one,two", "SLURM_JOB_NUM_NODES": str(machines),
    }  # fmt: skip
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", MACHINES], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("On worker node. Connecting to Ray cluster at 10.77.0.1:6380") == machines - 1
    assert f"Ray Train, {machines} worker" in done.stdout, "each machine has one core"
    assert "$ python -m pipeline.evaluate" in done.stdout
    summary = json.loads((tmp_path / "runs" / f"night-{FIRING}" / "summary.json").read_text())
    assert 0 <= summary["knn_top1"] <= 1
