"""`python -m jobs.arrivals --data FOLDER --run STORAGE/NAME-FIRING`: pretrain on what arrived since the last firing.

Takes every option of pretraining. The runs of one job differ in the firing that their names hold. Each keeps the list
of its images in its folder, `arrived/DATA.csv`; what stands in none of the finished runs' lists, by path and size, has
arrived: a file that was half copied one night comes whole the next, and one that is copied again as it was does not.
The new run begins with the newest earlier one (`--init`), finished or cut off with a checkpoint that was well: what a
night learnt in its time is not lost, though its images are still to come. The first one takes all there is.
"""

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.firing import FIRING
from pipeline import asked
from pipeline.command import guarded
from pipeline.config import Config, of_run
from pipeline.errors import UserError
from pipeline.redaction import hide

if TYPE_CHECKING:
    from pipeline.training.run_folder import RunFolder

LEAST = 16
"""Images that make a run; fewer wait for the next firing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns what pretraining does, and 0 where too little has arrived."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        configuration = asked.parse(argv, "python -m jobs.arrivals")
        from pipeline.training.launch import launch  # torch comes with it

        prepared = prepare(configuration)
        return 0 if prepared is None else launch(prepared, argv)

    return guarded(command, debug="--debug" in argv)


def prepare(configuration: Config) -> Config | None:
    """The configuration of this firing's run: its images, and the run it begins with; None where too few are new.

    Raises:
        UserError: the run's name holds no firing, or the data is no folder.
    """
    from pipeline.training.run_folder import RunFolder

    name = Path(configuration.run or "").name
    if not FIRING.search(name):
        raise UserError(f"--run {configuration.run}: must hold the firing, as in runs/nightly-20261124T013000Z")
    folder = RunFolder(str(configuration.run))
    listed = f"arrived/{Path(configuration.data.rstrip('/')).stem}.csv"
    before = earlier(folder.address)
    finished = [run for run in before if run.exists("summary.json")]
    last = next((run.address for run in reversed(before) if run in finished or goes_on(run)), None)
    if folder.exists("config.yaml"):  # an attempt at the same firing begins with the same run
        last = of_run(folder.address).init
    if not folder.exists(listed):  # and takes the same images
        known = {(row[0], *row[2:]) for run in finished for row in rows(run, listed)}
        new = [image for image in images(configuration.data) if (image[0], image[2]) not in known]
        since = f"since {Path(finished[-1].address).name}" if finished else "(the first run takes all)"
        print(f"{len(new):,} images have arrived {since}, {len(known):,} were there", flush=True)
        if len(new) < LEAST:
            print(f"fewer than {LEAST}: they wait for the next firing", flush=True)
            return None
        if last and last not in [run.address for run in finished]:
            print(f"it begins with what {Path(last).name} had learnt when it was cut off", flush=True)
        text = io.StringIO()
        csv.writer(text).writerows([("path", "label", "size"), *new])
        folder.write(listed, text.getvalue().encode(errors="surrogateescape"))
    return dataclasses.replace(configuration, data=folder.path(listed), init=last)


def earlier(address: str) -> list["RunFolder"]:
    """Runs of the same job and cell with an earlier firing, oldest first."""
    from pipeline.training.run_folder import RunFolder

    parent, _, name = address.rpartition("/")
    here = RunFolder(parent)
    pattern, firing = FIRING.sub("*", name, count=1), FIRING.search(name)
    assert firing
    found = []
    for path in here.filesystem.glob(f"{here.root}/{pattern}"):
        other = FIRING.search(path.rsplit("/", 1)[1])
        same = other and FIRING.sub("*", path.rsplit("/", 1)[1], count=1) == pattern
        if same and other and other[0] < firing[0]:
            found.append((other[0], f"{here.address}/{path.rsplit('/', 1)[1]}"))
    return [RunFolder(run) for _, run in sorted(found)]


def goes_on(run: "RunFolder") -> bool:
    """Whether a run that has not finished left weights to go on from: its newest checkpoint is whole, and was well."""
    kept = run.checkpoints()
    return bool(kept) and bool(run.facts_of(kept[-1]).get("well"))


def rows(run: "RunFolder", listed: str) -> list[list[str]]:
    """The (path, label, size) of each image in a run's list."""
    if not run.exists(listed):
        return []
    return list(csv.reader(io.StringIO(run.read(listed).decode(errors="surrogateescape"))))[1:]


def images(address: str) -> list[tuple[str, str, str]]:
    """The path, label and size in bytes of every image in a folder, the label empty where it has none."""
    from pipeline.data.remote import given
    from pipeline.data.source import LocalFolder, RemoteFolder, open_source

    place = given(address)
    if hide(place) != place:
        raise UserError(f"--data {address}: the list of what arrives would hold its credentials; give them elsewhere")
    source = open_source(place)
    if not isinstance(source, LocalFolder | RemoteFolder):
        raise UserError(
            f"--data {address}: is no folder of images, so what arrives in it cannot be told; give a folder"
        )
    wanted = source.wanted()
    items = [source.items[index] for index in wanted]
    keys = [f"{source.root}/{item.key}" for item in items]
    if isinstance(source, RemoteFolder):
        keys = [source.files.unstrip_protocol(key) for key in keys]
    else:
        keys = [str(Path(key).absolute()) for key in keys]
    return [(key, label or "", str(item.size)) for key, label, item in zip(keys, source.labels(wanted), items)]


if __name__ == "__main__":
    sys.exit(main())
