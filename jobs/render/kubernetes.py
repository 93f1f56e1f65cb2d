"""A CronJob of Kubernetes, and what its objects and KubeRay's have in common."""

from collections.abc import Mapping
from typing import Any

import yaml

from jobs.job import Job
from jobs.render.file import Arguments, gap, head, made_up, submission, webhook

POLICIES = {"skip": "Forbid", "wait": "Allow", "stop": "Allow", "allow": "Allow"}


def render(job: Job, arguments: Arguments) -> str:
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
    late = made_up(job.timetable, "Kubernetes", "the last is made up for within an hour", does="")
    return head(job) + gap(job.timetable, "Kubernetes") + late + text(document)


def variables(plain: Mapping[str, str], job: Job) -> list[dict[str, Any]]:
    """A container's environment: plain values, the job's among them, and references to a Secret with the others."""
    secret = {"name": f"ssl-{job.name}"}
    held = [{"name": name, "valueFrom": {"secretKeyRef": {**secret, "key": name}}} for name in job.secrets]
    if name := webhook(job):
        held.append({"name": name, "valueFrom": {"secretKeyRef": {**secret, "key": name, "optional": True}}})
    values = {**plain, **job.environment}
    return [*({"name": name, "value": kubernetes_word(value)} for name, value in values.items()), *held]


def kubernetes_word(word: str) -> str:
    """A word of a container's command or environment, in which $(NAME) would be replaced, and $$ be made $."""
    return word.replace("$", "$$")


def labels(job: Job) -> dict[str, str]:
    """Labels by which everything of a job is found."""
    return {"app.kubernetes.io/name": "ssl-pretraining", "app.kubernetes.io/instance": job.name}


def text(document: Any) -> str:
    """An object of Kubernetes as YAML."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
