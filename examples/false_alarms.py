"""How often a healthy layer is said to need attention, and a sick one not, in many small trainings from their start.

Two networks, several seeds, momenta, batch sizes and optimizers at ordinary learning rates. Every layer in every epoch
counts, also the first ones, in which the weights move fast. What is true is found by a pass over all training data with
the weights that the epoch ended with, apart from the monitor's own estimate of the same.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lightning_bnmonitor import BatchNormTracker, LayerReport
from lightning_bnmonitor.statistics.divergence import act_rmse

NUM_IMAGES, SIZE, CLASSES = 2048, 12, 4
HEALTHY, SICK = 0.05, 0.15  # half and one and a half of what is worth a warning
BOUNDS = (0.0, 0.05, 0.075, 0.1, 0.125, 0.15, math.inf)


class Setting(NamedTuple):
    """One way to train."""

    network: str
    optimizer: str
    batch_size: int
    momentum: float | None
    seed: int


def convolutional() -> nn.Module:
    """Four convolutions with BatchNorm, of images (N, 1, H, W)."""
    widths = [1, 16, 16, 32, 32]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, s in zip(widths[:-1], widths[1:], [1, 2, 1, 2], strict=True)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def perceptron() -> nn.Module:
    """Three linear layers with BatchNorm, of images (N, 1, H, W)."""
    widths = [SIZE * SIZE, 64, 64, 64]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutional": convolutional, "perceptron": perceptron}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}


def images(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes of random phase in one of four orientations, (N, 1, H, W), and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (NUM_IMAGES,), generator=generator)
    angle, phase = labels * torch.pi / CLASSES, 6.28 * torch.rand(NUM_IMAGES, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.sin(angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y + phase)
    noise = torch.randn(NUM_IMAGES, 1, SIZE, SIZE, generator=generator)
    return 0.5 + 0.3 * waves[:, None] + 0.3 * noise, labels


class Window(NamedTuple):
    """A layer in an epoch."""

    setting: Setting
    epoch: int
    layer: LayerReport
    error: float
    """Its eval error against the exact statistics of all training data, with the weights that the epoch ended with."""


def train(setting: Setting, epochs: int) -> Iterator[Window]:
    """All layers in all epochs."""
    torch.manual_seed(setting.seed)
    x, y = images(setting.seed)
    model = NETWORKS[setting.network]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = setting.momentum
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters())
    with BatchNormTracker(model) as tracker:
        for epoch in range(epochs):
            tracker.reset()
            for indices in torch.randperm(NUM_IMAGES).split(setting.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
                optimizer.step()
            report, errors = tracker.close(), true_errors(model, x, setting.batch_size)
            yield from (Window(setting, epoch, layer, errors[name]) for name, layer in report.items())


@torch.no_grad()
def true_errors(model: nn.Module, x: Tensor, batch_size: int) -> dict[str, float]:
    """RMS error of each layer's normalised activation in eval mode, from a pass over all data at fixed weights."""
    twin = copy.deepcopy(model)
    with BatchNormTracker(twin, capture="pass") as tracker:
        for batch in x.split(batch_size):
            twin(batch)
    errors = {}
    for name, exact in tracker.report().items():
        layer = model.get_submodule(name)
        running = layer.running_mean.double(), layer.running_var.double()
        error = act_rmse(exact.population_mean, exact.population_var, *running, exact.eps)
        errors[name] = float(error.square().mean().sqrt())
    return errors


def main() -> None:
    """Print, by the exact error, how many layers were said to need attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    settings = itertools.starmap(
        Setting, itertools.product(NETWORKS, OPTIMIZERS, (16, 32, 64), (0.05, 0.1, 0.2), range(args.seeds))
    )
    windows = [window for setting in settings for window in train(setting, args.epochs)]
    rows = []
    for low, high in itertools.pairwise(BOUNDS):
        here = [window.layer for window in windows if low <= window.error < high]
        alarms = sum(layer.needs_attention for layer in here)
        verdicts = Counter(layer.verdict for layer in here).most_common()
        rows.append([f"{low:.3f} to {high:.3f}", len(here), alarms, ", ".join(f"{n} {name}" for name, n in verdicts)])
    print(tabulate(rows, headers=["exact error", "layer-windows", "need attention", "verdicts"], tablefmt="github"))
    healthy = [window for window in windows if window.error < HEALTHY]
    sick = [window for window in windows if window.error >= SICK]
    false_alarms = [window for window in healthy if window.layer.needs_attention]
    missed = [window for window in sick if not window.layer.needs_attention]
    print(
        f"\n{len(false_alarms)} of {len(healthy)} healthy layer-windows (exact error below {HEALTHY}) were said to "
        f"need attention, {len(sick) - len(missed)} of {len(sick)} sick ones ({SICK} or more)."
    )
    for window in [*false_alarms, *missed]:
        print(f"{window.setting}, epoch {window.epoch}, exact error {window.error:.3f}: {window.layer.explanation}")
    if false_alarms or missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
