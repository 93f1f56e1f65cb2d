"""`python -m pipeline.evaluate RUN`: how good a representation is, beside its untrained self and raw pixels."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pipeline.command import command, refuse_workers
from pipeline.errors import UserError
from pipeline.evaluation import BY_TABLE, DEFAULT, NAMES


@dataclass(frozen=True)
class Arguments:
    """Measure a trained backbone, by k-NN and linear accuracy or as asked, beside it untrained and raw pixels."""

    run: Positional[str]
    """A run folder, or one of its checkpoints; of one that lies elsewhere, what is kept is in FILE.run/ beside it."""
    data: str | None = None
    """Images to learn from, labelled where a protocol needs labels; left open: the run's own. Any source that
    pretraining takes."""
    val_data: str | None = None
    """Images to be judged on; left open: a train/ + val/ pair, else a split by content."""
    labels: str | None = None
    """A table (.csv, .tsv) of labels in place of those of the folders: its first row names the columns, the first
    column holds paths. One column of classes; or for multilabel columns of 0 and 1, for regression quantities."""
    protocols: tuple[str, ...] = DEFAULT
    """Of knn, linear, logistic, low_shot, retrieval, label_free, factors, layerwise, similarity,
    robustness, seeing, depth, attentive, finetune, scratch; and with --labels multilabel, regression. label_free,
    similarity, seeing and depth need no labels. What is a picture pipeline.compare draws."""
    limit: int | None = None
    """Learn from at most this many images."""
    seed: int = 0
    """Of all that is drawn at random."""
    engine: Literal["ray", "local"] = "ray"
    """ray: features are extracted on the cluster that is there, else in this process; local: in this process, without
    Ray."""
    workers: int | None = None
    """Processes that extract features; left open: one to a GPU, or to a machine, of the cluster that is there."""
    cache: str | None = None
    """Where packed data sets, and in features/ what backbones make of them, are kept, to be deleted at any time; left
    open: ~/.cache/ssl-pretraining."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""

    def run(arguments: Arguments) -> None:
        for name in arguments.protocols:
            if name not in NAMES:
                raise UserError(f"--protocols {name}: unknown; there are {', '.join(NAMES)}")
            if name in BY_TABLE and arguments.labels is None:
                raise UserError(f"--protocols {name}: needs --labels, a table of what every image has")
        refuse_workers(arguments.engine, arguments.workers)
        if arguments.limit is not None and arguments.limit < 1:
            raise UserError(f"--limit {arguments.limit}: must be at least 1")
        if "://" not in arguments.run and not Path(arguments.run).exists():
            raise UserError(f"{arguments.run}: no such run folder or checkpoint")
        from pipeline.evaluation.judge import judge  # torch comes with it, after all that can be refused without

        judge(**{name: value for name, value in asdict(arguments).items() if name != "debug"})

    return command(Arguments, "pipeline.evaluate", run, argv)


if __name__ == "__main__":
    sys.exit(main())
