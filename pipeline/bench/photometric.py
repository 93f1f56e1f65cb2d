"""From views to what the network reads, on the CPU: this project's colours, torchvision's and kornia's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.bench.contender import Arguments, Bench, Contender, threads, views
from pipeline.errors import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the channels, by which all contenders normalise."""


def _uint8_views(arguments: Arguments) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for view in views():
        coarse = torch.rand(arguments.batch_size, 3, 8, 8, generator=generator)
        image = torch.nn.functional.interpolate(coarse, view.size, mode="bicubic").clamp(0, 1) * 255
        made.append(image.to(torch.uint8).contiguous(memory_format=torch.channels_last))
    return made


def _colours() -> Iterator[tuple[Any, int]]:
    """The photometric changes of each view, and the side of the window that its blur looks at."""
    for view in views(photometric=True):
        yield view.photometric, int(view.size[0] * 0.1) // 2 * 2 + 1


def photometrics(compiled: bool) -> Callable[[Path, Arguments], Iterator[int]]:
    """This project's: compiled for CPUs, or as the tensor operations that other devices run."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        import torch

        from pipeline.data.photometric import Photometrics

        torch.set_num_threads(threads(arguments))
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

    torch.set_num_threads(threads(arguments))
    images = _uint8_views(arguments)
    recipes = []
    for p, side in _colours():
        jitter = T.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)
        blur = T.RandomApply([T.GaussianBlur(side, p.blur_sigma)], p.blur_p)
        solarize = T.RandomSolarize(128 / 255, p.solarize_p)
        last = T.Normalize(*IMAGENET)
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

    torch.set_num_threads(threads(arguments))
    images = _uint8_views(arguments)
    recipes = []
    for p, side in _colours():
        recipes.append(
            K.AugmentationSequential(
                K.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue, p=p.jitter_p),
                K.RandomGrayscale(p=p.gray_p),
                K.RandomGaussianBlur((side, side), p.blur_sigma, p=p.blur_p),
                K.RandomSolarize(0.0, 0.0, p=p.solarize_p),
                K.Normalize(*IMAGENET),
            )
        )
    while True:
        for recipe, image in zip(recipes, images):
            recipe(image.float() / 255)
        yield arguments.batch_size


BENCH = Bench(
    "2 views of 224 and 8 of 96 pixels to what the network reads, on the CPU",
    {
        "torchvision": Contender("torchvision, sample by sample", torchvision_photometrics),
        "kornia": Contender("kornia, batched", kornia_photometrics),
        "tensors": Contender("this project, as tensor operations", photometrics(compiled=False)),
        "compiled": Contender("this project, compiled", photometrics(compiled=True)),
    },
)
