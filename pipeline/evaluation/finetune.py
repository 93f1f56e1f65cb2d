"""Fine-tuning: how good does the whole network get, when it may learn from the labels too?

After MAE's recipe for transformers (He et al. 2022, table 9), by SimCLR's for CNNs (Chen et al. 2020, appendix B.5),
and for those without batch norms, ConvNeXts among them, the first with a weaker layer-wise decay (Liu et al. 2022,
table 6); what differs from the paper is said in each `source`.
AdamW or SGD, a cosine schedule, layer-wise learning-rate decay by `Backbone.depths()` (Clark et al. 2020), mixup and
cutmix, label smoothing, drop path, and an average of the weights that is judged, as the recipe has them. From fresh
weights, the plain and residual nets of He et al. 2016, section 4.2, learn as they do there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import backbones
from backbones import names
from backbones.contract import Backbone
from pipeline.data.loader import make_loader
from pipeline.device import placed
from pipeline.evaluation import interval
from pipeline.evaluation.accuracy import headline
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.feature_set import FeatureSet, Found
from pipeline.evaluation.images import SMALL, Images, evaluation_view


@dataclass(frozen=True)
class Recipe:
    """How a whole network learns the labels.

    source       where the numbers come from
    layer_decay  factor of the learning rate from one depth to the one before it
    optimiser    "adamw", or "sgd", whose momentum is the first of `betas`
    lr           the peak, at a batch of 256
    drops        shares of the run at which the rate falls to a tenth; none: it falls by a cosine
    mixup        and `cutmix`: the α of their Beta distributions, 0 for none, each taken for half of the batches
    ema          decay of the average of the weights that is judged; 0: the last ones are
    scale        share of the image that a crop has; None: all of it, moved by up to an eighth of its side
    epochs       over the labelled images, and no fewer than `least_steps`
    """

    source: str
    layer_decay: float = 1.0
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    drops: tuple[float, ...] = ()
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1
    ema: float = 0.99
    clip: float = 5.0
    scale: tuple[float, float] | None = (0.35, 1.0)
    batch: int = 64
    epochs: int = 30
    least_steps: int = 300


AFTER_MAE = (
    "MAE's fine-tuning (He et al. 2022, table 9), but shorter, without RandAugment, crops from 35 % of the area on, "
    "gradients clipped to 5, and an average of the weights judged (decay 0.99)"
)
RECIPES = {
    "vit": Recipe(
        f"{AFTER_MAE}; at a higher rate: ViT-Ti by VICReg on 1,000 images of imagenette160 at 96 px, 468 steps: 36.5, "
        "with 1e-3 33.4",
        layer_decay=0.65, lr=4e-3,
    ),
    "cnn without batch norm": Recipe(
        f"{AFTER_MAE}; its layer-wise decay as weak as ConvNeXt's (Liu et al. 2022, table 6), at a higher rate: "
        "ResNet-18 by Barlow Twins on 1,000 images of imagenette160 at 96 px, 468 steps: 52.4, with 5e-4 37.1",
        layer_decay=0.9, lr=2e-3,
    ),
    "cnn": Recipe(
        "SimCLR's fine-tuning of ResNets (Chen et al. 2020, appendix B.5), of a tenth of the labels: 30 epochs of SGD "
        "without warm-up or any regularisation, crops and flips; at ten times its rate, for a small set shows a "
        "hundredth of the images. ResNet-18 by Barlow Twins on 1,000 of imagenette160 at 96 px, 468 steps: 59.7; "
        "with 0.2 53.1, with its own 0.05 39.5; by AdamW with 2e-3 52.4, with 5e-4 37.1",
        optimiser="sgd", lr=0.5, weight_decay=0, warmup=0, mixup=0, cutmix=0, smoothing=0, drop_path=0, ema=0,
        clip=math.inf, scale=(0.08, 1.0),
    ),
}  # fmt: skip
UNMEASURED = f"{AFTER_MAE}; of one rate at all depths, which was not measured"
FRESH = {
    "vit": replace(RECIPES["vit"], source=UNMEASURED, layer_decay=1.0, lr=1e-3),
    "cnn": replace(RECIPES["cnn without batch norm"], source=UNMEASURED, layer_decay=1.0, lr=5e-4),
}
"""From fresh weights."""
CIFAR_NETS = Recipe(
    "He et al. 2016, section 4.2: SGD with momentum, 64,000 steps of 128 images, which are 164 epochs of 50,000, a "
    "tenth of the rate from 32,000 and from 48,000 on, images moved by up to 4 of 32 pixels and flipped",
    optimiser="sgd", lr=0.2, weight_decay=1e-4, warmup=0, drops=(0.5, 0.75), mixup=0, cutmix=0, smoothing=0,
    drop_path=0, ema=0, clip=math.inf, scale=None, batch=128, epochs=164,
)  # fmt: skip
"""Of plain and residual nets from scratch. Norms and biases do not decay, and resnet110 is not warmed up."""


def recipe_of(backbone: Backbone) -> Recipe:
    """The recipe for a pretrained backbone: "cnn" where it has batch norms, which bear that rate."""
    if names.family(backbone.name) == "vit":
        return RECIPES["vit"]
    return RECIPES[
        "cnn" if any(isinstance(module, _BatchNorm) for module in backbone.modules()) else "cnn without batch norm"
    ]


def fresh_recipe_of(backbone: str) -> Recipe:
    """The recipe for fresh weights of a backbone of that name."""
    return CIFAR_NETS if names.cifar_net(backbone) else FRESH[names.family(backbone)]


def finetune(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """The headline numbers after fine-tuning a copy; `epochs`, how long it learnt; `recipe`, its source; `train_error`,
    the share of training images still wrong, `_low`, `_high` (its 95 % interval), and as evidence which of them are
    right, `train_right`; the `head`, with its backbone."""
    return _learned(train, val, seed, fresh=False)


def scratch(train: FeatureSet, val: FeatureSet, *, seed: int) -> dict[str, Found] | None:
    """As `finetune`, but from fresh weights, by the recipes for those: what the labels teach alone. How far `finetune`
    is above it is no measure of pretraining alone, since optimiser, rate and augmentation may differ as well.

    Its `train_error` by depth is the degradation experiment (He et al. 2016, section 4.2), where plain56 stays above
    plain20, resnet56 below resnet20.
    """
    return _learned(train, val, seed, fresh=True)


def _learned(train: FeatureSet, val: FeatureSet, seed: int, fresh: bool) -> dict[str, Found] | None:
    if train.images is None or val.images is None or train.which is None or val.which is None:
        return None
    if not isinstance(train.images.backbone, Backbone) or int((train.labels >= 0).sum()) < 2:
        return None
    backbone = train.images.backbone
    recipe = fresh_recipe_of(backbone.name) if fresh else recipe_of(backbone)
    if train.images.epochs:
        recipe = replace(recipe, epochs=train.images.epochs, least_steps=1)
    model = learn(train, recipe, seed=seed, fresh=fresh)
    predicted, truth = _answers(replace(val.images, backbone=model), val)
    of_train, train_truth = _answers(replace(train.images, backbone=model), train)
    right = of_train == train_truth
    batch, steps = length(recipe, len(right))
    low, high = interval.of_share(~right)
    return {
        **headline(predicted, truth), "epochs": steps * batch / len(right), "recipe": recipe.source,
        "train_error": 1 - right.double().mean().item(), "train_error_low": low, "train_error_high": high,
        "train_right": right, "head": model,
    }  # fmt: skip


def length(recipe: Recipe, images: int) -> tuple[int, int]:
    """Images of a step, and steps over so many labelled images."""
    batch = min(recipe.batch, images)
    return batch, max(recipe.least_steps, recipe.epochs * images // batch)


def learn(train: FeatureSet, recipe: Recipe, *, seed: int, fresh: bool = False) -> Classifier:
    """A copy of the backbone, `fresh` or as it is, and a classifier, trained on the labelled images; the average of all
    their weights."""
    images, which = train.images, train.which
    assert images is not None
    assert which is not None
    table = torch.full_like(images.labels, -1)
    table[which] = train.labels.cpu()
    batch, steps = length(recipe, int((table >= 0).sum()))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        backbone = _copy(images.backbone, recipe, fresh)
        head = nn.Linear(backbone.width, int(train.labels.max()) + 1)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        model = Classifier(backbone, head, train.classes[: head.out_features], images.image_size)
        placed(model, images.device).train()
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema), use_buffers=True
        )
        peak = recipe.lr * batch / 256
        of = groups(model, recipe, peak)
        optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(of, lr=peak, momentum=recipe.betas[0])
            if recipe.optimiser == "sgd"
            else torch.optim.AdamW(of, lr=peak, betas=recipe.betas)
        )
        rng = np.random.default_rng(seed)
        for step, (shown, labels) in zip(range(steps), _batches(images, table, recipe, batch, seed)):
            factor = min((step + 1) / max(1, recipe.warmup * steps), falling(recipe, step / steps))
            for group in optimiser.param_groups:
                group["lr"] = peak * group["scale"] * factor
            x = images.normalised(shown)
            x = moved(x, rng) if recipe.scale is None else x
            mixed, targets = mix(x, labels, head.out_features, recipe, rng)
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


def falling(recipe: Recipe, done: float) -> float:
    """The share of the peak learning rate where that share of the run is done, but for the warm-up."""
    if recipe.drops:
        return float(0.1 ** sum(done >= at for at in recipe.drops))
    return 0.5 * (1 + math.cos(math.pi * done))


def moved(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Normalised images [B, C, H, W], each moved by up to an eighth of its side any way, with zeros, the mean of all
    images, where it came from (4 of 32 pixels: He et al. 2016, section 4.2)."""
    height, width = x.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(x, (right, right, down, down))
    places = zip(rng.integers(0, 2 * down + 1, len(x)), rng.integers(0, 2 * right + 1, len(x)))
    return torch.stack([one[:, y : y + height, z : z + width] for one, (y, z) in zip(padded, places)])


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
    """Labelled images under random crops and flips, for ever: uint8 [batch, 3, H, W] on the device, int64 [batch]."""
    view = replace(evaluation_view(images.image_size), scale=recipe.scale, flip_p=0.5)
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
