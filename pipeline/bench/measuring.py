"""Every contender in a process of its own, by turns, and the table of what came of it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev

from pipeline.bench.contender import Arguments, Bench

STARTING = 120  # seconds a contender may take to import and to compile
SYNTHETIC = 256  # photographs drawn where no data is given


def measured(name: str, path: Path, arguments: Arguments, limit: float | None = None) -> float | str:
    """One contender's figure, in a process of its own that takes `limit` seconds at most, or why there is none."""
    command = [sys.executable, "-m", "pipeline.bench", arguments.bench, "--only", name, "--data", str(path)]
    for option in ("batch_size", "threads", "seconds"):
        if getattr(arguments, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "ssl"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit or STARTING + 4 * arguments.seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return "did not end"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return lines[-1]
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def rounds(bench: Bench, path: Path, arguments: Arguments) -> dict[str, list[float] | str]:
    """The figures of each contender, one to a round, or why it has none; every other round goes backwards."""
    figures: dict[str, list[float] | str] = {name: [] for name in bench.contenders}
    for turn in range(arguments.rounds):
        for name in list(bench.contenders)[:: -1 if turn % 2 else 1]:
            if isinstance(before := figures[name], str):
                continue  # it failed: once is enough
            figure = measured(name, path, arguments, bench.limit)
            figures[name] = figure if isinstance(figure, str) else [*before, figure]
            shown = figure if isinstance(figure, str) else f"{figure:.{2 if bench.unit == 's' else 1}f} {bench.unit}"
            print(f"round {turn + 1}: {bench.contenders[name].title}: {shown}", file=sys.stderr, flush=True)
    return figures


def machine() -> str:
    """Processor, cores and versions, as a table's caption."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    from pipeline.data.workers import cores

    versions = []
    for package in ("torch", "torchvision", "ffcv", "opencv-python-headless"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{model}, {cores()} core{'s' * (cores() != 1)}; Python {platform.python_version()}, {', '.join(versions)}"


def table(bench: Bench, figures: Mapping[str, list[float] | str], caption: str) -> str:
    """A Markdown table with the ratio to the first contender: of the best rounds, or of turns, with its interval."""
    yardstick = figures[next(iter(bench.contenders))]
    lines = [f"| {bench.job} | {bench.unit} | ratio |", "|---|---:|---:|"]
    for name, contender in bench.contenders.items():
        own = figures[name]
        if isinstance(own, str):
            lines.append(f"| {contender.title} | – ({own}) | – |")
            continue
        ratio = "–"
        if isinstance(yardstick, list):
            turns = bench.by_turns and own is not yardstick
            ratio = mean_ratio(own, yardstick) if turns else f"{bench.best(own) / bench.best(yardstick):.2f}"
        counts = mean(own) if bench.by_turns else bench.best(own)
        lines.append(f"| {contender.title} | {bench.words(counts)} | {ratio} |")
    return "\n".join([*lines, "", caption])


def mean_ratio(figures: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the ratios within a turn, and its 95 % interval by Student's t."""
    from scipy import stats

    ratios = [figure / other for figure, other in zip(figures, others, strict=True)]
    words = f"{mean(ratios):.3f}"
    if len(ratios) < 2:
        return words
    off = float(stats.t.ppf(0.975, len(ratios) - 1)) * stdev(ratios) / len(ratios) ** 0.5
    return f"{words} ({mean(ratios) - off:.3f} to {mean(ratios) + off:.3f})"


def draw_photographs(path: Path, images: int = SYNTHETIC) -> None:
    """JPEG files of the size and the detail of photographs, for a machine that has none."""
    import cv2
    import numpy as np

    from pipeline.data.beton import BetonWriter

    rng = np.random.default_rng(0)
    with BetonWriter(path, images) as writer:
        for n in range(images):
            height, width = (375, 500) if n % 4 else (500, 375)
            image = np.zeros((height, width, 3), np.float32)
            for octave in range(2, 9):  # amplitude falls with frequency, as in photographs
                coarse = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
                image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 2.0 ** (2 - octave)
            pixels = np.clip(128 + 50 * image, 0, 255).astype(np.uint8)
            jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            writer.write(jpeg, size=(height, width))


def describe(path: Path) -> str:
    """How many images of what size."""
    import numpy as np

    from pipeline.data.beton import BetonReader

    records = BetonReader(path).metadata
    height, width, size = (int(np.median(records[name])) for name in ("height", "width", "size"))
    return f"{len(records)} images, in the middle {width}x{height} pixels and {size / 1024:.0f} KB, in memory"
