"""Train what a comparison lacks: every backbone with every objective, one after the other, each once."""

import shlex
from collections.abc import Sequence
from itertools import product

from pipeline import config as configuration
from pipeline.errors import UserError
from pipeline.training import launch
from pipeline.training.run_folder import RunFolder


def train_missing(
    backbones: Sequence[str], objectives: Sequence[str], *, data: str, storage: str, options: str = ""
) -> list[str]:
    """Run folders `<storage>/<backbone>-<objective>-<data>` of all pairs, those trained now that had not ended.

    A run that was cut short is continued. All are trained alike but for what the recipe of each gives.

    Args:
        options: more options of `pipeline.pretrain`, as typed there.

    Raises:
        UserError: an impossible option, or a run folder that was made with other ones.
        RuntimeError: a run was stopped.
    """
    asked = []
    for backbone, objective in product(backbones, objectives):
        words = ["--backbone", backbone, "--objective", objective, "--data", data, *shlex.split(options)]
        name = f"{backbone.replace('/', '_')}-{objective}-{launch.data_name(configuration.Config(data=data))}"
        run = f"{storage.rstrip('/')}/{name}"
        # All command lines are read before the first hour is spent on one of them.
        asked.append((run, configuration.parse([*words, "--run", run, "--storage", storage]), words))
    for run, config, words in asked:
        folder = RunFolder(run)
        if folder.exists("summary.json"):
            _refuse_another(folder, config)
            print(f"{run}: trained already", flush=True)
        elif launch.launch(config, [*words, "--run", run]):
            raise RuntimeError(f"{run}: was stopped; the same command goes on from there")
    return [run for run, _, _ in asked]


def _refuse_another(folder: RunFolder, config: configuration.Config) -> None:
    """Raise where a finished run was made with other options than those that are asked for now."""
    earlier = configuration.read(folder.read("config.yaml").decode(), folder.path("config.yaml"))
    if changes := configuration.differences(earlier, config):
        raise UserError(
            f"{folder.address}: was trained with other options ({'; '.join(changes)}); give another --storage"
        )
