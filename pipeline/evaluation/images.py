"""A backbone and the images it is judged on, for protocols that must run it: on changed pixels, on cells, to train."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from objectives.views import View
from pipeline.data.beton import BetonReader
from pipeline.data.loader import Batch, make_loader
from pipeline.data.photometric import Photometrics

SMALL = 20_000
"""Images up to which the OpenCV loader is taken: FFCV compiles for seconds before its first batch."""

IN_CACHE = 32
"""Images a forward pass takes at a time on a CPU, whose caches the maps of more outgrow. Of 16 to 256 the fastest at 96
px, or near it: for 256 images 0.34 s in place of 0.44 all at once (ResNet-18), 0.77 of 1.49 (ResNet-50), 0.32 of 0.70
(EfficientNet-B0), 0.23 of 0.23 (ViT-Ti/16), medians of 5 in bf16 on 2 cores; the features are the same."""


class Shown(NamedTuple):
    """A batch of an evaluation: uint8 images [B, 3, H, W] on the device, their numbers in the file and labels [B]."""

    images: Tensor
    which: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Images:
    """A backbone beside one set of images, each under the one view of an evaluation.

    backbone  on `device`, in evaluation mode
    path      the .beton
    labels    int64 [images of the file], as the protocols number classes; -1 for none
    epochs    over which protocols train the whole network; None: as their recipes say
    """

    backbone: nn.Module
    path: Path
    labels: Tensor
    image_size: int | tuple[int, int]
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 256
    epochs: int | None = None

    def batches(self, limit: int | None = None, *, shuffled: bool = False) -> Iterator[Shown]:
        """All images in the file's order, or `limit` of them, always the same ones in the same order; all in such an
        order where `shuffled`."""
        for batch in batches(self.path, [evaluation_view(self.image_size)], self.batch_size, limit, shuffled=shuffled):
            yield Shown(batch.views[0].to(self.device), batch.index, self.labels[batch.index])

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] as the network reads them."""
        return normalised(images)

    def autocast(self) -> Any:
        """The precision to run the backbone in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def pooled(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of uint8 images, without gradients."""
        pieces = images.split(IN_CACHE if self.device.type == "cpu" else len(images))
        with torch.no_grad(), self.autocast():
            return torch.cat([self.backbone(normalised(piece)).pooled.float() for piece in pieces])


def evaluation_view(image_size: int | tuple[int, int]) -> View:
    """The one deterministic view of an evaluation: a centre crop, unflipped.

    From 128 pixels on, the shorter side is resized to size / 0.875 (256 for 224: Krizhevsky et al. 2012, and every
    ImageNet evaluation since). Below, where sets are made at their size and objects fill the frame, the whole centre
    square is kept.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    crop_pct = 0.875 if min(height, width) >= 128 else 1.0
    return View("evaluation", (height, width), scale=None, flip_p=0.0, crop_pct=crop_pct)


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32, as every view of pretraining is normalised."""
    view = View("evaluation", (images.shape[2], images.shape[3]), scale=None, flip_p=0.0)
    return Photometrics([view], seed=0)([images], torch.zeros(len(images), dtype=torch.int64), 0)[0]


def batches(
    path: str | Path,
    views: list[View],
    batch_size: int,
    limit: int | None = None,
    backend: Literal["auto", "ffcv", "opencv"] = "auto",
    share: tuple[int, int] = (0, 1),
    *,
    shuffled: bool = False,
) -> Iterator[Batch]:
    """One pass over a .beton in its order, or over `limit` of its images drawn without replacement, always the same;
    `shuffled`, over all in the order in which those are drawn.

    Args:
        share: (k, n), the k-th of n shares of the pass's batches, in their order.
    """
    images = len(BetonReader(path))
    wanted = min(images, limit or images)
    backend = "opencv" if backend == "auto" and images <= SMALL else backend
    batch_size = min(batch_size, wanted)
    whole = -(-wanted // batch_size)
    first, end = (min(wanted, whole * k // share[1] * batch_size) for k in (share[0], share[0] + 1))
    with make_loader(
        path,
        views,
        batch_size=batch_size,
        shuffle=shuffled or wanted < images,
        drop_last=False,
        backend=backend,
    ) as loader:
        loader.load_state({"epoch": 0, "position": first})
        yield from _first(loader, end - first)
        if black := len(loader.decode_errors):
            print(f"warning: {black:,} image{'s' * (black > 1)} of {path} cannot be decoded, seen as black", flush=True)


def _first(loader: Iterable[Batch], images: int) -> Iterator[Batch]:
    """So many images: whole batches, and the beginning of the last."""
    for batch in loader:
        take = min(images, len(batch.index))
        yield Batch([view[:take] for view in batch.views], batch.index[:take], batch.label[:take], batch.epoch)
        images -= take
        if not images:
            return


@contextmanager
def evaluating(backbones: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode and no gradients within; each module's own mode again after."""
    modes = [(module, module.training) for backbone in backbones.values() for module in backbone.modules()]
    for backbone in backbones.values():
        backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
