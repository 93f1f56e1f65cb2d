"""The experiment in MLflow's UI: one per data set, whose page links to the table that compares its runs.

The table as it opens shows no metric; the view that an experiment is created with, under "Views", sets a CNN beside a
ViT.
"""

import json
from typing import Any

from pipeline.tracking.store import now

COLUMNS = (
    *(f"tags.`{name}`" for name in ("backbone", "objective")),
    *(f"metrics.`{name}`" for name in ("knn_top1", "linear_top1", "untrained_knn_top1", "pixels_knn_top1")),
    *(f"metrics.`{name}`" for name in ("images_per_second", "data_wait", "loss")),
    *(f"params.`{name}`" for name in ("epochs", "batch_size", "image_size", "lr")),
)
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def find_or_create(client: Any, name: str, artifacts: str | None) -> str:
    """The id of the experiment of that name; artifacts of a new one lie at `artifacts`, or where MLflow puts them."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return _create(client, name, artifacts)
    except Exception:  # another run may have created it meanwhile
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def next_colour(client: Any, experiment: str) -> str:
    """Neighbours in a chart differ: the colour after that of the run begun last."""
    last = client.search_runs([experiment], "tags.kind = 'pretraining'", max_results=1, order_by=["start_time DESC"])
    colour = last[0].data.tags.get("mlflow.runColor", "") if last else ""
    return COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)] if colour in COLOURS else COLOURS[0]


def _create(client: Any, name: str, artifacts: str | None) -> str:
    """Create an experiment whose page says training rather than chats, and has our columns one click away."""
    state = {
        "searchFilter": "tags.kind = 'pretraining'",
        "orderByKey": "metrics.`knn_top1`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": COLUMNS,
        "columnOrder": COLUMNS,
        "columnWidths": dict.fromkeys(COLUMNS, 110),
        "runsHiddenMode": "FIRST_10_RUNS",
        "hideEmptyCharts": True,
    }
    view = {"name": "Comparison", "createdAt": now(), "state": json.dumps(state)}
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.sharedViewState.comparison": json.dumps(view),
    }
    experiment = str(client.create_experiment(name, artifacts, tags))
    link = f"#/experiments/{experiment}/runs?viewStateShareKey=comparison&workflowType=machine_learning"
    client.set_experiment_tag(experiment, "mlflow.note.content", f"[Compare the pretraining runs]({link})")
    return experiment
