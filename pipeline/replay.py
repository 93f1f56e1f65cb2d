"""`python -m pipeline.replay BUNDLE`: take again the steps in which a run fell ill, from the state before them."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from pipeline.command import command
from pipeline.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Take again the steps in which a run fell ill, from the state before them, and compare them with what was seen."""

    bundle: Positional[str]
    """A file of a run's bundles/ folder."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Compute in another precision than the run did."""
    lr: float | None = None
    """Train with another learning rate than the run's."""
    data: str | None = None
    """The packed .beton, where it has moved since."""
    debug: bool = False
    """Show the traceback of an error."""


def replay(arguments: Arguments) -> bool:
    """Print each step beside what the run recorded; returns whether all are equal: the losses, and whether the gradient
    was finite.

    One process computes the whole batch, so for a run of several workers equal means close: 1 % of the loss.

    Raises:
        UserError: no bundle, or its images are no longer there.
    """

    from pipeline import config as configuration
    from pipeline.data.loader import make_loader
    from pipeline.device import here
    from pipeline.training.health import Care, Intervention
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.step import Stepper

    parent, _, name = arguments.bundle.rpartition("/")
    folder = RunFolder(parent or ".")
    if not folder.exists(name):
        raise UserError(f"{arguments.bundle}: no such file")
    state = folder.load_state(name)
    if "bundle" not in state:
        raise UserError(f"{arguments.bundle}: is a checkpoint, no bundle (those are in a run's bundles/)")
    told: dict[str, Any] = state["bundle"]
    config = configuration.read(state["config"], arguments.bundle)
    changes = {key: value for key in ("precision", "lr") if (value := getattr(arguments, key)) is not None}
    images = config.batch_of(told["world"])  # of a step
    config = dataclasses.replace(config, workers=1, **changes)
    data = arguments.data or told["train"]["path"]
    if not Path(data).exists():
        raise UserError(f"{data}: the packed images are not there; name the .beton with --data")

    stepper = Stepper(config, here())
    stepper.load(state)
    care = Care([Intervention(**one) for one in told["before"]])
    print(f"{told['sentence']}\nimages of the first step: {', '.join(map(str, told['indices']))}", flush=True)
    recorded = {row["images"]: row for row in told["rows"]}
    seen, equal = int(state["images_seen"]), list[bool]()
    with make_loader(
        data, stepper.objective.views, batch_size=images, seed=config.seed, backend=config.loader
    ) as loader:
        loader.load_state(state["loader"])
        for batch in loader:
            start, seen = seen, seen + len(batch.index)
            if not care.skips(start):
                values, _ = stepper(batch, start, told["planned"], care)
                row = {key: value.item() for key, value in values.items()}
                was = recorded.get(seen)
                said = f"{seen:>12,} images  loss {row['loss']:.6g}  gradient norm {row['grad_norm']:.4g}"
                if was is not None:
                    equal.append(
                        alike(row["loss"], was["loss"], 0.0 if told["world"] == 1 else 0.01)
                        and math.isfinite(row["grad_norm"]) == math.isfinite(was["grad_norm"])
                    )
                    said += f"  {'as' if equal[-1] else 'but'} recorded: {was['loss']:.6g}, {was['grad_norm']:.4g}"
                print(said, flush=True)
            if seen >= told["until"]:
                break
    reproduced = bool(equal) and all(equal)
    print("reproduced" if reproduced else "not reproduced: the steps differ", flush=True)
    return reproduced


def alike(one: float, other: float, tolerance: float) -> bool:
    """Whether two losses are the same: both not finite, or within `tolerance` of each other, relatively."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return not (math.isfinite(one) or math.isfinite(other))
    return abs(one - other) <= max(tolerance, 1e-6) * max(abs(one), abs(other))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 reproduced, 3 not reproduced, 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    return command(Arguments, "pipeline.replay", lambda arguments: 0 if replay(arguments) else 3, argv)


if __name__ == "__main__":
    sys.exit(main())
