"""Gram anchoring: keep the cells of a long-trained backbone apart (Siméoni et al. 2025, DINOv3, arXiv 2508.10104).

Sections are the paper's; settings follow the authors' code (gram_loss.py, dinov3_vit7b16_gram_anchor.yaml).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from torch import Tensor

from objectives.checkpoint import read
from objectives.contract import Objective, pair
from objectives.dino import DINO
from objectives.dinov2 import DINOv2
from objectives.ibot import IBOT
from objectives.multicrop import crop_size
from objectives.precision import full_precision
from objectives.schedules import cosine
from objectives.views import VitalSign

if TYPE_CHECKING:
    from backbones import Backbone

BASES: dict[str, type[DINO]] = {"dino": DINO, "ibot": IBOT, "dinov2": DINOv2}
"""What may have trained the checkpoint."""


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of X_S X_S^T - X_G X_G^T (sec. 4.2) over the cell pairs of each image and over images.

    The entries are cosine similarities of cells: features may move as they like while those stay.

    Args:
        student, teacher: cells [I, N, D] of the same images. Widths D may differ.
    """
    with torch.autocast(student.device.type, enabled=False):
        x, y = (F.normalize(full_precision(cells), dim=-1) for cells in (student, teacher))
        return (x @ x.mT - y @ y.mT).square().mean()


def resample(cells: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Cells [I, N, D] on a grid (h, w) as cells on another, bicubic (sec. 4.3)."""
    if grid == to:
        return cells
    maps = rearrange(full_precision(cells), "i (h w) d -> i d h w", h=grid[0])
    return rearrange(F.interpolate(maps, size=to, mode="bicubic"), "i d h w -> i (h w) d")


def read_checkpoint(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The objective's state and the configuration of a checkpoint: a `.pt` file, or a run folder, whose newest it is.

    Raises:
        ValueError: no path, no checkpoint there, or one of another program.
    """
    if not path:
        raise ValueError("gram anchoring goes on from a trained run: name its folder or a .pt file in checkpoint")
    found = sorted(Path(path, "checkpoints").glob("*.pt")) if Path(path).is_dir() else [Path(path)]
    if not found or not found[-1].is_file():
        raise ValueError(f"checkpoint {path}: no such file, or a run folder without checkpoints")
    try:
        saved = read(found[-1].name, lambda name: found[-1].with_name(name).read_bytes())
        return saved["objective"], yaml.safe_load(saved["config"])
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"checkpoint {found[-1]}: was not written by this program ({reason})") from None


class GramAnchoring(Objective):
    """A refinement stage: go on with a run of DINO, iBOT or DINOv2, its cells held to an earlier teacher's geometry.

    Long training makes image features better and cell features alike (sec. 4.1). The Gram teacher, a frozen copy of
    the EMA teacher, sees the crops of the global views as they are before colours change, at a higher resolution,
    which makes its cells smoother; the similarities of the student's cells follow its. What the checkpoint's objective
    schedules stands as at its end; its teacher follows with a constant rate. Published for ViTs, it runs on every
    backbone whose grid has more than one cell.

    Args:
        backbone: of the checkpoint's kind; its weights are those of the checkpoint.
        image_size: of the global views as the student sees them, in pixels. A backbone with a table of positions
            needs the checkpoint's.
        checkpoint: a run folder, or a `.pt` file in it, on a disk that every worker reads.
        gram_weight: w_Gram of the loss, on a cosine from 0 over the first gram_warmup of the run (published in
            iterations: 1k). local_weight: of local crops in DINO's loss, on the same cosine from 1.
        gram_resolution: side of what the Gram teacher sees over `image_size`, rounded to the backbone's stride; 1 where
            the backbone takes one size only.
        refresh_every: share of the run after which the Gram teacher becomes the EMA teacher of the moment, again and
            again (published in iterations: 10k). refreshes: how often at most.
        ema: of the teacher.

    Raises:
        ValueError: a checkpoint that is missing or fits neither these objectives nor this backbone, a single cell.
    """

    family = "self-distillation"
    paper = "Siméoni et al. 2025, arXiv 2508.10104"
    continues = True

    refreshed: Tensor

    def __init__(
        self,
        backbone: "Backbone",
        *,
        image_size: int | tuple[int, int],
        checkpoint: str = "",
        gram_weight: float = 2.0,
        gram_warmup: float = 0.025,
        local_weight: float = 0.5,
        gram_resolution: float = 2.0,
        refresh_every: float = 0.25,
        refreshes: int = 3,
        ema: float = 0.999,
    ) -> None:
        super().__init__()
        size = pair(image_size)
        state, config = read_checkpoint(checkpoint)
        self.base = go_on(state, config, backbone, size)
        self.base.ema = (ema, ema)
        self.gram = deepcopy(self.base.backbone).eval()
        self.register_buffer("refreshed", torch.zeros((), dtype=torch.int64))
        self.refresh_every, self.refreshes = refresh_every, refreshes
        self.gram_weight, self.local_weight, self.gram_warmup = gram_weight, local_weight, gram_warmup
        large = crop_size(backbone, (size[0] * gram_resolution, size[1] * gram_resolution), size)
        self.grid, self.gram_grid = backbone.grid(*size), backbone.grid(*large)
        if self.grid == (1, 1):
            raise ValueError(
                f"gram anchoring compares cells: {backbone.name} has only one at {size[0]}x{size[1]} pixels"
            )
        undistorted = (
            replace(view, name=f"Gram teacher's {view.name}", size=large, photometric=None, crop_of=view.name)
            for view in self.base.views[:2]
        )
        self.views = (*self.base.views, *undistorted)
        drift = VitalSign("gram", 0.0, 0.25, "cells no longer resemble each other as the Gram teacher's do")
        self.vital_signs = (*self.base.vital_signs, drift)

    @property
    def backbone(self) -> "Backbone":
        """The EMA teacher's."""
        return self.base.backbone

    def train(self, mode: bool = True) -> Self:
        """The Gram teacher stays in evaluation mode, its batch norms included: it is frozen."""
        super().train(mode)
        self.gram.eval()
        return self

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L + w_Gram L_Gram (sec. 4.2) and scalars of the views [B, C, h, w], the Gram teacher's two last."""
        weight, local = self.weights(progress)
        loss, scalars, (_, cells) = self.base.distil(views[:-2], 1.0, local)
        with torch.no_grad():
            anchor = resample(self.gram(torch.cat(list(views[-2:]))).cells, self.gram_grid, self.grid)
        gram = gram_loss(cells.flatten(0, 1), anchor)
        return loss + weight * gram, scalars | {"gram": gram.detach()}

    def weights(self, progress: float) -> tuple[float, float]:
        """w_Gram, and that of local crops, at this place of the run."""
        part = progress / self.gram_warmup if self.gram_warmup else 1.0
        return cosine(0.0, self.gram_weight, part), cosine(1.0, self.local_weight, part)

    def after_step(self, progress: float) -> None:
        """The base's teacher and centres; now and then the Gram teacher."""
        self.base.after_step(1.0)
        due = min(int(progress / self.refresh_every + 1e-9), self.refreshes)
        if due > int(self.refreshed):
            self.gram.load_state_dict(self.base.backbone.state_dict())
            self.refreshed.fill_(due)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the base: the Gram teacher does not train."""
        return self.base.parameter_groups()


def go_on(state: dict[str, Tensor], config: dict[str, Any], backbone: "Backbone", size: tuple[int, int]) -> DINO:
    """The objective of a checkpoint around `backbone`, as it was saved."""
    name, kind = config.get("objective"), config.get("backbone")
    if name not in BASES:
        raise ValueError(f"checkpoint: gram anchoring goes on from {', '.join(BASES)}, and it was trained with {name}")
    if kind != backbone.name:
        raise ValueError(f"checkpoint: its backbone is {kind}, not {backbone.name}; take the same")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["options"].items()}
    base = BASES[name](backbone, image_size=size, **options)
    try:
        base.load_state_dict(state)
    except RuntimeError as error:
        where = str(error).splitlines()[-1].strip()[:150]
        trained = config.get("image_size")
        raise ValueError(f"checkpoint: does not fit at {size} pixels; it was trained at {trained} ({where})") from None
    return base
