"""What pretraining's command line asks for, and what of it is refused before anything is loaded.

Imports no torch, so that `--help` and every message about a mistake come at once.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from backbones import names
from pipeline import recipes
from pipeline.arguments import nearest, option, read
from pipeline.config import Config, load, nearest_size, of_run
from pipeline.errors import UserError
from pipeline.redaction import hide

EXAMPLES = """Examples:
  python -m pipeline.pretrain --backbone vit_s16
  python -m pipeline.pretrain --backbone resnet18 --objective mae --data photos/ --epochs 100
  ray job submit --working-dir . -- python -m pipeline.pretrain --backbone vit_s16 --data s3://photos --workers 2..8
  python -m pipeline.pretrain --resume runs/vit_s16-dino-photos-0712"""


def parse(argv: Sequence[str] | None = None, prog: str = "python -m pipeline.pretrain") -> Config:
    """The configuration that a command line asks for, with the recipe's part still open (None).

    Raises:
        UserError: an unknown option, objective or backbone, an impossible value, an unreadable `--config`, a `--resume`
            without a run.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    saved = Config(objective=recipes.objective_for(_peek(argv, "data") or Config.data))
    if path := _peek(argv, "config"):
        saved = dataclasses.replace(load(path), run=None, storage=None)
    elif run := _peek(argv, "resume"):
        saved = of_run(run)
    objective = _peek(argv, "objective") or saved.objective
    if objective not in recipes.OBJECTIVES:
        raise UserError(f"--objective {objective}: unknown{nearest(objective, recipes.OBJECTIVES)}")
    published = recipes.options_of(objective)
    kept = saved.options if objective == saved.objective else {}
    Options: Any = dataclasses.make_dataclass(
        "Options",
        [(key, option(_kind(value) | None, _published(value)), kept.get(key)) for key, value in published.items()],
    )
    Options.__doc__ = f"Options of {objective}; left open, the recipe's."
    parsed = read(
        Config,
        argv,
        prog,
        default=dataclasses.replace(saved, options=Options()),
        instead={"options": Options, "recipe": Annotated[str | None, tyro.conf.Suppress]},
        examples=EXAMPLES,
    )
    options = {key: value for key, value in dataclasses.asdict(parsed.options).items() if value is not None}
    if "teacher" in published:
        options["teacher"] = _teacher(options.get("teacher"))
    config = dataclasses.replace(parsed, options=options)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Raises:
        UserError: one sentence that names the option, its value and the way out.
    """
    try:
        names.resolve(config.backbone)
    except names.UnknownBackbone as error:
        raise UserError(f"--backbone {error}") from None
    for name in ("epochs", "batch_size", "image_size", "limit", "accumulate", "keep"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    patch = names.patch(config.backbone)
    if patch and config.image_size and config.image_size % patch:
        raise UserError(
            f"--image-size {config.image_size}: is no multiple of the patch of {config.backbone}, {patch} pixels; the "
            f"nearest is {nearest_size(config.image_size, config.backbone)}"
        )
    fewest, most = config.group
    if fewest < 1:
        raise UserError(f"--workers {config.workers}: must be at least 1")
    if fewest > most:
        raise UserError(f"--workers {config.workers}: the fewest come first, as in {most}..{fewest}")
    for name in ("lr", "checkpoint_every", "keep_every", "timeout"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if config.warmup is not None and not 0 <= config.warmup < 1:
        raise UserError(f"--warmup {config.warmup}: is a share of the run, from 0 to below 1")
    if config.batch_size is not None and config.batch_size % (most * config.accumulate):
        raise UserError(
            f"--batch-size {config.batch_size}: is global, so it must divide by --workers {most} "
            f"times --accumulate {config.accumulate}"
        )
    if config.engine == "local" and most > 1:
        raise UserError(f"--workers {config.workers}: --engine local is one process; use --engine ray")
    if ":" in config.data and recipes.generated(config.data):
        from pipeline.data.embedded import factor_of  # SciPy comes with it

        factor_of(config.data)
    for name in ("data", "val_data"):
        address = getattr(config, name)
        elsewhere = address and ("://" in address or address.startswith("$") or recipes.generated(address))
        if address and not elsewhere and not Path(address).exists():
            raise UserError(f"--{name.replace('_', '-')} {address}: no such file or folder")
    places = {name: getattr(config, name) for name in ("run", "storage", "resume", "init", "cache")}
    places |= {f"options.{name}": config.options.get(name) for name in ("teacher", "checkpoint")}
    for name, address in places.items():
        if address and "://" in str(address) and hide(address) != address:
            raise UserError(
                f"--{name.replace('_', '-')} {hide(address)}: credentials in this address would be written down; give "
                "them in the environment, as its own tools take them, or in ~/.config/fsspec"
            )


def _kind(value: Any) -> Any:
    """The type that the command line reads for an option with this published value."""
    if value is None:
        return int
    if isinstance(value, tuple):
        return tuple[(float,) * len(value)]  # type: ignore[misc]
    return type(value)


def _published(value: Any) -> str:
    """What the help says of an option with this published value."""
    return "" if value is None else f"Published: {' '.join(map(str, value)) if isinstance(value, tuple) else value}."


def _peek(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`, before the real parsing."""
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _teacher(address: str | None) -> str:
    """A teacher's address, absolute: workers run in other folders.

    Raises:
        UserError: there is none, or what there is can be no teacher.
    """
    if not address:
        raise UserError(
            "--options.teacher: left open; name a run folder, a checkpoint, a backbone.safetensors, or a backbone that "
            "timm has weights for"
        )
    if "://" in address:
        return address
    if Path(address).exists():
        return str(Path(address).resolve())
    try:
        names.resolve(address.removeprefix("random:"))
    except names.UnknownBackbone as error:
        raise UserError(f"--options.teacher {address}: no such run folder or file, and {error}") from None
    return address
