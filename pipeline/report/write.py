"""`python -m pipeline.compare`, from its arguments to the report on disk and in MLflow."""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from pipeline import tracking
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation import classifier, judge
from pipeline.evaluation.table import Table
from pipeline.redaction import redact
from pipeline.report import contest as contests
from pipeline.report import numbers, page, pictures, verdict
from pipeline.report.contest import Contest
from pipeline.report.cost import Cost


def compare(
    runs: Sequence[str],
    *,
    fresh: Sequence[Config],
    storage: str,
    data: str | None,
    val_data: str | None,
    table: Table | None,
    protocols: Sequence[str],
    limit: int | None,
    epochs: int | None,
    seed: int,
    cache: str | None,
    engine: str,
    workers: int | None,
    output: str | None,
    command: list[str],
) -> Contest:
    """Examine the runs, print the verdict, write `report.html`, `numbers.json`, `pictures/` and what classifiers were
    trained into `output`, and tell MLflow.

    Raises:
        UserError: as of `contest.hold`.
    """
    held = contests.hold(
        runs, fresh=fresh, data=data, val_data=val_data, table=table, protocols=protocols, limit=limit, epochs=epochs,
        seed=seed, cache=cache, engine=engine, workers=workers,
    )  # fmt: skip
    around = beside(runs, storage)
    name = f"comparison-{held.data.replace(' ', '-')}-{datetime.now():%m%d-%H%M%S}"
    folder = Path(output) if output else around / name
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    drawn = list(pictures.pictures(held))
    for picture in drawn:
        file, content = picture.file()
        (folder / "pictures" / file).write_bytes(content)
    (folder / "report.html").write_text(page.render(held, drawn, command), encoding="utf-8")
    (folder / "numbers.json").write_text(json.dumps(numbers.as_json(held), indent=2, ensure_ascii=False) + "\n")
    print()
    for sentence in verdict.sentences(held, verdict.claims(held)):
        print(sentence)
    for line in verdict.unfair(held):
        print(f"not alike: {line}")
    for protocol, takes in held.lacking.items():
        print(f"nothing by {protocol}: it takes {takes}")
    print(f"\nreport       {folder / 'report.html'}")
    for weights in keep_classifiers(held, folder / "classifiers"):
        print(f"classify     python -m pipeline.classify {shlex.quote(str(weights))} PHOTOS")
    track(held, folder, around / name)
    return held


def beside(runs: Sequence[str], storage: str) -> Path:
    """The folder that holds the first run, or will; `runs/` where that is remote."""
    address = judge.place(runs[0])[0].address.rpartition("/")[0] if runs else storage
    return Path("runs" if "://" in address else address)


def refuse(output: str | None, runs: Sequence[str], storage: str) -> None:
    """Raise `UserError` where a report, or what MLflow does not take of it, could not be written."""
    for folder in [beside(runs, storage), *([Path(output)] if output else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); name another --output or --storage"
            ) from None


def keep_classifiers(held: Contest, folder: Path) -> Iterator[Path]:
    """Write every classifier that was trained on a backbone of the contest, and name its file."""
    for one in held.entries:
        for protocol, trained in one.trained.classifiers.items():
            folder.mkdir(exist_ok=True)
            file = folder / f"{one.slug}-{protocol}.safetensors"
            file.write_bytes(classifier.save(trained))
            yield file


def spent(cost: Cost) -> dict[str, float | None]:
    """What a backbone and its pretraining cost, by the names of metrics; None where that is not known."""
    return {
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "inference_images_per_second": cost.inference,
        "images_seen": cost.images_seen,
        "pretraining_multiply_adds": cost.compute,
        "images_per_second": cost.training,
        "pretraining_hours": cost.hours(),
    }


def track(held: Contest, folder: Path, place: Path) -> None:
    """One parent run in MLflow with the report and its pictures, below it a child for each backbone, all with the same
    metric names.

    Args:
        folder: of the report.
        place: a folder beside the runs, recorded where they are; there waits what MLflow does not take now.
    """
    uri = tracking.store_of(str(place))
    parent = tracking.start_run(
        uri,
        experiment=held.data,
        name=f"comparison of {len(held.entries)}",
        tags={"kind": "comparison", "data": held.data},
        params={
            "protocols": " ".join(held.protocols),
            "seed": held.seed,
            "limit": held.limit,
            "epochs": held.epochs,
            "labels": held.table.address if held.table else None,
        },
        dataset={
            "name": held.data,
            "digest": held.fingerprints[0],
            "path": held.address,
            "images": held.train_images,
            "classes": len(held.classes),
        },
        config_path=None,
        run=str(place),
    )
    place.mkdir(parents=True, exist_ok=True)
    (place / "mlflow_run_id").write_text(parent)
    headlines = {verdict.headline(name) for name in held.protocols}
    for one in held.entries:
        metrics = {k: v for k, v in one.trained.numbers.items() if v is not None and v == v}  # NaN is no metric
        for floor, found in (("untrained", one.untrained), ("pixels", one.pixels)):
            known = {key: found.numbers.get(key) for key in headlines}
            metrics |= {f"{floor}_{key}": value for key, value in known.items() if value is not None and value == value}
        metrics |= {key: value for key, value in spent(one.cost).items() if value is not None}
        tags = {
            "backbone": one.config.backbone,
            "objective": one.config.objective if one.run else "from scratch",
            "family": one.family,
            "data": held.data,
            "run_folder": one.run or "",
            "mlflow.runName": one.name,
        }
        seen = one.cost.images_seen
        tracking.child_run(uri, parent, name=one.name, tags=tags, metrics=metrics, step=seen, run=str(place))
    tracker = tracking.Tracker(uri, parent, run=str(place), system_metrics=0)
    for name in ("report.html", "numbers.json"):
        tracker.log_artifact(folder / name)
    for picture in sorted((folder / "pictures").iterdir()):
        tracker.log_artifact(picture, "pictures")
    tracker.finish("FINISHED")
    print(f"in MLflow    mlflow ui --backend-store-uri {shlex.quote(redact(uri))}   (experiment {held.data})")
