"""Weather on images: fog, frost, snow and spatter, and the filters that they share with the blurs.

Layers of fog, ice, snow and liquid are drawn on a canvas whose shorter side has 224 pixels, and resized to the image.
ImageNet-C (Hendrycks and Dietterich, ICLR 2019) has its parameters for that size. Images are (H, W, C) floats in [0,
1]; results are not yet clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage, signal

__all__ = [
    "check_picture",
    "convolve",
    "fog",
    "frost",
    "length_scale",
    "load_frost",
    "motion_blur",
    "plasma",
    "resize",
    "snow",
    "spatter",
    "spread",
    "zoom",
]

Array = NDArray[np.float64]
Rng = np.random.Generator

_SIDE = 224  # pixels
_LUMA = (0.299, 0.587, 0.114)
_WATER = np.array((175, 238, 238)) / 255
_MUD = np.array((63, 42, 20)) / 255
_ICE = np.array((0.86, 0.94, 1.0))
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
_PICTURES = (".jpg", ".jpeg", ".png")


def check_picture(name: str, picture: NDArray[np.floating], channels: Sequence[int]) -> None:
    """Raise ValueError unless `picture` is (H, W, C) with C in `channels`, and holds floats in [0, 1]."""
    if picture.ndim != 3 or picture.shape[2] not in channels or not picture.size:
        shapes = " or ".join(f"(H, W, {count})" for count in channels)
        raise ValueError(f"Expected `{name}` to be {shapes}, but got {picture.shape}.")
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"Expected `{name}` to hold floats in [0, 1], but got {picture.dtype}; divide bytes by 255.")
    if not (picture.min() >= 0 and picture.max() <= 1):  # NaN fails here too
        raise ValueError(f"Expected `{name}` to lie in [0, 1], but got {picture.min():g} to {picture.max():g}.")


def load_frost(folder: Path) -> list[NDArray[np.float32]]:
    """Read the frost pictures, (h, w, 3) in [0, 1], of a folder: its .jpg, .jpeg and .png files by name.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _PICTURES)
    if not paths:
        raise ValueError(f"Expected `folder` to hold frost pictures ({', '.join(_PICTURES)}), but {folder} has none.")
    return [_load(path) for path in paths]


def _load(path: Path) -> NDArray[np.float32]:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), np.float32) / np.float32(255)
    except (OSError, SyntaxError) as error:  # Pillow raises the latter for broken PNG chunks
        raise ValueError(f"Expected {path} to be a picture, but it cannot be read: {error}.") from error


# ---------------------------------------------------------------------------------------------------------- filters


def length_scale(x: NDArray[np.floating]) -> float:
    """Return the factor from lengths in an image of 224 x 224 pixels to lengths in this one, (H, W, ...)."""
    return min(x.shape[:2]) / _SIDE


def resize(x: NDArray[np.floating], size: tuple[int, int], method: Image.Resampling) -> Array:
    """Resize (H, W) or (H, W, C) to `size`, rows first, by Pillow in single precision."""
    if x.ndim == 3:
        return np.dstack([resize(channel, size, method) for channel in np.moveaxis(x, 2, 0)])
    return np.asarray(Image.fromarray(x.astype(np.float32)).resize(size[::-1], method), np.float64)


def spread(dy: NDArray[np.floating], dx: NDArray[np.floating], weights: Array) -> Array:
    """Return a centred kernel of sum 1 with `weights` (N,) at `dy`, `dx` (N,), fractions of pixels allowed.

    Each weight is shared among the four nearest pixels, so lengths far below a pixel have an effect too.
    """
    reach = int(np.ceil(max(np.abs(dy).max(), np.abs(dx).max()))) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    rows, columns = np.floor(dy).astype(int), np.floor(dx).astype(int)
    for down in (0, 1):
        for right in (0, 1):
            share = (1 - np.abs(dy - rows - down)) * (1 - np.abs(dx - columns - right))
            np.add.at(kernel, (rows + down + reach, columns + right + reach), weights * share)
    return kernel / kernel.sum()


def convolve(x: Array, kernel: Array, border: str) -> Array:
    """Convolve (H, W, C) with a square kernel of odd side, behind a `border` of `numpy.pad`."""
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode=border)  # type: ignore[call-overload]
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def motion_blur(x: Array, radius: float, sigma: float, degrees: float) -> Array:
    """Smear (H, W, C) along a line, as ImageMagick does: 2 radius + 1 pixels to one side, half a Gaussian of weights.

    Args:
        x: the image.
        radius: in pixels of 224 x 224 images, as `sigma` is.
        sigma: standard deviation of the Gaussian.
        degrees: where the light comes from, from the right clockwise: 0 smears leftwards, -90 downwards.
    """
    scale, angle = length_scale(x), np.deg2rad(degrees)
    step = min(scale, 1)
    t = np.arange(0, 2 * radius * scale + step / 2, step)
    weights = np.exp(-((t / (sigma * scale)) ** 2) / 2)
    return convolve(x, spread(-t * np.sin(angle), -t * np.cos(angle), weights), "edge")


def zoom(x: Array, factor: float) -> Array:
    """Enlarge (H, W, ...) about its centre by `factor` >= 1, bilinearly, and keep its size."""
    for axis in (0, 1):
        centre = (x.shape[axis] - 1) / 2
        position = centre + (np.arange(x.shape[axis]) - centre) / factor
        low = position.astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = (position - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


def _canvas(x: Array) -> tuple[int, int]:
    """Return the image's size, rescaled to a shorter side of 224 pixels."""
    return round(x.shape[0] / length_scale(x)), round(x.shape[1] / length_scale(x))


def _fit(layer: NDArray[np.floating], x: Array) -> Array:
    """Resize a layer (h, w) or (h, w, 3) from the canvas to the image: (H, W, 1), or (H, W, C)."""
    layer = resize(layer, x.shape[:2], Image.Resampling.BILINEAR)
    return _in_channels(layer, x) if layer.ndim == 3 else layer[..., None]


def _in_channels(colours: ArrayLike, x: Array) -> Array:
    """Return colours (..., 3) unchanged, or as grey (..., 1) for an image without colours."""
    return np.asarray(colours) if x.shape[2] == 3 else (np.asarray(colours) @ _LUMA)[..., None]


# ---------------------------------------------------------------------------------------------------------- weather


def plasma(size: int, decay: float, rng: Rng) -> Array:
    """Draw a plasma fractal by diamond-square on a torus, in [0, 1]: (size, size), `size` a power of two above 1."""
    field = np.zeros((size, size))
    step, wibble = size, 1.0
    while step >= 2:
        half = step // 2

        def shake(total: Array, wibble: float = wibble) -> Array:
            return total / 4 + wibble * rng.uniform(-1, 1, total.shape)

        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        field[half::step, half::step] = shake(pairs + np.roll(pairs, -1, 0))
        centres = field[half::step, half::step]
        field[::step, half::step] = shake(pairs + centres + np.roll(centres, 1, 0))
        field[half::step, ::step] = shake(corners + np.roll(corners, -1, 0) + centres + np.roll(centres, 1, 1))
        step, wibble = half, wibble / decay**2  # squared: ImageNet-C's generator multiplies by its wibble twice
    field -= field.min()
    return field / field.max()


def _plasma_over(size: tuple[int, int], decay: float, rng: Rng) -> Array:
    return plasma(1 << (max(size) - 1).bit_length(), decay, rng)[: size[0], : size[1]]


def fog(x: Array, rng: Rng, amount: float, decay: float) -> Array:
    """Add a plasma fractal; the image's maximum stays an upper bound."""
    top = x.max()
    return (x + amount * _fit(_plasma_over(_canvas(x), decay, rng), x)) * top / (top + amount)


def frost(
    x: Array,
    rng: Rng,
    image_weight: float,
    frost_weight: float,
    pictures: Sequence[NDArray[np.floating]] | None,
) -> Array:
    """Add a random crop of one of the pictures (h, w, 3), or of ice drawn by `rng`."""
    ice = _ice(_canvas(x), rng) if pictures is None else _crop(pictures, _canvas(x), rng)
    return image_weight * x + frost_weight * _fit(ice, x)


def _crop(pictures: Sequence[NDArray[np.floating]], size: tuple[int, int], rng: Rng) -> NDArray[np.floating]:
    if not len(pictures):
        raise ValueError("Expected `frost` to hold at least one picture, but got none; None draws the ice instead.")
    picture = pictures[int(rng.integers(len(pictures)))]
    check_picture("frost", picture, (3,))
    cover = max(size[0] / picture.shape[0], size[1] / picture.shape[1])
    if cover > 1:
        height, width = (max(round(cover * picture.shape[axis]), size[axis]) for axis in (0, 1))
        picture = resize(picture, (height, width), Image.Resampling.BILINEAR)
    top, left = (rng.integers(picture.shape[axis] - size[axis] + 1) for axis in (0, 1))
    return picture[top : top + size[0], left : left + size[1]]


def _ice(size: tuple[int, int], rng: Rng) -> Array:
    """Draw bluish veins, where one of six plasmas crosses one half, over a faint cover: (h, w, 3)."""

    def ridge(decay: float, sharpness: int) -> Array:
        return (1 - np.abs(2 * _plasma_over(size, decay, rng)[..., None] - 1)) ** sharpness

    return (0.7 * np.max([ridge(1.35, 16) for _ in range(6)], 0) + 0.3 * ridge(1.6, 1)) * _ICE


def snow(
    x: Array, rng: Rng, loc: float, scale: float, size: float, threshold: float, radius: float, sigma: float, mix: float
) -> Array:
    """Whiten the image and add two layers of falling flakes; the second is the first, turned by half a turn."""
    flakes = zoom(rng.normal(loc, scale, (*_canvas(x), 1)), size)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _fit(motion_blur(flakes, radius, sigma, rng.uniform(-135, -45))[..., 0], x)
    grey = x if x.shape[2] == 1 else (x @ _LUMA)[..., None]
    return mix * x + (1 - mix) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


def spatter(
    x: Array, rng: Rng, loc: float, scale: float, sigma: float, threshold: float, mix: float, mud: bool
) -> Array:
    """Add drops of water, which brighten in pale turquoise, or of mud, which cover in brown."""
    liquid = ndimage.gaussian_filter(rng.normal(loc, scale, _canvas(x)), sigma, mode="nearest")
    if not mud:
        return x + _fit(mix * _relief(np.where(liquid < threshold, 0, liquid)), x) * _in_channels(_WATER, x)
    cover = ndimage.gaussian_filter((liquid > threshold).astype(float), mix, mode="nearest")
    cover = _fit(np.where(cover < 0.8, 0, cover), x)
    return x * (1 - cover) + cover * _in_channels(_MUD, x)


def _relief(liquid: Array) -> Array:
    """Return the light on drops (h, w), at most 1 and 0 beside them: an embossing of the distance from their edges."""
    drops = liquid > 0
    if not drops.any():
        return liquid
    edges = drops & ~ndimage.binary_erosion(drops)
    distance = ndimage.uniform_filter(np.minimum(ndimage.distance_transform_edt(~edges), 20), 3).astype(int)
    share = np.cumsum(np.bincount(distance.ravel())) / distance.size
    height = np.clip(ndimage.correlate(share[distance], np.array(_EMBOSS), mode="mirror"), 0, 1)
    light = liquid * ndimage.uniform_filter(height, 3)
    return light / light.max()
