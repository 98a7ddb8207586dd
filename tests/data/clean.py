"""A data set's list, corrupted copies of it, and what is in their folders; for the tests of corrupting."""

import json
import os

from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corrupt_work import CorruptOptions
from lightning_abpem.data.corruptions import Corruption

IDS = ("-aB_000030", "b", "ünï c")

RATE = 16000


def store(path, entries):
    path.write_text(json.dumps({"data": entries}))
    return path


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change(data, i, **changed):
    entries = load(data)["data"]
    entries[i] |= changed
    return store(data, entries)


def images(data, out, kind="gaussian_noise", severity=3, progress=None, **options):
    made = CorruptOptions(**{"size": 16, **options})
    return corrupt_data_set(data, out, Corruption("image", kind, severity), made, progress)


def sounds(data, out, kind="rain", severity=3, progress=None, **options):
    return corrupt_data_set(data, out, Corruption("audio", kind, severity), CorruptOptions(**options), progress)


def contents(folder):
    """Return the content of every file under a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(count, error=KeyboardInterrupt):
    def progress(done, total):
        if done == count:
            raise error

    return progress


def leads_out(data, secret, key, how):
    """The list with an entry that leads to the secret folder."""
    target = secret / "s.wav" if key == "wav" else secret
    link = data.parent / "link"
    if how == "link":
        link.symlink_to(target)
    elif how == "folder":
        link.symlink_to(target.parent)
    chained = {"link": "link", "folder": f"link/{target.name}"}
    relative = os.path.relpath(target, data.parent)
    words = {"absolute": str(target), "dots": relative, "deep": f"sound/../{relative}", **chained}
    return change(data, 1, **{key: words[how]})
