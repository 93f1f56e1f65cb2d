"""KubeRay's RayCronJob: a cluster is made for each firing."""

import math
import re
import shlex
from typing import Any

from jobs.entry_points import TRAINS
from jobs.job import Cell, Job, Resources, cell_name
from jobs.render.file import Arguments, gap, head, made_up, seconds, takes_of
from jobs.render.kubernetes import labels, text, variables
from pipeline.errors import UserError


def render(job: Job, arguments: Arguments) -> str:
    """A RayCronJob for every cell. What comes after runs in the cell's own cluster, which ends with it."""
    assert job.timetable is not None
    together = [step.run for step in job.after if step.once]
    if together and len(job.cells) > 1 and not arguments.volume:
        raise UserError(
            f"{job.path}: {together[0]} comes after all cells, which need a volume that they share; give --volume CLAIM"
        )
    notes = head(job) + gap(job.timetable, "KubeRay") + made_up(job.timetable, "RayCronJob")
    if job.timetable.overlap != "allow":
        notes += f"# RayCronJob cannot do overlap: {job.timetable.overlap}; firings may run side by side.\n"
    if absent := unmounted(job, arguments):
        notes += f"# No volume is mounted at {', '.join(absent)}: "
        notes += "--volume CLAIM mounts one at /data; what lies elsewhere is the image's, and is lost with the pod.\n"
    documents = []
    for cell in job.cells:
        name = kubernetes_name(job.name, cell.name)
        words = ["python", "-m", "jobs.run", str(job.path), "--firing", "scheduled", "--in-place"]
        words += ["--cell", cell.name] if cell.name else []
        words += ["--set", *job.settings] if job.settings else []
        template: dict[str, Any] = {
            "entrypoint": shlex.join(words),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 0,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": ray_cluster(job, cell, arguments),
        }
        if limit := seconds(job):  # jobs.run keeps the limit itself, and leaves a checkpoint; this is for when it hangs
            template["activeDeadlineSeconds"] = math.ceil(limit * 1.1 + 1800)
        documents.append(
            {
                "apiVersion": "ray.io/v1",
                "kind": "RayCronJob",
                "metadata": {"name": name, "labels": labels(job)},
                "spec": {
                    "schedule": job.timetable.schedule.cron.line,
                    "timeZone": job.timetable.schedule.zone.key,
                    "jobTemplate": template,
                },
            }
        )
    return notes + "---\n".join(map(text, documents))


def ray_cluster(job: Job, cell: Cell, arguments: Arguments) -> dict[str, Any]:
    """A cluster for one firing of a cell: a head that drives and runs what comes after, and workers where any train.
    Where none do, all runs on the head, a search's trials one after another."""
    trains = job.step.run in TRAINS
    takes = job.step.takes
    own = takes_of([*job.after] if trains else [job.of(cell), *job.after])
    env = variables({}, job)

    def pod(name: str, cpus: float, gpus: float, memory: int) -> dict[str, Any]:
        amounts = {"cpu": _cpu(cpus), "memory": str(memory or int(max(1, cpus) * (4 << 30)))}
        amounts |= {"nvidia.com/gpu": str(math.ceil(gpus))} if gpus else {}
        container: dict[str, Any] = {
            "name": name, "image": arguments.image, "env": env,
            "resources": {"requests": amounts, "limits": amounts},
            "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],
        }  # fmt: skip
        volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
        if arguments.volume:
            container["volumeMounts"].append({"name": "data", "mountPath": "/data"})
            volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": arguments.volume}})
        return {"spec": {"containers": [container], "volumes": volumes}}

    if trains:
        own = Resources(max(2, own.cpus), own.gpus, own.memory and max(8 << 30, own.memory))
    cluster: dict[str, Any] = {
        "headGroupSpec": {
            # KubeRay's operator submits over the pod network, so the head listens beyond loopback.
            "rayStartParams": {"dashboard-host": "0.0.0.0"} | ({"num-cpus": "0", "num-gpus": "0"} if trains else {}),
            "template": pod("ray-head", own.cpus, own.gpus, own.memory),
        }
    }
    if trains:
        fewest, most = job.group(cell)
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "train", "replicas": most, "minReplicas": fewest, "maxReplicas": most,
                "rayStartParams": {}, "template": pod("ray-worker", takes.cpus, takes.gpus, takes.memory),
            }
        ]  # fmt: skip
    return cluster


def unmounted(job: Job, arguments: Arguments) -> list[str]:
    """The local paths in a job's commands, and that of runs where it names none, at which no volume is mounted."""
    cells = [job.of(cell) for cell in job.cells]
    words = [word for step in (*cells, *job.after) for word in step.command("RUN")]
    paths = {match[1] for word in words if (match := re.match(r"(?:[\w.-]+=)?(/.*)", word))}
    paths |= {"~/ssl-runs" for step in cells if step.run in TRAINS and "storage" not in step.arguments}
    return sorted(path for path in paths if not (arguments.volume and f"{path}/".startswith("/data/")))


def kubernetes_name(job: str, cell: str) -> str:
    """A name within 41 characters: KubeRay appends 6 for the RayJob that it makes of it, whose name may have 47."""
    safe = re.sub(r"[^a-z0-9]+", "-", f"ssl-{job}-{cell}".lower()).strip("-")
    if len(safe) <= 41 and safe == f"ssl-{job}-{cell}".rstrip("-"):
        return safe
    return f"{safe[:32].rstrip('-')}-{cell_name([job + '/' + cell])[-8:]}"


def _cpu(cpus: float) -> str:
    return f"{cpus:g}" if cpus == int(cpus) else f"{cpus * 1000:.0f}m"
