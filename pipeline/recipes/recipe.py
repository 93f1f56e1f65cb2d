"""What a recipe is: hyper-parameters as data, with the source they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a bare command trains with.

    Args:
        source: the publication, or the measurement, the numbers come from.
        epochs, batch_size, image_size: length, global batch and pixels per side.
        optimiser: "adamw", "sgd", "lars" or "larc" (LARS that never exceeds the learning rate itself).
        base_lr: peak learning rate per 256 images of global batch.
        weight_decay, weight_decay_end: cosine from the first to the second (None: constant).
        warmup: share of the run over which the learning rate rises linearly.
        lr_end: learning rate at the end as a share of the peak.
        clip: largest norm of the gradient of all parameters together; None clips nothing.
        drop_path: stochastic depth of the student (Huang et al. 2016), for backbones that have it.
        options: keyword options of the objective, all of them.
    """

    source: str
    epochs: int
    batch_size: int
    image_size: int
    optimiser: str
    base_lr: float
    weight_decay: float
    weight_decay_end: float | None = None
    warmup: float = 0.1
    lr_end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    drop_path: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def embedded(
    options: Mapping[str, Any], *families: str, but: str = "", **changes: Any
) -> dict[tuple[str, str], Recipe]:
    """One recipe of the generated images for the given backbone families, by default both: a setting that all
    objectives share, with these `options`; `changes` replace its other numbers, and `but` says why it differs."""
    shared: dict[str, Any] = {
        "source": "chosen here for minutes on 2 CPU cores, one setting for all objectives: 192 small steps, heads of "
        "few hundred units, teachers that follow fast, colours kept where that is an option, for colour is what the "
        f"images are labelled by; unpublished, and not tuned for any of them{but and f', but {but}'}. What has been "
        "measured of it stands in README.md",
        "epochs": 3,
        "batch_size": 32,
        "image_size": 64,
        "optimiser": "adamw",
        "base_lr": 8e-3,
        "weight_decay": 0.04,
        "lr_end": 2e-3,
        "clip": 3.0,
    }
    recipe = Recipe(**{**shared, **changes}, options=options)
    return {(family, "embedded"): recipe for family in families or ("cnn", "vit")}
