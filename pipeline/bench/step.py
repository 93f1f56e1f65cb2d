"""A training step of DINO on views in memory: this project's, and LightlySSL's as its documentation writes it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.bench.contender import Arguments, Bench, Contender, threads
from pipeline.errors import UserError

SIZES = (64, 64, *[32] * 6)  # pixels per side of the views
HEAD: dict[str, Any] = {"hidden_dim": 2048, "bottleneck_dim": 256}
PROTOTYPES = 2048
RATE = 1e-4
PROGRESS = 0.5  # of the run, past the frozen last layer


def steps(step: Callable[[list[Any]], Any], half: bool, arguments: Arguments) -> Iterator[int]:
    """Call `step` with the same views for ever."""
    import torch

    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(arguments.batch_size, 3, size, size, generator=generator) for size in SIZES]
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = step(views)
        loss()
        yield arguments.batch_size


def ours(half: bool) -> Callable[[Path, Arguments], Iterator[int]]:
    """This project's objective and optimiser step."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        import torch

        import backbones
        from objectives.dino import DINO

        torch.set_num_threads(threads(arguments))
        torch.manual_seed(0)
        backbone = backbones.create("vit_ti16", image_size=SIZES[0])
        objective = DINO(backbone, image_size=SIZES[0], local_views=6, local_size=SIZES[-1], out_dim=PROTOTYPES, **HEAD)
        optimiser = torch.optim.AdamW(objective.parameter_groups(), RATE)

        def step(views: list[Any]) -> Callable[[], None]:
            loss, _ = objective(views, PROGRESS)

            def rest() -> None:
                loss.backward()
                objective.after_backward(PROGRESS)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                objective.after_step(PROGRESS)

            return rest

        yield from steps(step, half, arguments)

    return batches


def lightly(half: bool) -> Callable[[Path, Arguments], Iterator[int]]:
    """LightlySSL's loss, heads and teacher around timm's backbone, view after view."""

    def batches(path: Path, arguments: Arguments) -> Iterator[int]:
        import timm
        import torch

        try:
            from lightly.loss import DINOLoss
            from lightly.models.modules import DINOProjectionHead
            from lightly.models.utils import deactivate_requires_grad, update_momentum
        except ImportError as error:
            raise UserError(f"LightlySSL is not installed ({error})") from error

        torch.set_num_threads(threads(arguments))
        torch.manual_seed(0)
        sizes = {"img_size": SIZES[0], "dynamic_img_size": True, "num_classes": 0}

        def network() -> torch.nn.Sequential:
            head = DINOProjectionHead(192, **HEAD, output_dim=PROTOTYPES)
            return torch.nn.Sequential(timm.create_model("vit_tiny_patch16_224", **sizes), head)

        student, teacher = network(), network()
        teacher.load_state_dict(student.state_dict())
        deactivate_requires_grad(teacher)
        criterion = DINOLoss(output_dim=PROTOTYPES)
        optimiser = torch.optim.AdamW(student.parameters(), RATE)

        def step(views: list[Any]) -> Callable[[], None]:
            update_momentum(student, teacher, m=0.996)
            targets = [teacher(view) for view in views[:2]]
            loss = criterion(targets, [student(view) for view in views], epoch=10)

            def rest() -> None:
                loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)

            return rest

        yield from steps(step, half, arguments)

    return batches


BENCH = Bench(
    "training steps of DINO, ViT-Ti/16, 2 views of 64 and 6 of 32 pixels, on the CPU",
    {
        "lightly": Contender("LightlySSL", lightly(half=False)),
        "ours": Contender("this project", ours(half=False)),
        "lightly-bf16": Contender("LightlySSL, bf16", lightly(half=True)),
        "ours-bf16": Contender("this project, bf16", ours(half=True)),
    },
)
