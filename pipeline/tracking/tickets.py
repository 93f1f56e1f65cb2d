"""Runs and evaluations as MLflow is asked for them, in requests that may be repeated.

A request is a plain dictionary with a random `ticket`, which the run keeps as a tag: an attempt that failed half-way is
found by it, and completed. Of a run that no store has taken yet, the packed request itself is the id.
"""

import base64
import json
import logging
import zlib
from collections.abc import Mapping
from typing import Any

from pipeline.redaction import redact
from pipeline.tracking import experiment as experiments
from pipeline.tracking.store import short

log = logging.getLogger(__name__)

PENDING = "pending."
PARAMS_PER_REQUEST = 100
REWOUND_TAG = "rewound"
TICKET_TAG = "mlflow.pretraining.ticket"  # tags below `mlflow.` are no columns in the UI


def pack(request: Mapping[str, Any]) -> str:
    """The ticket with which `resolve` creates a run later."""
    return PENDING + base64.urlsafe_b64encode(zlib.compress(json.dumps(request).encode(), 9)).decode()


def resolve(client: Any, run_id: str) -> str:
    """The id of a run that the store holds, which a ticket gets here at the latest."""
    if not run_id.startswith(PENDING):
        client.get_run(run_id)
        return run_id
    return create(client, json.loads(zlib.decompress(base64.urlsafe_b64decode(run_id.removeprefix(PENDING)))))


def create(client: Any, request: Mapping[str, Any]) -> str:
    """Create a run as `start_run` asks for it, or complete the one an earlier attempt created; gives its id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    experiment = experiments.find_or_create(client, request["experiment"], request["artifacts"])
    run = _made(client, experiment, request["ticket"])
    if run is None:
        tags = {TICKET_TAG: request["ticket"], "mlflow.runColor": experiments.next_colour(client, experiment)}
        run = client.create_run(experiment, request["start"], request["tags"] | tags, request["name"])
    run_id = str(run.info.run_id)
    params = [Param(key, value) for key, value in request["params"].items()]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
    if data := request["dataset"]:
        path = redact(str(data["path"]))
        listed = Dataset(
            name=redact(data["name"])[:500],
            digest=str(data["digest"])[:36],
            source_type=path.split("://")[0] if "://" in path else "local",
            source=json.dumps({"uri": path}),
            profile=json.dumps({"num_rows": data["images"], "classes": data["classes"]}),
        )
        client.log_inputs(run_id, [DatasetInput(listed, [InputTag("mlflow.data.context", "pretraining")])])
    if request["config"]:
        try:
            client.log_text(run_id, request["config"], "config.yaml")
        except Exception as error:  # the artifact store is another service, often with other permissions
            log.warning("MLflow did not keep config.yaml (%s).", short(error))
    return run_id


def create_evaluation(client: Any, parent_run_id: str, request: Mapping[str, Any]) -> str:
    """Create a run below another as `child_run` asks for it, or complete an earlier attempt's; gives its id."""
    from mlflow.entities import Metric

    parent = client.get_run(parent_run_id)
    run = _made(client, parent.info.experiment_id, request["ticket"])
    if run is None:
        shared = {key: value for key, value in parent.data.tags.items() if not key.startswith("mlflow.")}
        for own in ("resumed_at", REWOUND_TAG):
            shared.pop(own, None)
        if colour := parent.data.tags.get("mlflow.runColor"):
            shared["mlflow.runColor"] = colour
        named = {"kind": "evaluation", "mlflow.runName": f"{request['name']} of {parent.info.run_name}"}
        placed = {"mlflow.parentRunId": parent_run_id, TICKET_TAG: request["ticket"]}
        tags = shared | named | placed | request["tags"]
        name = tags.pop("mlflow.runName")
        run = client.create_run(parent.info.experiment_id, request["time"], tags, name)
    metrics = [Metric(key, value, request["time"], request["step"]) for key, value in request["metrics"].items()]
    client.log_batch(run.info.run_id, metrics)
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def _made(client: Any, experiment: str, ticket: str) -> Any:
    """The run that an earlier attempt with this ticket created, None without one."""
    found = client.search_runs([experiment], f"tags.`{TICKET_TAG}` = '{ticket}'", max_results=1)
    return found[0] if found else None
