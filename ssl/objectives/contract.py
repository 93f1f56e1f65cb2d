"""The contract every objective keeps with the training loop."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from objectives.views import View, VitalSign

if TYPE_CHECKING:
    from backbones import Backbone


class TooFewImages(ValueError):
    """A batch, over all ranks, from which an objective cannot learn; its message names the way out."""


class Objective(nn.Module):
    """A loss with all it needs around the backbone: heads, a teacher, a queue, and the views it wants to see.

    All state is in parameters and buffers, so `state_dict()` is the checkpoint. Schedules are functions of
    `progress`, the images seen over the images planned, in [0, 1]. An optimiser step is

        loss, scalars = objective(views, progress)
        loss.backward()
        objective.after_backward(progress)
        optimiser.step()
        objective.after_step(progress)

    Randomness comes from torch's default generators alone, which the loop seeds before each step. Every trainable
    parameter gets a gradient in every step, so DDP needs no search for unused ones. Any number of ranks trains as one
    with the joined batch: what couples samples is summed over them. What is drawn for each image, its mask, a rank
    draws for its own from a seed of its own: there, ranks are as one in distribution.
    """

    family: ClassVar[str]
    """What kind of objective it is, for lists: "self-distillation", "masked modelling", ..."""
    paper: ClassVar[str]
    """Authors, year and arXiv number."""
    pool: ClassVar[str | None] = None
    """The pooling the backbone should be created with, "cls" or "mean"; None leaves the backbone its own."""
    labelled: ClassVar[bool] = False
    """Whether `forward` is given labels too, int64 [B], -1 for none; then the option `classes` is their number."""

    masking: ClassVar[Literal["visible", "replaced"] | None] = None
    """How it hides cells, on any backbone: by the argument of the backbone's that names those to see, which drops the
    others, or by the one that replaces some by a learned token; None where it hides none."""

    continues: ClassVar[bool] = False
    """Whether it goes on from a trained run, which its option `checkpoint` must name."""

    tokens_decay: ClassVar[bool] = True
    """Whether class tokens and absolute positions decay, as DINO's, MAE's and MoCo v3's authors have it."""

    views: tuple[View, ...]
    """The views `forward` expects, in this order."""
    vital_signs: tuple[VitalSign, ...]
    """Scalars that tell a collapse, with their healthy ranges."""

    @property
    def backbone(self) -> "Backbone":
        """The backbone to evaluate and to export: the teacher's where there is one."""
        raise NotImplementedError(f"{type(self).__name__} must name its backbone")

    def forward(self, views: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, with gradient) and named scalars (detached) of one batch.

        Args:
            views: one tensor [B, C, h, w] for each of `self.views`, float, normalised.
            progress: images seen so far / images planned.
        """
        raise NotImplementedError(f"{type(self).__name__} must compute a loss")

    def after_backward(self, progress: float) -> None:
        """Change gradients before the step; they are already averaged over ranks."""

    def after_step(self, progress: float) -> None:
        """Move what follows the optimiser: teachers, centres, queues."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in groups with `lr_scale` and `wd_scale`.

        No decay on biases, 1-D parameters, gains (of NFNets, [C, 1, 1, 1]), and what the networks want `spared`. A
        group with `constant_lr` keeps the peak learning rate throughout.
        """
        named = spared(self, tokens=not self.tokens_decay)
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                bare = parameter.ndim <= 1 or name.endswith((".bias", ".gain")) or name in named
                (plain if bare else decayed).append(parameter)
        groups = [(decayed, 1.0), (plain, 0.0)]
        return [{"params": group, "lr_scale": 1.0, "wd_scale": wd} for group, wd in groups if group]


def spared(module: nn.Module, *, tokens: bool) -> set[str]:
    """Names of the parameters inside `module` that its networks want without weight decay (timm's `no_weight_decay()`).

    Relative position biases, for one (Swin, BEiT), and temperatures (Swin V2, XCiT).

    Args:
        tokens: whether class tokens and absolute positions are among them.
    """
    return {
        f"{prefix}.{name}"
        for prefix, network in module.named_modules()
        for name in getattr(network, "no_weight_decay", set)()
        if tokens or not ("token" in name or "pos_embed" in name)
    }


def pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or as both."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
