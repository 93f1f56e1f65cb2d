"""The worked example of CONTRIBUTING.md keeps the contract."""

import re
from pathlib import Path

import torch
from objective_checks import continues_exactly, learns_with_every_parameter, lifts_knn, takes_any_images, toy

ROOT = Path(__file__).resolve().parents[2]


def example() -> type:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names["AlignUniform"]


def test_the_example_keeps_the_contract() -> None:
    kind = example()

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return kind(toy("vit"), image_size=32, out_dim=16)

    continues_exactly(make)
    learns_with_every_parameter(make())
    takes_any_images(lambda backbone, image_size: kind(backbone, image_size=image_size, out_dim=16))


def test_the_example_learns() -> None:
    before, after = lifts_knn(example(), "cnn", steps=40)
    assert after > before + 0.03
