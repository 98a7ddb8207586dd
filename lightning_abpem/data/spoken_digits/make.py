"""Synthesise the spoken digits: every digit in every voice. Needs espeak-ng; run as ``make speech``.

Writes `clips.ogg`, all clips one after the other (8 kHz, mono, Vorbis, silence at the ends cut), and `clips.csv`, one
row a clip: digit, voice, accent, words per minute, pitch (0-99), and where it starts and how long it is, in samples.
"""

from __future__ import annotations

import csv
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import resample_poly

FOLDER = Path(__file__).parent
RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VOICES = [
    "m1",
    "f1",
    "m2",
    "f2",
    "m3",
    "f3",
    "m4",
    "f4",
    "m5",
    "f5",
    "m6",
    "m7",
    "m8",
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Annie",
    "adam",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "grandma",
    "grandpa",
    "iven",
    "john",
    "klatt2",
    "klatt4",
    "Lee",
    "linda",
    "Mario",
    "Michael",
    "pablo",
    "paul",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph",
    "victor",
]


class Setting(NamedTuple):
    voice: str
    accent: str
    speed: int
    pitch: int


def settings() -> list[Setting]:
    """Two ways of speaking per voice, spread over accents, speeds and pitches."""
    rng = np.random.default_rng(0)
    chosen = []
    for number, voice in enumerate(VOICES):
        for turn in range(2):
            accent = ACCENTS[(2 * number + 3 * turn) % len(ACCENTS)]
            chosen.append(Setting(voice, accent, int(rng.integers(130, 231)), int(rng.integers(25, 76))))
    return chosen


def speak(word: str, setting: Setting) -> np.ndarray:
    """Synthesise one clip: float in [-1, 1] at 8 kHz, peak 0.9, silence below 1 % of the peak cut from its ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        voice = f"{setting.accent}+{setting.voice}"
        command = ["espeak-ng", "-v", voice, "-s", str(setting.speed), "-p", str(setting.pitch), "-w", str(path), word]
        subprocess.run(command, check=True)
        wave, rate = soundfile.read(path)
    wave = resample_poly(wave, RATE, rate)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    return 0.9 * wave / np.abs(wave).max()


def main() -> None:
    clips, rows, start = [], [], 0
    for setting in settings():
        for digit, word in enumerate(WORDS):
            clip = speak(word, setting)
            clips.append(clip)
            rows.append((digit, *setting, start, len(clip)))
            start += len(clip)
    with soundfile.SoundFile(
        FOLDER / "clips.ogg", "w", RATE, channels=1, format="OGG", subtype="VORBIS", compression_level=0.5
    ) as file:
        for clip in clips:
            file.write(clip)
    with (FOLDER / "clips.csv").open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("digit", *Setting._fields, "start", "length"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
