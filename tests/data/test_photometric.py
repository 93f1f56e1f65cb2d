"""Photometric changes: torchvision's operators for each sample, distributed as the published recipes draw them."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from scipy.stats import ks_2samp
from torch import Tensor

from objectives.views import Photometric, View
from pipeline.data import crops
from pipeline.data.photometric import CONTRAST, HUE, SATURATION, Draws, Photometrics, apply, draw, kernel_size

pytestmark = pytest.mark.timeout(120)
ALL = Photometric(0.4, 0.4, 0.2, 0.1, jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.2)
PLAIN = Photometric(jitter_p=0.0)


def images(n: int, size: tuple[int, int] = (40, 50), channels: int = 3) -> Tensor:
    """Smooth random images uint8 [n, C, h, w], channels last, with flat, grey and saturated places."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 5, 6, generator=generator) * 1.4 - 0.2
    x = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    x[:, :, :5] = x[:, :1, :5]
    return (x * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def unchanged(n: int) -> Draws:
    return draw(None, np.arange(n, dtype=np.uint64))


def ours(x: Tensor, draws: Draws, path: str) -> Tensor:
    """Through the compiled code of CPUs, or the tensor operations of other devices; not normalised."""
    if path == "tensors":
        return apply(x.float() / 255, draws)
    photometrics = Photometrics([View("v", x.shape[-2:], None)], 0, [0.0] * x.shape[1], [1.0] * x.shape[1])
    return photometrics._on_cpu(x, draws)


def theirs(x: Tensor, draws: Draws) -> Tensor:
    """torchvision, sample by sample, operation by operation."""
    jitter = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    out = []
    for n, image in enumerate(x.float() / 255):
        for op in draws.order[n]:
            image = jitter[op](image, float(draws.factors[n, op]))
        if draws.gray[n]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if draws.sigma[n] > 0:
            window = [kernel_size(image.shape[2]), kernel_size(image.shape[1])]
            image = TF.gaussian_blur(image, window, [float(draws.sigma[n])] * 2)
        if draws.solarize[n]:
            image = TF.solarize(image, 0.5)
        out.append(image)
    return torch.stack(out)


def close(a: Tensor, b: Tensor, levels: float = 0.05) -> bool:
    """Equal within `levels` of 255, but for the few pixels on the edge of a threshold (solarise, hue of a grey)."""
    return ((a - b).abs() > levels / 255).float().mean().item() < 1e-4


PATHS = ["cpu", "tensors"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", range(4))
def test_each_jitter_operation_is_torchvisions(path, op):
    x = images(12)
    values = np.linspace(-0.5, 0.5, 12) if op == HUE else np.linspace(0, 2, 12)
    draws = unchanged(12)
    draws.factors[:, op] = values.astype(np.float32)
    assert close(ours(x, draws, path), theirs(x, draws))


@pytest.mark.parametrize("path", PATHS)
def test_grayscale_and_solarise_are_torchvisions(path):
    x, every = images(6), np.ones(6, np.bool_)
    for draws in (unchanged(6)._replace(gray=every), unchanged(6)._replace(solarize=every)):
        assert close(ours(x, draws, path), theirs(x, draws))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(40, 50), (96, 96), (224, 224), (32, 32), (16, 7), (1, 1)])
def test_blur_is_torchvisions(path, size):
    x = images(6, size)
    draws = unchanged(6)._replace(sigma=np.array([0.1, 0.5, 1, 1.5, 2, 0], np.float32))
    assert close(ours(x, draws, path), theirs(x, draws))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(32, 32), (61, 45), (112, 112)])
def test_everything_together_in_random_order_is_torchvisions(path, size):
    x = images(48, size)
    draws = draw(ALL, crops.sample_keys(crops.stream(crops.PHOTOMETRIC, 0, 0), np.arange(48), 0))
    assert close(ours(x, draws, path), theirs(x, draws), levels=0.2)


def test_the_window_is_a_tenth_of_the_image_and_odd():
    assert [kernel_size(s) for s in (224, 96, 64, 32, 16, 1)] == [23, 9, 7, 3, 1, 1]


@pytest.mark.parametrize("channels", range(1, 13))
def test_any_number_of_channels(channels):
    x = images(16, channels=channels)
    view = View("v", (40, 50), None, photometric=ALL)
    photometrics = Photometrics([view], 0, [0.5] * channels, [0.25] * channels)
    on_cpu = photometrics([x], torch.arange(16), 0)[0]
    with_tensors = photometrics._on_device(x, photometrics.draws(0, np.arange(16), 0))
    assert on_cpu.shape == x.shape
    assert on_cpu.isfinite().all()
    assert close(on_cpu, with_tensors)
    if channels != 3:  # colour operations have no meaning there
        draws = unchanged(16)
        draws.factors[:, SATURATION:] = 0.3
        draws.gray[:] = True
        assert close(ours(x, draws, "cpu"), x.float() / 255)


def test_normalised_by_channel():
    x = images(4)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.9)
    out = Photometrics([View("v", (40, 50), None)], 0, mean, std)([x], torch.arange(4), 0)[0]
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, TF.normalize(x.float() / 255, mean, std), atol=1e-5)


def test_draws_are_distributed_as_colour_jitter_draws_them():
    n = 6000
    draws = draw(ALL, crops.sample_keys(crops.stream(crops.PHOTOMETRIC, 0, 0), np.arange(n), 0))
    jittered = draws.factors[:, CONTRAST] != 1
    assert abs(jittered.mean() - 0.8) < 0.02
    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    params = [jitter.make_params([]) for _ in range(3000)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for op, name in enumerate(names):
        assert ks_2samp(draws.factors[jittered, op], [p[name] for p in params]).pvalue > 1e-3
    orders, counts = np.unique(draws.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts / n - 1 / 24).max() < 0.012
    for share, p in ((draws.gray, 0.2), (draws.sigma > 0, 0.5), (draws.solarize, 0.2)):
        assert abs(share.mean() - p) < 0.02
    sigma = draws.sigma[draws.sigma > 0]
    assert ks_2samp(sigma, np.random.default_rng(0).uniform(0.1, 2, 3000)).pvalue > 1e-3


def test_images_are_distributed_as_torchvisions_recipe_makes_them():
    """One image many times through the recipe of DINO: mean and contrast of what comes out, by channel."""
    n = 800
    x = images(1, (24, 24)).expand(n, -1, -1, -1)
    recipe = Photometric(0.4, 0.4, 0.2, 0.1, gray_p=0.2, solarize_p=0.2)
    view = View("v", (24, 24), None, photometric=recipe)
    out = Photometrics([view], 0, (0, 0, 0), (1, 1, 1))([x], torch.arange(n), 0)[0]
    torch.manual_seed(0)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    published = T.Compose([jitter, T.RandomGrayscale(0.2), T.RandomSolarize(0.5, 0.2)])
    reference = torch.stack([published(image) for image in x.float() / 255])
    for statistic in (lambda v: v.mean((1, 2, 3)), lambda v: v.std((1, 2, 3)), lambda v: v[:, 0].mean((1, 2))):
        assert ks_2samp(*(statistic(v).numpy().round(4) for v in (out, reference))).pvalue > 1e-3


def test_a_sample_does_not_depend_on_its_batch_or_on_threads_but_on_seed_epoch_and_view():
    x = images(20)
    views = [View("a", (40, 50), None, photometric=ALL), View("b", (40, 50), None, photometric=ALL)]
    whole = Photometrics(views, 3)([x, x], torch.arange(20), 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        part = Photometrics(views, 3)([x[7:9], x[7:9]], torch.arange(7, 9), 5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, w[7:9]) for p, w in zip(part, whole))
    differs = lambda a, b: (a != b).flatten(1).any(1).float().mean() > 0.9  # noqa: E731
    assert differs(whole[0], whole[1])
    assert differs(whole[0], Photometrics(views, 3)([x, x], torch.arange(20), 6)[0])
    assert differs(whole[0], Photometrics(views, 4)([x, x], torch.arange(20), 5)[0])


def test_jitter_says_nothing_about_the_crop():
    index = np.arange(5000)
    crop = crops.uniforms(crops.sample_keys(crops.stream(crops.CROP, 0, 0), index, 0), 0)
    colour = crops.uniforms(crops.sample_keys(crops.stream(crops.PHOTOMETRIC, 0, 0), index, 0), 1)
    assert abs(np.corrcoef(crop, colour)[0, 1]) < 0.05


def test_views_of_several_sizes_keep_their_order_and_the_input_is_left_alone():
    sizes = [(40, 50), (20, 20), (40, 50), (20, 20)]
    views = [View(str(n), size, None, photometric=ALL) for n, size in enumerate(sizes)]
    x = [images(6, size) for size in sizes]
    before = [v.clone() for v in x]
    photometrics = Photometrics(views, 0)
    out = photometrics(x, torch.arange(6), 0)
    assert [tuple(v.shape[-2:]) for v in out] == sizes
    assert all(torch.equal(a, b) for a, b in zip(x, before))
    for n in range(4):
        assert close(out[n], photometrics._on_device(x[n], photometrics.draws(n, np.arange(6), 0)))


def test_views_without_photometric_changes_are_only_normalised():
    x = images(4)
    for photometric in (None, PLAIN, Photometric(0.0, 0.0, 0.0, 0.0, jitter_p=1.0)):
        view = View("v", (40, 50), None, photometric=photometric)
        out = Photometrics([view], 0, (0, 0, 0), (1, 1, 1))([x], torch.arange(4), 0)[0]
        assert torch.allclose(out, x.float() / 255, atol=1e-6)


def test_what_was_not_declared_is_refused():
    photometrics = Photometrics([View("v", (40, 50), None)], 0)
    with pytest.raises(ValueError, match="got 2 views, but 1"):
        photometrics([images(2), images(2)], torch.arange(2), 0)
    with pytest.raises(ValueError, match=r"5 channels.*3"):
        photometrics([images(2, channels=5)], torch.arange(2), 0)
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        photometrics([images(2).float()], torch.arange(2), 0)


def test_solarising_begins_at_level_128():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for path in PATHS:
        out = ours(x, unchanged(1)._replace(solarize=np.ones(1, np.bool_)), path)
        expected = TF.solarize(x, 128).float() / 255
        assert torch.allclose(out, expected, atol=1e-6)
