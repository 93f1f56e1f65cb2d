"""Fine-tuning: how good does the whole network get, when it may learn from the labels too?

One recipe of two families: MAE's for transformers (He et al. 2022, table 9) and, for CNNs, the same without its strong
layer-wise decay (as ConvNeXt's fine-tuning, Liu et al. 2022, table 6, weakens it). AdamW, a cosine schedule with
warm-up, layer-wise learning-rate decay by `Backbone.depths()` (Clark et al. 2020), mixup and cutmix, label smoothing,
drop path, and an average of the weights that is judged.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
from backbones import names
from backbones.contract import Backbone
from objectives.views import View
from pipeline.data.loader import make_loader
from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.feature_set import FeatureSet, Found
from pipeline.evaluation.images import SMALL, Images


@dataclass(frozen=True)
class Recipe:
    """`layer_decay` is the factor of the learning rate from one depth to the one before it; `lr` the peak at a batch of
    256; `mixup` and `cutmix` the α of their Beta distributions, 0 for none, each taken for half of the batches."""

    layer_decay: float
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1
    ema: float = 0.99
    clip: float = 5.0
    scale: tuple[float, float] = (0.35, 1.0)
    batch: int = 64
    epochs: int = 30
    least_steps: int = 300


RECIPES = {"vit": Recipe(layer_decay=0.65, lr=1e-3), "cnn": Recipe(layer_decay=0.9)}


def finetune(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """The headline numbers after fine-tuning a copy; `train_error`, the share of training images still wrong; the
    `head`, with its backbone."""
    return _learned(train, val, seed, fresh=False)


def scratch(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """As `finetune`, but from fresh weights: what the labels teach alone, and so what pretraining brought.

    Its `train_error` by depth is the degradation experiment (He et al. 2016, section 4.2): plain56 stays above plain20,
    resnet56 below resnet20.
    """
    return _learned(train, val, seed, fresh=True)


def _learned(train: FeatureSet, val: FeatureSet, seed: int, fresh: bool) -> dict[str, Found] | None:
    if train.images is None or val.images is None or train.which is None or val.which is None:
        return None
    if not isinstance(train.images.backbone, Backbone) or int((train.labels >= 0).sum()) < 2:
        return None
    recipe = RECIPES[names.family(train.images.backbone.name)]
    recipe = replace(recipe, layer_decay=1.0) if fresh else recipe
    model = learn(train, recipe, seed=seed, fresh=fresh)
    predicted, truth = _answers(replace(val.images, backbone=model), val)
    of_train, train_truth = _answers(replace(train.images, backbone=model), train)
    error = (of_train != train_truth).double().mean().item()
    return {**headline(predicted, truth), "train_error": error, "head": model}


def learn(train: FeatureSet, recipe: Recipe, *, seed: int, fresh: bool = False) -> Classifier:
    """A copy of the backbone, `fresh` or as it is, and a classifier, trained on the labelled images; the average of all
    their weights."""
    images, which = train.images, train.which
    assert images is not None
    assert which is not None
    table = torch.full_like(images.labels, -1)
    table[which] = train.labels.cpu()
    count = int((table >= 0).sum())
    batch = min(recipe.batch, count)
    steps = max(recipe.least_steps, recipe.epochs * count // batch)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        backbone = _copy(images.backbone, recipe, fresh)
        head = nn.Linear(backbone.width, int(train.labels.max()) + 1)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        model = Classifier(backbone, head, train.classes[: head.out_features], images.image_size).to(images.device)
        model.train()
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema), use_buffers=True
        )
        peak = recipe.lr * batch / 256
        optimiser = torch.optim.AdamW(groups(model, recipe, peak), lr=peak, betas=recipe.betas)
        rng = np.random.default_rng(seed)
        for step, (shown, labels) in zip(range(steps), _batches(images, table, recipe, batch, seed)):
            factor = min((step + 1) / max(1, recipe.warmup * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = peak * group["scale"] * factor
            mixed, targets = mix(images.normalised(shown), labels, head.out_features, recipe, rng)
            with images.autocast():
                logits = model(mixed)
            loss = torch.sum(-targets * F.log_softmax(logits.float(), dim=1), dim=1).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            average.update_parameters(model)
    judged = average.module.eval()
    assert isinstance(judged, Classifier)
    return judged


def groups(model: Classifier, recipe: Recipe, peak: float) -> list[dict[str, object]]:
    """Parameter groups with their `scale` of the learning rate: 1 for the head, layer_decay^(deepest + 1 − depth) for
    the backbone; biases, norms, tokens and positions do not decay."""
    depths = model.backbone.depths()
    deepest = max(depths.values())
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = name.removeprefix("backbone.")
        scale = recipe.layer_decay ** (deepest + 1 - depths[inside]) if name.startswith("backbone.") else 1.0
        plain = parameter.ndim < 2 or inside.split(".")[-1] in ("cls_token", "pos_embed", "reg_token", "mask_token")
        found.setdefault((scale, 0.0 if plain else recipe.weight_decay), []).append(parameter)
    return [
        {"params": of, "scale": scale, "weight_decay": decay, "lr": peak * scale}
        for (scale, decay), of in found.items()
    ]


def mix(x: Tensor, labels: Tensor, classes: int, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] mixed with those of the batch in reverse, and soft targets [B, classes].

    Mixup (Zhang et al. 2018): λ x + (1 − λ) x'. Cutmix (Yun et al. 2019): a rectangle of 1 − λ of the area from x'; λ
    is then what is left after the border cut it. Targets are smoothed (Szegedy et al. 2016) and mixed alike.
    """
    off = recipe.smoothing / classes
    targets = torch.full((len(x), classes), off, device=x.device)
    targets.scatter_(1, labels[:, None].to(x.device), 1 - recipe.smoothing + off)
    kinds = [kind for kind, alpha in (("mixup", recipe.mixup), ("cutmix", recipe.cutmix)) if alpha > 0]
    if not kinds:
        return x, targets
    other = x.flip(0)
    if kinds[int(rng.integers(len(kinds)))] == "mixup":
        share = float(rng.beta(recipe.mixup, recipe.mixup))
        x = share * x + (1 - share) * other
    else:
        height, width = x.shape[-2:]
        side = math.sqrt(1 - float(rng.beta(recipe.cutmix, recipe.cutmix)))
        y, z = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = (min(height, max(0, round(y + sign * side * height / 2))) for sign in (-1, 1))
        left, right = (min(width, max(0, round(z + sign * side * width / 2))) for sign in (-1, 1))
        x = x.clone()
        x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return x, share * targets + (1 - share) * targets.flip(0)


def _copy(backbone: nn.Module, recipe: Recipe, fresh: bool) -> Backbone:
    """The backbone again, with drop path where its blocks can be dropped."""
    assert isinstance(backbone, Backbone)
    config = {**backbone.config, "pretrained": False}
    try:
        copy = backbones.create(**{**config, "drop_path": recipe.drop_path})
    except ValueError:  # no residual blocks
        copy = backbones.create(**{**config, "drop_path": 0.0})
    if not fresh:
        copy.load_state_dict(backbone.state_dict())
    return copy


def _batches(images: Images, table: Tensor, recipe: Recipe, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Labelled images under random crops, for ever: uint8 [batch, 3, H, W] on the device, int64 [batch]."""
    size = images.image_size
    view = View("finetune", (size, size) if isinstance(size, int) else size, scale=recipe.scale)
    whole = len(images.labels)
    shown: list[Tensor] = []
    labels: list[Tensor] = []
    backend: Literal["auto", "opencv"] = "opencv" if whole <= SMALL else "auto"
    with make_loader(images.path, [view], batch_size=min(batch, whole), seed=seed, backend=backend) as loader:
        for one in loader:
            of = table[one.index]
            shown.append(one.views[0][of >= 0])
            labels.append(of[of >= 0])
            while sum(map(len, labels)) >= batch:
                x, y = torch.cat(shown), torch.cat(labels)
                yield x[:batch].to(images.device), y[:batch]
                shown, labels = [x[batch:]], [y[batch:]]


def _answers(images: Images, of: FeatureSet) -> tuple[Tensor, Tensor]:
    """What the fine-tuned model says of every labelled image, and the truth, in the order of the set."""
    assert of.which is not None
    wanted = of.which[of.labels.cpu() >= 0]
    predicted = torch.empty(len(images.labels), dtype=torch.int64)
    for shown in images.batches():
        with torch.no_grad(), images.autocast():
            predicted[shown.which] = images.backbone(images.normalised(shown.images)).argmax(1).cpu()
    return predicted[wanted], images.labels[wanted]
