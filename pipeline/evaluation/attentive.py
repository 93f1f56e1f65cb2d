"""Attentive probe: what is in the cells that their mean does not show? One learned query attends to frozen cells.

Masked and predictive objectives train no pooled feature, so a linear probe on the mean undersells them (Chen et al.
2023, CAE, section 3.3; Bardes et al. 2024, V-JEPA, section 3.3). Cross-attention with one query per class set, then a
linear classifier; several learning rates are trained side by side and a held-out slice of train chooses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.feature_set import FeatureSet, Found
from pipeline.evaluation.images import Images

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
STEPS = 400
BATCH = 128
HELD_OUT = 0.1
HELD = 2 << 30
"""Bytes of cells that are held at most, in half precision. Where more training images are given, it learns from as many
of them, drawn at random, as fit."""


class Attentive(nn.Module):
    """Cells [B, N, D] to logits [B, C]: a query attends to the normalised cells with heads of 64, then a classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out_features = classes
        self.heads = max(1, width // 64) if width % max(1, width // 64) == 0 else 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, cells: Tensor) -> Tensor:
        x = self.norm(cells)
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            t.unflatten(-1, split).transpose(1, 2)
            for t in (self.query.expand(len(x), -1, -1), self.key(x), self.value(x))
        )
        pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.classifier(pooled[:, 0])


def attentive(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """The headline numbers, the lr that a held-out slice of train chose, how many `images` it learned from, and the
    `head`."""
    if train.images is None or val.images is None or train.which is None or val.which is None:
        return None
    x, y = _held(train.images, train.which[train.labels.cpu() >= 0])
    asked = val.which[val.labels.cpu() >= 0]
    if len(x) < 10 or not len(asked):
        return None
    device, classes = train.images.device, int(y.max()) + 1
    aside = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, kept = aside[: max(1, round(HELD_OUT * len(x)))], aside[max(1, round(HELD_OUT * len(x))) :]
    scores = []
    for lr in LEARNING_RATES:
        head = learn(x[kept], y[kept], classes, lr, device, seed)
        scores.append((predict(head, x[held], device) == y[held]).double().mean().item())
    lr = LEARNING_RATES[max(range(len(scores)), key=scores.__getitem__)]
    head = learn(x, y, classes, lr, device, seed)
    return {**headline(*_answers(head, val.images, asked)), "lr": lr, "images": len(x), "head": head}


def learn(x: Tensor, y: Tensor, classes: int, lr: float, device: torch.device, seed: int) -> Attentive:
    """A head trained by AdamW with a cosine schedule on half-precision cells [M, N, D] and labels [M]."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        head = Attentive(x.shape[-1], classes).to(device)
        optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, STEPS, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            chosen = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
            loss = F.cross_entropy(head(x[chosen].to(device).float()), y[chosen].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return head.eval()


def predict(head: Attentive, x: Tensor, device: torch.device) -> Tensor:
    """The class [M], on the CPU, of cells [M, N, D]."""
    with torch.no_grad():
        return torch.cat([head(part.to(device).float()).argmax(1).cpu() for part in x.split(BATCH)])


def _held(images: Images, which: Tensor) -> tuple[Tensor, Tensor]:
    """Cells float16 [M, N, D] of the images `which` names, or of as many as may be held, and their labels [M]."""
    wanted = torch.zeros(len(images.labels), dtype=torch.bool)
    wanted[which] = True
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    for shown in images.batches(shuffled=True):  # a set is packed class by class: its beginning is no sample of it
        keep = wanted[shown.which]
        if bool(keep.any()):
            parts.append(_cells(images, shown.images[keep]).cpu())
            labels.append(shown.labels[keep])
        if sum(part.numel() * part.element_size() for part in parts) > HELD or sum(map(len, labels)) == len(which):
            break
    if not parts:
        return torch.empty(0, 1, 1), torch.empty(0, dtype=torch.int64)
    return torch.cat(parts), torch.cat(labels)


def _cells(images: Images, shown: Tensor) -> Tensor:
    """Cells float16 [B, N, D] of uint8 images."""
    with torch.no_grad(), images.autocast():
        return images.backbone(images.normalised(shown)).cells.half()


def _answers(head: Attentive, images: Images, which: Tensor) -> tuple[Tensor, Tensor]:
    """What the head says of the images that `which` [M] names, a batch of cells at a time, and the truth: both [M]."""
    predicted = torch.empty(len(images.labels), dtype=torch.int64)
    for shown in images.batches():
        predicted[shown.which] = predict(head, _cells(images, shown.images), images.device)
    return predicted[which], images.labels[which]
