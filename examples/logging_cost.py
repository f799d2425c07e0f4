"""What logging costs: disk and memory over many windows, and CPU time at the end of a window.

Small models of many BatchNorm layers are trained by a real Trainer with a TensorBoardLogger, each in a process of its
own. Each fourth layer has ``momentum=0.001``, so that there are verdicts to show and to explain. "Whatever time it
takes" is what long epochs do: in short ones the heatmap is drawn, and the history written, as often as takes 1 % of the
time. Neither is made anew until there are an eighth, or a sixteenth, more windows.

CPU time is that of the whole process, TensorBoard's writer thread included: its queue is flushed within each
measurement, and Python's garbage is collected before (a full collection takes as long, and comes when it pleases). It
counts all that ``BatchNormMonitor`` does at the end of a window but for the report itself, which
``examples/overhead.py`` measures. The work to compare it with is a ResNet-18 for images of 32 x 32: a training step
is measured, and an epoch extrapolated from it.

Resident memory is read after the same, and after unused memory was given back to the system.
Needs Linux (``/proc``) and glibc. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tabulate import tabulate
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker
from lightning_bnmonitor.callbacks import dashboard, scalars

MEGABYTE = 1e6
MAX_EVENTS, MAX_GROWTH = 20 * MEGABYTE, 4 * MEGABYTE  # bytes
MAX_SHARE = 0.02  # of a training epoch
NUM_IMAGES, BATCH_SIZE = 50_000, 32
RESNET_LAYERS = 20
PARTS = ("scalars", "report", "heatmap", "events", "rest")


@dataclass(frozen=True)
class Run:
    """A training to measure. ``per_layer`` is the monitor's; ``"none"`` trains without a monitor."""

    name: str
    num_layers: int
    per_layer: bool | str = "auto"
    is_always_drawn: bool = False
    every_n_train_batches: int | None = None


@dataclass(frozen=True)
class Costs:
    """What a training took: bytes, and CPU seconds of each part of each window's end."""

    events: int
    num_images: int
    images: int
    memory_early: int
    memory_late: int
    window_ends: list[dict[str, float]]

    @property
    def growth(self) -> int:
        """Of the resident memory, between a fifth of the windows and all of them."""
        return self.memory_late - self.memory_early


def train(run: Run, windows: int, batches: int) -> Costs:
    """Train for so many windows, of so many batches unless the run says otherwise; for a process of its own."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        logger = TensorBoardLogger(folder)
        memory = Memory(windows, run.every_n_train_batches or batches)
        callbacks: list[Callback] = [memory]
        if run.per_layer != "none":
            stopwatch.attach(logger)
            if run.is_always_drawn:
                dashboard._SHARE = math.inf
            monitor = BatchNormMonitor(per_layer=run.per_layer, every_n_train_batches=run.every_n_train_batches)
            callbacks.insert(0, monitor)
        trainer = Trainer(
            max_steps=windows * (run.every_n_train_batches or batches),
            max_epochs=-1,
            accelerator="cpu",
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        data = TensorDataset(torch.randn(batches * BATCH_SIZE, 8))
        trainer.fit(Chain(run.num_layers), DataLoader(data, BATCH_SIZE, shuffle=True))
        logger.experiment.close()
        paths = list(Path(folder).rglob("events.out.tfevents.*"))
        images = [size for path in paths for size in image_sizes(path)]
        events = sum(path.stat().st_size for path in paths)
    return Costs(events, len(images), sum(images), *memory.bytes, stopwatch.window_ends)


class Chain(LightningModule):
    """Many BatchNorm layers, one after the other, with residual connections."""

    def __init__(self, num_layers: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, momentum=0.1 if index % 4 else 0.001))
            for index in range(num_layers)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Any loss: it is not the training that is measured."""
        (x,) = batch
        for block in self.blocks:
            x = (x + block(x).relu()) * 0.8
        loss = (x - 1).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, fused=True)


class Memory(Callback):
    """Resident memory after a fifth of the windows, and after all of them."""

    def __init__(self, windows: int, batches: int) -> None:
        self._when = (max(windows // 5, 1) * batches, windows * batches)
        self._num_batches = 0
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read it, without what is garbage or yet to be written."""
        self._num_batches += 1
        if self._num_batches in self._when:
            trainer.logger.experiment.flush()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what has been freed, glibc keeps as it pleases: -15 to +10 MB
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes += [pages * os.sysconf("SC_PAGESIZE")] * self._when.count(self._num_batches)


class Stopwatch:
    """CPU seconds of what the monitor does at the end of a window, by part, each without the parts inside it."""

    def __init__(self) -> None:
        self.window_ends: list[dict[str, float]] = []
        self._inside: list[float] = []  # seconds of parts inside those that have begun

    def attach(self, logger: TensorBoardLogger) -> None:
        """Replace functions by those that are measured, for the rest of the process."""
        for owner, name, part in (
            (scalars, "log_scalars", "scalars"),
            (dashboard.Dashboard, "show", "report"),
            (dashboard.Dashboard, "tell", "report"),
            (dashboard.Dashboard, "_draw", "heatmap"),
            (dashboard.Dashboard, "_write_events", "events"),
            (BatchNormMonitor, "_end_window", "rest"),
        ):
            setattr(owner, name, self._measured(getattr(owner, name), part, logger))
        close = BatchNormTracker.close
        gc.collect()
        gc.freeze()  # what has been imported: else each collection takes half a second

        def begin(tracker: BatchNormTracker, *args: Any, **kwargs: Any) -> Any:
            if not self._inside:  # a window begins: this one has been closed
                return close(tracker, *args, **kwargs)
            self.window_ends.append(defaultdict(float))
            with self._part("statistics"):
                report = close(tracker, *args, **kwargs)
            with self._part("garbage"):
                gc.collect()
            return report

        BatchNormTracker.close = begin

    def _measured(self, function: Callable[..., Any], part: str, logger: TensorBoardLogger) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._part(part):
                result = function(*args, **kwargs)
                logger.experiment.flush()
            return result

        return measured

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        began = time.process_time()
        yield
        seconds = time.process_time() - began
        own = seconds - self._inside.pop()
        if self.window_ends:
            self.window_ends[-1][name] += own
        if self._inside:
            self._inside[-1] += seconds


def image_sizes(path: Path) -> list[int]:
    """Bytes of each image in a file of events."""
    events = map(Event.FromString, RawEventFileLoader(str(path)).Load())
    return [
        len(value.image.encoded_image_string)
        for event in events
        for value in event.summary.value
        if value.HasField("image")
    ]


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )
        projection = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if before == width else projection

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, width, H / stride, W / stride)."""
        return (self.body(x) + self.shortcut(x)).relu()


def resnet18(num_classes: int = 10) -> nn.Sequential:
    """ResNet-18 as it is used for images of 32 x 32: a stem of 3 x 3 without pooling."""
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for a, b, stride in widths for block in (Residual(a, b, stride), Residual(b, b, 1))]
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def training_step_seconds(model: nn.Module, steps: int) -> float:
    """Median CPU time of a training step, after one that is not counted."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(10, (BATCH_SIZE,))
    seconds = []
    for _ in range(1 + steps):
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[1:])


def storage_table(runs: dict[Run, Costs]) -> str:
    """Disk and memory."""
    rows = [
        [
            run.name,
            run.num_layers,
            costs.events / MEGABYTE,
            costs.num_images,
            costs.images / MEGABYTE,
            costs.memory_late / MEGABYTE,
            costs.growth / MEGABYTE,
        ]
        for run, costs in runs.items()
    ]
    headers = ["run", "layers", "events, MB", "images", "images, MB", "resident, MB", "growth, MB"]
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", "", ".2f", "", ".2f", ".0f", ".1f"))


def time_table(window_ends: dict[tuple[int, str], dict[str, float]], epoch: float) -> str:
    """CPU time by part, and its share of an epoch."""
    rows = []
    for (num_layers, which), seconds in window_ends.items():
        total = logging_seconds(seconds)
        cells = [1000 * seconds[part] for part in PARTS]
        rows.append([num_layers, which, *cells, 1000 * total, 100 * total / epoch, total / MAX_SHARE])
    headers = [
        "layers",
        "window's end",
        *(f"{part}, ms" for part in PARTS),
        "sum, ms",
        "% of an epoch",
        "2 % of an epoch of, s",
    ]
    digits = ("", "", *[".1f"] * len(PARTS), ".0f", ".4f", ".1f")
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=digits)


def logging_seconds(window_end: dict[str, float]) -> float:
    """CPU time of all parts that are logging."""
    return sum(window_end[part] for part in PARTS)


def main() -> int:
    """Print the tables, and whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200, help="BatchNorm layers (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=50, help="windows in a training (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="batches in a window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of ResNet-18 that are timed (default: %(default)s)")
    args = parser.parse_args()
    if args.windows < 2:
        parser.error(f"--windows must be at least 2, the first being counted apart, got {args.windows}")

    unmonitored = Run("no monitor", args.layers, "none")
    always = Run("per_layer=True, whatever time it takes", args.layers, True, is_always_drawn=True)
    always_resnet = Run("per_layer=True, whatever time it takes", RESNET_LAYERS, True, is_always_drawn=True)
    runs = [unmonitored, Run("default", args.layers), always, always_resnet]
    model = resnet18()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    step = training_step_seconds(model, args.steps)
    epoch = step * NUM_IMAGES / BATCH_SIZE
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measured = pool.map(partial(train, windows=args.windows, batches=args.batches), runs, chunksize=1)
    costs = dict(zip(runs, measured, strict=True))
    print(
        f"{args.windows} windows of {args.batches} batches; growth is that after window {max(args.windows // 5, 1)}.\n"
    )
    print(storage_table(costs))

    window_ends: dict[tuple[int, str], dict[str, float]] = {}
    for run in (always_resnet, always):
        first, *others = costs[run].window_ends
        window_ends[run.num_layers, "the first"] = first
        window_ends[run.num_layers, "median"] = {part: statistics.median(end[part] for end in others) for part in PARTS}
        window_ends[run.num_layers, "the longest of the others"] = max(others, key=logging_seconds)
    print(
        f"\nA training step of ResNet-18 ({parameters / 1e6:.1f} M parameters, {BATCH_SIZE} images of 32 x 32) was "
        f"measured to take {step:.2f} s of CPU time\n(median of {args.steps}, one thread). Extrapolated: an epoch of "
        f"{NUM_IMAGES} images is {NUM_IMAGES / BATCH_SIZE:.1f} steps, {epoch:.0f} s.\n"
    )
    print(time_table(window_ends, epoch))

    monitored = [each for run, each in costs.items() if run is not unmonitored]
    events, growth = max(each.events for each in monitored), max(each.growth for each in monitored)
    share = max(map(logging_seconds, window_ends.values())) / epoch
    verdicts = [
        (events < MAX_EVENTS, f"events of at most {events / MEGABYTE:.1f} MB, below {MAX_EVENTS / MEGABYTE:.0f} MB"),
        (
            growth < MAX_GROWTH,
            f"memory grows by at most {growth / MEGABYTE:.1f} MB, below {MAX_GROWTH / MEGABYTE:.0f} MB "
            f"(without monitor {costs[unmonitored].growth / MEGABYTE:.1f})",
        ),
        (share < MAX_SHARE, f"logging takes at most {share:.4%} of an epoch, below {MAX_SHARE:.0%}"),
    ]
    print()
    for is_met, target in verdicts:
        print(f"{'Met' if is_met else 'MISSED'}: {target}.")
    return 0 if all(is_met for is_met, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
