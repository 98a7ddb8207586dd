"""``abpem corrupt``: a corrupted copy of a published data set of frames and sound, or of a folder of either."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lightning_abpem.data.audio_corruptions import AUDIO_KINDS, Recordings
from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corrupt_folder import corrupt_folder
from lightning_abpem.data.corrupt_work import CorruptOptions
from lightning_abpem.data.corruptions import KINDS, Corruption, Sensor
from lightning_abpem.data.image_corruptions import IMAGE_KINDS
from lightning_abpem.display import literal
from lightning_abpem.trainer.options import argument_words

__all__ = ["add_arguments", "run"]

_PUBLISHED: dict[Sensor, tuple[str, ...]] = {"audio": AUDIO_KINDS, "image": IMAGE_KINDS}
_EPILOG = f"""image: {", ".join(KINDS["image"])}
audio: {", ".join(KINDS["audio"])}

examples:
  abpem corrupt clean/severity_0.json corrupted --kind fog --severity 5
  abpem corrupt photos corrupted --kind fog,motion_blur --severity 1,3,5      (all images of a folder)
  abpem corrupt clean/severity_0.json corrupted --modality audio --kind all --severity 1,3,5 --recordings noises
An interrupted run goes on where it was when the command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = _EPILOG
    words = 'folder of images or sounds; or a data set\'s JSON list: {"data": [{"video_id", "wav", ...}]}'
    parser.add_argument("input", type=Path, help=words)
    parser.add_argument("output", type=Path, help="folder of the corrupted copy")
    parser.add_argument("--modality", choices=list(KINDS), help="which one, for a kind of both, or all kinds of one")
    parser.add_argument("--kind", required=True, help="one or several with commas, or all (held-out ones excepted)")
    parser.add_argument("--severity", required=True, help="1 to 5, or several with commas")
    parser.add_argument("--root", type=Path, help="what relative paths in the list are relative to; its own folder")
    meanings = argument_words(CorruptOptions)
    for own in fields(CorruptOptions):
        flag, meaning = own.name.replace("_", "-"), meanings.get(own.name, "")
        parser.add_argument(f"--{flag}", help=meaning.rstrip("."), **_form(own.default))
    parser.set_defaults(workers=os.cpu_count() or 1)


def _form(default: object) -> dict[str, Any]:
    """Return how argparse takes an option with this default."""
    if isinstance(default, bool):
        return {"action": "store_true"}
    return {"type": Path if default is None else type(default), "default": default}


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Make a corrupted copy for every kind and severity that is asked for."""
    if rest:
        raise ValueError(f"Expected no arguments but those of --help, but got {' '.join(rest)}.")
    kinds = _kinds(options.kind, list(KINDS) if options.modality is None else [options.modality])
    severities = [_integer(word) for word in options.severity.split(",")]
    faults = [Corruption(modality, kind, severity) for modality, kind in kinds for severity in severities]
    if options.recordings is not None:  # what is missing is said before the first kind is made
        Recordings(options.recordings).check(fault.kind for fault in faults if fault.modality == "audio")
    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for fault in faults:
            bar = progress.add_task(f"{fault}, severity {fault.severity}", total=None)
            made = _corrupt(fault, options, partial(_advance, progress, bar))
            progress.console.print(literal(made))


def _kinds(words: str, modalities: Sequence[Sensor]) -> list[tuple[Sensor, str]]:
    """Return the requested kinds, each with its modality, which is one of `modalities`."""
    if words == "all":
        return [(modality, kind) for modality in modalities for kind in _PUBLISHED[modality]]
    return [(_modality_of(kind, modalities), kind) for kind in map(str.strip, words.split(","))]


def _modality_of(kind: str, modalities: Sequence[Sensor]) -> Sensor:
    own = [modality for modality in modalities if kind in KINDS[modality]] or modalities
    if len(own) == 1:
        return own[0]
    if kind in KINDS[own[0]]:
        raise ValueError(f"Expected `--modality` to be {' or '.join(own)}, for {kind} is a kind of each.")
    known = "; of ".join(f"{modality}: {', '.join(KINDS[modality])}" for modality in own)
    raise ValueError(f"Expected `kind` to be one of {known}; but got {kind!r}.")


def _corrupt(fault: Corruption, options: argparse.Namespace, advance: Callable[[int, int], None]) -> str:
    """Make one corruption's files; return a line that says where they are."""
    how = CorruptOptions(**{own.name: getattr(options, own.name) for own in fields(CorruptOptions)})
    if not options.input.is_dir():
        return str(corrupt_data_set(options.input, options.output, fault, how, advance, root=options.root))
    if options.root is not None:
        raise ValueError(f"Expected no `--root` with a folder, whose files are its own, but got {options.root}.")
    made = corrupt_folder(options.input, options.output, fault, how, advance)
    skipped = f", {made.skipped} others skipped" if made.skipped else ""
    return f"{made.folder}: {made.files} {fault.modality} files{skipped}"


def _advance(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def _integer(word: str) -> int:
    if not word.strip().isdigit():
        raise ValueError(f"Expected `severity` to be an integer in [1, 5], or several with commas, but got {word!r}.")
    return int(word)
