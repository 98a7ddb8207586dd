"""Frames as the published models see them, before any corruption."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["centre_square"]


def centre_square(picture: Image.Image, size: int) -> NDArray[np.float64]:
    """Resize an RGB picture's shorter side to `size` and cut out the centre: (size, size, 3) in [0, 1].

    The interpolation is bicubic; lengths are rounded as the models' pipelines do.
    """
    width, height = (size * side // min(picture.size) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    square = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(square, np.float64) / 255
