"""`python -m jobs.render JOB --to …`: a job as a file that another scheduler takes.

    cron          a line for crontab
    systemd       a .service and a .timer, one after the other, each under its name
    kubernetes    a CronJob whose pod submits the firing to a cluster that is there (RAY_ADDRESS)
    raycronjob    KubeRay's RayCronJob (KubeRay >= 1.6, alpha), one to a cell: a cluster is made for each firing
    slurm         a script for sbatch: an array of the cells, each with a cluster of its own (`ray symmetric-run`)

cron, systemd and Kubernetes submit `--firing scheduled`: the newest firing of the schedule, under the id that anyone
else would give it. Every word of a command is quoted for what reads it. Secrets are names, never values.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import yaml
from tyro.conf import Positional

from jobs import spec
from jobs.entry_points import TRAINS
from jobs.job import Cell, Job, Timetable, cell_name
from jobs.schedule import DAYS
from pipeline.command import command
from pipeline.errors import UserError

PLAIN_PORT = 6379


@dataclass(frozen=True)
class Arguments:
    """Write a job as a file for another scheduler."""

    job: Positional[str]
    """A job file, or the name of one in jobs/."""
    to: Literal["cron", "systemd", "kubernetes", "raycronjob", "slurm"] | None = None
    """What reads it; has to be given."""
    image: str = "ssl-pretraining:latest"
    """The container that holds this code (kubernetes, raycronjob)."""
    address: str | None = None
    """The cluster's job API, http://HOST:8265 (cron, systemd, kubernetes); left open: RAY_ADDRESS where it runs."""
    folder: str = "."
    """Where this code lies on the machine that runs it (cron, systemd, slurm)."""
    volume: str | None = None
    """A persistent volume claim with data and runs, mounted at /data (raycronjob)."""
    set: tuple[str, ...] = ()
    """name=value: arguments that take the place of the file's."""
    debug: bool = False
    """Show the traceback of an error."""


def render(job: Job, arguments: Arguments) -> str:
    """The file's text.

    Raises:
        UserError: the job has no schedule, or the target cannot express something in it.
    """
    targets: Mapping[str, Callable[[Job, Arguments], str]] = {
        "cron": cron, "systemd": systemd, "kubernetes": kubernetes, "raycronjob": raycronjob, "slurm": slurm,
    }  # fmt: skip
    if arguments.to is None:
        raise UserError(f"--to: say what reads the file: {', '.join(targets)}")
    if arguments.to != "slurm" and job.timetable is None:
        raise UserError(
            f"{job.path}: has no schedule, which {arguments.to} needs; give it one: schedule: {{cron, time_zone}}"
        )
    for text in (*job.settings, arguments.folder, str(job.path), arguments.address or "", arguments.image):
        if "\n" in text or "\r" in text or "\0" in text:
            raise UserError(f"{text!r}: holds the end of a line, which a rendered file cannot; leave it out")
    return targets[arguments.to](job, arguments)


def submission(job: Job, arguments: Arguments) -> list[str]:
    """The words that submit the newest firing, after the interpreter."""
    words = ["-m", "jobs.submit", str(job.path), "--firing", "scheduled"]
    words += ["--address", arguments.address] if arguments.address else []
    return words + (["--set", *job.settings] if job.settings else [])


def head(job: Job, mark: str = "#") -> str:
    """The comment that every file begins with."""
    lines = [f"{job.name}: made from {job.path} by python -m jobs.render; change it there."]
    if job.timetable:
        schedule = job.timetable.schedule
        lines.append(f"{schedule.cron.line} in {schedule.zone.key}")
    if job.secrets:
        lines.append(f"It needs {', '.join(job.secrets)}; their values are kept elsewhere.")
    return "".join(f"{mark} {line}\n" for line in lines)


def gap(timetable: Timetable, who: str) -> str:
    """A warning where a scheduler leaves out what the clocks skip."""
    now = datetime.now(UTC)
    skipped = timetable.schedule.skipped(now, now + timedelta(days=366))
    if not skipped:
        return ""
    return (
        f"# {skipped[0]:%Y-%m-%d %H:%M} does not exist in {timetable.schedule.zone.key}: {who} skips that firing;\n"
        "# another time of day, or python -m jobs.scheduler, does not.\n"
    )


# --- cron and systemd -----------------------------------------------------------------------------------------------


def cron(job: Job, arguments: Arguments) -> str:
    """A line for crontab. cron ends a command at an unescaped %, so each is escaped."""
    assert job.timetable is not None
    schedule = job.timetable.schedule
    folder = shlex.quote(arguments.folder)
    shell = f"cd {folder} && exec {shlex.join(['.venv/bin/python', *submission(job, arguments)])}"
    return (
        head(job)
        + "# Debian's cron reads no CRON_TZ: there, the machine's own time zone must be this one.\n"
        + f"CRON_TZ={schedule.zone.key}\n"
        + f"{schedule.cron.line} {shell.replace('%', chr(92) + '%')}\n"
    )


def systemd(job: Job, arguments: Arguments) -> str:
    """A service and a timer."""
    assert job.timetable is not None
    if not arguments.folder.startswith("/"):
        raise UserError(f"--folder {arguments.folder}: systemd needs the whole path, as in --folder /srv/pretraining")
    words = [f"{arguments.folder.rstrip('/')}/.venv/bin/python", *submission(job, arguments)]
    service: dict[str, dict[str, str | list[str]]] = {
        "Unit": {"Description": f"Submit {job.name} to the Ray cluster", "Wants": "network-online.target",
                 "After": "network-online.target"},
        "Service": {"Type": "oneshot", "WorkingDirectory": arguments.folder.replace("%", "%%"),
                    "ExecStart": " ".join(map(systemd_word, words))},
    }  # fmt: skip
    if job.secrets:
        service["Service"]["EnvironmentFile"] = f"-%E/ssl-pretraining/{job.name}.env"
    timer: dict[str, dict[str, str | list[str]]] = {
        "Unit": {"Description": f"When {job.name} fires"},
        "Timer": {"OnCalendar": calendars(job.timetable), "Persistent": "true", "AccuracySec": "1s"},
        "Install": {"WantedBy": "timers.target"},
    }
    name = f"ssl-{job.name}"
    return (
        f"# --- {name}.service\n{head(job)}{_ini(service)}\n"
        f"# --- {name}.timer\n{head(job)}{gap(job.timetable, 'systemd')}{_ini(timer)}"
    )


def systemd_word(word: str) -> str:
    """A word of ExecStart: quoted, with systemd's own specifiers and variables made plain."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"'


def calendars(timetable: Timetable) -> list[str]:
    """The schedule in systemd's calendar language; where either kind of day suffices, one line for each."""
    cron = timetable.schedule.cron
    names = {number: name.capitalize() for name, number in DAYS.items()}
    weekdays = ",".join(names[day] for day in cron.weekdays)
    months, days = _numbers(cron.months, 12), _numbers(cron.days, 31)
    clock = f"{_numbers(cron.hours, 24)}:{_numbers(cron.minutes, 60)}:00 {timetable.schedule.zone.key}"
    if cron.either:
        return [f"*-{months}-{days} {clock}", f"{weekdays} *-{months}-* {clock}"]
    day = f"{weekdays} " if len(cron.weekdays) < 7 else ""
    return [f"{day}*-{months}-{days} {clock}"]


def _numbers(values: Sequence[int], every: int) -> str:
    return "*" if len(values) == every else ",".join(f"{value:02d}" for value in values)


def _ini(sections: Mapping[str, Mapping[str, str | list[str]]]) -> str:
    text = ""
    for section, entries in sections.items():
        text += f"\n[{section}]\n"
        for key, values in entries.items():
            text += "".join(f"{key}={value}\n" for value in (values if isinstance(values, list) else [values]))
    return text


# --- Kubernetes -----------------------------------------------------------------------------------------------------

POLICIES = {"skip": "Forbid", "wait": "Allow", "stop": "Allow", "allow": "Allow"}


def kubernetes(job: Job, arguments: Arguments) -> str:
    """A CronJob. Its pod is short: the firing runs in the cluster, where overlap is looked after."""
    assert job.timetable is not None
    schedule = job.timetable.schedule
    container = {
        "name": "submit",
        "image": arguments.image,
        "command": ["python", *map(kubernetes_word, submission(job, arguments))],
        "env": variables({"RAY_ADDRESS": "http://ray-head:8265"} if not arguments.address else {}, job),
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    }
    document = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"ssl-{job.name}", "labels": labels(job)},
        "spec": {
            "schedule": schedule.cron.line,
            "timeZone": schedule.zone.key,
            "concurrencyPolicy": POLICIES[job.timetable.overlap],
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 3,
                    "activeDeadlineSeconds": 1800,
                    "template": {
                        "metadata": {"labels": labels(job)},
                        "spec": {"restartPolicy": "Never", "containers": [container]},
                    },
                }
            },
        },
    }
    return head(job) + gap(job.timetable, "Kubernetes") + _yaml(document)


def raycronjob(job: Job, arguments: Arguments) -> str:
    """A RayCronJob for every cell. What comes after runs in the cell's own cluster, which ends with it."""
    assert job.timetable is not None
    together = [step.run for step in job.after if step.once]
    if together and len(job.cells) > 1 and not arguments.volume:
        raise UserError(
            f"{job.path}: {together[0]} comes after all cells, which need a volume that they share; give --volume CLAIM"
        )
    notes = head(job) + gap(job.timetable, "KubeRay")
    if job.timetable.overlap != "allow":
        notes += f"# RayCronJob cannot do overlap: {job.timetable.overlap}; firings may run side by side.\n"
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
        if job.time_limit:  # jobs.run keeps the limit itself, and leaves a checkpoint; this one is for when it hangs
            template["activeDeadlineSeconds"] = math.ceil(job.time_limit * 1.1 + 1800)
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
    return notes + "---\n".join(map(_yaml, documents))


def ray_cluster(job: Job, cell: Cell, arguments: Arguments) -> dict[str, Any]:
    """A cluster for one firing of a cell: a head that drives, and the workers that train, where there are any."""
    trains = job.step.run in TRAINS
    takes = job.step.takes
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

    head_takes = (2, 0, 8 << 30) if trains else (takes.cpus, takes.gpus, takes.memory)
    cluster: dict[str, Any] = {
        "headGroupSpec": {
            # KubeRay's operator submits over the pod network, so the head listens beyond loopback.
            "rayStartParams": {"dashboard-host": "0.0.0.0"} | ({"num-cpus": "0"} if trains else {}),
            "template": pod("ray-head", *head_takes),
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


def variables(plain: Mapping[str, str], job: Job) -> list[dict[str, Any]]:
    """A container's environment: plain values, the job's among them, and references to the secret of the others."""
    held = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": f"ssl-{job.name}", "key": name}}} for name in job.secrets
    ]
    values = {**plain, **job.environment}
    return [*({"name": name, "value": kubernetes_word(value)} for name, value in values.items()), *held]


def kubernetes_word(word: str) -> str:
    """A word of a container's command or environment, in which $(NAME) would be replaced, and $$ be made $."""
    return word.replace("$", "$$")


def kubernetes_name(job: str, cell: str) -> str:
    """A name that Kubernetes takes, within the 52 characters that leave room for what it appends."""
    safe = re.sub(r"[^a-z0-9]+", "-", f"ssl-{job}-{cell}".lower()).strip("-")
    if len(safe) <= 47 and safe == f"ssl-{job}-{cell}".rstrip("-"):
        return safe
    return f"{safe[:38].rstrip('-')}-{cell_name([job + '/' + cell])[-8:]}"


def labels(job: Job) -> dict[str, str]:
    """Labels by which everything of a job is found."""
    return {"app.kubernetes.io/name": "ssl-pretraining", "app.kubernetes.io/instance": job.name}


def _cpu(cpus: float) -> str:
    return f"{cpus:g}" if cpus == int(cpus) else f"{cpus * 1000:.0f}m"


def _yaml(document: Any) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# --- SLURM ----------------------------------------------------------------------------------------------------------


def slurm(job: Job, arguments: Arguments) -> str:
    """A script for sbatch. SLURM has no schedules of its own: scrontab, or cron, submits it."""
    takes = job.step.takes
    (fewest, most), *others = sorted({job.group(cell) for cell in job.cells})
    if others:
        raise UserError(
            f"{job.path}: its cells ask for different numbers of workers, and all tasks of a SLURM array get as many "
            "nodes; render it once for each, with --set workers=…"
        )
    cpus = math.ceil(takes.cpus) or 1
    options = [
        f"job-name=ssl-{job.name}",
        f"nodes={fewest}" if fewest == most else f"nodes={fewest}-{most}",
        "ntasks-per-node=1",
        f"cpus-per-task={cpus}",
        "exclusive",
    ]
    options += [f"gpus-per-node={math.ceil(takes.gpus)}"] if takes.gpus else []
    options += [f"mem={math.ceil(takes.memory / (1 << 20))}M"] if takes.memory else []
    options += [f"time={math.ceil(job.time_limit / 60) + 10}"] if job.time_limit else []
    options += [f"array=0-{len(job.cells) - 1}"] if len(job.cells) > 1 else []
    options += ["output=%x-%j.log"]
    firing = '"${FIRING:-scheduled}"' if job.timetable else '"${FIRING:-$(date -u +%Y%m%dT%H%M%SZ)}"'
    cells = " ".join(shlex.quote(cell.name) for cell in job.cells)
    words = [*map(shlex.quote, ["-m", "jobs.run", str(job.path)]), "--firing", firing, "--in-place"]
    words += ["--cell", '"${CELLS[${SLURM_ARRAY_TASK_ID:-0}]}"'] if len(job.cells) > 1 else []
    words += ["--set", *map(shlex.quote, job.settings)] if job.settings else []
    plain = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items())
    needed = "".join(f': "${{{name}:?is not set; export it before sbatch}}"\n' for name in job.secrets)
    return (
        "#!/usr/bin/env bash\n"
        + "".join(f"#SBATCH --{option}\n" for option in options)
        + head(job)
        + ("# By its schedule: scrontab, with the cron line above.\n" if job.timetable else "")
        + "# Exclusive: symmetric-run begins no second Ray on a machine, and ends all that is there (`ray stop`).\n"
        + f"""set -euo pipefail
cd {shlex.quote(arguments.folder)}
{plain}{needed}CELLS=({cells})
PORT=$(({PLAIN_PORT} + ${{SLURM_JOB_ID:-0}} % 1000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
BEGAN=$(mktemp -u)
srun --export=ALL ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus {cpus} -- \\
    bash -c 'touch "$0"; exec "$@"' "$BEGAN" python {" ".join(words)}
# symmetric-run ends with 0 where Ray does not start.
rm "$BEGAN" 2>/dev/null || {{ echo "nothing ran: Ray did not start, for the reason above" >&2; exit 1; }}
"""
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        print(render(spec.load(arguments.job, arguments.set), arguments), end="")
        return 0

    return command(Arguments, "jobs.render", run, argv)


if __name__ == "__main__":
    sys.exit(main())
