"""Are the changes what they are said to be? Against Pillow, scipy, colorsys and what noise must measure."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from pipeline.evaluation import changes, corruptions
from pipeline.evaluation.changes import ALL, change
from pipeline.evaluation.jpeg import jpeg_at

SIDE = 48


def photographs(n: int = 2, side: int = SIDE) -> Tensor:
    """Smooth images with edges, float in [0.1, 0.9]: [n, 3, side, side]."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(n, 3, side, side)), (0, 0, 4, 4))
    smooth = smooth / np.abs(smooth).max()
    smooth[:, :, side // 4 : side // 2, side // 4 : side // 2] *= -1
    return torch.from_numpy(0.5 + 0.4 * smooth).float()


def run(name: str, severity: int, x: Tensor, seed: int = 0) -> Tensor:
    return ALL[name](x, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_every_change_grows_with_its_severity_and_repeats_itself(name: str) -> None:
    images = (photographs(4) * 255).round().to(torch.uint8)
    severities = (3, 4, 5) if name == "elastic" else (1, 3, 5)  # its first two move the image most, and bend it little
    far = [(change(images, name, severity, 3).float() - images.float()).abs().mean().item() for severity in severities]
    assert far[0] > 0.05
    assert far[0] < far[2] or name == "frost"  # there the image darkens while ice is added
    assert torch.equal(change(images, name, 2, 3), change(images, name, 2, 3))
    assert change(images, name, 2, 3).shape == images.shape
    odd = change(images[..., :37, :45], name, 5, 1)  # no multiple of 8, not square
    assert odd.shape[-2:] == (37, 45)


def test_noise_has_the_strength_it_is_said_to_have() -> None:
    x = torch.full((4, 3, 64, 64), 0.5)
    assert (run("gaussian_noise", 3, x) - x).std().item() == pytest.approx(0.18, rel=0.03)
    shot = run("shot_noise", 4, x)
    assert shot.mean().item() == pytest.approx(0.5, rel=0.02)
    assert shot.var().item() == pytest.approx(0.5 / 5, rel=0.05)  # Poisson: variance λ of counts, x / c of images
    impulse = run("impulse_noise", 5, x)
    assert (impulse == 0).double().mean().item() == pytest.approx(0.135, rel=0.06)
    assert (impulse == 1).double().mean().item() == pytest.approx(0.135, rel=0.06)


def test_contrast_and_brightness() -> None:
    x = photographs()
    torch.testing.assert_close(run("contrast", 2, x).std((2, 3)), 0.3 * x.std((2, 3)))
    torch.testing.assert_close(run("contrast", 2, x).mean((2, 3)), x.mean((2, 3)))
    found = run("brightness", 3, x)
    for pixel in ((0, 5, 5), (1, 20, 20), (0, 40, 7)):
        before, after = (t[pixel[0], :, pixel[1], pixel[2]].tolist() for t in (x, found))
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3)), abs=1e-5)


def test_defocus_is_a_convolution_with_a_disc() -> None:
    x = photographs(1, 112)
    found = run("defocus_blur", 4, x)[0, 0].numpy()
    fine = (np.arange(110) - 54.5) / 10  # ten times finer than its pixels
    disc = np.hypot(fine[:, None], fine) <= 4  # 8 of 224 pixels, at 112
    kernel = disc.reshape(11, 10, 11, 10).mean((1, 3))
    expected = ndimage.convolve(x[0, 0].numpy(), kernel / kernel.sum(), mode="mirror")
    assert np.abs(found - expected).max() < 0.03
    assert np.abs(x[0, 0].numpy() - expected).max() > 0.1


def test_motion_blur_is_the_weighted_mean_of_scipys_shifts() -> None:
    x = photographs(1, 56)[..., :48]
    angle = np.radians(float(torch.rand((), generator=torch.Generator().manual_seed(5))) * 90 - 45)
    far = np.arange(31)  # radius 15, sigma 8 at 224 pixels
    weights = np.exp(-(far**2) / 128)
    moved = [
        ndimage.shift(x[0, 0].numpy(), (-d * np.sin(angle), -d * np.cos(angle)), order=1, mode="reflect")
        for d in far * 48 / 224
    ]
    found = run("motion_blur", 3, x, seed=5)[0, 0].numpy()
    assert abs(angle) > 0.2
    assert np.abs(found - np.average(moved, axis=0, weights=weights)).max() < 1e-5


def test_zoom_blur_is_the_mean_of_scipys_zooms() -> None:
    x = photographs(1, 64)
    found = run("zoom_blur", 3, x)[0, 0].numpy()
    image = x[0, 0].numpy().astype(np.float64)
    grid = np.arange(64) - 31.5
    zooms = [image]
    for factor in np.arange(1, 1.21, 0.02):
        at = 31.5 + grid / factor
        zooms.append(ndimage.map_coordinates(image, np.meshgrid(at, at, indexing="ij"), order=1, mode="mirror"))
    assert np.abs(found - np.mean(zooms, axis=0)).max() < 1e-3


def test_snow_whitens_and_its_flakes_cover_what_the_noise_promises() -> None:
    black, half = torch.zeros(8, 3, 224, 224), torch.full((8, 3, 224, 224), 0.5)
    assert run("snow", 1, black).amin().item() == pytest.approx(0.2 * 0.5, abs=1e-4)  # between the flakes
    assert run("snow", 1, half).amin().item() == pytest.approx(0.8 * 0.5 + 0.2 * 1.25, abs=1e-4)
    rng = np.random.default_rng(0)
    zoomed = ndimage.zoom(rng.normal(0.55, 0.3, (600, 600)), 4, order=1)
    flakes = np.where(zoomed < 0.9, 0, zoomed.clip(0, 1)).mean()  # a streak keeps the mean; there are two layers
    found = (run("snow", 3, black) - 0.3 * 0.5).mean().item()
    assert found == pytest.approx(2 * flakes, rel=0.1)
    small = run("snow", 3, torch.zeros(64, 3, 56, 56))
    assert (small - 0.3 * 0.5).mean().item() == pytest.approx(2 * flakes, rel=0.1)


def places(name: str, severity: int, seed: int, side: int = 224) -> np.ndarray:
    """Where a change that is linear in the values takes each pixel from, in pixels (right, down): [2, side, side]."""
    at = torch.arange(side, dtype=torch.float32) / side
    image = torch.stack([at.expand(side, side), at[:, None].expand(side, side), torch.zeros(side, side)])[None]
    return side * run(name, severity, image, seed)[0, :2].double().numpy()


def inner(field: np.ndarray, border: int = 48) -> np.ndarray:
    return field[..., border:-border, border:-border]


def softened(sigma: float) -> float:
    """What a Gaussian blur leaves of the deviation of white noise."""
    point = np.zeros((129, 129))
    point[64, 64] = 1
    return float(np.sqrt((ndimage.gaussian_filter(point, sigma) ** 2).sum()))


@pytest.mark.parametrize(("severity", "sigma", "reach", "times"), [(1, 0.7, 1, 2), (3, 1, 2, 3), (5, 1.5, 4, 2)])
def test_glass_is_the_original_exchange_of_pixels_between_two_blurs(
    severity: int, sigma: float, reach: int, times: int
) -> None:
    x = photographs(2, 224)
    found = run("glass_blur", severity, x, seed=4)
    inside = 224 - 2 * reach
    steps = torch.randint(-reach, reach, (times, inside, inside, 2), generator=torch.Generator().manual_seed(4)).numpy()
    for image, of in zip(x.double().numpy(), found.numpy()):
        pixels = ndimage.gaussian_filter(image.transpose(1, 2, 0), (sigma, sigma, 0))
        for once in steps:
            for i, h in enumerate(range(224 - reach, reach, -1)):
                for j, w in enumerate(range(224 - reach, reach, -1)):
                    dx, dy = once[i, j]
                    pixels[h, w], pixels[h + dy, w + dx] = pixels[h + dy, w + dx], pixels[h, w]
        pixels = ndimage.gaussian_filter(pixels, (sigma, sigma, 0))
        assert np.abs(inner(pixels.transpose(2, 0, 1), 8) - inner(of, 8)).max() < 1e-3
        assert np.abs(inner(image, 8) - inner(of, 8)).max() > 0.02


def test_glass_on_small_images_moves_as_far_for_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "blurred", lambda x, sigma: x)
    large, small = (places("glass_blur", 5, 0, side) for side in (224, 56))
    still = [np.stack(np.meshgrid(np.arange(side), np.arange(side))) for side in (224, 56)]
    spread = [inner(of - at, side // 8).std() for of, at, side in zip((large, small), still, (224, 56))]
    assert spread[1] / spread[0] == pytest.approx(0.25, rel=0.1)


def test_fog_of_a_known_thickness_lies_over_the_image() -> None:
    x = photographs(2, 224)
    field = corruptions.plasma(2, 1.7, torch.Generator().manual_seed(0))[..., :224, :224]
    most = x.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(run("fog", 3, x), (x + 2.5 * field) * most / (most + 2.5))
    small = run("fog", 3, torch.full((2, 3, 56, 56), 0.5))  # (0.5 + 2.5 f) 0.5 / 3
    average = torch.nn.functional.avg_pool2d(field, 4)
    assert ((small[:, :1] * 6 - 0.5) / 2.5 - average).abs().mean() < 0.02


@pytest.mark.parametrize("decay", [2.0, 1.4])
def test_a_plasma_is_displaced_by_a_wobble_squared_that_falls_with_its_scale(decay: float) -> None:
    field = corruptions.plasma(6, decay, torch.Generator().manual_seed(0))[:, 0].double().numpy()
    assert (field.min((1, 2)), field.max((1, 2))) == (pytest.approx(0), pytest.approx(1))
    spread = []
    for step in (2, 4, 8):
        corners, middles = field[:, ::step, ::step], field[:, step // 2 :: step, step // 2 :: step]
        four = sum(np.roll(corners, (-y, -z), (1, 2)) for y in (0, 1) for z in (0, 1))
        added = middles - four / 4
        spread.append(added.std((1, 2)))
        assert np.abs(added).max((1, 2)) == pytest.approx(3**0.5 * spread[-1], rel=0.05)  # uniform, to both sides
        sides = field[:, ::step, step // 2 :: step] - four_around(corners, middles)
        assert sides.std((1, 2)) == pytest.approx(spread[-1], rel=0.1)
    assert spread[1] / spread[0] == pytest.approx(np.full(6, decay**2), rel=0.1)
    assert spread[2] / spread[1] == pytest.approx(np.full(6, decay**2), rel=0.15)


def four_around(corners: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """The mean of what surrounds the points between two corners of a row."""
    return (corners + np.roll(corners, -1, 2) + middles + np.roll(middles, 1, 1)) / 4


def test_frost_adds_its_share_of_ice_that_differs_from_image_to_image() -> None:
    black, grey = torch.zeros(4, 3, 224, 224), torch.full((4, 3, 224, 224), 0.5)
    for severity, (kept, thick) in enumerate(((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), 1):
        ice = run("frost", severity, black) / thick
        assert ice.amin() >= 0
        assert ice.amax() <= 1
        torch.testing.assert_close(run("frost", severity, grey), 0.5 * kept + thick * ice)
    assert 0.2 < ice.mean() < 0.6
    assert ice.std((1, 2, 3)).min() > 0.1
    assert (ice[0] - ice[1]).abs().mean() > 0.05
    assert ice[:, 2].mean() > ice[:, 0].mean()  # blue
    assert run("frost", 3, torch.zeros(1, 3, 48, 96)).shape == (1, 3, 48, 96)


@pytest.mark.parametrize(
    ("severity", "amount", "sigma", "jitter"), [(3, 0.05, 0.01, 0.02), (4, 0.07, 0.01, 0.02), (5, 0.12, 0.01, 0.02)]
)
def test_elastic_is_an_affine_map_of_three_moved_points_and_a_smooth_field(
    severity: int, amount: float, sigma: float, jitter: float
) -> None:
    amount, sigma, jitter = (244 / 224 * part for part in (amount, sigma, jitter))  # the authors' side
    points = 111.5 + 224 / 3 * np.array([[1, 1], [1, -1], [-1, -1]])
    still = np.stack(np.meshgrid(np.arange(224), np.arange(224))).astype(float)
    known = np.concatenate([inner(still).reshape(2, -1), np.ones((1, 128 * 128))])
    far, spread = [], []
    for seed in range(6):
        found = inner(places("elastic", severity, seed)).reshape(2, -1)
        affine = found @ np.linalg.pinv(known)
        # The points came from where the map sends those that they were moved to.
        moved = np.linalg.solve(affine[:, :2], points.T - affine[:, 2:]).T
        far.append(abs(moved - points).max() / 224)
        spread.append(np.linalg.solve(affine[:, :2], found - affine @ known).std())
    # Uniform noise of deviation 1 / √3, blurred.
    expected = amount * 224 / 3**0.5 * softened(sigma * 224)
    assert np.mean(spread) == pytest.approx(expected, rel=0.1)
    assert 0.3 * jitter < max(far) < 1.1 * jitter


def test_pixelate_is_pillows_box_and_nearest() -> None:
    x = photographs(1, 40)
    image = Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    theirs = image.resize((20, 20), Image.Resampling.BOX).resize((40, 40), Image.Resampling.NEAREST)
    found = run("pixelate", 2, x)  # half of the side and more: int(40 * 0.5) = 20
    assert np.abs(np.asarray(theirs) / 255 - found[0].permute(1, 2, 0).numpy()).max() < 0.006  # both round twice


@pytest.mark.parametrize("quality", [25, 7, 80])
def test_jpeg_loses_what_pillow_loses(quality: int) -> None:
    x = photographs(1, 64)
    image = Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)
    theirs = np.asarray(Image.open(file)).astype(float)
    ours = jpeg_at(torch.from_numpy(np.asarray(image) / 255.0).permute(2, 0, 1)[None].float(), quality)
    ours = (ours[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    loss = np.abs(theirs - np.asarray(image)).mean()
    assert np.abs(theirs - ours).mean() < 0.35 * loss + 0.3
    assert np.abs(ours - np.asarray(image)).mean() == pytest.approx(loss, rel=0.15, abs=0.2)


def test_geometry_moves_what_it_is_said_to_move() -> None:
    x = torch.zeros(1, 1, 40, 40)
    x[..., 20, 20] = 1
    where = [divmod(int(run("shift", 4, x, seed).flatten().argmax()), 40) for seed in range(8)]
    assert all(np.hypot(r - 20, c - 20) == pytest.approx(8, abs=1) for r, c in where)  # 20 % of 40 pixels
    ramp = torch.linspace(-1, 1, 41).expand(1, 1, 41, 41)
    turned = run("rotation", 5, ramp)[0, 0]  # by 90 degrees: columns become rows
    assert min((turned - ramp[0, 0].T).abs().max(), (turned + ramp[0, 0].T).abs().max()) < 0.06
    cut = run("crop", 4, ramp)[0, 0]
    assert (cut[20, -1] - cut[20, 0]).item() == pytest.approx(2 * 0.5, abs=0.06)  # 25 % of the area: half of the side
    small = run("scale", 4, torch.ones(1, 3, 40, 40) * torch.eye(40))
    assert small[0, 0, :11].std() < 1e-6  # nothing but the mean colour around it
    assert small[0, 0, 20, 20] > 0.2


def test_occlusion_hides_its_share_and_shuffling_keeps_every_pixel() -> None:
    x = photographs(3)
    hidden = (run("occlusion", 3, x) != x).any(1).double().mean((1, 2))
    assert hidden.tolist() == pytest.approx([round(0.45 * 64) / 64] * 3, abs=0.01)
    for severity in changes.SEVERITIES:
        shuffled = run("patch_shuffle", severity, x)
        assert torch.equal(shuffled.flatten().sort().values, x.flatten().sort().values)
        assert not torch.equal(shuffled, x)
