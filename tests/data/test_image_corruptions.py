"""Image corruptions: hand-computed or naive values where they are deterministic, their distribution where random."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from lightning_abpem.data import image_weather as weather
from lightning_abpem.data.image_corruptions import (
    HELD_OUT_IMAGE_KINDS,
    IMAGE_KINDS,
    _shuffle,
    corrupt_image,
)
from lightning_abpem.data.image_weather import load_frost

KINDS = IMAGE_KINDS + HELD_OUT_IMAGE_KINDS
DETERMINISTIC = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def corrupt(image, kind, severity, seed=0, frost=None):
    return corrupt_image(image, kind, severity, np.random.default_rng(seed), frost)


def dot(size):
    image = np.zeros((size, size, 1))
    image[size // 2, size // 2] = 1
    return image


# ------------------------------------------------------------------------------------------------------- every kind


def test_kinds_are_those_of_the_benchmark():
    assert IMAGE_KINDS == (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    )
    assert HELD_OUT_IMAGE_KINDS == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@pytest.mark.parametrize("shape", [(32, 32, 1), (48, 40, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_images(kind, shape):
    image = random_image(*shape)
    image.flags.writeable = False  # a write raises
    for severity in range(1, 6):
        corrupted = corrupt(image, kind, severity)
        assert corrupted.shape == shape
        assert corrupted.dtype == np.float64
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        assert np.array_equal(corrupted, image) == (kind == "saturate" and shape[2] == 1)
        assert np.array_equal(corrupted, corrupt(image, kind, severity))
        assert np.array_equal(corrupted, corrupt(image, kind, severity, seed=1)) == (kind in DETERMINISTIC)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 2, 1), (240, 250, 3)])
def test_odd_sizes(kind, shape):
    corrupted = corrupt(random_image(*shape).astype(np.float32), kind, 5)
    assert corrupted.shape == shape
    assert np.isfinite(corrupted).all()


@pytest.mark.parametrize(
    "kind",
    ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "brightness", "contrast"],
)
@pytest.mark.parametrize("size", [32, 128])
def test_severity_is_severity(kind, size):
    image = 0.1 + 0.5 * random_image(size, size, 3)
    changes = [np.abs(corrupt(image, kind, severity) - image).mean() for severity in range(1, 6)]
    assert (np.diff(changes) > 0).all()


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"])
@pytest.mark.parametrize("size", [32, 224])
def test_blurs_and_elastic_keep_a_constant(kind, size):
    image = np.full((size, size, 3), (0.2, 0.5, 0.9))
    for severity in (1, 5):
        np.testing.assert_allclose(corrupt(image, kind, severity), image, atol=1e-12)
        np.testing.assert_allclose(corrupt(image, "elastic_transform", severity), image, atol=1e-12)


@pytest.mark.parametrize(("kind", "atol"), [("gaussian_blur", 1e-12), ("defocus_blur", 1e-12), ("motion_blur", 3e-3)])
def test_a_small_image_is_blurred_as_a_large_one(kind, atol):
    """Each pixel of 32 x 32 is a block of 7 x 7 in 224 x 224; the tolerance is for lines between the pixels."""
    small = random_image(32, 32, 3)
    large = small.repeat(7, 0).repeat(7, 1)
    for severity in (1, 3, 5):
        blocks = corrupt(large, kind, severity).reshape(32, 7, 32, 7, 3).mean((1, 3))
        inner = (slice(3, -3), slice(3, -3))  # ImageNet-C's border of the disk depends on the size of the pixels
        np.testing.assert_allclose(corrupt(small, kind, severity)[inner], blocks[inner], atol=atol)


@pytest.mark.parametrize("kind", ["snow", "frost", "fog", "spatter"])
def test_weather_is_as_bright_on_a_small_image(kind):
    for severity in (1, 3, 5):
        means = [
            np.mean([corrupt(np.full((size, size, 3), 0.2), kind, severity, seed).mean() for seed in range(20)])
            for size in (32, 224)
        ]
        assert means[0] == pytest.approx(means[1], abs=0.005)


# ------------------------------------------------------------------------------------------------------------ noise


def test_gaussian_noise_has_its_standard_deviation():
    grey = np.full((200, 200, 3), 0.5)
    for severity, sd in enumerate((0.08, 0.12), start=1):  # beyond, clipping narrows it
        assert corrupt(grey, "gaussian_noise", severity).std() == pytest.approx(sd, rel=0.02)
    assert (corrupt(grey, "gaussian_noise", 5) == 1).mean() == pytest.approx(0.0941, rel=0.05)  # 1 - Phi(0.5 / 0.38)
    assert corrupt(grey, "speckle_noise", 1).std() == pytest.approx(0.5 * 0.15, rel=0.02)


def test_shot_noise_counts_photons():
    noisy = corrupt(np.full((200, 200, 3), 0.3), "shot_noise", 1)
    assert noisy.mean() == pytest.approx(0.3, rel=0.01)
    assert noisy.var() == pytest.approx(0.3 / 60, rel=0.02)
    few = corrupt(np.full((200, 200, 3), 0.3), "shot_noise", 5)
    np.testing.assert_allclose(np.unique(few), (0, 1 / 3, 2 / 3, 1))
    assert (few == 0).mean() == pytest.approx(np.exp(-0.9), rel=0.02)


def test_impulse_noise_hits_its_share():
    grey = np.full((200, 200, 3), 0.5)
    for severity, amount in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), start=1):
        corrupted = corrupt(grey, "impulse_noise", severity)
        assert (corrupted == 1).mean() == pytest.approx(amount / 2, rel=0.05)
        assert (corrupted == 0).mean() == pytest.approx(amount / 2, rel=0.05)
        assert (corrupted == 0.5).mean() == pytest.approx(1 - amount, rel=0.02)


# ------------------------------------------------------------------------------------------------------------- blur


def test_defocus_spreads_a_dot_over_a_disk():
    rows, columns = np.indices((224, 224)) - 112
    disk = corrupt(dot(224), "defocus_blur", 1)[..., 0]
    np.testing.assert_allclose(disk, (rows**2 + columns**2 <= 9) / 29, atol=1e-12)
    wide = corrupt(dot(224), "defocus_blur", 5)[112, :, 0]
    assert (wide > 0.5 / (100 * np.pi)).sum() == pytest.approx(21, abs=1)


def test_gaussian_blur_is_scipys():
    image = random_image(224, 230, 3)
    for severity, sigma in enumerate((1, 2, 3, 4, 6), start=1):
        expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
        np.testing.assert_allclose(corrupt(image, "gaussian_blur", severity), expected, atol=1e-12)


def test_glass_swaps_neighbours():
    height, width, shift, iterations = 13, 17, 3, 2
    order = _shuffle(height, width, shift, 1.0, iterations, np.random.default_rng(0))
    assert np.array_equal(np.sort(order), np.arange(height * width))

    rng, expected = np.random.default_rng(0), np.arange(height * width).reshape(height, width)
    for _ in range(iterations):
        down, right = rng.integers(-shift, shift, (2, height, width))
        rng.random((2, height, width))  # decides the rounding, of which whole pixels need none
        for i in range(height - 1, -1, -1):
            for j in range(width - 1, -1, -1):
                there = (min(max(i + down[i, j], 0), height - 1), min(max(j + right[i, j], 0), width - 1))
                expected[i, j], expected[there] = expected[there], int(expected[i, j])
    assert np.array_equal(order.reshape(height, width), expected)


def test_glass_moves_few_pixels_of_a_small_image():
    """A shift of -1 or 0, times 1/7, is a step with probability 1/14 along either axis."""
    order = _shuffle(100, 100, 1, 1 / 7, 1, np.random.default_rng(0))
    assert (order != np.arange(10000)).mean() == pytest.approx(2 * (1 - (13 / 14) ** 2), rel=0.1)  # two per swap


def test_motion_blur_draws_half_a_gaussian_to_one_side():
    smeared = weather.motion_blur(dot(224), 10, 3, 0)[..., 0]
    weights = np.exp(-(np.arange(21) ** 2) / 18)
    np.testing.assert_allclose(smeared[112, 112:91:-1], weights / weights.sum(), atol=1e-12)
    assert smeared[112, 92:113].sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_motion_blur_lies_at_the_angle_drawn(seed):
    angle = np.deg2rad(np.random.default_rng(seed).uniform(-45, 45))
    smeared = corrupt(dot(224), "motion_blur", 5, seed)[..., 0]
    rows, columns = np.indices((224, 224)) - 112
    assert smeared.sum() == pytest.approx(1)
    assert np.arctan2(-(rows * smeared).sum(), -(columns * smeared).sum()) == pytest.approx(angle, abs=1e-6)
    off_the_line = rows * np.cos(angle) - columns * np.sin(angle)
    assert np.abs(off_the_line[smeared > 1e-9]).max() < 1.5


def test_zoom_blur_against_a_loop():
    image = random_image(9, 12, 1)

    def at(row, column):
        top, left = int(row), int(column)
        down, right = min(top + 1, 8), min(left + 1, 11)
        a, b = row - top, column - left
        upper = (1 - b) * image[top, left, 0] + b * image[top, right, 0]
        return (1 - a) * upper + a * ((1 - b) * image[down, left, 0] + b * image[down, right, 0])

    zooms = (1, 1.03, 1.06, 1.09, 1.12, 1.15, 1.18, 1.21, 1.24, 1.27, 1.30)
    expected = image.copy()
    for i in range(9):
        for j in range(12):
            expected[i, j] += sum(at(4 + (i - 4) / zoom, 5.5 + (j - 5.5) / zoom) for zoom in zooms)
    np.testing.assert_allclose(corrupt(image, "zoom_blur", 5), expected / 12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- weather


def test_plasma_is_rougher_by_its_decay():
    """Compare the offsets of one level with those of the level below: ImageNet-C's wibble decays by the square."""
    for decay in (2, 1.4):
        field = weather.plasma(256, decay, np.random.default_rng(0))
        assert (field.min(), field.max()) == (0, 1)

        def added(step, field=field):
            corners = field[::step, ::step]
            pairs = corners + np.roll(corners, -1, 0)
            return (field[step // 2 :: step, step // 2 :: step] - (pairs + np.roll(pairs, -1, 1)) / 4).std()

        assert added(4) / added(2) == pytest.approx(decay**2, rel=0.05)


def test_fog_stays_below_the_images_maximum():
    fogged = corrupt(np.full((224, 224, 3), 0.5), "fog", 1)
    assert np.ptp(fogged, axis=2).max() == 0
    assert fogged.max() <= 0.5
    thickness = (fogged[..., 0] * (0.5 + 1.5) / 0.5 - 0.5) / 1.5
    np.testing.assert_allclose(thickness, weather.plasma(256, 2, np.random.default_rng(0))[:224, :224], atol=1e-6)


def test_frost_adds_a_window_of_a_picture():
    picture = np.arange(240 * 250 * 3).reshape(240, 250, 3) / (240 * 250 * 3)
    corners = set()
    for seed in range(5):
        window = corrupt(np.zeros((224, 224, 3)), "frost", 1, seed, frost=[picture]) / 0.4
        top, left = divmod(round(window[0, 0, 0] * 240 * 250), 250)
        np.testing.assert_allclose(window, picture[top : top + 224, left : left + 224], atol=1e-6)
        corners.add((top, left))
    assert len(corners) > 1


def test_frost_fits_pictures_to_the_image():
    ramp = np.broadcast_to(np.arange(224)[:, None] / 224, (112, 224, 3))  # becomes 224 x 448
    window = corrupt(np.zeros((224, 224, 1)), "frost", 1, frost=[ramp]) / (0.4 * np.sum((0.299, 0.587, 0.114)))
    np.testing.assert_allclose(np.diff(window[:, 2:-2], axis=1), 1 / 448, atol=1e-6)
    flat = [np.full((10, 300, 3), 0.5), np.full((10, 10, 3), 0.5)]
    np.testing.assert_allclose(corrupt(np.full((30, 40, 3), 0.25), "frost", 2, frost=flat), 0.8 * 0.25 + 0.6 * 0.5)
    red = [np.full((250, 250, 3), (1.0, 0, 0))]
    np.testing.assert_allclose(corrupt(np.zeros((32, 32, 1)), "frost", 1, frost=red), 0.4 * 0.299, atol=1e-6)


def test_every_frost_picture_has_its_turn():
    pictures = [np.full((224, 224, 3), level) for level in (0.0, 0.5, 1.0)]
    levels = [corrupt(np.zeros((32, 32, 1)), "frost", 1, seed, pictures).mean() for seed in range(20)]
    np.testing.assert_allclose(np.unique(np.round(levels, 6)), (0, 0.2, 0.4))


def test_snow_whitens_and_falls():
    snowed = corrupt(np.zeros((224, 224, 3)), "snow", 1)
    np.testing.assert_allclose(snowed, snowed[::-1, ::-1], atol=1e-6)  # a layer and its half-turn
    assert snowed.min() == pytest.approx(0.2 * 0.5)
    assert 0.01 < (snowed > 0.3).mean() < 0.3
    assert (np.diff(snowed, axis=0) ** 2).mean() < 0.5 * (np.diff(snowed, axis=1) ** 2).mean()  # drawn: -68 degrees
    red = corrupt(np.full((224, 224, 3), (0.8, 0, 0)), "snow", 1).min((0, 1))
    grey = 0.299 * 0.8 * 1.5 + 0.5
    np.testing.assert_allclose(red, (0.8 * 0.8 + 0.2 * max(0.8, grey), 0.2 * grey, 0.2 * grey))


def test_snow_has_its_share_of_flakes():
    """Noise N(0.1, 0.3), three times enlarged: its sd at a pixel depends on where that lies among the four drawn."""
    between = (111.5 + (np.arange(224) - 111.5) / 3) % 1
    part = between**2 + (1 - between) ** 2
    sd = 0.3 * np.sqrt(np.outer(part, part))
    limit = (0.5 - 0.1) / sd
    expected = (0.1 * stats.norm.sf(limit) + sd * stats.norm.pdf(limit)).mean()
    layers = [corrupt(np.zeros((224, 224, 1)), "snow", 1, seed).mean() - 0.2 * 0.5 for seed in range(20)]
    assert np.mean(layers) == pytest.approx(2 * expected, rel=0.03)


def test_spatter_is_water_then_mud():
    water = corrupt(np.zeros((224, 224, 3)), "spatter", 2)
    assert (water == 0).all(-1).mean() > 0.5
    np.testing.assert_allclose(water.max((0, 1)), 0.6 * np.array((175, 238, 238)) / 255, rtol=1e-6)
    mud = corrupt(np.ones((224, 224, 3)), "spatter", 5)
    clean = (mud == 1).all(-1)
    assert 0.1 < clean.mean() < 0.9
    cover = 1 - (mud[~clean] - 63 / 255)[:, :1] / (1 - 63 / 255)
    assert cover.min() == pytest.approx(0.8, abs=0.01)
    np.testing.assert_allclose(mud[~clean], 1 - cover + cover * np.array((63, 42, 20)) / 255, atol=1e-6)


# ------------------------------------------------------------------------------------------- colour, shape, storage


def in_hsv(image, change):
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image.reshape(-1, 3)]
    return np.reshape(pixels, image.shape)


def some_colours():
    image = random_image(6, 7, 3)
    image[0, :4] = ((0, 0, 0), (1, 1, 1), (0.4, 0.4, 0.4), (1, 0, 0))
    return image


def test_brightness_is_added_to_the_value():
    for severity, amount in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1):
        expected = in_hsv(some_colours(), lambda h, s, v, amount=amount: (h, s, min(v + amount, 1)))
        np.testing.assert_allclose(corrupt(some_colours(), "brightness", severity), expected, atol=1e-12)
    grey = np.array([[[0.0], [0.2], [0.9]]])
    np.testing.assert_allclose(corrupt(grey, "brightness", 3), [[[0.3], [0.5], [1.0]]])


def test_saturate_changes_the_saturation():
    for severity, (a, b) in enumerate(((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)), start=1):
        expected = in_hsv(some_colours(), lambda h, s, v, a=a, b=b: (h, min(s * a + b, 1), v))
        np.testing.assert_allclose(corrupt(some_colours(), "saturate", severity), expected, atol=1e-12)


def test_contrast_by_hand():
    image = np.array([[[0.0, 0.5], [0.2, 0.5]], [[0.4, 0.5], [1.0, 0.5]]])[..., (0, 1, 1)]
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
        expected = np.stack((0.4 + factor * (image[..., 0] - 0.4), image[..., 1], image[..., 2]), 2)
        np.testing.assert_allclose(corrupt(image, "contrast", severity), expected)


def test_elastic_transform_displaces_by_its_pixels():
    """Noise of sd 1/sqrt(3), smoothed by sigma, has 1 / (2 sqrt(pi) sigma) of that, and alpha multiplies it."""
    for size, severity, alpha in ((224, 3, 0.05), (448, 4, 0.07), (112, 5, 0.12)):
        ramp = np.broadcast_to(np.arange(size)[None, :, None] / size, (size, size, 1))
        moved = corrupt(ramp, "elastic_transform", severity)[..., 0] * size
        inner = slice(size // 8, -size // 8)
        rows, columns = np.indices((size, size))[:, inner, inner].reshape(2, -1)
        plane = np.column_stack((rows, columns, np.ones(rows.size)))
        fit, *_ = np.linalg.lstsq(plane, moved[inner, inner].ravel(), rcond=None)
        jitter = (moved[inner, inner].ravel() - plane @ fit).std()
        assert jitter == pytest.approx(size / 224 * 244 * alpha / (np.sqrt(12 * np.pi) * 2.44), rel=0.1)
        assert np.abs(plane @ fit - columns).max() < 4 * 244 * 0.02 * size / 224


def test_pixelate_averages_blocks():
    image = random_image(32, 40, 3)
    blocks = image.reshape(8, 4, 10, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    np.testing.assert_allclose(corrupt(image, "pixelate", 5), blocks, atol=1e-6)
    halves = image.reshape(16, 2, 20, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(corrupt(image, "pixelate", 2), halves, atol=1e-6)


def test_jpeg_compression_is_pillows():
    for image in (random_image(40, 48, 3), random_image(40, 48, 1)):
        pixels = np.rint(255 * image).astype(np.uint8).squeeze()
        for severity, quality in enumerate((25, 18, 15, 10, 7), start=1):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            expected = np.asarray(Image.open(file)).reshape(image.shape) / 255
            np.testing.assert_allclose(corrupt(image, "jpeg_compression", severity), expected)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "hail"}, "Expected `kind` to be one of gaussian_noise, .*, saturate, but got 'hail'."),
        ({"severity": 0}, r"Expected `severity` to be an integer in \[1, 5\], but got 0."),
        ({"severity": 2.0}, r"Expected `severity` to be an integer in \[1, 5\], but got 2.0."),
        ({"image": np.zeros((8, 8))}, r"`image` to be \(H, W, 1\) or \(H, W, 3\), but got \(8, 8\)."),
        ({"image": np.zeros((8, 8, 4))}, r"`image` to be \(H, W, 1\) or \(H, W, 3\), but got \(8, 8, 4\)."),
        ({"image": np.zeros((0, 8, 3))}, r"`image` to be \(H, W, 1\) or \(H, W, 3\), but got \(0, 8, 3\)."),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, r"floats in \[0, 1\], but got uint8; divide bytes by 255."),
        ({"image": np.full((8, 8, 3), 1.5)}, r"Expected `image` to lie in \[0, 1\], but got 1.5 to 1.5."),
        ({"image": np.full((8, 8, 3), np.nan)}, r"Expected `image` to lie in \[0, 1\], but got nan to nan."),
        ({"frost": []}, "Expected `frost` to hold at least one picture, but got none; None draws the ice instead."),
        ({"frost": [np.zeros((8, 8, 1))]}, r"Expected `frost` to be \(H, W, 3\), but got \(8, 8, 1\)."),
    ],
)
def test_bad_input_is_named(changed, message):
    arguments = {"image": np.zeros((8, 8, 3)), "kind": "frost", "severity": 1, **changed}
    with pytest.raises(ValueError, match=message):
        corrupt_image(rng=np.random.default_rng(0), **arguments)


def test_frost_pictures_are_read_by_name(tmp_path):
    Image.new("L", (5, 4), 51).save(tmp_path / "b.PNG")
    Image.new("RGB", (7, 6), (255, 0, 102)).save(tmp_path / "a.png")
    (tmp_path / "readme.txt").write_text("not a picture")
    first, second = load_frost(tmp_path)
    np.testing.assert_allclose(first, np.broadcast_to((1, 0, 0.4), (6, 7, 3)), rtol=1e-6)
    np.testing.assert_allclose(second, np.full((4, 5, 3), 0.2), rtol=1e-6)


def test_frost_folders_without_pictures_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=rf"frost pictures \(.jpg, .jpeg, .png\), but {folder} has none."):
            load_frost(folder)


@pytest.mark.parametrize("keep", [10, 300])
def test_broken_frost_pictures_are_named(tmp_path, keep):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(whole, "PNG")
    (tmp_path / "torn.png").write_bytes(whole.getvalue()[:keep])
    with pytest.raises(ValueError, match=r"Expected .*torn.png to be a picture, but it cannot be read: "):
        load_frost(tmp_path)
