"""The experiment that this package grew from: are BatchNorm's running averages the statistics of its inputs?

It sends 2000 batches of 20 random 1x1 images with 3 channels through ``nn.BatchNorm2d(3)`` and compares the buffers
with the moments of all inputs. As published it stacked all 40 000 inputs; the tracker gets the same digits from a state
whose size does not depend on the number of batches.
"""

from __future__ import annotations

import torch
from tabulate import tabulate
from torch import nn

from lightning_bnmonitor import BatchNormTracker, LayerReport

PUBLISHED = {
    "mean of all inputs": [0.0039, 0.0015, 0.0095],
    "running_mean": [-0.0628, 0.0649, 0.0600],
    "variance of all inputs": [1.0029, 1.0026, 0.9947],
    "running_var": [1.0812, 1.0318, 1.0721],
    "mean |difference| of means": [0.0602],
    "mean |difference| of variances": [0.0616],
}


def run(num_batches: int = 2000) -> LayerReport:
    """The experiment, watched by the engine behind ``BatchNormMonitor``."""
    torch.manual_seed(21)
    y = torch.randn(20, 3, 1, 1)
    layer = nn.BatchNorm2d(3)
    with BatchNormTracker(layer) as tracker:
        for _ in range(num_batches):
            layer(torch.randn_like(y))
    return tracker.report().worst()[0]


def measured(report: LayerReport) -> dict[str, list[float]]:
    """Our values for the published ones."""
    return {
        "mean of all inputs": report.population_mean.tolist(),
        "running_mean": report.running_mean.tolist(),
        "variance of all inputs": report.population_var.tolist(),
        "running_var": report.running_var.tolist(),
        "mean |difference| of means": [float((report.running_mean - report.population_mean).abs().mean())],
        "mean |difference| of variances": [float((report.running_var - report.population_var).abs().mean())],
    }


def main() -> None:
    """Print the published digits beside ours; exit with an error if any differs."""
    report = run()
    ours = measured(report)
    rows = [
        [
            name,
            _digits(published),
            _digits(ours[name]),
            "same" if _digits(published) == _digits(ours[name]) else "DIFFERS",
        ]
        for name, published in PUBLISHED.items()
    ]
    print(tabulate(rows, headers=["", "published", "lightning_bnmonitor", ""], disable_numparse=True))
    print(f"\n{report.num_batches} batches, {report.num_samples} values per channel; {report!r}")
    z_mean, z_var = report.evidence["z_mean"], report.evidence["z_var"]
    print(f"RMS z of the running mean {z_mean:.2f}, of the running variance {z_var:.2f}.")
    print(report.explanation)
    if any(row[-1] != "same" for row in rows):
        raise SystemExit("A digit differs from the published one.")


def _digits(values: list[float]) -> str:
    return " ".join(f"{value:7.4f}" for value in values)


if __name__ == "__main__":
    main()
