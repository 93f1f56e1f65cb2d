"""Judge a run or one of its checkpoints: find its backbone and data, measure, and keep the result with the run."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from backbones import Backbone, names
from objectives.views import View
from pipeline import cluster, evaluation, recipes, tracking
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data import preparation
from pipeline.data.pack import Split
from pipeline.data.packed import Packed
from pipeline.device import here, placed, precision_of
from pipeline.errors import UserError
from pipeline.evaluation import duplicates, finetune, floors, table
from pipeline.evaluation.classifier import save
from pipeline.evaluation.evaluate import confusions
from pipeline.training import conclusion, launch, measure, step
from pipeline.training.run_folder import RunFolder

FLOORS = ("untrained", "pixels")


def judge(
    run: str,
    *,
    data: str | None = None,
    val_data: str | None = None,
    labels: str | None = None,
    protocols: Sequence[str] = evaluation.DEFAULT,
    limit: int | None = None,
    seed: int = 0,
    cache: str | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> dict[str, Any]:
    """Measure a backbone beside its floors; print the table, add to `summary.json`, and tell MLflow as children.
    `pretrained_on` of what is added is how many validation images the run had learnt from, None where that is unknown.

    Classifiers that are trained for it stay in the run's folder `classifiers/`, and what they took for what in
    `confusions/`, those of the latest evaluation.

    Args:
        run: address of a run folder (its newest checkpoint is judged) or of one checkpoint.
        data, val_data: as of pretraining; by default the run's own.
        labels: a table that takes the place of the labels that were packed, as `table.read` takes it.
        limit: learn from at most this many images.
        engine, workers: where features are extracted, as of `cluster.looking`.

    Raises:
        UserError: as of `find` and of `sets`.
    """
    own = None if labels is None else table.read(labels)
    if own:
        table.refuse(own, protocols)
    judged = find(run)
    folder, config, backbone, seen = judged[:4]
    assert folder is not None
    if data:
        config = replace(config, data=data, val_data=val_data, limit=None)
    config = replace(config, val_data=val_data or config.val_data, cache=cache or config.cache)
    train, val, note = sets(config, own, protocols)
    assert val is not None
    cached = preparation.cache_folder(config.cache)
    met = duplicates.met(judged.config, judged.trained_on, val, cache=cached)
    device = here()
    scores, found = evaluation.with_floors(
        placed(backbone, device), placed(floors.untrained(backbone.config, config.seed), device), train, val,
        image_size=int(config.image_size or 0), protocols=protocols, device=device, seed=seed, limit=limit,
        precision=precision_of(config, device), cache=cached / "features",
        table=own, look=cluster.looking(engine, workers),
    )  # fmt: skip
    name = launch.data_name(config) + (f" by {own.name}" if own else "")
    scores |= {
        "pretrained_on": met.count, "data": name, "labels": own.address if own else None, "checkpoint_images": seen,
        "fingerprints": [train.fingerprint, val.fingerprint], "seed": seed, "limit": limit,
    }  # fmt: skip
    print(f"{name}: {scores['train_images']:,} images to learn from, {scores['val_images']:,} to be judged on ({note})")
    conclusion.table({"backbone": config.backbone, "objective": config.objective, **scores})
    if said := met.sentence([f"{config.backbone} + {config.objective}"]):
        print(said)
    for protocol, takes in scores["lacking"].items():
        print(f"nothing by {protocol}: it takes {takes}")
    keep(folder, scores, protocols)
    called = name.replace(" ", "-")
    if tables := confusions(found, own.classes if own else train.classes):
        folder.write_json(f"confusions/{called}.json", tables)
        print(f"confusions   {shlex.quote(folder.path(f'confusions/{called}.json'))}")
    for protocol, classifier in found.classifiers.items():
        file = f"classifiers/{protocol}-{called}.safetensors"
        folder.write(file, save(classifier))
        print(f"classify     python -m pipeline.classify {shlex.quote(folder.path(file))} PHOTOS")
    return scores


def sets(config: Config, own: table.Table | None, protocols: Sequence[str]) -> Split:
    """The images to learn from and to be judged on; of images without labels in their folders, some are held out where
    a table `own` labels them, or where no protocol needs labels.

    Raises:
        UserError: a protocol needs labels and there are none, a table knows no image, both sets are the same, or there
            are too few images to hold some out.
    """
    split = preparation.prepare(config)
    needing = [name for name in protocols if evaluation.PROTOCOLS[name].labels or name in evaluation.BY_TABLE]
    labelled = split.train.classes and (split.val is None or split.val.classes)
    if own is None and needing and not labelled:
        raise UserError(
            f"--data {config.data}: has no labels, which --protocols {' '.join(needing)} cannot do without (class "
            "folders are labels; --labels takes a table); label_free, similarity, seeing and depth can"
        )
    split = split if split.val else preparation.prepare(config, hold_out=True)
    train, val, _ = split
    if val is None:
        raise UserError(f"--data {config.data}: too few images ({train.images:,}) to hold some out; give --val-data")
    if train.path == val.path or (train.fingerprint and train.fingerprint == val.fingerprint):
        raise UserError(
            f"--val-data {config.val_data or config.data}: holds the training images, so an accuracy on it says "
            "nothing; give other images to be judged on"
        )
    if own:
        own.of(train), own.of(val)
    return split


class Judged(NamedTuple):
    """A run or one of its checkpoints: where it is, how it was made, what came out, after how many images, the views
    that its objective took of each, and the fingerprint of the training set, which old checkpoints do not know. A
    backbone that nobody pretrained has no folder, images or views."""

    folder: RunFolder | None
    config: Config
    backbone: Backbone
    seen: int
    views: tuple[View, ...]
    trained_on: str | None = None

    def summary(self) -> dict[str, Any]:
        """What the run wrote when it ended; empty where it has not."""
        if self.folder is None or not self.folder.exists("summary.json"):
            return {}
        return dict(json.loads(self.folder.read("summary.json")))


def place(run: str) -> tuple[RunFolder, str | None]:
    """The folder of a run, and the name of the file in its `checkpoints/` where that was named in place of the run. A
    checkpoint that lies elsewhere has `FILE.run/` beside it for what is made of it.

    Raises:
        UserError: a file of weights, which do not say how they were trained.
    """
    folder = RunFolder(run)
    if not folder.filesystem.isfile(folder.root):
        return folder, None
    inside, _, name = folder.address.rpartition("/")
    if name.endswith(".safetensors"):
        raise UserError(
            f"{run}: holds weights alone, which do not say how they were trained; name a run folder, or one of its "
            "checkpoints (checkpoints/*.pt)"
        )
    inside, _, last = inside.rpartition("/")
    return RunFolder(inside if last == "checkpoints" else f"{folder.address}.run"), name


def find(run: str) -> Judged:
    """A run, at its newest checkpoint, or one of its checkpoints.

    Raises:
        UserError: there is none, or it is torn, foreign, or not what its configuration says.
    """
    folder, name = place(run)
    if name is not None:
        state = RunFolder(RunFolder(run).address.rpartition("/")[0]).load_state(name)
    elif kept := folder.checkpoints():
        state = folder.load_checkpoint(kept[-1])
    else:
        raise UserError(f"{run}: holds no checkpoint (looked for {folder.path('checkpoints')}/*.pt)")
    text, seen = state["config"], state.get("images_seen")
    if not isinstance(text, str) or not isinstance(seen, int):
        raise UserError(f"{run}: is no checkpoint of a run (it has no images_seen, or no configuration of ours)")
    config = configuration.read(text, run)
    objective = step.build(config)
    try:
        objective.load_state_dict(state["objective"])
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{run}: does not fit its own configuration ({str(error).splitlines()[-1].strip()[:150]})"
        ) from None
    trained_on = (state.get("train") or {}).get("fingerprint")
    return Judged(folder, config, objective.backbone, seen, tuple(objective.views), trained_on)


def fresh(config: Config, train: Packed) -> Judged:
    """A backbone that nobody pretrained, its weights drawn from the seed; where the image size is left open, at that of
    supervised training on such images."""
    scale = recipes.scale_of(config.data, train.images, preparation.median_side(train))
    recipe = recipes.find("supervised", names.family(config.backbone), scale)
    source = f"from scratch: {finetune.fresh_recipe_of(config.backbone).source}"
    size = config.image_size or configuration.nearest_size(recipe.image_size, config.backbone)
    config = replace(config, image_size=size, recipe=source)
    torch.manual_seed(config.seed)
    return Judged(None, config, measure.fresh_backbone(config), 0, ())


def merged(earlier: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores, and beside them those of other protocols that an earlier evaluation on as many images found."""
    if any(earlier.get(count) != scores[count] for count in ("train_images", "val_images")):
        return dict(scores)
    within = ("choices", "lacking", *FLOORS)
    return {**earlier, **scores, **{part: {**earlier.get(part, {}), **scores[part]} for part in within}}


def name_of(scores: Mapping[str, Any]) -> str:
    """What an evaluation is called among those of its run: alike where the same checkpoint was judged on the same
    images and labels with the same seed, learning from as many."""
    limit = "" if scores["limit"] is None else f", limit {scores['limit']}"
    which = " ".join([*scores["fingerprints"], scores["labels"] or ""])
    which = hashlib.blake2b(which.encode(), digest_size=4).hexdigest()
    return f"{scores['data']} at {scores['checkpoint_images']} images, seed {scores['seed']}{limit} ({which})"


def keep(folder: RunFolder, scores: Mapping[str, Any], protocols: Sequence[str]) -> None:
    """Add the scores to those in `summary.json` under `evaluations`, the latest last, and one child a protocol to the
    run in MLflow; say which of both was done."""
    places = []
    if folder.exists("summary.json"):
        summary = json.loads(folder.read("summary.json"))
        evaluations = summary.setdefault("evaluations", {})
        name = name_of(scores)
        evaluations[name] = merged(evaluations.pop(name, {}), scores)
        folder.write_json("summary.json", summary)
        places.append(f"in {shlex.quote(folder.path('summary.json'))}")
    if folder.exists("mlflow_run_id") and all(record(folder, scores, protocols)):
        places.append("as children of the run in MLflow")
    print(f"kept {' and '.join(places)}" if places else "not kept: the run has no summary.json before its end")


def record(folder: RunFolder, scores: Mapping[str, Any], protocols: Sequence[str]) -> list[str | None]:
    """The ids of one child a protocol of the run in MLflow, None for what waits to be delivered."""
    run_id = folder.read("mlflow_run_id").decode()
    uri = tracking.store_of(folder.address)
    tags = {key: str(scores[key]) for key in ("data", "seed", "limit") if scores[key] is not None}
    children = []
    for protocol in protocols:
        numbers = {key: value for key, value in scores.items() if key.startswith(f"{protocol}_")}
        for floor in FLOORS:
            headline = f"{protocol}_{evaluation.PROTOCOLS[protocol].headline}"
            numbers[f"{floor}_{headline}"] = scores[floor].get(headline)
        children.append(
            tracking.child_run(
                uri, run_id, name=protocol, tags={"protocol": protocol, **tags}, metrics=numbers,
                step=scores["checkpoint_images"], run=folder.address,
            )
        )  # fmt: skip
    return children
