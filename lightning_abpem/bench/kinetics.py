"""Kinetics50-C and VGGSound-C on a user's copy of the data, with the authors' settings and the published results."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.audio_visual import AudioVisualPairs
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.data.image_corruptions import IMAGE_KINDS
from lightning_abpem.data.published_layout import read_json
from lightning_abpem.data.roots import AllowOutside
from lightning_abpem.methods.abpem import RECIPES
from lightning_abpem.models.cavmae import CAVMAE

__all__ = ["Kinetics50C", "VGGSoundC"]

_FOLDERS: dict[Sensor, str] = {"audio": "audio", "image": "video"}  # as the published lists have it
Published = Mapping[tuple[str, str], Mapping[str, float]]


class _Published(Benchmark):
    """A benchmark with published lists and a published checkpoint: the base of both.

    Args:
        data_root: folder to which relative paths are relative: those in the lists, and those of `clean_list` and
            `corrupted_lists`.
        checkpoint: the published source model's.
        clean_list: JSON list of the clean test samples.
        labels_csv: the classes: columns index, mid.
        corrupted_lists: folder with {video,audio}/KIND/severity_S.json, lists of data corrupted beforehand, as
            published or by ``abpem corrupt``. Without it samples are corrupted as they are read.
        corrupted_root: folder to which relative paths in those lists are relative; by default each list's own.
        recordings: folder of noise recordings, KIND.wav; without it noises made here are procedural.
        frost: folder of pictures of frost; without it frost made here is procedural.
        seed: of the corruptions made here.
        broken: "raise" or "skip" clean samples whose files are missing or broken.
        num_workers: processes that load samples.
        allow_outside: True lets paths in the lists, and links, lead out of `data_root`. The paths of `corrupted_lists`
            may always lead to `data_root`, and to OUT if that folder is ``OUT/json``, as ``abpem corrupt`` writes it.
    """

    sensors = ("audio", "image")
    sources = ("CAV-MAE",)
    fusion = "blocks_u.*.attn"
    immaterial = ("num_workers", "allow_outside")
    stem: ClassVar[str]
    recipes: ClassVar[Mapping[Sensor, str]]

    def __init__(
        self,
        data_root: Path,
        checkpoint: Path,
        clean_list: Path | None = None,
        labels_csv: Path | None = None,
        corrupted_lists: Path | None = None,
        corrupted_root: Path | None = None,
        recordings: Path | None = None,
        frost: Path | None = None,
        seed: int = 0,
        broken: Literal["raise", "skip"] = "raise",
        num_workers: int = 2,
        allow_outside: bool = False,
    ) -> None:
        if not Path(checkpoint).is_file():
            raise ValueError(f"Expected `checkpoint` to be the published state dict, but {checkpoint} is no file.")
        lists = Path(data_root) / "json_csv_files"
        self.kinds = {"image": IMAGE_KINDS, "audio": AUDIO_KINDS}
        self.modalities = CAVMAE.modalities
        self.encoders = {"audio": "blocks_a.10", "image": "blocks_v.10"}
        self.num_workers = num_workers
        self._checkpoint = checkpoint
        self._labels_csv = labels_csv or lists / f"class_labels_indices_{self.stem}.csv"
        self._corrupted_lists, self._corrupted_root = corrupted_lists, corrupted_root
        self._made_here = {"recordings": recordings, "frost": frost}
        self._options: dict[str, Any] = {"root": data_root, "seed": seed, "broken": broken}
        self._options["allow_outside"] = allow_outside
        clean = clean_list or lists / self.stem / "clean" / "severity_0.json"
        self._pairs = AudioVisualPairs(clean, self._labels_csv, recordings=recordings, frost=frost, **self._options)
        self.labels = self._pairs.labels
        self._corrupted: dict[Corruption, tuple[AudioVisualPairs, dict[str, int]]] = {}

    def source(self, name: str) -> LightningModule:
        return CAVMAE(self._pairs.classes).load_published(self._checkpoint).eval()

    def load(self, corruptions: Sequence[Corruption]) -> None:
        """Read the lists of data corrupted beforehand; without such lists, check that the recordings exist.

        Raises:
            FileNotFoundError: naming all that are missing.
        """
        if self._corrupted_lists is None:
            self._pairs.check_recordings(corruptions)
            return
        lists = [self._list_of(corruption) for corruption in corruptions]
        if missing := [str(path) for path in lists if not path.is_file()]:
            raise FileNotFoundError(
                f"Expected `corrupted_lists` to have a list for each of {len(lists)} corruptions, but {len(missing)} "
                f"are missing: {', '.join(missing)}."
            )
        for corruption in corruptions:
            self._list_and_positions(corruption)

    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
        if self._corrupted_lists is None or not corruptions:
            return self._pairs.sample(index, corruptions)
        name = self._pairs.video_ids[index]
        inputs = list(self._pairs.sample(index, ()))
        for corruption in corruptions:
            pairs, positions = self._list_and_positions(corruption)
            position = self.sensors.index(corruption.modality)
            inputs[position] = pairs.sample(positions[name], ())[position]
        return inputs[0], inputs[1]

    def options(self, method: str, sensors: Sequence[Sensor]) -> Mapping[str, Any]:
        """Return the authors' settings of published ABPEM for the failing modality; audio's if several or none fail."""
        if method != "abpem-published":
            return {}
        recipe = RECIPES[self.recipes["image" if list(sensors) == ["image"] else "audio"]]._asdict()
        return {name: value for name, value in recipe.items() if name != "batch_size"}

    def provenance(self) -> Mapping[str, Any]:
        skipped = {"skipped": self._pairs.skipped}
        if self._corrupted_lists is not None:
            return {"corrupted": str(self._corrupted_lists), **_made_beforehand(self._corrupted_lists), **skipped}
        made = {name: "procedural" if folder is None else str(folder) for name, folder in self._made_here.items()}
        return {"noise": made["recordings"], "frost": made["frost"], **skipped}

    @abstractmethod
    def published(self) -> Published: ...

    def _list_of(self, corruption: Corruption) -> Path:
        assert self._corrupted_lists is not None
        folder = Path(self._corrupted_lists) / _FOLDERS[corruption.modality] / corruption.kind
        return folder / f"severity_{corruption.severity}.json"

    def _list_and_positions(self, corruption: Corruption) -> tuple[AudioVisualPairs, dict[str, int]]:
        if corruption not in self._corrupted:
            own = {"root": self._corrupted_root, "allow_outside": self._allowed(), "broken": "raise"}
            pairs = AudioVisualPairs(self._list_of(corruption), self._labels_csv, **{**self._options, **own})
            positions = {name: i for i, name in enumerate(pairs.video_ids)}
            if missing := [name for name in self._pairs.video_ids if name not in positions]:
                raise ValueError(
                    f"Expected {self._list_of(corruption)} to have every sample of the clean list, but {len(missing)} "
                    f"are missing, the first of them {missing[0]!r}."
                )
            self._corrupted[corruption] = pairs, positions
        return self._corrupted[corruption]

    def _allowed(self) -> AllowOutside:
        """Return the folders that paths in `corrupted_lists` may lead to: the originals', and the copies'."""
        if self._options["allow_outside"]:
            return True
        lists = Path(self._corrupted_lists or "")
        return [self._options["root"], *([lists.parent] if lists.name == "json" else [])]


class Kinetics50C(_Published):
    """Kinetics50-C: 2,466 pairs of 50 classes; batches of 8, as its authors adapt."""

    name = "Kinetics50-C"
    stem = "ks50"
    batch_size = 8
    recipes: ClassVar[Mapping[Sensor, str]] = {"audio": "kinetics50-audio", "image": "kinetics50-video"}

    def published(self) -> Published:
        return {
            ("iid", "image"): {
                **_by_read(Source=59.9, MMTTA=54.5, Tent=59.4, EATA=60.1, SAR=59.8, READ=62.5),
                **_by_brimpr(60.5, 60.1, 61.5, 61.0, 63.4, 64.1, 63.9, 65.9),
            },
            ("iid", "audio"): {
                **_by_read(Source=69.3, MMTTA=69.4, Tent=69.6, EATA=69.4, SAR=69.1, READ=71.1),
                **_by_brimpr(69.4, 70.2, 70.5, 70.3, 71.5, 71.4, 71.9, 72.0),
            },
        }


class VGGSoundC(_Published):
    """VGGSound-C: 14,046 pairs of 309 classes; batches of 32, as its authors adapt."""

    name = "VGGSound-C"
    stem = "vgg"
    batch_size = 32
    recipes: ClassVar[Mapping[Sensor, str]] = {"audio": "vggsound-audio", "image": "vggsound-video"}

    def published(self) -> Published:
        return {
            ("iid", "image"): {
                **_by_read(Source=56.0, MMTTA=32.1, Tent=55.8, EATA=56.2, SAR=56.1, READ=56.9),
                **_by_brimpr(56.2, 56.1, 56.4, 56.0, 56.7, 52.4, 57.3, 57.7),
            },
            ("iid", "audio"): {
                **_by_read(Source=25.6, MMTTA=7.6, Tent=4.5, EATA=29.4, SAR=20.1, READ=32.4),
                **_by_brimpr(25.0, 4.6, 32.7, 17.1, 32.4, 29.5, 33.2, 36.5),
            },
        }


def _made_beforehand(lists: Path) -> dict[str, str]:
    """Return the origins of noise and frost, from the records that ``abpem corrupt`` wrote beside its lists."""
    found = [read_json(path) for path in sorted(Path(lists).glob("*/*/severity_*.meta.json"))]
    records = [record for record in found if isinstance(record, dict)]
    said = {name: sorted({str(record[name]) for record in records if record.get(name)}) for name in ("noise", "frost")}
    return {name: ", ".join(origins) for name, origins in said.items() if origins}


def _by_read(**accuracies: float) -> dict[str, float]:
    return {f"{method}, READ's paper".replace("MMTTA", "MM-TTA"): value for method, value in accuracies.items()}


def _by_brimpr(*accuracies: float) -> dict[str, float]:
    """Label accuracies that BriMPR's authors measured, at batch size 64."""
    methods = ("Source", "Tent", "EATA", "SAR", "READ", "ABPEM", "SuMi", "BriMPR")
    return {f"{method}, BriMPR's paper": value for method, value in zip(methods, accuracies, strict=True)}
