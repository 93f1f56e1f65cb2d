"""The files to deploy with: each right by the schema of what reads it."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml
from job_toys import ROOT, schema_of

DEPLOY = ROOT / "jobs" / "deploy"


def test_the_rayjob_fits_kuberays_schema():
    validator = jsonschema.Draft202012Validator(schema_of("rayjobs"))
    document = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    validator.validate(document)
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        validator.validate(document)


def test_the_ray_cluster_fits_rays_schema():
    schema = Path(next(iter(find_spec("ray").submodule_search_locations)), "autoscaler", "ray-schema.json")
    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 2}, json.loads(schema.read_text()))


def test_the_ray_clusters_job_api_listens_on_loopback():
    commands = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())["head_start_ray_commands"]
    (start,) = [command for command in commands if "ray start --head" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert start.startswith("RAY_JOB_START_TIMEOUT_SECONDS="), "a job waits for what it takes"


def test_the_slurm_script_parses():
    assert subprocess.run([shutil.which("bash") or "bash", "-n", DEPLOY / "slurm.sh"], timeout=30).returncode == 0


def test_all_that_the_container_copies_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"pipeline", "jobs", "ssl", "backbones"} < set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name


def test_every_file_says_what_was_tried():
    for path in DEPLOY.iterdir():
        assert re.search(r"^# Tried: .+\. Not ", path.read_text(), re.MULTILINE), path.name
