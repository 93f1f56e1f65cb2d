"""What the entry points of jobs share: their command line."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pipeline.command import guarded


def command(arguments: Any, name: str, function: Callable[[Any], int], argv: Sequence[str] | None) -> int:
    """Parse a command line into a dataclass and call a function with it; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        import tyro

        kind = Annotated[arguments, tyro.conf.arg(name="")]
        return function(
            tyro.cli(kind, args=words, prog=f"python -m {name}", config=(tyro.conf.PositionalRequiredArgs,))
        )

    return guarded(run, debug="--debug" in words)
