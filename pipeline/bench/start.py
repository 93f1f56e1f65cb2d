"""What a command takes to answer where it has nothing to train: its help, and a mistake."""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.contender import Arguments, Bench


class Answer(NamedTuple):
    """Python from its start to its end, over words after `python` that are to end with one status."""

    title: str
    words: tuple[str, ...]
    status: int = 0

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Seconds, the second time, when the files are in the machine's memory.

        Raises:
            RuntimeError: it ended with another status.
        """
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *self.words], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            took = time.perf_counter() - started
            if done.returncode != self.status:
                raise RuntimeError(f"status {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        return took


PRETRAIN = ("-m", "pipeline.pretrain")

BENCH = Bench(
    "from the command to its answer",
    {
        "torch": Answer("`import torch` alone, for comparison", ("-c", "import torch")),
        "help": Answer("`--help`", (*PRETRAIN, "--help")),
        "options": Answer("`--objective mae --help`", (*PRETRAIN, "--objective", "mae", "--help")),
        "option": Answer("an option that is none", (*PRETRAIN, "--bachbone", "vit_s16"), status=2),
        "backbone": Answer("a backbone that is none", (*PRETRAIN, "--backbone", "vit_16s"), status=2),
        "data": Answer("images that are not there", (*PRETRAIN, "--data", "not-here/"), status=2),
    },
    limit=120,
    unit="s",
)
