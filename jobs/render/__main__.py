"""`python -m jobs.render JOB --to …`."""

import sys
from collections.abc import Sequence

from jobs import spec
from jobs.render import Arguments, render
from pipeline.command import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 a user's mistake."""

    def run(arguments: Arguments) -> int:
        print(render(spec.load(arguments.job, arguments.set), arguments), end="")
        return 0

    return command(Arguments, "jobs.render", run, argv)


if __name__ == "__main__":
    sys.exit(main())
