"""A corrupted copy of a data set on disk, in the layout of Kinetics50-C and VGGSound-C (see `published_layout`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from PIL import Image

from lightning_abpem import __version__
from lightning_abpem.data.audio_corruptions import Recordings, corrupt_audio
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.frames import centre_square
from lightning_abpem.data.image_corruptions import corrupt_image
from lightning_abpem.data.image_weather import load_frost
from lightning_abpem.data.published_layout import (
    File,
    Layout,
    as_json,
    read_json,
    read_list,
    relative,
    remove_partial,
    write,
    write_json,
)
from lightning_abpem.data.roots import AllowOutside
from lightning_abpem.processes import Workers

__all__ = ["corrupt_data_set"]

_BROKEN = (OSError, SyntaxError, ValueError, soundfile.SoundFileError, Image.DecompressionBombError)


def corrupt_data_set(
    data_list: Path,
    out: Path,
    modality: Literal["audio", "image"],
    kind: str,
    severity: int,
    *,
    root: Path | None = None,
    allow_outside: AllowOutside = False,
    seed: int = 0,
    recordings: Path | None = None,
    frost: Path | None = None,
    workers: int = 1,
    quality: int = 85,
    size: int = 224,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write corrupted copies of all files of one modality, and then the list that has them.

    ``out/audio/{kind}/severity_{s}/{video_id}.wav`` are 16 bit, mono, at the source's rate. Images become
    ``out/video/{kind}/severity_{s}/frame_{i}/{video_id}.jpg``: shorter side to `size` by bicubic interpolation,
    centre crop, corruption. The list ``out/json/{audio|video}/{kind}/severity_{s}.json`` points at them and at the
    other modality's originals, by paths relative to its folder; it is written last, so that it exists means that all
    is done. ``severity_{s}.meta.json`` beside it says how it was made; paths in that are relative to `out`.

    A run that was interrupted goes on when it is started again with the same settings: finished files are kept. The
    bytes are the same for any number of `workers`. Those are spawned: a script that wants more than one needs
    ``if __name__ == "__main__":``. Two runs at once must not write the same corruption.

    Args:
        data_list: of the clean data set, or one that this function made of the other modality.
        out: folder of this data set's corruptions, of any kinds and severities.
        modality: "audio", or "image" for the frames.
        kind: see `Corruption`.
        severity: 1 to 5.
        root: what the list's relative paths are relative to; None for its own folder.
        allow_outside: by default no path in the list, nor a link that it meets, may lead out of `root`, or of the
            list's own folder. True allows all, and folders allow those. A list that this function made needs it.
        seed: >= 0; every file has its own random numbers, drawn with this, the corruption and the file's name.
        recordings: folder of noises, see `Recordings`; None for procedural ones. White noise needs neither.
        frost: folder of pictures for the kind of that name, see `load_frost`; None for drawn ones.
        workers: processes; 1 is this one.
        quality: of JPEGs, 1 to 100.
        size: height and width of the images, in pixels.
        progress: called with the number of files that are finished, kept ones too, and that of all.

    Returns:
        The new list's path, absolute.

    Raises:
        ValueError: a setting is out of range, the list is not as above or has a `video_id` twice, a path leads out of
            the root, a link would lead a file out of `out`, a file cannot be read, or there are files already that
            were made with other settings.
        FileNotFoundError: files of the list, or the recording, are missing; nothing has been written then.
    """
    _check_integers(seed=(seed, 0), workers=(workers, 1), quality=(quality, 1, 100), size=(size, 1))
    job = _Job(Corruption(modality, kind, severity), seed, recordings, frost, quality, size)
    layout = Layout(data_list, out, job.corruption, root, allow_outside)
    document = read_list(layout.data_list)
    files = layout.files(document["data"])
    corrupt = _Corrupt(job)
    settings = job.settings(layout)
    layout.check_output(files)
    new_list = as_json({**document, "data": [layout.relocate(entry) for entry in document["data"]]})
    _prepare(layout.folder, settings)
    _run(files, corrupt, workers, progress or _ignore)
    write_json(layout.new_list.with_suffix(".meta.json"), {**settings, "files": len(files)})
    write(layout.new_list, new_list)
    return layout.new_list


def _check_integers(**named: tuple[int, ...]) -> None:
    """Each name has its value, the least one allowed, and the greatest if there is one."""
    for name, (value, least, *most) in named.items():
        if not isinstance(value, int) or value < least or any(value > bound for bound in most):
            wanted = f"an integer in [{least}, {most[0]}]" if most else f"an integer >= {least}"
            raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}.")


def _ignore(done: int, total: int) -> None:
    """The progress, if nobody asks for it."""


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings where the files go to, or compare them with those of the files that are there."""
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
class _Job:
    """The work on every file: all that a worker has to be told."""

    corruption: Corruption
    seed: int
    recordings: Path | None
    frost: Path | None
    quality: int
    size: int

    def settings(self, layout: Layout) -> dict[str, Any]:
        """All that the files' bytes depend on; what takes neither recordings nor pictures has None there."""
        modality, kind, severity = self.corruption.modality, self.corruption.kind, self.corruption.severity
        data_list = relative(layout.data_list.resolve(), layout.out)
        settings = {"modality": modality, "kind": kind, "severity": severity, "seed": self.seed}
        settings |= {"version": __version__, "data_list": data_list}
        if modality == "audio":
            return {**settings, "noise": None if kind == "gaussian_noise" else _origin(self.recordings, layout)}
        frost = _origin(self.frost, layout) if kind == "frost" else None
        return {**settings, "frost": frost, "quality": self.quality, "size": self.size}


def _origin(folder: Path | None, layout: Layout) -> str:
    return "procedural" if folder is None else relative(Path(folder).resolve(), layout.out)


class _Corrupt:
    """Makes files, one a call, after it has loaded what the job needs."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        modality, kind = job.corruption.modality, job.corruption.kind
        noisy = modality == "audio" and kind != "gaussian_noise"
        self._recordings = Recordings(job.recordings) if noisy and job.recordings is not None else None
        if self._recordings is not None:
            self._recordings(kind, 16000)  # at any rate: a missing or broken one is found before anything is written
        icy = modality == "image" and kind == "frost"
        self._frost = load_frost(job.frost) if icy and job.frost is not None else None

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
        rng = sample_rng(self.job.seed, fault, file.key)
        noisy = corrupt_audio(wave.mean(1).clip(-1, 1), fault.kind, fault.severity, rng, rate, self._recordings)
        content = io.BytesIO()
        samples = np.rint(noisy * 32768).clip(-32768, 32767).astype(np.int16)
        soundfile.write(content, samples, rate, subtype="PCM_16", format="WAV")
        return content.getvalue()

    def _picture(self, file: File) -> bytes:
        with Image.open(file.source) as image:
            picture = centre_square(image.convert("RGB"), self.job.size)
        fault = self.job.corruption
        rng = sample_rng(self.job.seed, fault, file.key)
        corrupted = corrupt_image(picture, fault.kind, fault.severity, rng, self._frost)
        content = io.BytesIO()
        Image.fromarray(np.rint(corrupted * 255).astype(np.uint8)).save(content, "JPEG", quality=self.job.quality)
        return content.getvalue()


# --------------------------------------------------------------------------------------------------------- processes


def _run(files: Sequence[File], corrupt: _Corrupt, workers: int, progress: Callable[[int, int], None]) -> None:
    """Make the files that are not there yet."""
    left = [file for file in files if not file.target.exists()]
    kept = len(files) - len(left)
    for done in range(1, kept + 1):
        progress(done, len(files))
    finished = _in_turn(left, corrupt) if workers == 1 else _in_processes(left, corrupt.job, workers)
    with closing(finished):  # also if `progress` raises: then the processes end here
        for done, _ in enumerate(finished, kept + 1):
            progress(done, len(files))


def _in_turn(files: Sequence[File], corrupt: _Corrupt) -> Generator[None, None, None]:
    for file in files:
        corrupt(file)
        yield


def _in_processes(files: Sequence[File], job: _Job, workers: int) -> Generator[None, None, None]:
    """Yields as files are finished, in any order; few wait at a time, so that little is left to do at the end."""
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


_worker: _Corrupt  # of this process, if it is a worker


def _start_worker(job: _Job) -> None:
    global _worker
    _worker = _Corrupt(job)


def _work(file: File) -> None:
    _worker(file)
