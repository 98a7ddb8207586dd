"""A corrupted copy of any folder of images or sounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_abpem.data.corrupt_work import PICTURES, SOUNDS, Corrupt, CorruptOptions, Job, Progress, prepare, run
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.data.published_layout import File, relative, write_json
from lightning_abpem.data.roots import Roots, is_inside

__all__ = ["CorruptedFolder", "corrupt_folder"]


class CorruptedFolder(NamedTuple):
    """The copy's folder, the number of its files, and the number of files left out."""

    folder: Path
    files: int
    skipped: int


def corrupt_folder(
    folder: Path,
    out: Path,
    corruption: Corruption,
    options: CorruptOptions | None = None,
    progress: Progress | None = None,
) -> CorruptedFolder:
    """Write corrupted copies of all images, or of all sounds, of a folder and of the folders in it.

    They are in ``out/{modality}/{kind}/severity_{s}``, with the names and formats that they have in `folder`. Images
    (.bmp, .jpg, .png, .tif, .webp) are RGB: shorter side to `size`, centre crop, corruption. Sounds (.aif, .flac, .ogg,
    .wav) are mono, 16 bit where the format has bits, at the source's rate. Other files are left out, and so are links
    to folders, and `out` if it is in `folder`. ``severity_{s}.meta.json`` is written last and says how it was made.

    An interrupted run goes on when it is started again with the same settings, and new files of `folder` are added.
    The bytes are the same for any number of workers. Two runs at once must not write the same corruption.

    Args:
        folder: whose files.
        out: folder of its corruptions, of any kinds and severities.
        corruption: made of them; its modality says which files are taken.
        options: of the work; a file's name in them is its path in `folder`.
        progress: called after each file.

    Raises:
        ValueError: `folder` has no such file, a link leads out of it or of `out`, a file cannot be read, or there are
            files already that were made with other settings.
        NotADirectoryError: `folder` is none.
    """
    job = Job(corruption, options or CorruptOptions())
    modality = corruption.modality
    folder, out = Path(folder), Path(out).resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"Expected {folder} to be a folder, but it is none.")
    if out == folder.resolve():
        raise ValueError(f"Expected `out` to be another folder than that of the files, but got {out} for both.")
    target = out / modality / corruption.kind / f"severity_{corruption.severity}"
    files, skipped = _files(folder, out, target, modality, Roots(folder, job.options.allow_outside))
    _stay_inside(out, {target, *(file.target.parent for file in files)})
    corrupt = Corrupt(job)
    settings = job.settings(out) | {"folder": relative(folder.resolve(), out)}
    prepare(target, settings)
    run(files, corrupt, progress)
    counts = {"files": len(files), "skipped": skipped}
    write_json(target.parent / f"{target.name}.meta.json", {**settings, **counts})
    return CorruptedFolder(target, len(files), skipped)


def _files(folder: Path, out: Path, target: Path, modality: Sensor, roots: Roots) -> tuple[list[File], int]:
    """Return the files to make, ordered by path, and the number of the others.

    Raises:
        ValueError: there are none, or one is a link that leads out.
    """
    known = SOUNDS if modality == "audio" else PICTURES
    files, skipped = [], 0
    for path in sorted(_walk(folder, out)):
        if path.suffix.lower() not in known or not path.is_file():
            skipped += 1
            continue
        key = relative(path, folder)
        roots.check(path, str(path), f"the files of {folder}")
        files.append(File(path, target / key, key, f"in {folder}"))
    if not files:
        raise ValueError(
            f"Expected {folder} to have {modality} files ({', '.join(known)}), but it has none, and {skipped} others."
        )
    return files, skipped


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    """Yield all files, and links to folders, except those in `out`."""
    for top, folders, names in os.walk(folder):
        here = Path(top)
        folders[:] = [name for name in folders if (here / name).resolve() != out]
        yield from (here / name for name in folders if (here / name).is_symlink())
        yield from (here / name for name in names)


def _stay_inside(out: Path, folders: set[Path]) -> None:
    """Refuse links in `out` through which files would be written elsewhere."""
    for own in sorted(folders):
        if not is_inside(real := os.path.realpath(own), str(out)):
            raise ValueError(f"Expected {own} to be in {out}, but it is a link, or in one, to {real}.")
