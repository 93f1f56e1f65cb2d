"""A full cluster: what comes after a job waits for room for longer than Ray lets it, or for what its cell gives back;
what has no room can be stopped."""

import time
from pathlib import Path

import pytest
from job_toys import cluster_of, photographs, python

from jobs.cluster import Client, environment

FIRING = "20260101T000000Z"
PATIENCE = "40"
"""Seconds that Ray lets a job wait here; 900 where nobody says so."""
JOB = """
run: pack
arguments: {data: photos}
resources: {cpus: 0}
after:
  - {run: pack, arguments: {data: photos, limit: 20}, resources: {cpus: 1}}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_comes_after_is_submitted_anew_until_there_is_room(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", range(40))
    (tmp_path / "packs.yaml").write_text(JOB)
    (tmp_path / "holds.py").write_text("import time\ntime.sleep(3600)\n")
    with cluster_of(tmp_path, cpus=1, RAY_JOB_START_TIMEOUT_SECONDS=PATIENCE) as cluster:
        client, step = Client(cluster.address), f"packs-{FIRING}-after1"
        client.submit("holds", "python holds.py", environment=environment(tmp_path, {}), about={}, cpus=1)
        words = ["packs.yaml", "--address", cluster.address, "--firing", FIRING]
        done = python("-m", "jobs.submit", *words, cwd=tmp_path, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        until = time.monotonic() + 500
        while (said := client.logs(f"packs-{FIRING}")).count(f"submitted pack as {step}") < 2:
            assert time.monotonic() < until, said
            time.sleep(1.0)
        client.stop("holds")
        assert client.wait([f"packs-{FIRING}", step]) == {f"packs-{FIRING}": "SUCCEEDED", step: "SUCCEEDED"}
        assert "--limit 20" in client.logs(step)

        (tmp_path / "holds.yaml").write_text(JOB.replace("cpus: 0", "cpus: 1"))
        words = ["holds.yaml", "--address", cluster.address, "--firing", FIRING, "--wait"]
        done = python("-m", "jobs.submit", *words, cwd=tmp_path, timeout=280)
        assert f"holds-{FIRING}-after1: succeeded" in done.stdout, done.stdout + done.stderr

        client.submit("full", "python holds.py", environment=environment(tmp_path, {}), about={}, cpus=1)
        about = {"job": "late", "firing": FIRING}
        client.submit("late", "python holds.py", environment=environment(tmp_path, {}), about=about, cpus=1)
        done = python("-m", "jobs.stop", "late", "--address", cluster.address, cwd=tmp_path, timeout=60)
        assert "late: stopping; it ends once there is room for it" in done.stdout, done.stdout + done.stderr
        client.stop("full")
        assert client.wait(["full", "late"]) == {"full": "STOPPED", "late": "STOPPED"}
