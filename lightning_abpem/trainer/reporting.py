"""The report of a run: what is gathered while it lasts, and two files at its end."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.describe import options_of, package_version
from lightning_abpem.engine.ranks import process
from lightning_abpem.engine.recording import Recorder
from lightning_abpem.engine.settings import Settings
from lightning_abpem.modules.parameters import device_of
from lightning_abpem.report.charts import check_matplotlib
from lightning_abpem.report.page import run_page
from lightning_abpem.report.record import FORMAT, VERSION, check_writable, write_text
from lightning_abpem.trainer.options import Page

__all__ = ["RunReport", "report_path", "reported"]

log = logging.getLogger(__name__)

_MOST = 2000  # characters of an option or an error


def report_path(report: Page | None) -> Path | None:
    """Return the option `report` as a path; None without one.

    Raises:
        ImportError: there is no matplotlib, with the way to get it.
    """
    if report is None:
        return None
    check_matplotlib()
    return Path(report).absolute()


class RunReport:
    """The report of one run. With several processes the first one gathers and writes; the others do nothing.

    Args:
        path: of the page; the record gets the same name with .json.
        settings: the engine's.
        stage: "test", "predict", "validate" or "attach".

    Attributes:
        recorder: from `record` on; None in processes that do not write.
    """

    def __init__(self, path: Path, settings: Settings, stage: str) -> None:
        self.path, self._settings, self._stage = path, settings, stage
        self.recorder: Recorder | None = None
        self._is_written = False

    def problem(self) -> str | None:
        """Return why the files cannot be written, None if they can; of processes that do not write, None."""
        if process()[0]:
            return None
        try:
            check_writable(self.path)
            check_writable(self.path.with_suffix(".json"))
        except ValueError as error:
            return str(error)
        return None

    def open(self, model: nn.Module) -> Recorder | None:
        """Return what gathers, for an `attach` that begins.

        Raises:
            ValueError: the files cannot be written.
        """
        if problem := self.problem():
            raise ValueError(problem)
        return self.record(device_of(model.parameters()))

    def record(self, device: torch.device) -> Recorder | None:
        """Return what gathers, for an adaptation that begins; None in processes that do not write."""
        if process()[0] == 0:
            self.recorder = Recorder(device)
        return self.recorder

    def see_blocks(self, adaptation: Adaptation | None) -> None:
        """Look at the fusion's attention with the weights that the run has come to."""
        if self.recorder is not None and adaptation is not None:
            self.recorder.see_blocks(adaptation)

    def write(
        self,
        updates: int,
        skipped_for: Mapping[str, int],
        left_out: int,
        metrics: Mapping[str, object],
        error: BaseException | None = None,
    ) -> None:
        """Write the record and the page, once. What goes wrong is logged: no run is lost for it.

        Args:
            updates: steps taken.
            skipped_for: steps not taken, by reason.
            left_out: samples left out of steps.
            metrics: what the user logged, scalars by name.
            error: what ended the run early.
        """
        if self.recorder is None or self._is_written:
            return
        self._is_written = True
        try:
            gathered = self.recorder.result()
            skipped = sum(skipped_for.values())
            gathered["counts"] |= {"updates": updates, "skipped": skipped, "left_out": left_out}
            own = f"{self._settings.method.name.lower()}/"
            record = {
                "format": FORMAT,
                "version": VERSION,
                "run": self._run(error),
                "versions": _versions(),
                "options": {name: _words(str(value)) for name, value in options_of(self._settings).items()},
                "skipped": dict(skipped_for),
                "metrics": {_words(name): _plain(x) for name, x in metrics.items() if not name.startswith(own)},
                **gathered,
            }
            write_text(self.path.with_suffix(".json"), json.dumps(record, allow_nan=False) + "\n")
            write_text(self.path, run_page(record))
            log.info("The report is in '%s'.", self.path)
        except Exception as problem:
            log.warning("The report '%s' is not written: %r", self.path, problem)

    def _run(self, error: BaseException | None) -> dict[str, Any]:
        status = "finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        return {
            "method": self._settings.method.name,
            "stage": self._stage,
            "status": status,
            "error": None if error is None else _words(f"{type(error).__name__}: {error}"),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processes": process()[1],
            "sync": self._settings.sync,
        }


@contextmanager
def reported(report: RunReport | None, write: Callable[..., None]) -> Iterator[None]:
    """Write the report of an `attach` when the block ends, also by an error.

    Args:
        report: None for none.
        write: called with the report, no metrics of the user's, and the error.
    """
    try:
        yield
    except BaseException as error:
        write(report, {}, error)
        raise
    write(report, {})


def _versions() -> dict[str, str]:
    names = ("lightning_abpem", "torch", "lightning", "torchmetrics", "matplotlib")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def _words(words: str) -> str:
    """Return words of limited length that a file in UTF-8 can hold."""
    return words[:_MOST].encode("utf-8", "replace").decode()


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
