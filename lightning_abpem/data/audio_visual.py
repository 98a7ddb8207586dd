"""Frames and sound in the layout of Kinetics50-C and VGGSound-C, as CAV-MAE takes them, corrupted on the fly."""

from __future__ import annotations

import csv
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from scipy import signal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lightning_abpem.data.audio_corruptions import Recordings, corrupt_audio
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.filterbank import filterbank
from lightning_abpem.data.frames import centre_square
from lightning_abpem.data.image_corruptions import corrupt_image
from lightning_abpem.data.image_weather import load_frost
from lightning_abpem.data.published_layout import read_list
from lightning_abpem.data.roots import AllowOutside, Roots

__all__ = ["AudioVisualC", "AudioVisualPairs"]

Array = NDArray[np.float64]
Broken = Literal["raise", "skip"]
FrostPictures = Sequence[NDArray[np.floating]]

RATE, FRAMES, MEL_BINS, IMAGE_SIZE = 16000, 1024, 128, 224
AUDIO_MEAN, AUDIO_STD = -5.081, 4.4849
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AudioVisualPairs(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Pairs ((audio (1024, 128), video (3, 224, 224)), label (), int64) of a published list, in its order.

    The frame: shorter side to 224 by bicubic interpolation, centre crop, image corruptions, ImageNet's mean and sd.
    The sound: channels averaged, brought to 16 kHz (a warning says so, once), audio corruptions, Kaldi filterbank of
    128 bins, zeros added at the end or cut to 1024 frames, (x + 5.081) / 4.4849.

    Args:
        data_list: JSON, ``{"data": [{"video_id", "wav", "video_path", "labels"}, ...]}``, one mid in each `labels`;
            the frame is ``{video_path}/frame_{frame}/{video_id}.jpg``.
        labels_csv: its columns index and mid say which class, 0 to C - 1, a mid is; display_name is optional.
        root: folder to which the list's relative paths are relative; by default the list's own.
        allow_outside: by default no path in the list, and no link on it, may lead out of `root`. True allows any
            folder; a list of folders allows those.
        corruptions: applied to every item, in this order.
        seed: of the corruptions. What a sample gets also depends on its video_id, but not on the order of reading.
        frame: which frame of a video; 5, the middle one of ten, as published.
        recordings: of noises, or their folder; None for procedural noises.
        frost: pictures of frost, or their folder; None for drawn ones.
        broken: "raise", or "skip" entries whose files are missing or unreadable. To find the unreadable ones, "skip"
            decodes every file here in one process: a few milliseconds an entry, and all of the data from the disk.

    Attributes:
        labels: classes (N,).
        classes: C.
        names: of the classes: display_name, or the mid where the CSV has none.
        video_ids: of the pairs, in their order.
        skipped: how many entries are left out.

    Raises:
        ValueError: the list or the CSV is not as above, a path leads out, or "skip" leaves nothing; when a sample is
            read: a file of it cannot be. The message has the file, the entry and the value.
        FileNotFoundError: files are missing.
    """

    def __init__(
        self,
        data_list: str | Path,
        labels_csv: str | Path,
        *,
        root: str | Path | None = None,
        allow_outside: AllowOutside = False,
        corruptions: Sequence[Corruption] = (),
        seed: int = 0,
        frame: int = 5,
        recordings: Recordings | str | Path | None = None,
        frost: FrostPictures | str | Path | None = None,
        broken: Broken = "raise",
    ) -> None:
        if broken not in ("raise", "skip"):
            raise ValueError(f'Expected `broken` to be "raise" or "skip", but got {broken!r}.')
        data_list = Path(data_list)
        index_of, self.names = _read_classes(Path(labels_csv))
        home = data_list.parent if root is None else Path(root)
        entries = _read_entries(data_list, home, frame, index_of)
        _check_paths(entries, Roots(home, allow_outside))
        self._entries = _readable(entries, data_list) if broken == "skip" else _present(entries, data_list)
        self.skipped = len(entries) - len(self._entries)
        self.video_ids = [entry.video_id for entry in self._entries]
        self.labels = np.array([entry.label for entry in self._entries], np.int64)
        self.classes = len(self.names)
        self.corruptions, self.seed, self._frame = tuple(corruptions), seed, frame
        self._recordings = Recordings(recordings) if isinstance(recordings, (str, Path)) else recordings
        self._frost = load_frost(Path(frost)) if isinstance(frost, (str, Path)) else frost
        self._told = torch.zeros(1, dtype=torch.bool).share_memory_()  # of resampling; workers share it

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return self.sample(index, self.corruptions), torch.tensor(self._entries[index].label)

    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
        """Return audio (1024, 128) and video (3, 224, 224) of a pair, under these corruptions instead of the set's."""
        entry = self._entries[index]
        wave, image = self._resampled(*_read_wave(entry)), centre_square(_read_frame(entry), IMAGE_SIZE)
        for corruption in corruptions:
            key = entry.video_id if corruption.modality == "audio" else f"{entry.video_id}/frame_{self._frame}"
            fault = corruption.kind, corruption.severity, sample_rng(self.seed, corruption, key)
            if corruption.modality == "audio":
                wave = corrupt_audio(wave.clip(-1, 1), *fault, RATE, self._recordings)
            else:
                image = corrupt_image(image, *fault, self._frost)
        audio = (filterbank(wave, RATE, MEL_BINS, FRAMES) - AUDIO_MEAN) / AUDIO_STD
        video = torch.from_numpy((image - IMAGE_MEAN) / IMAGE_STD).permute(2, 0, 1)
        return torch.from_numpy(audio), video.float().contiguous()

    def check_recordings(self, corruptions: Sequence[Corruption]) -> None:
        """Raise unless there is a recording for each of these corruptions that needs one.

        Raises:
            FileNotFoundError: naming those that are missing.
        """
        if self._recordings is not None:
            self._recordings.check([c.kind for c in corruptions if c.modality == "audio"])

    def _resampled(self, wave: Array, rate: int) -> Array:
        if rate == RATE:
            return wave
        if not self._told:
            self._told.fill_(True)
            rank_zero_warn(f"Sound at {rate} Hz is resampled to {RATE} Hz; published results are of files at {RATE}.")
        return signal.resample_poly(wave, RATE, rate)


class AudioVisualC(LightningDataModule):
    """Kinetics50-C, VGGSound-C, or data of one's own in their layout, for `Trainer.test` and `Trainer.predict`.

    A test batch is ((audio (B, 1024, 128), video (B, 3, 224, 224)), label (B,)); predict has (audio, video) alone.

    Args:
        data_list, labels_csv, root, allow_outside, corruptions, seed, frame, recordings, frost, broken: see
            `AudioVisualPairs`, which the attribute `pairs` is.
        batch_size: B.
        num_workers: processes that read.
        shuffle: one order drawn with `seed`, the same in every run; otherwise the list's.
    """

    def __init__(
        self,
        data_list: str | Path,
        labels_csv: str | Path,
        *,
        root: str | Path | None = None,
        allow_outside: AllowOutside = False,
        corruptions: Sequence[Corruption] = (),
        seed: int = 0,
        batch_size: int = 8,
        num_workers: int = 0,
        frame: int = 5,
        recordings: Recordings | str | Path | None = None,
        frost: FrostPictures | str | Path | None = None,
        broken: Broken = "raise",
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.pairs = AudioVisualPairs(
            data_list,
            labels_csv,
            root=root,
            allow_outside=allow_outside,
            corruptions=corruptions,
            seed=seed,
            frame=frame,
            recordings=recordings,
            frost=frost,
            broken=broken,
        )
        self.seed, self.batch_size, self.num_workers, self.shuffle = seed, batch_size, num_workers, shuffle

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(default_collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(_collate_inputs)

    def _loader(self, collate: Callable[[list[object]], object]) -> DataLoader[Any]:
        pairs: Dataset[Any] = self.pairs
        if self.shuffle:  # here and not by a sampler, which a distributed run would replace
            pairs = Subset(pairs, np.random.default_rng(self.seed).permutation(len(self.pairs)).tolist())
        return DataLoader(pairs, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate)


def _collate_inputs(items: list[Any]) -> Any:
    return default_collate([inputs for inputs, _ in items])


# -------------------------------------------------------------------------------------------------- list, CSV, files


@dataclass(frozen=True)
class _Entry:
    """One pair of the list; `where` is its place there, for messages."""

    where: str
    video_id: str
    wav: Path
    frame: Path
    label: int


def _read_entries(path: Path, root: Path, frame: int, index_of: dict[str, int]) -> list[_Entry]:
    listed = read_list(path, ("video_id", "wav", "video_path", "labels"))["data"]
    return [_entry(raw, f"data[{i}] of {path}", root, frame, index_of) for i, raw in enumerate(listed)]


def _entry(raw: dict[str, Any], where: str, root: Path, frame: int, index_of: dict[str, int]) -> _Entry:
    mid = raw["labels"]
    if mid not in index_of:
        raise ValueError(f"Expected `labels` of {where} to be one mid of the CSV's {len(index_of)}, but got {mid!r}.")
    picture = root / raw["video_path"] / f"frame_{frame}" / f"{raw['video_id']}.jpg"
    return _Entry(where, raw["video_id"], root / raw["wav"], picture, index_of[mid])


def _check_paths(entries: list[_Entry], roots: Roots) -> None:
    for entry in entries:
        for key, path in (("wav", entry.wav), ("video_path", entry.frame)):
            roots.check(path, str(path), f"`{key}` of {entry.where}")


def _read_classes(path: Path) -> tuple[dict[str, int], list[str]]:
    """Read the class of every mid, and the names of all classes."""
    index_of: dict[str, int] = {}
    names: dict[int, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if not {"index", "mid"} <= set(columns):
                raise ValueError(f"columns index and mid are wanted, and got {', '.join(columns) or 'none'}")
            for row in reader:
                index, mid = row["index"] or "", row["mid"]
                if not index.isdecimal() or not mid or mid in index_of or int(index) in names:
                    raise ValueError(f"line {reader.line_num} has no index or mid of its own: {index!r}, {mid!r}")
                index_of[mid], names[int(index)] = int(index), row.get("display_name") or mid
        if not names or set(names) != set(range(len(names))):
            raise ValueError(f"{len(names)} indices should be 0, 1, 2, ..., and got {reprlib.repr(sorted(names))}")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"Expected {path} to be a CSV of classes, but: {error}.") from error
    return index_of, [names[index] for index in range(len(names))]


def _present(entries: list[_Entry], data_list: Path) -> list[_Entry]:
    files = [(path, entry.where) for entry in entries for path in (entry.wav, entry.frame)]
    missing = [f"{path} ({where})" for path, where in files if not path.is_file()]
    if missing:
        shown = ", ".join((*missing[:5], "...")[: len(missing)])
        raise FileNotFoundError(
            f"Expected all files of {data_list} to exist, but {len(missing)} are missing: {shown}. "
            'With `broken="skip"` their entries are left out.'
        )
    return entries


def _readable(entries: list[_Entry], data_list: Path) -> list[_Entry]:
    kept, problems = [], []
    for entry in entries:
        try:
            _read_wave(entry)
            _read_frame(entry)
            kept.append(entry)
        except ValueError as error:
            problems.append(str(error))
    if not kept:
        raise ValueError(f"Expected {data_list} to have an entry that can be read, but it has none. {problems[0]}")
    if problems:
        rank_zero_warn(f"{len(problems)} of {len(entries)} entries of {data_list} are left out. {problems[0]}")
    return kept


def _read_wave(entry: _Entry) -> tuple[Array, int]:
    """Read a waveform: the mean of its channels (T,), and the rate in Hz."""
    expected = f"Expected {entry.wav} ({entry.where}) to be 25 ms of sound at least"
    try:
        wave, rate = soundfile.read(entry.wav, always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        why = error if entry.wav.exists() else "there is no such file."  # which libsndfile calls a system error
        raise ValueError(f"{expected}, but: {why}") from error
    if 1000 * len(wave) < 25 * rate or not np.isfinite(wave).all():
        raise ValueError(f"{expected}, but got {len(wave)} samples at {rate} Hz, too few or not all finite.")
    return wave.mean(1), rate


def _read_frame(entry: _Entry) -> Image.Image:
    try:
        with Image.open(entry.frame) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Expected {entry.frame} ({entry.where}) to be a picture, but: {error}.") from error
