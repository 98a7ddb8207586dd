"""The making of corrupted files: one by one or in processes, resumable, with a record of the settings beside them."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from lightning_abpem import __version__
from lightning_abpem.data.audio_corruptions import Recordings, corrupt_audio
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.frames import centre_square
from lightning_abpem.data.image_corruptions import corrupt_image
from lightning_abpem.data.image_weather import load_frost
from lightning_abpem.data.published_layout import File, read_json, relative, remove_partial, write, write_json
from lightning_abpem.data.roots import AllowOutside
from lightning_abpem.processes import Workers

__all__ = ["PICTURES", "SOUNDS", "Corrupt", "CorruptOptions", "Job", "Progress", "prepare", "run"]

Progress = Callable[[int, int], None]
"""Function that gets the number of finished files, kept ones included, and the number of all."""

PICTURES = {
    ".bmp": "BMP",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
SOUNDS = {".aif": "AIFF", ".aiff": "AIFF", ".flac": "FLAC", ".ogg": "OGG", ".wav": "WAV"}
"""Formats by the end of a file's name, which copies of it have too."""
_BROKEN = (OSError, SyntaxError, ValueError, soundfile.SoundFileError, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class CorruptOptions:
    """Options of making corrupted files. The command `abpem corrupt` has the same, in these words.

    Args:
        allow_outside: paths and links may lead out of the data's folder; in a program a list names the folders allowed.
        seed: of the random numbers, >= 0; each file has its own, drawn with this, the corruption and the file's name.
        recordings: folder of noises, KIND.wav; without it noises are procedural, and white noise needs none.
        frost: folder of pictures of frost; without it frost is procedural.
        quality: of JPEG and WebP files, 1 to 100; ImageNet-C has 85.
        size: height and width of the images, in pixels.
        workers: processes; 1 is the calling one, and the command's default is one per core.

    Raises:
        ValueError: an option is out of its range.
    """

    allow_outside: AllowOutside = False
    seed: int = 0
    recordings: Path | None = None
    frost: Path | None = None
    quality: int = 85
    size: int = 224
    workers: int = 1

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[int, ...]] = {"seed": (0,), "quality": (1, 100), "size": (1,), "workers": (1,)}
        for name, (least, *most) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or any(value > bound for bound in most):
                wanted = f"an integer in [{least}, {most[0]}]" if most else f"an integer >= {least}"
                raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}.")


def prepare(folder: Path, settings: dict[str, object]) -> None:
    """Record the settings beside the files; if there are files already, compare with their record instead.

    Raises:
        ValueError: there are files that were made with other settings.
    """
    remove_partial(folder)
    record = folder / "settings.json"
    way_out = f"choose another `out`, or delete {folder}"
    if not record.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"Expected {folder} to be empty or to have settings.json, but got other files; {way_out}.")
        write_json(record, settings)
        return
    recorded = read_json(record)
    if not isinstance(recorded, dict):
        raise ValueError(f"Expected {record} to hold an object, but got {recorded!r}; {way_out}.")
    differ = [
        f"{name} was {recorded.get(name)!r} and is now {settings.get(name)!r}"
        for name in {**recorded, **settings}
        if recorded.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(f"Expected the settings of the files in {folder}, but {', '.join(differ)}; {way_out}.")


# ------------------------------------------------------------------------------------------------------- corruption


@dataclass(frozen=True)
class Job:
    """The work on every file, as a worker process gets it."""

    corruption: Corruption
    options: CorruptOptions

    def __post_init__(self) -> None:
        kinds = {"corruption": Corruption, "options": CorruptOptions}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(
                    f'Expected `{name}` to be a {kind.__name__}, such as Corruption("audio", "wind", 5) and '
                    f"CorruptOptions(seed=1), but got {value!r}."
                )

    def settings(self, out: Path) -> dict[str, Any]:
        """Return everything that the files' bytes depend on; `noise` or `frost` is None for kinds that use none."""
        modality, kind, severity = self.corruption.modality, self.corruption.kind, self.corruption.severity
        settings = {"modality": modality, "kind": kind, "severity": severity, "seed": self.options.seed}
        settings |= {"version": __version__}
        if modality == "audio":
            return {**settings, "noise": None if kind == "gaussian_noise" else _origin(self.options.recordings, out)}
        frost = _origin(self.options.frost, out) if kind == "frost" else None
        return {**settings, "frost": frost, "quality": self.options.quality, "size": self.options.size}


def _origin(folder: Path | None, out: Path) -> str:
    return "procedural" if folder is None else relative(Path(folder).resolve(), out)


class Corrupt:
    """Callable that makes one file; it loads the recordings and pictures once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        modality, kind = job.corruption.modality, job.corruption.kind
        noisy = modality == "audio" and kind != "gaussian_noise"
        recordings, frost = job.options.recordings, job.options.frost
        self._recordings = Recordings(recordings) if noisy and recordings is not None else None
        if self._recordings is not None:
            self._recordings(kind, 16000)  # at any rate: a missing or broken one is found before anything is written
        icy = modality == "image" and kind == "frost"
        self._frost = load_frost(frost) if icy and frost is not None else None

    def __call__(self, file: File) -> None:
        make = self._sound if self.job.corruption.modality == "audio" else self._picture
        try:
            content = make(file)
        except _BROKEN as error:
            raise ValueError(f"Expected {file.source} ({file.where}) to be readable, but: {error}") from error
        write(file.target, content)

    def _sound(self, file: File) -> bytes:
        wave, rate = soundfile.read(file.source, dtype="float64", always_2d=True)
        if not np.isfinite(wave).all():
            raise ValueError("Expected samples to be finite, but got NaN or infinite ones.")
        fault = self.job.corruption
        rng = sample_rng(self.job.options.seed, fault, file.key)
        noisy = corrupt_audio(wave.mean(1).clip(-1, 1), fault.kind, fault.severity, rng, rate, self._recordings)
        content = io.BytesIO()
        samples = np.rint(noisy * 32768).clip(-32768, 32767).astype(np.int16)
        form = SOUNDS[file.target.suffix.lower()]
        soundfile.write(content, samples, rate, subtype="VORBIS" if form == "OGG" else "PCM_16", format=form)
        return content.getvalue()

    def _picture(self, file: File) -> bytes:
        with Image.open(file.source) as image:
            picture = centre_square(image.convert("RGB"), self.job.options.size)
        fault = self.job.corruption
        rng = sample_rng(self.job.options.seed, fault, file.key)
        corrupted = corrupt_image(picture, fault.kind, fault.severity, rng, self._frost)
        content = io.BytesIO()
        form = PICTURES[file.target.suffix.lower()]
        options = {"quality": self.job.options.quality} if form in ("JPEG", "WEBP") else {}
        Image.fromarray(np.rint(corrupted * 255).astype(np.uint8)).save(content, form, **options)
        return content.getvalue()


# --------------------------------------------------------------------------------------------------------- processes


def run(files: Sequence[File], corrupt: Corrupt, progress: Progress | None = None) -> None:
    """Make the files that are not there yet, in as many processes as the job's options say.

    Args:
        files: to be made.
        corrupt: makes one.
        progress: called after each file.

    Raises:
        ValueError: a file cannot be read.
    """
    progress = progress or (lambda done, total: None)
    left = [file for file in files if not file.target.exists()]
    kept = len(files) - len(left)
    for done in range(1, kept + 1):
        progress(done, len(files))
    finished = _in_turn(left, corrupt) if corrupt.job.options.workers == 1 else _in_processes(left, corrupt.job)
    with closing(finished):  # also if `progress` raises: then the processes end here
        for done, _ in enumerate(finished, kept + 1):
            progress(done, len(files))


def _in_turn(files: Sequence[File], corrupt: Corrupt) -> Generator[None, None, None]:
    for file in files:
        corrupt(file)
        yield


def _in_processes(files: Sequence[File], job: Job) -> Generator[None, None, None]:
    """Yield once for each finished file, in any order; few files are queued, so an interrupt has little to wait for."""
    workers = job.options.workers
    pool = Workers(workers, _start_worker, job)
    running: set[Future[None]] = set()
    try:
        for file in files:
            if len(running) == 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield
            running.add(pool.submit(_work, file))
        for future in as_completed(running):
            future.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Corrupt  # of this process, if it is a worker


def _start_worker(job: Job) -> None:
    global _worker
    _worker = Corrupt(job)


def _work(file: File) -> None:
    _worker(file)
