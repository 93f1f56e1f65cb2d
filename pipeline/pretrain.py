"""`python -m pipeline.pretrain`: from images to a trained, measured backbone."""

import faulthandler
import sys
from collections.abc import Sequence

from pipeline import asked
from pipeline.command import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM, 75 so many machines
    are about to be taken away that too few are left."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        faulthandler.enable(sys.__stderr__ or 2)  # a data disk that fails ends the process (SIGBUS): not without a word
        configuration = asked.parse(argv)
        from pipeline.training.launch import launch  # torch comes with it, after all that can be refused without

        return launch(configuration, argv)

    return guarded(command, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
