"""A small data set on disk, and a folder beside it."""

from itertools import product

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.data.clean import IDS, RATE, store


@pytest.fixture
def data(tmp_path):
    """The list of three sounds of 0.5 s, and of their two frames of 40 x 30 pixels."""
    home = tmp_path / "clean"
    rng = np.random.default_rng(0)
    entries = []
    for i, name in enumerate(IDS):
        wav = home / "sound" / f"{name}.wav"
        wav.parent.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * rng.standard_normal((8000, 1 + i % 2)).clip(-3, 3)  # the second one is stereo
        soundfile.write(wav, wave, RATE, subtype="PCM_16")
        for frame in (0, 5):
            picture = home / "frames" / f"frame_{frame}" / f"{name}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(picture)
        entries.append({"video_id": name, "wav": f"sound/{name}.wav", "video_path": "frames", "labels": f"/m/{i}"})
    return store(home / "test.json", entries)


@pytest.fixture
def secret(tmp_path):
    """A folder beside the data's, with a sound and frames."""
    folder = tmp_path / "secret"
    for frame, name in product((0, 5), IDS):
        picture = folder / f"frame_{frame}" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture)
    soundfile.write(folder / "s.wav", np.zeros(800), RATE)
    return folder
