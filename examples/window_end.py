"""What the end of a window costs: CPU time of everything between the last batch and the report, logging apart.

The layers are of unequal width: verdicts, noise floors and distances of all their channels are computed at once.
Python's garbage is collected before each measurement: a full collection takes as long as the end of a window does, and
comes when it pleases.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time

import torch
from tabulate import tabulate
from torch import nn

from lightning_bnmonitor import BatchNormTracker


def widths_of(num_layers: int, num_channels: int, seed: int = 0) -> list[int]:
    """Widths of so many layers, unequal, that add up to so many channels."""
    cuts = sorted(random.Random(seed).sample(range(1, num_channels), num_layers - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, num_channels], strict=True)]


def window_ends(widths: list[int], num_batches: int, repeats: int) -> list[float]:
    """CPU seconds of each of several window ends, after so many batches each."""
    layers = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
    seconds = []
    with BatchNormTracker(layers) as tracker:
        for _ in range(repeats):
            tracker.reset()
            for _ in range(num_batches):
                for layer in layers:
                    layer(torch.randn(8, layer.num_features))
            tracker.flush()
            gc.collect()
            start = time.process_time()
            tracker.close()
            seconds.append(time.process_time() - start)
    return seconds


def main() -> None:
    """Print a table of the costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="windows of each kind (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for num_layers, num_channels, num_batches in (
        (10, 1000, 40),
        (100, 10_000, 40),
        (1000, 100_000, 10),
        (1000, 100_000, 40),
    ):
        seconds = window_ends(widths_of(num_layers, num_channels), num_batches, args.repeats)
        milliseconds = [1000 * s for s in seconds]
        rows.append([num_layers, num_channels, num_batches, statistics.median(milliseconds), max(milliseconds)])
    headers = ["layers", "channels", "batches", "CPU ms, median", "CPU ms, largest"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".0f"))


if __name__ == "__main__":
    main()
