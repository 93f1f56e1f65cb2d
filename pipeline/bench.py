"""`python -m pipeline.bench loader`: what the parts cost here, measured against their alternatives.

Every contender runs in a process of its own, under a time limit, several times by turns; its best round counts, since
whatever else a machine does can only slow a round down.
"""

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.blocks import around, write
from pipeline.command import guarded
from pipeline.errors import UserError

if TYPE_CHECKING:
    from objectives.views import View

STARTING = 120  # seconds a contender may take to import and to compile
SYNTHETIC = 256  # photographs drawn where no data is given


@dataclass(frozen=True)
class Arguments:
    """Measure a part of the pipeline on this machine: images of the source per second."""

    bench: str
    """loader: JPEG files to views. photometric: views to what the network reads, on this machine's CPU. engine: whole
    training steps, with Ray and without."""
    data: str | None = None
    """Images to measure with: anything `pipeline.pack` takes; left open: photographs drawn for the purpose."""
    batch_size: int = 32
    """Images of a batch."""
    threads: int | None = None
    """Threads or processes of each contender; left open: one to a core."""
    seconds: float = 5.0
    """How long a round measures."""
    rounds: int = 3
    """Rounds of each contender; the best counts."""
    write: str | None = None
    """A file whose block `<!-- bench:NAME -->` … `<!-- /bench:NAME -->` takes the table."""
    only: str | None = None
    """Measure this one contender in this process and print its figure."""
    debug: bool = False
    """Show the traceback of an error."""


class Contender(NamedTuple):
    """One way to do the job. `batches` yields the number of images that it has just finished, for ever."""

    title: str
    batches: Callable[[Path, Arguments], Iterator[int]]

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Images per second."""
        return rate(self.batches(path, arguments), arguments.seconds)


class Training(NamedTuple):
    """A whole pretraining run on one engine."""

    title: str
    options: tuple[str, ...]

    def figure(self, path: Path, arguments: Arguments) -> float:
        """Images per second of its steps, from the first to the last."""
        from pipeline import pretrain

        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            run = str(Path(folder) / "run")
            fixed = ("--limit", "1024", "--batch-size", str(arguments.batch_size), "--knn-every", "0", "--run", run)
            if pretrain.main([*TRAINING, *fixed, "--storage", folder, *self.options]):
                raise RuntimeError("the run failed")
            return float(json.loads((Path(run) / "summary.json").read_text())["images_per_second"])


class Bench(NamedTuple):
    """Contenders for one job, the first of which is the yardstick of the ratios."""

    job: str
    contenders: Mapping[str, Contender | Training]


TRAINING = ("--backbone", "vit_ti16", "--image-size", "64", "--epochs", "2")
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray_p": 0.2}


def views(photometric: bool = False) -> list["View"]:
    """DINO's multi-crop: two views of 224 pixels and eight of 96, with BYOL's colours where asked for."""
    from objectives.views import Photometric, View

    def colours(**more: float) -> Any:
        return Photometric(**{**JITTER, **more}) if photometric else None  # type: ignore[arg-type]

    return [
        View("global", (224, 224), (0.25, 1.0), photometric=colours(blur_p=1.0)),
        View("global", (224, 224), (0.25, 1.0), photometric=colours(blur_p=0.1, solarize_p=0.2)),
        *[View("local", (96, 96), (0.05, 0.25), photometric=colours(blur_p=0.5))] * 8,
    ]


# Loader ---------------------------------------------------------------------------------------------------------------


def ours(backend: str) -> Callable[[Path, Arguments], Iterator[int]]:
    """This project's loader."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        from pipeline.data.loader import make_loader

        with make_loader(
            path,
            views(),
            batch_size=arguments.batch_size,
            threads=_threads(arguments),
            backend=backend,  # type: ignore[arg-type]
        ) as loader:
            for batch in loader:
                yield len(batch.index)

    return batches


class _Photographs:
    """The data set of torchvision's contender: PIL decodes, every view is cropped, resized and flipped on its own."""

    def __init__(self, path: Path) -> None:
        from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip
        from torchvision.transforms import RandomResizedCrop as Crop

        from pipeline.data.beton import BetonReader

        self.reader = BetonReader(path)
        bicubic = InterpolationMode.BICUBIC
        self.transforms = [
            Compose([Crop(view.size, view.scale, interpolation=bicubic), RandomHorizontalFlip(), PILToTensor()])
            for view in views()
        ]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> list[Any]:
        from PIL import Image

        image = self.reader.read(index)[0]
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
        picture = picture.convert("RGB")
        return [transform(picture) for transform in self.transforms]


def torchvision_loader(path: Path, arguments: Arguments) -> Iterator[int]:
    """The plain way: a `DataLoader` of processes, torchvision's transforms on Pillow images."""
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Photographs(path),  # type: ignore[arg-type]
        arguments.batch_size,
        shuffle=True,
        num_workers=_threads(arguments),
        drop_last=True,
        persistent_workers=True,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    while True:
        for batch in loader:
            yield len(batch[0])


def decoding(path: Path, arguments: Arguments) -> Iterator[int]:
    """libjpeg-turbo alone: what no loader that decodes each image can exceed."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from pipeline.data.beton import JPEG, BetonReader

    records, data = (reader := BetonReader(path)).metadata, np.asarray(reader.data)
    jpegs = [record for record in records if record["mode"] == JPEG]
    if not jpegs:
        raise UserError(f"{path} holds no JPEG: there is nothing to decode")
    rooms, largest = threading.local(), max(3 * int(r["height"]) * int(r["width"]) for r in jpegs)
    decode = _decoder()

    def work(record: Any) -> None:
        if not hasattr(rooms, "room"):
            rooms.room = np.empty(largest, np.uint8)
        start = int(record["data_ptr"])
        decode(data[start : start + int(record["size"])], int(record["height"]), int(record["width"]), rooms.room)

    with ThreadPoolExecutor(_threads(arguments)) as pool:
        while True:
            for first in range(0, len(jpegs), arguments.batch_size):
                batch = jpegs[first : first + arguments.batch_size]
                list(pool.map(work, batch))
                yield len(batch)


def _decoder() -> Callable[..., Any]:
    try:
        from pipeline.data.ffcv_loader import decode

        return decode
    except (ImportError, OSError):
        from pipeline.data.opencv_loader import decode as with_opencv

        return lambda data, height, width, room: with_opencv(data)


# Photometric changes --------------------------------------------------------------------------------------------------


def _uint8_views(arguments: Arguments) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for view in views():
        coarse = torch.rand(arguments.batch_size, 3, 8, 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, view.size, mode="bicubic").clamp(0, 1) * 255
        made.append(image.to(torch.uint8).contiguous(memory_format=torch.channels_last))
    return made


def photometrics(compiled: bool) -> Callable[[Path, Arguments], Iterator[int]]:
    """This project's: compiled for CPUs, or as the tensor operations that other devices run."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        import torch

        from pipeline.data.photometric import Photometrics

        torch.set_num_threads(_threads(arguments))
        images, index, epoch = _uint8_views(arguments), torch.arange(arguments.batch_size), 0
        change = Photometrics(views(photometric=True), 0)
        while True:
            if compiled:
                change(images, index, epoch)
            else:
                for n, image in enumerate(images):
                    change._on_device(image, change.draws(n, index.numpy(), epoch))
            epoch += 1
            yield arguments.batch_size

    return batches


def torchvision_photometrics(path: Path, arguments: Arguments) -> Iterator[int]:
    """torchvision's transforms on tensors, sample by sample; threads work within an operation."""
    import torch
    import torchvision.transforms.v2 as T

    torch.set_num_threads(_threads(arguments))
    images = _uint8_views(arguments)
    recipes = []
    for view in views(photometric=True):
        p, side = view.photometric, int(view.size[0] * 0.1) // 2 * 2 + 1
        assert p is not None
        jitter = T.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)
        blur = T.RandomApply([T.GaussianBlur(side, p.blur_sigma)], p.blur_p)
        solarize = T.RandomSolarize(128 / 255, p.solarize_p)
        last = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        steps = [T.ToDtype(torch.float32, scale=True), T.RandomApply([jitter], p.jitter_p)]
        recipes.append(T.Compose([*steps, T.RandomGrayscale(p.gray_p), blur, solarize, last]))
    while True:
        for n in range(arguments.batch_size):
            for recipe, image in zip(recipes, images):
                recipe(image[n])
            yield 1


def kornia_photometrics(path: Path, arguments: Arguments) -> Iterator[int]:
    """kornia's batched augmentations on the CPU."""
    import torch

    try:
        import kornia.augmentation as K
    except ImportError as error:
        raise UserError(f"kornia is not installed ({error})") from error

    torch.set_num_threads(_threads(arguments))
    images = _uint8_views(arguments)
    recipes = []
    for view in views(photometric=True):
        p, side = view.photometric, int(view.size[0] * 0.1) // 2 * 2 + 1
        assert p is not None
        recipes.append(
            K.AugmentationSequential(
                K.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue, p=p.jitter_p),
                K.RandomGrayscale(p=p.gray_p),
                K.RandomGaussianBlur((side, side), p.blur_sigma, p=p.blur_p),
                K.RandomSolarize(0.0, 0.0, p=p.solarize_p),
                K.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            )
        )
    while True:
        for recipe, image in zip(recipes, images):
            recipe(image.float() / 255)
        yield arguments.batch_size


BENCHES: dict[str, Bench] = {
    "loader": Bench(
        "JPEG files to 2 views of 224 and 8 of 96 pixels",
        {
            "torchvision": Contender("torchvision on Pillow in a `DataLoader`", torchvision_loader),
            "opencv": Contender("this loader with OpenCV", ours("opencv")),
            "ffcv": Contender("this loader with FFCV", ours("ffcv")),
            "decode": Contender("JPEG decoding alone (the floor)", decoding),
        },
    ),
    "photometric": Bench(
        "2 views of 224 and 8 of 96 pixels to what the network reads, on the CPU",
        {
            "torchvision": Contender("torchvision, sample by sample", torchvision_photometrics),
            "kornia": Contender("kornia, batched", kornia_photometrics),
            "tensors": Contender("this project, as tensor operations", photometrics(compiled=False)),
            "compiled": Contender("this project, compiled", photometrics(compiled=True)),
        },
    ),
    "engine": Bench(
        "training steps of DINO with ViT-Ti/16 at 64 pixels",
        {
            "local": Training("`--engine local`", ("--engine", "local")),
            "ray": Training("Ray Train, one worker", ("--engine", "ray")),
            "ray2": Training("Ray Train, two workers, half the batch and of the cores each", ("--workers", "2")),
        },
    ),
}


# Measuring ------------------------------------------------------------------------------------------------------------


def _threads(arguments: Arguments) -> int:
    from pipeline.data.workers import cores

    return arguments.threads or cores()


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over at least `seconds`, after one batch that does not count."""
    next(batches)
    images, started = 0, time.perf_counter()
    for done in batches:
        images += done
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return images / elapsed
    raise RuntimeError("the contender ended before its time")


def measured(name: str, path: Path, arguments: Arguments) -> float | str:
    """Images per second of one contender in a process of its own, or why there is no figure."""
    command = [sys.executable, "-m", "pipeline.bench", arguments.bench, "--only", name, "--data", str(path)]
    for option in ("batch_size", "threads", "seconds"):
        if getattr(arguments, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "ssl"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STARTING + 4 * arguments.seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return "did not end"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return lines[-1]
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def best_rates(path: Path, arguments: Arguments) -> dict[str, float | str]:
    """The best of all rounds for each contender."""
    best: dict[str, float | str] = {}
    contenders = BENCHES[arguments.bench].contenders
    for turn in range(arguments.rounds):
        for name in contenders:
            if isinstance(best.get(name), str):
                continue  # it failed: once is enough
            figure = measured(name, path, arguments)
            before = best.get(name, 0.0)
            best[name] = figure if isinstance(figure, str) or isinstance(before, str) else max(figure, before)
            shown = figure if isinstance(figure, str) else f"{figure:.0f} images/s"
            print(f"round {turn + 1}: {contenders[name].title}: {shown}", file=sys.stderr, flush=True)
    return best


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


def table(bench: Bench, rates: dict[str, float | str], caption: str) -> str:
    """A Markdown table with the ratio to the first contender."""
    yardstick = rates[next(iter(bench.contenders))]
    lines = [f"| {bench.job} | images/s | ratio |", "|---|---:|---:|"]
    for name, contender in bench.contenders.items():
        figure = rates[name]
        if isinstance(figure, str):
            lines.append(f"| {contender.title} | – ({figure}) | – |")
            continue
        ratio = "–" if isinstance(yardstick, str) else f"{figure / yardstick:.2f}"
        lines.append(f"| {contender.title} | {figure:,.0f} | {ratio} |")
    return "\n".join([*lines, "", caption])


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
        if arguments.bench == "loader":
            if arguments.data is None:
                draw_photographs(path)
            else:
                from pipeline.data.pack import pack

                path = pack(arguments.data, folder).path
            caption = describe(path) + "; "
        rates = best_rates(path, arguments)
    rounds = f"best of {arguments.rounds} rounds" + f" of {arguments.seconds:g} s" * (arguments.bench != "engine")
    text = table(bench, rates, f"{caption}batches of {arguments.batch_size}, {rounds}; {machine()}.")
    print(text)
    if arguments.write:
        write(Path(arguments.write), f"bench:{arguments.bench}", text)
    return 1 if all(isinstance(figure, str) for figure in rates.values()) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 failed, 2 a user's mistake, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        import tyro

        config = (tyro.conf.PositionalRequiredArgs,)
        return run(tyro.cli(Arguments, args=argv, prog="python -m pipeline.bench", config=config))

    return guarded(command, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
