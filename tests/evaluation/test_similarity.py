"""Is CKA what the papers define, and does it know what is the same?"""

import numpy as np
import pytest
import torch

import backbones
from pipeline.evaluation.similarity import cka, hsic, layer_grams


def gram(x: torch.Tensor) -> torch.Tensor:
    return x @ x.T


def matrices(seed: int, n: int = 30, p: int = 7) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hsic_is_the_unbiased_estimator_written_out() -> None:
    k, m = (gram(matrices(i)).numpy() for i in (0, 1))
    for matrix in (k, m):
        np.fill_diagonal(matrix, 0)
    n, ones = len(k), np.ones(len(k))
    expected = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    expected = (expected - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))
    found = hsic(torch.from_numpy(k)[None], torch.from_numpy(m)[None])
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_minibatches_estimate_what_all_images_give() -> None:
    """Against linear CKA of the whole set in feature space (Kornblith et al. 2019, equation 5)."""
    x = matrices(0, 4000, 6) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.5])
    y = x @ matrices(1, 6, 9) + matrices(2, 4000, 9)
    a, b = x - x.mean(0), y - y.mean(0)
    whole = ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())).item()
    grams = [torch.stack([gram(part) for part in t.split(50)])[None] for t in (x, y)]
    assert cka(*grams).item() == pytest.approx(whole, abs=0.01)


def test_rotations_scales_and_shifts_are_the_same_and_noise_is_not() -> None:
    x = matrices(0, 64, 7)
    q, _ = torch.linalg.qr(matrices(1, 7, 7))
    grams = torch.stack([gram(x), gram(3 * x @ q + 5), gram(matrices(2, 64, 7))])[:, None]
    table = cka(grams, grams)
    assert table[0, 1].item() == pytest.approx(1, abs=1e-8)
    assert table.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert abs(table[0, 2].item()) < 0.12
    torch.testing.assert_close(table, table.T)


def test_other_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="same batches"):
        cka(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 9, 9))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("vit_ti8", 12), ("resnet18", 9), ("resnet20", 11), ("efficientnet_b0", 17), ("convnext_atto", 14), ("lenet5", 5)],
)
def test_every_block_is_a_layer_in_its_order(name: str, blocks: int) -> None:
    """Of CNNs the stem counts, too (of resnet20 as its convolution and its norm); of EfficientNet and ConvNeXt, what
    follows the last block."""
    torch.manual_seed(0)
    backbone = backbones.create(name, image_size=32).eval()
    images = torch.randn(6, 3, 32, 32)
    found = layer_grams(backbone, images)
    assert found.shape == (blocks, 6, 6)
    with torch.no_grad():
        features = backbone(images, layers=True)
    last = features.cells if name in ("resnet18", "resnet20", "efficientnet_b0", "convnext_atto") else None
    if last is not None:
        x = last.flatten(1)
        torch.testing.assert_close(found[-1], x @ x.T / x.shape[1], rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_a_block_that_is_changed_changes_all_layers_from_it_on_and_none_before() -> None:
    torch.manual_seed(0)
    backbone = backbones.create("resnet18", image_size=32).eval()
    images = torch.randn(6, 3, 32, 32)
    before = layer_grams(backbone, images)
    torch.nn.init.zeros_(backbone.blocks()[3].downsample[0].weight)  # type: ignore[index, union-attr]
    after = layer_grams(backbone, images)
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    assert same == [True] * 3 + [False] * 6
