"""One run's configuration: what there is to ask for, what the recipe fills in, what `config.yaml` keeps."""

import dataclasses
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from backbones import names
from pipeline import recipes
from pipeline.arguments import nearest
from pipeline.errors import UserError
from pipeline.redaction import hide


@dataclass(frozen=True)
class Config:
    """Pretrain a backbone on images nobody labelled.

    What is left open is filled by the recipe for the objective, the backbone's family and the size of the data;
    the filled-in configuration is printed at the start and kept in the run folder as config.yaml.
    """

    backbone: str = "vit_s16"
    """lenet5, resnet18, efficientnet_b0, vit_s16 ... or a timm name; `python -m backbones` lists them."""
    objective: str = recipes.DEFAULT
    """The self-supervised objective; `python -m objectives` lists them. Left open: dino; for the generated images
    lejepa, which learns from them in minutes."""
    data: str = "embedded"
    """A folder, .tar, .parquet, .csv or .beton, here or at any fsspec address, or '$NAME' of a variable that holds it;
    "embedded" is a generated set, labelled by colour, "embedded:shape" by another factor."""
    val_data: str | None = None
    """Held-out images for the k-NN and linear accuracy. Left open: a train/ + val/ pair, else a split by content."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Global batch: images per optimiser step over all workers and accumulated parts."""
    image_size: int | None = None
    """Pixels per side of the (global) views."""
    lr: float | None = None
    """Peak learning rate, as it is; left open: the recipe's, scaled linearly with the batch."""
    optimiser: Literal["adamw", "sgd", "lars", "larc"] | None = None
    """larc: LARS with trust coefficient 0.02 whose local rate never exceeds the learning rate."""
    weight_decay: float | None = None
    """At the start; norms, biases and tokens never decay."""
    weight_decay_end: float | None = None
    """At the end, reached by a cosine."""
    warmup: float | None = None
    """Share of the run over which the learning rate rises."""
    lr_end: float | None = None
    """Learning rate at the end, as a share of the peak."""
    betas: tuple[float, float] | None = None
    """AdamW's."""
    clip: float | None = None
    """Largest gradient norm; 0 clips nothing."""
    drop_path: float | None = None
    """Stochastic depth of the student."""
    seed: int = 0
    """Of all that is drawn at random."""
    limit: int | None = None
    """Use at most this many training images."""
    workers: int | str = 1
    """Processes that train together, one to a GPU or a share of the cores; 2..8: as many as there are machines for."""
    timeout: float = 10.0
    """Minutes that a worker may keep the others waiting before training goes back to the newest checkpoint, and a data
    disk before it is named."""
    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Train, on the cluster that is there or on this machine; local: this process, without Ray."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp32."""
    compile: bool = False
    """Compile the step (torch.compile): slower start, faster steps."""
    accumulate: int = 1
    """Parts a worker's batch is computed in, to save memory."""
    loader: Literal["auto", "ffcv", "opencv"] = "auto"
    """What decodes and crops; auto: ffcv where it is installed."""
    knn_every: float | None = None
    """Epochs between measurements of k-NN accuracy while training; 0 for none, left open: ten over a long run."""
    checkpoint_every: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 2
    """Of the newest checkpoints, so many are kept."""
    keep_every: float | None = None
    """And one every so many epochs; left open: none for that."""
    keep_best: bool = True
    """And the one with the best online k-NN accuracy, which is taken when it is measured."""
    heal: bool = True
    """Go back to the last healthy checkpoint and change one thing where the loss is NaN, leaps, or collapses."""
    tracking: Literal["optional", "required"] = "optional"
    """required: refuse to begin while MLflow does not answer, and stop, with a checkpoint, where it is away for ten
    minutes; optional: what it is to be told waits."""
    run: str | None = None
    """Run folder; left open: a fresh, readable name below the storage."""
    storage: str | None = None
    """Where runs and tracking go, any fsspec address; left open: runs/, or in a cluster job ~/ssl-runs."""
    cache: str | None = None
    """Where packed data sets are kept; left open: ~/.cache/ssl-pretraining."""
    resume: str | None = None
    """Continue this run folder exactly where its last checkpoint stands."""
    init: str | None = None
    """Begin with the backbone and objective of this run's last checkpoint; all else begins anew."""
    config: str | None = None
    """A saved config.yaml, here or at any fsspec address, for a run of its own: all options of the file but --run and
    --storage, each overridden where it is given."""
    debug: bool = False
    """Show the traceback of an error."""
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    @property
    def group(self) -> tuple[int, int]:
        """The fewest and the most workers that may train.

        Raises:
            UserError: `workers` is neither a number nor two of them.
        """
        fewest, dots, most = str(self.workers).partition("..")
        if not (fewest.isdecimal() and (most.isdecimal() or not dots)):
            raise UserError(f"--workers {self.workers}: must be a number, or the fewest and the most, as in 2..8")
        return int(fewest), int(most or fewest)

    def batch_of(self, workers: int) -> int:
        """Images of a step of that many workers: `batch_size`, or the next below that they can share out equally."""
        batch = int(self.batch_size or 0)
        return batch - batch % (workers * self.accumulate)

    def planned(self, images: int) -> int:
        """Images of the whole run over a training set of `images`, whoever trains it: whole batches of every epoch."""
        batch = int(self.batch_size or 0)
        return int(self.epochs or 0) * (images // batch) * batch


SEAL = "# the lines above have the checksum "

# Options that say how or where to compute, not what: they may change when a run continues.
FREE_ON_RESUME = {
    *("workers", "timeout", "engine", "compile", "loader", "knn_every", "checkpoint_every", "keep"),
    *("keep_every", "keep_best", "heal"),
    *("tracking", "run", "storage", "cache", "resume", "config", "debug"),
}


def resolve(config: Config, *, images: int, side: int, classes: int = 0) -> Config:
    """Fill what is open from the recipe.

    Args:
        config: as parsed.
        images: training images there are.
        side: their median shorter side, pixels.
        classes: how many they are labelled by; 0 without labels.

    Raises:
        UserError: where labels or a checkpoint are needed and there are none, or the batch cannot be made to fit the
            data.
    """
    scale = recipes.scale_of(config.data, images, side)
    recipe = recipes.find(config.objective, names.family(config.backbone), scale)
    batch = config.batch_size or recipe.batch_size
    parts = config.group[1] * config.accumulate
    batch = min(batch, images)
    batch -= batch % parts
    if batch < 1:
        few = "1 image is" if images == 1 else f"{images} images are"
        raise UserError(
            f"--data {config.data}: {few} too few for --workers {config.workers} and --accumulate {config.accumulate}, "
            "each part of whose batch needs one"
        )
    values = _values(recipe, config.backbone, batch)
    filled = {key: value for key, value in values.items() if getattr(config, key) is None}
    options = dict(recipe.options) | config.options
    if "classes" in options:  # a labelled objective
        if not classes:
            raise UserError(f"--data {config.data}: has no labels, which --objective {config.objective} learns from")
        options["classes"] = classes
    if "checkpoint" in options:  # an objective that goes on from a trained run
        if not options["checkpoint"] or not Path(options["checkpoint"]).exists():
            raise UserError(
                f"--options.checkpoint {options['checkpoint'] or '(none)'}: --objective {config.objective} goes on "
                "from a trained run; name its folder or a .pt file in it"
            )
        options["checkpoint"] = str(Path(options["checkpoint"]).absolute())
    if config.weight_decay is not None and config.weight_decay_end is None:
        filled["weight_decay_end"] = config.weight_decay
    return dataclasses.replace(
        config,
        batch_size=batch,
        options=options,
        recipe=f"{config.objective}/{names.family(config.backbone)}/{scale}: {recipe.source}",
        **filled,
    )


def departures(config: Config) -> list[str]:
    """As `differences`, what a filled-in configuration has otherwise than the recipe that filled it; the learning rate
    follows the batch. Empty where that recipe is not known here."""
    try:
        recipe = recipes.find(*str(config.recipe).partition(":")[0].split("/"))
    except (KeyError, TypeError):
        return []
    asked = {name: config.options.get(name) for name, value in recipe.options.items() if value in (None, "")}
    values = _values(recipe, config.backbone, int(config.batch_size or 0)) | {"batch_size": recipe.batch_size}
    return differences(dataclasses.replace(config, **values, options={**recipe.options, **asked}), config)


def nearest_size(size: int, backbone: str) -> int:
    """The image size nearest to `size` that is a multiple of the backbone's patch, where its name tells one."""
    patch = names.patch(backbone) or 1
    return max(round(size / patch), 1) * patch


def _values(recipe: recipes.Recipe, backbone: str, batch: int) -> dict[str, Any]:
    """What a recipe fills in for that backbone and a batch of that size."""
    return {
        "epochs": recipe.epochs,
        "image_size": nearest_size(recipe.image_size, backbone),
        "lr": recipe.base_lr * batch / 256,
        "optimiser": recipe.optimiser,
        "weight_decay": recipe.weight_decay,
        "weight_decay_end": recipe.weight_decay if recipe.weight_decay_end is None else recipe.weight_decay_end,
        "warmup": recipe.warmup,
        "lr_end": recipe.lr_end,
        "betas": recipe.betas,
        "clip": recipe.clip or 0.0,
        "drop_path": recipe.drop_path,
    }


def without_secrets(config: Config) -> Config:
    """A configuration to write down: `***` stands for the credentials in the addresses of its data."""
    return dataclasses.replace(config, data=hide(config.data), val_data=config.val_data and hide(config.val_data))


def dump(config: Config) -> str:
    """A configuration as YAML, without secrets; tuples become lists."""
    plain = dataclasses.asdict(without_secrets(config))
    plain["betas"] = list(plain["betas"]) if plain["betas"] else None
    plain["options"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain["options"].items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def sealed(config: Config) -> str:
    """As `dump`, for a run folder: with a checksum (CRC-32), by which damage is found out."""
    text = dump(config)
    return f"{text}{SEAL}{zlib.crc32(text.encode()):08x}\n"


def of_run(address: str) -> Config:
    """The configuration of a run; where its `config.yaml` is damaged, that of its newest checkpoint, written anew.

    Raises:
        UserError: it is damaged, or missing, and there is no checkpoint.
    """
    path = f"{address.rstrip('/')}/config.yaml"
    try:
        return load(path, "--resume", sealed=True)
    except (UserError, FileNotFoundError) as error:
        from pipeline.training.mending import configuration_again  # torch comes with it

        return configuration_again(address, str(error) if isinstance(error, UserError) else f"{path}: is not there")


def load(path: str | Path, option: str = "--config", *, sealed: bool = False) -> Config:
    """Read a `config.yaml`, here or at any fsspec address.

    Args:
        option: what asked for it, for errors.
        sealed: it is to be as a run wrote it.

    Raises:
        UserError: a missing file, no YAML, a key that no option has, or a file that is not as it was written.
    """
    address = str(path)
    if "://" in address:
        from pipeline.data import remote  # OpenCV comes with it

        files, place, _ = remote.locate(address)
        content = files.cat_file(place)
    else:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{option} {address}: {error.strerror}") from None
    text = content.decode(errors="replace")
    if sealed:
        refuse_damaged(text, address)
    return read(text, address)


def refuse_damaged(text: str, name: str) -> None:
    """Raise `UserError` for a `config.yaml` that lacks its end, or is not as its checksum says it was written."""
    body, seal, checksum = text.rpartition(SEAL)
    if seal and checksum.strip() != f"{zlib.crc32(body.encode()):08x}":
        raise UserError(f"{name}: is not as it was written (its checksum is wrong)")
    if not re.search(r"^recipe: ", text, re.M):  # the last key
        raise UserError(f"{name}: has lost its end")


def read(text: str, name: str) -> Config:
    """A configuration from YAML; `name` is what errors call it.

    Raises:
        UserError: no YAML, or a key that no option has.
    """
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(plain, dict):
        raise UserError(f"{name}: holds no configuration")
    known = [f.name for f in dataclasses.fields(Config)]
    for key in plain:
        if key not in known:
            raise UserError(f"{name}: unknown key {key!r}{nearest(str(key), known)}")
    if plain.get("betas"):
        plain["betas"] = tuple(plain["betas"])
    plain["options"] = {k: tuple(v) if isinstance(v, list) else v for k, v in (plain.get("options") or {}).items()}
    return Config(**plain)


def differences(old: Config, new: Config) -> list[str]:
    """Sentences on what a continued run would change that it must not: "lr 0.001 → 0.002"."""
    before, after = (dataclasses.asdict(without_secrets(config)) for config in (old, new))
    lines = []
    for key, value in after.items():
        if key in FREE_ON_RESUME or key in ("recipe", "options") or value is None:
            continue
        if value != before[key]:
            lines.append(f"--{key.replace('_', '-')} {before[key]} → {value}")
    for key, value in after["options"].items():
        if before["options"].get(key) != value:
            lines.append(f"--options.{key.replace('_', '-')} {before['options'].get(key)} → {value}")
    return lines
