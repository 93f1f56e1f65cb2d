"""Backbones that a comparison names in place of runs: trained with every objective, each once, side by side on a
cluster; or left to be trained from scratch."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from pipeline import asked as command_line
from pipeline import cluster
from pipeline import config as configuration
from pipeline.command import stop_signals
from pipeline.data import preparation
from pipeline.errors import UserError
from pipeline.training import launch
from pipeline.training.run_folder import RunFolder

STOPPED = "was stopped; the same command goes on from there"
POLL = 0.5  # seconds between two looks at the processes that train


class Candidate(NamedTuple):
    """A run to be: its folder, its configuration, and the options it was read from."""

    run: str
    config: configuration.Config
    words: list[str]


def asked(
    backbones: Sequence[str], objectives: Sequence[str], *, data: str, storage: str, options: str = ""
) -> list[Candidate]:
    """Runs `<storage>/<backbone>-<objective>-<data>` of all pairs, alike but for what the recipe of each gives.

    Args:
        options: more options of `pipeline.pretrain`, as typed there.

    Raises:
        UserError: an impossible option.
    """
    found = []
    for backbone, objective in product(backbones, objectives):
        words = ["--backbone", backbone, "--objective", objective, "--data", data, *shlex.split(options)]
        name = f"{backbone.replace('/', '_')}-{objective}-{launch.data_name(configuration.Config(data=data))}"
        run = f"{storage.rstrip('/')}/{name}"
        words += ["--run", run]
        found.append(Candidate(run, command_line.parse([*words, "--storage", storage]), words))
    return found


def train_missing(asked: Sequence[Candidate], *, storage: str) -> list[str]:
    """The folders of those runs, of which those are trained now that had not ended.

    A run that was cut short is continued. On a cluster that is there, as many are trained at once as it has room for;
    else one after the other.

    Raises:
        UserError: a run folder that was made with other options.
        RuntimeError: a run was stopped, or failed beside others.
    """
    missing = []
    for one in asked:
        folder = RunFolder(one.run)
        if folder.exists("summary.json"):
            _refuse_another(folder, one.config)
            print(f"{one.run}: trained already", flush=True)
        else:
            missing.append(one)
    if len(missing) > 1 and missing[0].config.engine == "ray" and cluster.join():
        side_by_side(missing, storage)
    else:
        for one in missing:
            if launch.launch(one.config, one.words):
                raise RuntimeError(f"{one.run}: {STOPPED}")
    return [one.run for one in asked]


def side_by_side(missing: Sequence[Candidate], storage: str) -> None:
    """Train on the joined cluster, as many at once as it has room for, each from a process of its own on this machine.

    Of a run that fails the others take no notice. What each says is in `<run>.log`, below `runs/` where the storage is
    remote.

    Raises:
        RuntimeError: some failed, or all were stopped.
    """
    at_once = cluster.side_by_side(*missing[0].config.group)
    preparation.prepare(missing[0].config)  # packed here, once, and not by each at the same time
    folder = Path("runs" if "://" in storage else storage)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address()}
    waiting, failed = list(missing), []
    training: dict[str, tuple[subprocess.Popen[bytes], Path, float]] = {}
    with stop_signals() as stop:
        try:
            while (waiting or training) and not stop.wait(POLL):
                while waiting and len(training) < at_once:
                    one = waiting.pop(0)
                    log = folder / f"{Path(one.run).name}.log"
                    print(f"{one.run}: training begins (what it says: {log})", flush=True)
                    with log.open("ab") as said:
                        process = subprocess.Popen(
                            [sys.executable, "-m", "pipeline.pretrain", *one.words, "--storage", storage],
                            env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
                            start_new_session=True,  # Ctrl-C reaches it from here, once
                        )  # fmt: skip
                    training[one.run] = process, log, time.monotonic()
                for run, (process, log, begun) in list(training.items()):
                    if (status := process.poll()) is None:
                        continue
                    del training[run]
                    if status:
                        failed.append(run)
                        last = (log.read_text(errors="replace").strip().splitlines() or ["without a word"])[-1]
                        print(f"{run}: ended with status {status}: {last}", flush=True)
                    else:
                        print(f"{run}: trained in {time.monotonic() - begun:.0f} s", flush=True)
            for process, _, _ in training.values():
                process.terminate()
            for process, _, _ in training.values():
                process.wait()
        finally:
            for process, _, _ in training.values():
                process.kill()
    if stop.is_set():
        cut = [run for run, (process, _, _) in training.items() if process.returncode]
        raise RuntimeError(f"{', '.join([*cut, *(one.run for one in waiting)])}: {STOPPED}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} runs failed: {', '.join(failed)} (their logs are in {folder}/); the "
            "others are kept, and the same command tries these again"
        )


def untrained(backbones: Sequence[str], *, data: str, options: str = "") -> list[configuration.Config]:
    """Configurations of backbones that nobody pretrains; arguments as of `asked`.

    Raises:
        UserError: an impossible option.
    """
    words = ["--objective", "supervised", "--data", data, *shlex.split(options)]
    return [command_line.parse(["--backbone", backbone, *words]) for backbone in backbones]


def _refuse_another(folder: RunFolder, config: configuration.Config) -> None:
    """Raise where a finished run was made with other options than those that are asked for now."""
    earlier = configuration.of_run(folder.address)
    if changes := configuration.differences(earlier, config):
        raise UserError(
            f"{folder.address}: was trained with other options ({'; '.join(changes)}); give another --storage"
        )
