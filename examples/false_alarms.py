"""How often a healthy layer is said to need attention, and a sick one not, in many small trainings from their start.

Three networks (of images, flattened images, signals), SGD and Adam up to the edge of what still learns, momenta from
0.01 to 0.9, several batch sizes, and data in four orders. Every layer in every epoch counts, also the first ones, in
which the weights move fast. What is true is found apart from the monitor, with the weights that the epoch ended with:
how far off the running statistics are, by a pass over all training data, and what that costs: the loss in eval mode
against that with statistics which ``torch.optim.swa_utils.update_bn`` has recomputed; where data come in an order, how
much more the epoch's own batches vary than batches that are drawn at random.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from lightning_bnmonitor import BatchNormTracker, LayerReport
from lightning_bnmonitor.statistics.divergence import act_rmse

NUM_IMAGES, SIZE, CLASSES = 2048, 12, 4
HEALTHY, SICK = 0.05, 0.15  # half and one and a half of what is worth a warning
COSTS = 1.1  # times the loss with recomputed statistics that of a sick model is in eval mode, and more by 0.02
VARYING = 0.05  # share of the variance by which batches vary more than random ones: 0.22 standard deviations
BOUNDS = (0.0, 0.05, 0.075, 0.1, 0.125, 0.15, math.inf)
TO_SHUFFLE = ("ordered-batches", "grouped-batches")
MAX_FALSE, MAX_MISSED = 0.01, 0.03


class Setting(NamedTuple):
    """One way to train."""

    network: str
    optimizer: str
    lr: float
    batch_size: int
    momentum: float
    order: str
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


def of_signals() -> nn.Module:
    """Three convolutions with BatchNorm, of images (N, 1, H, W) whose rows are the channels of a signal."""
    widths = [SIZE, 32, 32, 32]
    blocks = [
        nn.Sequential(nn.Conv1d(a, b, 3, padding=1), nn.BatchNorm1d(b), nn.ReLU())
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(nn.Flatten(1, 2), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "perceptron": perceptron,
    "of signals": of_signals,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4),
    "Adam": torch.optim.Adam,
}
RATES = (("SGD", 0.01), ("SGD", 0.05), ("SGD", 0.3), ("Adam", 1e-3), ("Adam", 1e-2))


def images(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes, whose orientation and brightness depend on their class, (N, 1, H, W), and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (NUM_IMAGES,), generator=generator)
    angle, phase = labels * torch.pi / CLASSES, 6.28 * torch.rand(NUM_IMAGES, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.sin(angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y + phase)
    noise = torch.randn(NUM_IMAGES, 1, SIZE, SIZE, generator=generator)
    brightness = 0.4 + 0.1 * labels[:, None, None, None] + 0.2 * torch.rand(NUM_IMAGES, 1, 1, 1, generator=generator)
    return brightness + 0.3 * waves[:, None] + 0.3 * noise, labels


def runs_of_a_class(y: Tensor, length: int = 64) -> Tensor:
    """Indices of samples in runs of one class, in random order."""
    runs = y.argsort(stable=True).split(length)
    return torch.cat([runs[index] for index in torch.randperm(len(runs)).tolist()])


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shuffled": lambda x, y: torch.randperm(len(x)),
    "by class": lambda x, y: y.argsort(stable=True),
    "by brightness": lambda x, y: x.flatten(1).mean(1).argsort(),
    "runs of a class": lambda x, y: runs_of_a_class(y),
}


class Window(NamedTuple):
    """A layer in an epoch."""

    setting: Setting
    epoch: int
    layer: LayerReport
    error: float
    """Its eval error against the exact statistics of all training data, with the weights that the epoch ended with."""
    is_costly: bool
    """Whether the model's loss is larger for its running statistics."""
    varying: float
    """Share of a channel's variance by which the epoch's batches vary more than random ones, with these weights."""


def train(setting: Setting, epochs: int, hides_inputs: bool) -> Iterator[Window]:
    """All layers in all epochs."""
    torch.manual_seed(setting.seed)
    x, y = images(setting.seed)
    model = NETWORKS[setting.network]()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = setting.momentum
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters(), setting.lr)
    with BatchNormTracker(model) as tracker:
        for epoch in range(epochs):
            tracker.reset()
            order = ORDERS[setting.order](x, y).split(setting.batch_size)
            for indices in order:
                optimizer.zero_grad()
                if hides_inputs:
                    tracker.see_inputs(None)
                nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
                optimizer.step()
            report, errors, is_costly = tracker.close(), true_errors(model, x), costs(model, x, y)
            varying = dict.fromkeys(errors, 0.0) if setting.order == "shuffled" else true_shares(model, x, order)
            for name, layer in report.items():
                yield Window(setting, epoch, layer, errors[name], is_costly, varying[name])


@torch.no_grad()
def costs(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the loss in eval mode is larger than with statistics that were recomputed."""
    twin = copy.deepcopy(model)
    update_bn(x.split(64), twin)
    loss, possible = (float(nn.functional.cross_entropy(each.eval()(x), y)) for each in (copy.deepcopy(model), twin))
    return not loss <= max(COSTS * possible, possible + 0.02)


@torch.no_grad()
def received(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What each BatchNorm layer of a copy receives of batches, (N, C, P) float64 each."""
    twin, seen = copy.deepcopy(model), {}

    def record(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(
            args[0].double().flatten(1).view(*args[0].shape[:2], -1)
        )

    for name, module in twin.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(record(name))
    for batch in batches:
        twin(batch)
    return seen


@torch.no_grad()
def true_errors(model: nn.Module, x: Tensor) -> dict[str, float]:
    """RMS error of each layer's normalised activation in eval mode, from a pass over all data at fixed weights."""
    twin = copy.deepcopy(model)
    with BatchNormTracker(twin, capture="pass") as tracker:
        for batch in x.split(64):
            twin(batch)
    errors = {}
    for name, exact in tracker.report().items():
        layer = model.get_submodule(name)
        running = layer.running_mean.double(), layer.running_var.double()
        error = act_rmse(exact.population_mean, exact.population_var, *running, exact.eps)
        errors[name] = float(error.square().mean().sqrt())
    return errors


def true_shares(model: nn.Module, x: Tensor, order: Sequence[Tensor]) -> dict[str, float]:
    """Share of the variance by which batches in this order vary more than random ones, at fixed weights."""
    mixed = torch.randperm(len(x)).split(len(order[0]))
    here, at_random = (received(model, (x[part] for part in parts)) for parts in (order, mixed))
    shares = {}
    for name, batches in here.items():
        own, other = (torch.stack([part.mean((0, 2)) for part in each]).var(0) for each in (batches, at_random[name]))
        shares[name] = float(((own - other) / (torch.cat(batches).var((0, 2)) + 1e-5)).mean())
    return shares


def settings(seeds: Iterable[int]) -> Iterator[Setting]:
    """All trainings: of shuffled data, and of data in an order."""
    for seed, network, (optimizer, lr) in itertools.product(seeds, NETWORKS, RATES):
        for batch_size, momentum in itertools.product((16, 64), (0.01, 0.1, 0.2, 0.9)):
            yield Setting(network, optimizer, lr, batch_size, momentum, "shuffled", seed)
        if (optimizer, lr) in (("SGD", 0.05), ("Adam", 1e-3)):
            for order in list(ORDERS)[1:]:
                yield Setting(network, optimizer, lr, 16, 0.1, order, seed)


def main() -> None:
    """Print, by the exact error, how many layers were said to need attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: %(default)s")
    parser.add_argument("--every", type=int, default=1, help="make each so many-th training (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--hide-inputs", action="store_true", help="what the model is given is not known")
    args = parser.parse_args()
    chosen = itertools.islice(settings(args.seeds), 0, None, args.every)
    windows = [window for setting in chosen for window in train(setting, args.epochs, args.hide_inputs)]
    shuffled = [window for window in windows if window.setting.order == "shuffled"]
    rows = []
    for low, high in itertools.pairwise(BOUNDS):
        rows.append([f"{low:.3f} to {high:.3f}", *described([w for w in shuffled if low <= w.error < high])])
    print(tabulate(rows, headers=["exact error", *COLUMNS], tablefmt="github"))
    varying = [window for window in windows if window.varying >= VARYING]
    rows = [[order, *described([w for w in varying if w.setting.order == order])] for order in list(ORDERS)[1:]]
    print("\n" + tabulate(rows, headers=["data in an order", *COLUMNS], tablefmt="github"))

    healthy = [window for window in shuffled if window.error < HEALTHY]
    sick = [*(window for window in shuffled if window.error >= SICK and window.is_costly), *varying]
    told = [window for window in shuffled if window.layer.verdict in TO_SHUFFLE]
    alarms = [window for window in healthy if window.layer.needs_attention]
    missed = [window for window in sick if not window.layer.needs_attention]
    print(
        f"\n{len(alarms)} of {len(healthy)} healthy layer-windows (shuffled data, exact error below {HEALTHY}) were "
        f"said to need attention, {len(missed)} of {len(sick)} sick ones (shuffled data and {SICK} or more that costs, "
        f"or varying with the order) were not. {len(told)} of {len(shuffled)} layer-windows of shuffled data were told "
        "to shuffle."
    )
    for window in [*alarms, *missed, *told]:
        print(f"{window.setting}, epoch {window.epoch}, exact error {window.error:.3f}: {window.layer.explanation}")
    too_many = len(alarms) > MAX_FALSE * len(healthy) or len(told) > MAX_FALSE * len(shuffled)
    if too_many or len(missed) > MAX_MISSED * len(sick):
        raise SystemExit(1)


COLUMNS = ("layer-windows", "need attention", "verdicts")


def described(windows: list[Window]) -> list[str | int]:
    """How many there are, how many need attention, and their verdicts."""
    verdicts = Counter(window.layer.verdict for window in windows).most_common()
    alarms = sum(window.layer.needs_attention for window in windows)
    return [len(windows), alarms, ", ".join(f"{n} {name}" for name, n in verdicts)]


if __name__ == "__main__":
    main()
