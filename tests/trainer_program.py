"""A program that adapts in a Trainer with several processes, as its users' programs do; for test_distributed_trainer.

Each process leaves what it predicted and learnt in a file of its own, {out}/{run}-{rank}.pt.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_abpem import ABPEM
from tests.toy import CLASSES, MODALITIES, PAPER, Toy, batches

Batch = tuple[Tensor, ...]
SAMPLES, BATCH_SIZE = 17, 4
# By process and dataloader, the sizes of its batches. Their sum over processes is even, also under the limit: Lightning
# divides by half of it, rounded down.
UNEVEN = (((3, 2, 2, 1, 3), (2, 3)), ((2, 3), (1, 3, 1, 2)))
LIMIT = 3
EMPTY_FOR_BOTH = (((3, 2, 2), (), (2, 3)), ((2, 3), (), (3,)))
EMPTY = {
    "last": (((3, 2, 2), (2, 3)), ((2, 4), ())),
    "first": (((), (2, 3)), ((2, 4), (1, 3, 2))),
    "middle": (((3, 2), (), (2,)), ((2,), (4, 2), (2, 3))),
    "all": (((3, 2), (2,)), ((), ())),
    "only": (((3, 2),), ((),)),
}
SCENARIOS = ("sampled", "predicted", "streams", "empty", "failing", "unreadable", "reported", "unreported")
EMPTY_NAMES = {"global": tuple(EMPTY), "local": ("first", "only")}


class Model(Toy):
    """The toy in float64, with metrics of its own, one for each dataloader."""

    def __init__(self, loaders: int = 1, fails_on: int | None = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.accuracy = nn.ModuleList(MulticlassAccuracy(CLASSES, average="micro") for _ in range(loaders))
        self.fails_on = fails_on
        self.double()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 2 and self.global_rank == self.fails_on:
            raise ValueError("a sample that cannot be read")
        logits = self(*batch[:2])
        own: Any = self.accuracy[dataloader_idx]
        own(logits, batch[2])
        self.log("accuracy", own, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(logits))
        self.log("largest", logits.amax(1).mean(), on_epoch=True, sync_dist=True, batch_size=len(logits))
        return logits

    validation_step = test_step


class Keep(Callback):
    """Writes what this process saw: predictions, adapted weights, figures, and the weights afterwards."""

    def __init__(self, abpem: ABPEM, out: Path, run: str) -> None:
        self.abpem, self.out, self.run = abpem, out, run
        self.outputs: list[tuple[int, Tensor]] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.outputs.append((dataloader_idx, outputs.clone()))

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        seen = {
            "outputs": self.outputs,
            "adapted": dict(self.abpem.state_dict()["weights"]["params"]),
            "restored": weights_of(pl_module),
            "updates": self.abpem.updates,
            "averages": self.abpem.averages,
        }
        torch.save(seen, self.out / f"{self.run}-{trainer.global_rank}.pt")


class Write(BasePredictionWriter):
    """Writes predictions of each batch and, at the end, of all."""

    def __init__(self, out: Path) -> None:
        super().__init__("batch_and_epoch")
        self.out = out

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        torch.save((prediction, batch_indices), self.out / f"batch-{batch_idx}-{trainer.global_rank}.pt")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        dist.barrier()  # as users do who merge the files
        torch.save((predictions, batch_indices), self.out / f"epoch-{trainer.global_rank}.pt")


class Stream(IterableDataset[Batch]):
    """Batches of the sizes of this process."""

    def __init__(self, sizes: Sequence[Sequence[int]], loader: int) -> None:
        self.sizes, self.loader = sizes, loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(stream(self.sizes[dist.get_rank()], self.loader, dist.get_rank()))


class Unreadable(Dataset[Batch]):
    """Samples of which the second process can read none."""

    def __init__(self, count: int) -> None:
        self.samples = samples(count)

    def __len__(self) -> int:
        return len(self.samples[0])

    def __getitem__(self, index: int) -> Batch:
        if dist.get_rank() == 1:
            raise ValueError("a sample that cannot be read")
        return tuple(x[index] for x in self.samples)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.sizes[dist.get_rank()])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def samples(count: int, seed: int = 10) -> Batch:
    audio, video = batches(1, count, seed)[0]
    return audio.double(), video.double(), torch.arange(count) % CLASSES


def stream(sizes: Sequence[int], loader: int, rank: int) -> list[Batch]:
    return [samples(size, 100 + 50 * loader + 20 * rank + i) for i, size in enumerate(sizes)]


def adapting(**options: Any) -> ABPEM:
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return ABPEM("fusion.*.attn", MODALITIES, **{"optimizer": optimizer, **PAPER, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(SAMPLES)), batch_size=BATCH_SIZE)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=list(callbacks), **{**silent, **options})


class Program:
    """The scenarios, each with the Trainer that the command line asks for."""

    def __init__(self, out: Path, strategy: str, devices: int, nodes: int) -> None:
        self.out = out
        start: Any = {"ddp": "popen", "ddp_spawn": "spawn"}[strategy]
        self.strategy = partial(DDPStrategy, start_method=start, timeout=timedelta(seconds=150))
        self.places = {"devices": devices, "num_nodes": nodes}

    def trainer(self, run: str, *callbacks: Callback, method: Any = None, **options: Any) -> Trainer:
        abpem = adapting(**(method or {}))
        own = (abpem, Keep(abpem, self.out, run), *callbacks)
        return trainer(*own, strategy=self.strategy(), **self.places, **options)

    def sampled(self) -> None:
        """Lightning's own sampler deals the samples."""
        runner = self.trainer("test", method={"memory_batches": 3})
        self.save_result("test", runner, runner.test(Model(), loader(), verbose=False))
        runner = self.trainer("validate", method={"stages": ("validate",)})
        self.save_result("validate", runner, runner.validate(Model(), loader(), verbose=False))

    def predicted(self) -> None:
        runner = self.trainer("test")
        self.save_result("test", runner, runner.test(Model(), loader(), verbose=False))
        self.trainer("predict", Write(self.out)).predict(Model(), loader(), return_predictions=False)

    def streams(self) -> None:
        """The user's own dealing of the samples, in several dataloaders."""
        self.stream("unsized", Stream, UNEVEN)
        self.stream("sized", SizedStream, UNEVEN)
        self.stream("limited", Stream, UNEVEN, limit_test_batches=LIMIT)
        self.stream("reset", Stream, UNEVEN, method={"reset": "dataloader"})
        self.stream("local", Stream, UNEVEN, method={"sync": "local"})
        self.stream("empty for both", Stream, EMPTY_FOR_BOTH)

    def stream(self, run: str, kind: type[Stream], sizes: Any, **options: Any) -> None:
        loaders = [DataLoader(kind([own[i] for own in sizes], i), batch_size=None) for i in range(len(sizes[0]))]
        runner = self.trainer(run, use_distributed_sampler=False, **options)
        model = Model(len(loaders))
        model.allow_zero_length_dataloader_with_multiple_devices = True
        self.save_result(run, runner, runner.test(model, loaders, verbose=False))

    def empty(self) -> None:
        """A process has no batch of a dataloader of which the other has some: known by its length, or not."""
        for sync, names in EMPTY_NAMES.items():
            for name in names:
                for kind in (Stream, SizedStream):
                    run = f"{name}, {kind.__name__}, {sync}"
                    try:
                        self.stream(run, kind, EMPTY[name], method={"sync": sync})
                    except RuntimeError as error:
                        torch.save(str(error), self.out / f"{run}-error-{dist.get_rank()}.pt")

    def failing(self) -> None:
        """The second process fails at its third of five batches."""
        self.fail(Model(fails_on=1), DataLoader(TensorDataset(*samples(20)), batch_size=2))

    def reported(self) -> None:
        """Each process has the name of a report; the first writes it, of all batches."""
        method = {"report": self.out / "report.html", "monitor": "source", "reset": "dataloader"}
        self.stream("reported", Stream, UNEVEN, method=method)
        local = {**method, "report": self.out / "local.html", "reset": "never", "sync": "local"}
        self.stream("local", Stream, UNEVEN, method=local)

    def unreported(self) -> None:
        """The first process finds that the report's folder is missing; the others stop with it."""
        runner = self.trainer("unreported", method={"report": self.out / "none" / "report.html"})
        try:
            runner.test(Model(), loader(), verbose=False)
        except ValueError as error:
            torch.save(str(error), self.out / f"unreported-{runner.global_rank}.pt")

    def unreadable(self) -> None:
        """The second process fails at its first sample, before its first batch."""
        self.fail(Model(), DataLoader(Unreadable(20), batch_size=2))

    def fail(self, model: Model, loader: DataLoader[Any]) -> None:
        runner = self.trainer("failing")
        try:
            runner.test(model, loader, verbose=False)
        except BaseException as error:
            seen = {"error": str(error), "restored": weights_of(model)}
            torch.save(seen, self.out / f"failing-{runner.global_rank}.pt")
            raise

    def save_result(self, run: str, runner: Trainer, result: Any) -> None:
        torch.save(result, self.out / f"{run}-result-{runner.global_rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", choices=["ddp", "ddp_spawn"], default="ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    scenario = options.pop("scenario")
    getattr(Program(**options), scenario)()


if __name__ == "__main__":
    main()
