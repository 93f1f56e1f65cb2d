"""What does a frozen backbone make of a packed set? One pass over the images, for one backbone or several at once,
kept on disk so that no protocol and no later command repeats it."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from objectives.views import Photometric, View
from pipeline.data.packed import Packed
from pipeline.data.photometric import Photometrics
from pipeline.evaluation.images import IN_CACHE, batches, evaluating, evaluation_view

VERSION = 2  # of what extraction does; a new one extracts anew

VIEWS = 10
VIEWED = 512
"""Random views of each of so many images, for the label-free scores that need them; both chosen here."""


class Pass(NamedTuple):
    """One pass over a set, on the CPU, in the order of its file.

    which     int64 [N], the images' numbers in the file
    labels    int64 [N], as the file has them; -1 for none
    features  float32 [N, V, D], pooled, for every view
    summaries half precision, one [N, S, D_l] for each of as many last blocks or stages as were asked for, as
              `Features.summaries` of the first view; what half precision cannot hold is infinite
    """

    which: Tensor
    labels: Tensor
    features: Tensor
    summaries: tuple[Tensor, ...] = ()


def random_views(image_size: int | tuple[int, int]) -> list[View]:
    """Views as joint-embedding methods train on: SimCLR's crop and colour (Chen et al. 2020, appendix A), no blur."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    colour = Photometric(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, gray_p=0.2)
    return [View(f"random {i}", size, scale=(0.2, 1.0), photometric=colour) for i in range(VIEWS)]


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
    passes = look(
        backbones, path, [evaluation_view(image_size)], batch_size=batch_size, device=device, backend=backend,
        limit=limit, precision=precision,
    )  # fmt: skip
    return {name: one.features[:, 0] for name, one in passes.items()}, next(iter(passes.values())).labels


def look(
    backbones: Mapping[str, nn.Module],
    path: str | Path,
    views: Sequence[View],
    **options: Any,
) -> dict[str, Pass]:
    """One pass of several backbones over the same images, each decoded once; `options` as of `look_at`."""
    return joined([look_at(backbones, path, views, **options)], path)


Look = Callable[..., dict[str, Pass]]
"""What takes the arguments of `look` and gives its passes: `look` itself, or what spreads it over a cluster."""


def look_at(
    backbones: Mapping[str, nn.Module],
    path: str | Path,
    views: Sequence[View],
    *,
    share: tuple[int, int] = (0, 1),
    summaries: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    backend: Literal["auto", "ffcv", "opencv"] = "auto",
    limit: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Pass]:
    """One share of a pass, its images in the order in which they were shown.

    Args:
        share: (k, n), the k-th of n, each of whole batches of the pass; n is at most `batches_of`.
        summaries: of how many of the last layers what sums them up is wanted; those of a backbone that has fewer, all.
    """
    device = torch.device(device)
    at_once = IN_CACHE if device.type == "cpu" else batch_size
    photometrics = Photometrics(views, seed=0)
    pooled: dict[str, list[Tensor]] = {name: [] for name in backbones}
    summed: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in backbones}
    index, labels = [], []
    with evaluating(backbones):
        for batch in batches(path, list(views), _batch(batch_size, views), limit, backend, share):
            shown = photometrics([v.to(device) for v in batch.views], batch.index, batch.epoch)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                for name, backbone in backbones.items():
                    for views_of_some in zip(*(view.split(at_once) for view in shown)):
                        first, *others = views_of_some
                        found = [backbone(first, summaries=True) if summaries else backbone(first)]
                        found += [backbone(view) for view in others]
                        pooled[name].append(torch.stack([one.pooled.float().cpu() for one in found], dim=1))
                        if summaries:
                            summed[name].append(tuple(layer.half().cpu() for layer in found[0].summaries[-summaries:]))
            index.append(batch.index)
            labels.append(batch.label)
    return {
        name: Pass(
            torch.cat(index), torch.cat(labels), torch.cat(pooled[name]),
            tuple(torch.cat(parts) for parts in zip(*summed[name])),
        )
        for name in backbones
    }  # fmt: skip


def joined(shares: Sequence[Mapping[str, Pass]], path: str | Path) -> dict[str, Pass]:
    """The whole passes over the .beton at `path` from all their shares.

    Raises:
        FloatingPointError: features that are not finite.
    """
    passes = {}
    for name in shares[0]:
        parts = [share[name] for share in shares]
        which, labels, features = (torch.cat(values) for values in zip(*(part[:3] for part in parts)))
        if broken := int((~features.isfinite().flatten(1).all(dim=1)).sum()):
            raise FloatingPointError(
                f"{broken:,} images of {path} have features of {name or 'the backbone'} that are NaN or infinite; "
                "--precision fp32 or an earlier checkpoint may have none"
            )
        order = which.argsort()
        summaries = tuple(torch.cat(values)[order] for values in zip(*(part.summaries for part in parts)))
        passes[name] = Pass(which[order], labels[order], features[order], summaries)
    return passes


def batches_of(images: int, views: Sequence[View], batch_size: int) -> int:
    """Batches of a pass over so many images."""
    return -(-images // _batch(batch_size, views))


def _batch(batch_size: int, views: Sequence[View]) -> int:
    return max(1, batch_size // len(views))


def look_once(
    folder: Path | None,
    backbones: Mapping[str, nn.Module],
    packed: Packed,
    views: Sequence[View],
    *,
    summaries: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    look: Look = look,
) -> dict[str, Pass]:
    """As `look`, from the files in `folder` where this pass was made before; None keeps nothing.

    A file's name is a digest of all that its content depends on: the weights, the images and labels (the packed set's
    fingerprint), the views, which images, and the precision. Processes may write at once.
    """
    if folder is None or not packed.fingerprint:
        return look(
            backbones, packed.path, views, summaries=summaries, batch_size=batch_size, device=device, limit=limit,
            precision=precision,
        )  # fmt: skip
    limit = None if limit is None or limit >= packed.images else limit
    what = f"{VERSION} {packed.fingerprint} {[asdict(view) for view in views]} {limit} {precision}"
    files = {
        name: folder / f"{hashlib.blake2b(f'{digest(one)} {what}'.encode(), digest_size=16).hexdigest()}.safetensors"
        for name, one in backbones.items()
    }
    kept = {name: found for name, file in files.items() if (found := _read(file, summaries)) is not None}
    missing = {name: backbone for name, backbone in backbones.items() if name not in kept}
    if missing:
        fresh = look(
            missing, packed.path, views, summaries=summaries, batch_size=batch_size, device=device, limit=limit,
            precision=precision,
        )  # fmt: skip
        for name, one in fresh.items():
            _write(files[name], one, summaries)
        kept |= fresh
    return {name: kept[name] for name in backbones}


def digest(backbone: nn.Module) -> str:
    """32 hexadecimal digits that name a module's kind and weights."""
    found = hashlib.blake2b(type(backbone).__name__.encode(), digest_size=16)
    found.update(str(sorted(getattr(backbone, "config", {}).items())).encode())
    for name, value in backbone.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(file: Path, summaries: int) -> Pass | None:
    """A pass that was kept; None where there is none, or a torn one, or one with fewer summaries than are asked for and
    than there are."""
    try:
        with safe_open(file, framework="pt") as head:
            count, asked = (int((head.metadata() or {})[key]) for key in ("summaries", "asked"))
        if count == asked < summaries:
            return None
        kept = load_file(file)
        of = [kept[f"summary {i}"] for i in range(count)][max(0, count - summaries) :]
        return Pass(kept["which"], kept["labels"], kept["features"], tuple(of))
    except (OSError, KeyError, SafetensorError):
        return None


def _write(file: Path, one: Pass, asked: int) -> None:
    tensors = {"which": one.which, "labels": one.labels, "features": one.features}
    tensors |= {f"summary {i}": layer for i, layer in enumerate(one.summaries)}
    facts = {"summaries": str(len(one.summaries)), "asked": str(asked)}
    partial = file.with_name(f".{file.name}.{uuid4().hex[:12]}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, facts)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
