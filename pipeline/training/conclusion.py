"""What a run says at its start and at its end: ten lines, then the table, `summary.json`, and the lines to paste."""

import contextlib
import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from backbones import names
from pipeline import tracking
from pipeline.device import device_name
from pipeline.evaluation.measures import MEASURES
from pipeline.redaction import redact
from pipeline.training.run_folder import RunFolder
from pipeline.training.storage import patiently
from pipeline.training.worker import Job

LOG_WIDTH = 120
"""Of the table where there is no terminal to fit it to."""

INTERNAL = ("stopped", "unrecorded", "away", "taken", "run")
"""Of what comes back from the training, for the driver alone."""
FEW = 4
"""Cells along a side of the image, below which a ViT has next to nothing to relate; 14 is usual."""
VERSIONS = ("torch", "timm", "ray", "mlflow", "ffcv", "numpy")


def introduce(job: Job, folder: RunFolder, engine: str, note: str, uri: str) -> None:
    """Say what is about to run, in ten lines."""
    config, train, val = job.config, job.train, job.val
    seen, files = folder.checkpoints(), tracking.artifacts_of(uri, folder.address)
    lines = {
        "run": f"{folder.address}{f' (continued at {seen[-1]:,} images)' if seen else ''}",
        "backbone": config.backbone + few_cells(config.backbone, int(config.image_size or 0)),
        "objective": config.objective,
        "recipe": config.recipe,
        "train": f"{train.images:,} images, {len(train.classes) or 'no'} classes"
        + (f", {train.rejected_count:,} files left out (rejected.csv)" if train.rejected_count else ""),
        "val": f"{val.images:,} images" + (f" ({note})" if note else "") if val else "none: accuracy is not measured",
        "length": f"{config.epochs} epoch{'s' * (config.epochs != 1)} at batch {config.batch_size}, "
        f"{config.image_size} px, {config.optimiser} at learning rate {config.lr:.2g}",
        "engine": engine,
        "tracking": redact(uri) + (f", its files in {files}" if files else ""),
    }
    for name, value in lines.items():
        print(f"{name:>10}  {value}", flush=True)


def few_cells(backbone: str, size: int) -> str:
    """ " (2 x 2 cells of 16 pixels; vit_s4 sees 8 x 8)" where a ViT sees so little of such images, else ""."""
    vit = names.vit_size(backbone)
    if vit is None or size // vit[1] >= FEW:
        return ""
    side = size // vit[1]
    patch = max(p for p in range(1, max(size // 8, 1) + 1) if size % p == 0)
    finer = f"{backbone.removesuffix(str(vit[1]))}{patch} sees {size // patch} x {size // patch}"
    return f" ({side} x {side} cell{'s' * (side > 1)} of {vit[1]} pixels; {finer})"


def conclude(
    job: Job, folder: RunFolder, result: dict[str, Any], uri: str, run_id: str, seconds: float
) -> dict[str, Any]:
    """Write `summary.json`, tell MLflow, print the table and how to go on; returns the summary."""
    config = job.config
    final = {
        "knn_top1": result["knn_top1"],
        "linear_top1": result["linear_top1"],
        "peak_memory": result["peak_memory"],
        **{f"{floor}_{name}": value for floor in ("untrained", "pixels") for name, value in result[floor].items()},
    }
    tracker = tracking.Tracker(uri, run_id, run=folder.address, system_metrics=0)
    tracker.log({k: v for k, v in final.items() if isinstance(v, int | float)}, result["images_seen"])
    tracker.flush()
    if not tracker.pending and tracker.run_id != run_id:
        patiently(lambda: folder.write("mlflow_run_id", tracker.run_id), folder)
    summary = {
        "backbone": config.backbone,
        "objective": config.objective,
        **{key: value for key, value in result.items() if key not in INTERNAL},
        "rejected": job.train.rejected_count,
        "fingerprints": [one.fingerprint for one in (job.train, job.val) if one],
        "mlflow_run_id": None if tracker.pending else tracker.run_id,
        "config": folder.path("config.yaml"),
        "versions": {"python": platform.python_version(), **versions()},
        "device": device_name(job.device),
        "seconds": seconds,
    }
    before = json.loads(folder.read("summary.json")) if folder.exists("summary.json") else {}
    if "evaluations" in before:
        summary["evaluations"] = before["evaluations"]
    if before and summary["images_per_second"] is None:  # it had ended before: no step was left
        kept = (
            "images_per_second",
            "data_wait",
            "checkpoint_wait",
            "training_seconds",
            "peak_memory",
            "seconds",
            "vital_signs",
            "alarms",
            "decode_errors",
        )
        summary |= {key: before[key] for key in kept if key in before}
    patiently(lambda: folder.write_json("summary.json", summary), folder)
    tracker.log_artifact(folder.path("summary.json"))
    weights, made = folder.path("backbone.safetensors"), {"create": "backbones.create", **result["backbone_config"]}
    lines = usage(folder, summary["timm"])
    tracker.log_backbone(weights, made, lines)
    tracker.finish("FINISHED")
    table(summary)
    speed = ""
    if summary["images_per_second"] is not None:
        speed = (
            f"{summary['images_seen']:,} images in {summary['training_seconds']:.0f} s of training: "
            f"{summary['images_per_second']:.0f} images/s, {summary['data_wait']:.1%} of it waiting for data\n"
        )
    print(
        f"\n{speed}run folder   {folder.address}\n"
        f"checkpoint   {summary['checkpoint']}\n{lines}"
        f"look         mlflow ui --backend-store-uri {shlex.quote(redact(uri))}",
        flush=True,
    )
    return summary


def usage(folder: RunFolder, in_timm: str | None) -> str:
    """The lines that evaluate and that load a run's backbone, here and in timm (`in_timm` makes it), ready to paste."""
    file = folder.path("backbone.safetensors")
    lines = (
        f"evaluate     python -m pipeline.evaluate {shlex.quote(folder.address)}\n"
        f"load         import backbones; backbone = backbones.load({file!r})\n"
    )
    if in_timm and "://" not in file:
        lines += (
            f"in timm      import timm, safetensors.torch as st; model = {in_timm}; "
            f"model.load_state_dict(st.load_file({file!r}), strict=False)\n"
        )
    return lines


def table(summary: dict[str, Any]) -> None:
    """Print what was measured of the trained backbone, of the untrained one and of raw pixels, one row a measure; and
    what makes all of it too good."""
    columns = {
        f"{summary['backbone']} + {summary['objective']}": summary,
        "untrained": summary["untrained"],
        "raw pixels": summary["pixels"],
    }
    rows = Table("measured", box=None, header_style="bold")
    for name in columns:
        rows.add_column(name, justify="right")
    for measure in MEASURES:
        if not any(numbers.get(measure.key) is not None for numbers in columns.values()):
            continue
        cells = []
        for numbers in columns.values():
            text, interval = measure.text(numbers), measure.interval(numbers)
            unit = "%" if measure.factor == 100 and text != "–" else ""
            cells.append(f"{text}{unit}" + (f" [dim]({interval})[/]" if interval else ""))
        rows.add_row(measure.title, *cells)
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print("", rows)
    if copies := summary["duplicates"]:
        also = "image is also a training image" if copies == 1 else "images are also training images"
        print(f"{copies:,} validation {also}: all accuracies are somewhat too good")


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
