"""A corrupted copy of a data set on disk, in the layout of Kinetics50-C and VGGSound-C (see `published_layout`)."""

from __future__ import annotations

from pathlib import Path

from lightning_abpem.data.corrupt_work import Corrupt, CorruptOptions, Job, Progress, prepare, run
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.data.published_layout import Layout, as_json, read_list, relative, write, write_json

__all__ = ["corrupt_data_set"]


def corrupt_data_set(
    data_list: Path,
    out: Path,
    corruption: Corruption,
    options: CorruptOptions | None = None,
    progress: Progress | None = None,
    *,
    root: Path | None = None,
) -> Path:
    """Write corrupted copies of all files of one modality, and then the list that has them.

    ``out/audio/{kind}/severity_{s}/{video_id}.wav`` are 16 bit, mono, at the source's rate. Images become
    ``out/video/{kind}/severity_{s}/frame_{i}/{video_id}.jpg``: shorter side to `size` by bicubic interpolation,
    centre crop, corruption. The list ``out/json/{audio|video}/{kind}/severity_{s}.json`` points at them and at the
    other modality's originals, by paths relative to its folder. It is written last: if it exists, all is done.
    ``severity_{s}.meta.json`` beside it says how the files were made; paths in it are relative to `out`.

    A run that was interrupted goes on when it is started again with the same settings: finished files are kept. The
    bytes are the same for any number of workers. Those are spawned: a script that wants more than one needs
    ``if __name__ == "__main__":``. Two runs at once must not write the same corruption.

    Args:
        data_list: of the clean data set, or one that this function made of the other modality.
        out: folder of this data set's corruptions, of any kinds and severities.
        corruption: made of them, of the sound or of the frames ("image").
        options: of the work; a list that this function made needs `allow_outside`.
        progress: called after each file.
        root: folder to which the list's relative paths are relative; None for the list's own.

    Returns:
        The new list's path, absolute.

    Raises:
        ValueError: the list is not as above or has a `video_id` twice, a path leads out of the root, a link would lead
            a file out of `out`, a file cannot be read, or there are files already that were made with other settings.
        FileNotFoundError: files of the list, or the recording, are missing; nothing has been written then.
    """
    job = Job(corruption, options or CorruptOptions())
    layout = Layout(data_list, out, corruption, root, job.options.allow_outside)
    document = read_list(layout.data_list)
    files = layout.files(document["data"])
    corrupt = Corrupt(job)
    settings = job.settings(layout.out) | {"data_list": relative(layout.data_list.resolve(), layout.out)}
    layout.check_output(files)
    new_list = as_json({**document, "data": [layout.relocate(entry) for entry in document["data"]]})
    prepare(layout.folder, settings)
    run(files, corrupt, progress)
    write_json(layout.new_list.with_suffix(".meta.json"), {**settings, "files": len(files)})
    write(layout.new_list, new_list)
    return layout.new_list
