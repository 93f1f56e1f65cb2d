"""`python -m pipeline.bench loader`: what the parts cost here, measured against their alternatives.

Every contender runs in a process of its own, under a time limit, several times by turns; its best round counts, since
whatever else a machine does can only slow a round down. Where a difference of one in a hundred is looked for, there is
one run, which is measured by turns.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench import engine, loader, photometric, start, step, watcher
from pipeline.bench.contender import Arguments
from pipeline.bench.measuring import describe, draw_photographs, machine, rounds, table
from pipeline.blocks import around, write
from pipeline.command import command
from pipeline.errors import UserError

BENCHES = {
    "loader": loader.BENCH,
    "photometric": photometric.BENCH,
    "step": step.BENCH,
    "engine": engine.BENCH,
    "watcher": watcher.BENCH,
    "start": start.BENCH,
}


def run(arguments: Arguments) -> int:
    """One contender's figure, or the whole table."""
    bench = BENCHES.get(arguments.bench)
    if bench is None:
        raise UserError(f"no bench is called {arguments.bench!r}: choose one of {', '.join(BENCHES)}")
    if arguments.only is not None:
        if arguments.only not in bench.contenders:
            raise UserError(f"--only {arguments.only}: choose one of {', '.join(bench.contenders)}")
        print(json.dumps(bench.contenders[arguments.only].figure(Path(arguments.data or ""), arguments)))
        return 0
    if arguments.write:
        around(Path(arguments.write), f"bench:{arguments.bench}")  # a wrong file is told before measuring
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path, caption = Path(folder) / "photographs.beton", ""
        if bench.unit == "images/s":
            caption = f"batches of {arguments.batch_size}, "
        if arguments.bench == "loader":
            if arguments.data is None:
                draw_photographs(path)
            else:
                from pipeline.data.pack import pack

                path = pack(arguments.data, folder).path
            caption = f"{describe(path)}; {caption}"
        figures = bench.by_turns(arguments) if bench.by_turns else rounds(bench, path, arguments)
    counted = f"best of {arguments.rounds} rounds" + f" of {arguments.seconds:g} s" * (bench.limit is None)
    if bench.by_turns:
        counted = f"means of {arguments.rounds} times {arguments.seconds:g} s by turns in one run, with 95 % intervals"
    text = table(bench, figures, f"{caption}{counted}; {machine()}.")
    print(text)
    if arguments.write:
        write(Path(arguments.write), f"bench:{arguments.bench}", text)
    return 1 if all(isinstance(figure, str) for figure in figures.values()) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    return command(Arguments, "pipeline.bench", run, argv)


if __name__ == "__main__":
    sys.exit(main())
