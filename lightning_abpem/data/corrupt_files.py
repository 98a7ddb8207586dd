"""A corrupted copy of a data set on disk, in the layout of Kinetics50-C and VGGSound-C (see `published_layout`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lightning_abpem.data.corrupt_work import Corrupt, Job, check_integers, prepare, run
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.data.published_layout import Layout, as_json, read_list, relative, write, write_json
from lightning_abpem.data.roots import AllowOutside

__all__ = ["corrupt_data_set"]


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
    other modality's originals, by paths relative to its folder. It is written last: if it exists, all is done.
    ``severity_{s}.meta.json`` beside it says how the files were made; paths in it are relative to `out`.

    A run that was interrupted goes on when it is started again with the same settings: finished files are kept. The
    bytes are the same for any number of `workers`. Those are spawned: a script that wants more than one needs
    ``if __name__ == "__main__":``. Two runs at once must not write the same corruption.

    Args:
        data_list: of the clean data set, or one that this function made of the other modality.
        out: folder of this data set's corruptions, of any kinds and severities.
        modality: "audio", or "image" for the frames.
        kind: see `Corruption`.
        severity: 1 to 5.
        root: folder to which the list's relative paths are relative; None for the list's own.
        allow_outside: by default no path in the list, and no link on it, may lead out of `root`, or of the list's own
            folder. True allows any folder; a list of folders allows those. Lists made by this function need it.
        seed: >= 0; every file has its own random numbers, drawn with this, the corruption and the file's name.
        recordings: folder of noises, see `Recordings`; None for procedural ones. White noise needs neither.
        frost: folder of pictures for the kind of that name, see `load_frost`; None for drawn ones.
        workers: processes; 1 is this one.
        quality: of JPEGs, 1 to 100.
        size: height and width of the images, in pixels.
        progress: called with the number of finished files, kept ones included, and the number of all.

    Returns:
        The new list's path, absolute.

    Raises:
        ValueError: a setting is out of range, the list is not as above or has a `video_id` twice, a path leads out of
            the root, a link would lead a file out of `out`, a file cannot be read, or there are files already that
            were made with other settings.
        FileNotFoundError: files of the list, or the recording, are missing; nothing has been written then.
    """
    check_integers(seed=(seed, 0), workers=(workers, 1), quality=(quality, 1, 100), size=(size, 1))
    job = Job(Corruption(modality, kind, severity), seed, recordings, frost, quality, size)
    layout = Layout(data_list, out, job.corruption, root, allow_outside)
    document = read_list(layout.data_list)
    files = layout.files(document["data"])
    corrupt = Corrupt(job)
    settings = job.settings(layout.out) | {"data_list": relative(layout.data_list.resolve(), layout.out)}
    layout.check_output(files)
    new_list = as_json({**document, "data": [layout.relocate(entry) for entry in document["data"]]})
    prepare(layout.folder, settings)
    run(files, corrupt, workers, progress)
    write_json(layout.new_list.with_suffix(".meta.json"), {**settings, "files": len(files)})
    write(layout.new_list, new_list)
    return layout.new_list
