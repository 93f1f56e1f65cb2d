"""`python -m pipeline.compare RUN RUN ...`: which representation is better for these images, and why.

    python -m pipeline.compare --backbones resnet50 vit_s16 --objectives dino mae --data photos/

trains what is missing first.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pipeline.arguments import read
from pipeline.command import guarded, refuse_workers
from pipeline.errors import UserError
from pipeline.evaluation import BY_TABLE, COMPARED, NAMES


@dataclass(frozen=True)
class Arguments:
    """Examine trained backbones on the same images, test their differences, and write one report.

    The report is a single HTML file: the verdict in sentences, the numbers, the pictures, and what reproduces them.
    """

    runs: Positional[tuple[str, ...]] = ()
    """Run folders (their newest checkpoint counts), or checkpoints."""
    backbones: tuple[str, ...] = ()
    """Instead of runs, or beside them: backbones to train with every one of --objectives on --data, or none of them
    where --protocols is scratch alone."""
    objectives: tuple[str, ...] = ()
    """By which they are trained."""
    pretrain: str = ""
    """Further options of pipeline.pretrain for all of them, in quotes: "--epochs 50 --image-size 96"."""
    storage: str = "runs"
    """Where those runs go, and are found again."""
    data: str | None = None
    """Images to learn from, labelled where a protocol needs labels; left open: the runs' own. Any source that
    pretraining takes."""
    val_data: str | None = None
    """Images to be judged on; left open: a train/ + val/ pair, else a split by content."""
    labels: str | None = None
    """A table (.csv, .tsv) of labels in place of those of the folders: its first row names the columns, the first
    column holds paths. One column of classes; or for multilabel columns of 0 and 1, for regression quantities."""
    protocols: tuple[str, ...] = COMPARED
    """What to examine; attentive, finetune and scratch, which train for minutes, only where named; and with --labels
    multilabel, regression. label_free, similarity, seeing and depth need no labels."""
    limit: int | None = None
    """Learn from at most this many labelled images."""
    epochs: int | None = None
    """For finetune and scratch, which train the whole network, passes over those images; left open: their recipes'."""
    seed: int = 0
    """Of all that is drawn at random."""
    engine: Literal["ray", "local"] = "ray"
    """ray: missing runs are trained, and features extracted, on the cluster that is there, else in this process;
    local: in this process, without Ray."""
    workers: int | None = None
    """Processes that extract features; left open: one to a GPU, or to a machine, of the cluster that is there."""
    output: str | None = None
    """Folder of the report; left open: a fresh one beside the first run."""
    cache: str | None = None
    """Where packed data sets, and in features/ what backbones make of them, are kept, to be deleted at any time; left
    open: ~/.cache/ssl-pretraining."""
    debug: bool = False
    """Show the traceback of an error."""


def with_value(argv: Sequence[str], option: str) -> list[str]:
    """The command line with `option VALUE` as `option=VALUE`: its value begins with dashes of its own."""
    words = list(argv)
    if option in words[:-1]:
        i = words.index(option)
        words[i : i + 2] = [f"{option}={words[i + 1]}"]
    return words


def refuse(arguments: Arguments) -> None:
    """Raise `UserError` for what cannot be compared, before anything slow begins."""
    for name in arguments.protocols:
        if name not in NAMES:
            raise UserError(f"--protocols {name}: unknown; there are {', '.join(NAMES)}")
        if name in BY_TABLE and arguments.labels is None:
            raise UserError(f"--protocols {name}: needs --labels, a table of what every image has")
    refuse_workers(arguments.engine, arguments.workers)
    for run in arguments.runs:
        if "://" not in run and not Path(run).exists():
            raise UserError(f"{run}: no such run folder or checkpoint")
    scratch = set(arguments.protocols) == {"scratch"}
    if bool(arguments.backbones) != bool(arguments.objectives) and not (arguments.backbones and scratch):
        raise UserError(
            "--backbones and --objectives go together: every backbone is trained with every objective (none is needed "
            "where --protocols is scratch alone, which pretrains nothing)"
        )
    for option, value in (("--limit", arguments.limit), ("--epochs", arguments.epochs)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    if arguments.backbones and not arguments.data:
        raise UserError("--backbones: give --data to say what they are trained on")
    count = len(arguments.runs) + len(arguments.backbones) * max(1, len(arguments.objectives))
    if count < 2:
        raise UserError(f"a comparison needs at least two runs, not {count}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        words = with_value(argv, "--pretrain")
        arguments = read(Arguments, words, "python -m pipeline.compare")
        refuse(arguments)
        options = asdict(arguments)
        backbones, objectives, pretrain, runs, labels = (
            options.pop(name) for name in ("backbones", "objectives", "pretrain", "runs", "labels")
        )
        options.pop("debug")
        own = None
        if labels is not None:
            from pipeline.evaluation import table

            own = table.read(labels)
            table.refuse(own, arguments.protocols)
        asked, fresh = [], []
        if backbones:
            from pipeline.report import candidates

            more = f"{pretrain} --cache {shlex.quote(arguments.cache)}" if arguments.cache else pretrain
            more = f"--engine local {more}" if arguments.engine == "local" else more
            data, options["data"] = str(arguments.data), arguments.data if runs else None
            if objectives:
                asked = candidates.asked(backbones, objectives, data=data, storage=arguments.storage, options=more)
            else:
                fresh = candidates.untrained(backbones, data=data, options=more)
        from pipeline.report import contest, write  # torch comes with it, after all that can be refused without

        if asked:
            images = {name: options[name] for name in ("data", "val_data", "protocols", "cache")}
            contest.refuse(runs, [one.config for one in asked], table=own, **images)
        write.refuse(arguments.output, runs, arguments.storage)
        if asked:
            runs += tuple(candidates.train_missing(asked, storage=arguments.storage))
        write.compare(runs, **options, fresh=fresh, table=own, command=["python", "-m", "pipeline.compare", *argv])
        return 0

    return guarded(command, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
