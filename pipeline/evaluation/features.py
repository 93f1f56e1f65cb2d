"""What does a frozen backbone make of a packed set? One pass over the images, for one backbone or several at once."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from objectives.views import View
from pipeline.data.beton import BetonReader
from pipeline.data.loader import Batch, make_loader
from pipeline.data.photometric import Photometrics

SMALL = 20_000
"""Images up to which the OpenCV loader is taken: FFCV compiles for seconds before its first batch."""


def evaluation_view(image_size: int | tuple[int, int]) -> View:
    """The one deterministic view of an evaluation: a centre crop, unflipped.

    From 128 pixels on, the shorter side is resized to size / 0.875 (256 for 224: Krizhevsky et al. 2012, and every
    ImageNet evaluation since). Below, where sets are made at their size and objects fill the frame, the whole centre
    square is kept.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    crop_pct = 0.875 if min(height, width) >= 128 else 1.0
    return View("evaluation", (height, width), scale=None, flip_p=0.0, crop_pct=crop_pct)


def extract(
    backbone: nn.Module,
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    backend: Literal["auto", "ffcv", "opencv"] = "auto",
    limit: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[Tensor, Tensor]:
    """Pooled features of the images of a .beton, in its order.

    Args:
        limit: at most this many images, drawn without replacement, always the same ones.

    Returns:
        float32 features [N, D] and int64 labels [N] (-1 for none), both on the CPU.

    Raises:
        FloatingPointError: features that are not finite, on which no accuracy could stand.
    """
    features, labels = extract_all(
        {"": backbone}, path, image_size=image_size, batch_size=batch_size, device=device, backend=backend,
        limit=limit, precision=precision,
    )  # fmt: skip
    return features[""], labels


def extract_all(
    backbones: Mapping[str, nn.Module],
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    backend: Literal["auto", "ffcv", "opencv"] = "auto",
    limit: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[dict[str, Tensor], Tensor]:
    """As `extract`, for several backbones on `device`, each image decoded once."""
    device = torch.device(device)
    view = evaluation_view(image_size)
    images = len(BetonReader(path))
    wanted = min(images, limit or images)
    backend = "opencv" if backend == "auto" and images <= SMALL else backend
    photometrics = Photometrics([view], seed=0)
    found: dict[str, list[Tensor]] = {name: [] for name in backbones}
    index, labels = [], []
    with (
        _evaluating(backbones),
        make_loader(
            path, [view], batch_size=min(batch_size, wanted), shuffle=wanted < images, drop_last=False, backend=backend
        ) as loader,
    ):
        for batch in _first(loader, wanted):
            views = photometrics([v.to(device) for v in batch.views], batch.index, batch.epoch)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                for name, backbone in backbones.items():
                    found[name].append(backbone(views[0]).pooled.float().cpu())
            index.append(batch.index)
            labels.append(batch.label)
    order = torch.cat(index)[:wanted].argsort()
    features = {name: torch.cat(parts)[:wanted][order] for name, parts in found.items()}
    for name, rows in features.items():
        if broken := int((~rows.isfinite().all(dim=1)).sum()):
            raise FloatingPointError(
                f"{broken:,} of {len(rows):,} images of {path} have features of {name or 'the backbone'} that are NaN "
                "or infinite; --precision fp32 or an earlier checkpoint may have none"
            )
    return features, torch.cat(labels)[:wanted][order]


def _first(batches: Iterable[Batch], images: int) -> Iterator[Batch]:
    """Batches until they hold that many images."""
    for batch in batches:
        yield batch
        images -= len(batch.index)
        if images <= 0:
            return


@contextmanager
def _evaluating(backbones: Mapping[str, nn.Module]) -> Iterator[None]:
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
