"""Corruptions of images at severities 1 to 5: the fifteen of ImageNet-C and its four held-out ones.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019; Kinetics50-C and VGGSound-C use the same parameters. They are made for images of 224 x 224 pixels. Every length
among them (radii and sigmas of blurs, shifts, displacements, sizes of flakes, drops and ice) is multiplied by
min(H, W) / 224, so that an image of 32 x 32 is hit comparably. Amplitudes of noise, qualities and ratios are not.

Departures from ImageNet-C's program: the frost pictures are not ours to ship. Zooms are centred exactly. Pixels swapped
by glass change places (there a swap of array views copies one over the other). Nothing is rounded to bytes on the way,
but for JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lightning_abpem.data import image_weather as weather
from lightning_abpem.data.image_weather import convolve, length_scale, resize, spread, zoom

__all__ = ["HELD_OUT_IMAGE_KINDS", "IMAGE_KINDS", "corrupt_image"]

Array = NDArray[np.float64]
Rng = np.random.Generator


def corrupt_image(
    image: NDArray[np.floating],
    kind: str,
    severity: int,
    rng: Rng,
    frost: Sequence[NDArray[np.floating]] | None = None,
) -> Array:
    """Return a corrupted copy of one image.

    Args:
        image: (H, W, 1), grey, or (H, W, 3), RGB; floats in [0, 1]. Grey has no saturation: `saturate` keeps it.
        kind: one of `IMAGE_KINDS` or `HELD_OUT_IMAGE_KINDS`.
        severity: 1 to 5.
        rng: the only source of randomness.
        frost: pictures (h, w, 3) in [0, 1] for the kind of that name, as `load_frost` reads them; None draws ice.

    Returns:
        (H, W, C) in [0, 1].

    Raises:
        ValueError: an unknown kind, a severity outside 1 to 5, or an image of another shape, type or range.
    """
    if kind not in _TABLE:
        raise ValueError(f"Expected `kind` to be one of {', '.join(_TABLE)}, but got {kind!r}.")
    if not isinstance(severity, int | np.integer) or not 1 <= severity <= 5:
        raise ValueError(f"Expected `severity` to be an integer in [1, 5], but got {severity!r}.")
    weather.check_picture("image", image, (1, 3))
    corruption, parameters = _TABLE[kind]
    pictures = (frost,) if kind == "frost" else ()
    return np.clip(corruption(image.astype(np.float64), rng, *parameters[severity - 1], *pictures), 0, 1)


# ------------------------------------------------------------------------------------------------------------ noise


def _gaussian_noise(x: Array, rng: Rng, sd: float) -> Array:
    return x + rng.normal(0, sd, x.shape)


def _shot_noise(x: Array, rng: Rng, photons: float) -> Array:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, rng: Rng, amount: float) -> Array:
    draw = rng.random(x.shape)
    return np.where(draw < amount, draw < amount / 2, x)


def _speckle_noise(x: Array, rng: Rng, sd: float) -> Array:
    return x + x * rng.normal(0, sd, x.shape)


# ------------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(x: Array, rng: Rng, radius: float, alias_sigma: float) -> Array:
    scale = max(length_scale(x), 1)
    step = min(length_scale(x), 1)  # a smaller image's disk has the points of a 224-pixel one's, closer together
    reach = int(radius * scale) + int(4 * alias_sigma * scale + 0.5)
    dy, dx = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    disk = ndimage.gaussian_filter((dy**2 + dx**2 <= (radius * scale) ** 2).astype(float), alias_sigma * scale)
    return convolve(x, spread(step * dy.ravel(), step * dx.ravel(), disk.ravel()), "reflect")


def _gaussian_blur(x: Array, rng: Rng, sigma: float) -> Array:
    sigma, step = sigma * length_scale(x), min(length_scale(x), 1)
    reach = int(4 * sigma / step + 0.5)
    t = np.arange(-reach, reach + 1) * step
    kernel = spread(np.zeros(t.shape), t, np.exp(-((t / sigma) ** 2) / 2))
    kernel = kernel[len(kernel) // 2]
    return ndimage.correlate1d(ndimage.correlate1d(x, kernel, 0, mode="nearest"), kernel, 1, mode="nearest")


def _glass_blur(x: Array, rng: Rng, sigma: float, shift: int, iterations: int) -> Array:
    order = _shuffle(x.shape[0], x.shape[1], shift, length_scale(x), iterations, rng)
    shuffled = _gaussian_blur(x, rng, sigma).reshape(-1, x.shape[2])[order].reshape(x.shape)
    return _gaussian_blur(shuffled, rng, sigma)


def _shuffle(height: int, width: int, shift: int, scale: float, iterations: int, rng: Rng) -> NDArray[np.intp]:
    """Swap every pixel with a neighbour, from the last to the first; return each one's source as a flat index (H W,).

    As in ImageNet-C, a neighbour is -shift to shift - 1 away, here times `scale` and not beyond the border. Fractions
    of a pixel are rounded up or down at random: in a small image a share of the pixels move, by one.
    """
    rows, columns = np.indices((height, width)).reshape(2, -1)
    order = list(range(height * width))  # swapping in a list is many times faster than in an array
    for _ in range(iterations):
        away = rng.integers(-shift, shift, (2, height * width)) * scale
        down, right = np.floor(away + rng.random(away.shape)).astype(int)
        partners = np.clip(rows + down, 0, height - 1) * width + np.clip(columns + right, 0, width - 1)
        for here, there in zip(reversed(range(len(order))), reversed(partners.tolist()), strict=True):
            order[here], order[there] = order[there], order[here]
    return np.array(order)


def _motion_blur(x: Array, rng: Rng, radius: float, sigma: float) -> Array:
    return weather.motion_blur(x, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(x: Array, rng: Rng, step: float, count: int) -> Array:
    zooms = (zoom(x, 1 + step * index) for index in range(1, count))
    return (2 * x + sum(zooms)) / (count + 1)  # the image itself, and its zoom by 1


# ------------------------------------------------------------------------------------------- colour, shape, storage


def _brightness(x: Array, rng: Rng, amount: float) -> Array:
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(x: Array, rng: Rng, factor: float) -> Array:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _saturate(x: Array, rng: Rng, factor: float, offset: float) -> Array:
    if x.shape[2] == 1:
        return x
    value = x.max(2, keepdims=True)
    chroma = value - x.min(2, keepdims=True)
    saturation = np.clip(factor * chroma / np.where(value > 0, value, 1) + offset, 0, 1)
    hue = np.where(chroma > 0, (value - x) / np.where(chroma > 0, chroma, 1), (0, 1, 1))  # grey counts as red in HSV
    return value * (1 - saturation * hue)


def _elastic_transform(x: Array, rng: Rng, alpha: float, sigma: float, shift: float) -> Array:
    scale, size = length_scale(x), x.shape[:2]
    corners = np.array(size) / 2 + min(size) / 3 * np.array(((1, 1), (1, -1), (-1, -1)))
    moved = corners + scale * rng.uniform(-shift, shift, corners.shape)
    matrix = np.linalg.solve(np.column_stack((moved, np.ones(3))), corners)
    grid = np.indices(size)
    fields = [ndimage.gaussian_filter(rng.uniform(-1, 1, size), sigma * scale, truncate=3) for _ in size]
    # Smoothing over fewer pixels leaves the noise stronger by 1 / scale: alpha takes the scale twice.
    x = _sample(x, np.einsum("i...,ij->j...", grid, matrix[:2]) + matrix[2, :, None, None], "mirror")
    return _sample(x, grid + alpha * scale**2 * np.stack(fields), "reflect")


def _sample(x: Array, positions: Array, border: str) -> Array:
    """Sample the image (H, W, C) at `positions` (2, H, W), rows first, bilinearly."""
    return np.dstack([ndimage.map_coordinates(c, positions, order=1, mode=border) for c in np.moveaxis(x, 2, 0)])


def _pixelate(x: Array, rng: Rng, factor: float) -> Array:
    height, width = x.shape[:2]
    small = resize(x, (max(1, int(height * factor)), max(1, int(width * factor))), Image.Resampling.BOX)
    return resize(small, (height, width), Image.Resampling.BOX)


def _jpeg_compression(x: Array, rng: Rng, quality: int) -> Array:
    pixels = np.round(255 * x).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if x.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as stored:
        return np.asarray(stored, np.float64).reshape(x.shape) / 255


# ------------------------------------------------------------------------------------------------------- parameters

_SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6, False),
    (0.65, 0.3, 3, 0.68, 0.6, False),
    (0.65, 0.3, 2, 0.68, 0.5, False),
    (0.65, 0.3, 1, 0.65, 1.5, True),
    (0.67, 0.4, 1, 0.65, 1.5, True),
)
_ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))


def _each(*values: float) -> tuple[tuple[float], ...]:
    return tuple((value,) for value in values)


# By severity, what follows the image and the generator. The zooms' numbers are those of ImageNet-C's `numpy.arange`,
# which rounding lets reach the end in the first; its elastic lengths are multiples of 244.
_TABLE: dict[str, tuple[Callable[..., Array], Sequence[tuple[float, ...]]]] = {
    "gaussian_noise": (_gaussian_noise, _each(0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, _each(60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, _each(0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))),
    "snow": (weather.snow, _SNOW),
    "frost": (weather.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (weather.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, _each(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, _each(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (_elastic_transform, [tuple(244 * value for value in values) for values in _ELASTIC]),
    "pixelate": (_pixelate, _each(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, _each(25, 18, 15, 10, 7)),
    "speckle_noise": (_speckle_noise, _each(0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, _each(1, 2, 3, 4, 6)),
    "spatter": (weather.spatter, _SPATTER),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
HELD_OUT_IMAGE_KINDS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The kinds that ImageNet-C sets aside for choosing hyper-parameters."""
IMAGE_KINDS: tuple[str, ...] = tuple(kind for kind in _TABLE if kind not in HELD_OUT_IMAGE_KINDS)
"""The fifteen kinds of the benchmark, in its order."""
