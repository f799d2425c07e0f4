"""``recalibrate`` beside what people use today: fvcore's ``update_bn_stats`` and ``torch.optim.swa_utils.update_bn``.

The same models and data for all three. What is true is found apart from them: a copy of the model at fixed weights, in
which BatchNorm normalises by the batch and all else is in eval mode (dropout is off, frozen layers keep what they
have), and the moments of all values that each layer receives there, in two passes in float64. All errors are those of
the worst channel of the worst layer. Variances of N values are divided by N or by N - 1, whichever suits a method
better: that is a convention and no error.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.nn.precise_bn import update_bn_stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from lightning_bnmonitor import recalibrate

NUM_BATCHES, BATCH_SIZE, CHANNELS, SIZE = 12, 64, 16, 8
EXACT = 1e-7  # what differs by less, and by less than the buffers are rounded, is equally exact
AS_BEFORE = "as before"
TITLES = (
    "RMS error of the normalised activation in eval()",
    "Error of the running mean",
    "Error of the running variance",
)

Method = Callable[[nn.Module, Iterable[Tensor]], Any]
METHODS: dict[str, Method] = {
    "recalibrate": recalibrate,
    "fvcore": lambda model, batches: update_bn_stats(model, batches, num_iters=NUM_BATCHES),
    "update_bn": lambda model, batches: update_bn(batches, model),
}


class Errors(NamedTuple):
    """Of running statistics, in the worst channel."""

    eval: float  # RMS error of the normalised activation in eval()
    mean: float  # in standard deviations of what the layer receives
    var: float  # relative to variance + eps


class Network(nn.Sequential):
    """Two convolutions with BatchNorm and ReLU, and whatever is between them."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__(
            *(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), *between),
            *(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
        )


class Shared(nn.Module):
    """Two convolutions that share a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise after either."""
        return self.norm(self.second(self.norm(self.first(x)).relu()))


def plain(sizes: Sequence[int] = (BATCH_SIZE,) * NUM_BATCHES, mean: float = 0.0, apart: float = 0.0) -> list[Tensor]:
    """Batches of noisy images: mean over standard deviation in all, and how far the batches are apart."""
    std = torch.tensor([0.3, 1.0, 4.0])[:, None, None]
    return [std * (mean + apart * torch.randn(3, 1, 1) + torch.randn(size, 3, SIZE, SIZE)) for size in sizes]


def frozen_network() -> nn.Module:
    """In training, but for its first BatchNorm layer, which has the statistics of other data."""
    net = Network()
    for x in plain(mean=0.5):
        net(x)
    net[1].eval()
    return net


def dropout_off_by_hand() -> nn.Module:
    """In eval mode, but for BatchNorm."""
    net = Network(nn.Dropout(0.5)).eval()
    for module in net.modules():
        module.training = isinstance(module, _BatchNorm)
    return net


@dataclass(frozen=True)
class Case:
    """A model as it is in training, and batches."""

    name: str
    model: Callable[[], nn.Module] = Network
    batches: Callable[[], list[Tensor]] = plain


CASES = (
    Case("equal batches"),
    Case("unequal batches (64, ..., 64, 8)", batches=lambda: plain([BATCH_SIZE] * (NUM_BATCHES - 1) + [8])),
    *(
        Case(f"mean/std 1e{power}", lambda: nn.BatchNorm2d(3), lambda power=power: plain(mean=10.0**power))
        for power in (2, 3, 4)
    ),
    Case("dropout, the model in training mode", lambda: Network(nn.Dropout(0.5))),
    Case("dropout, only BatchNorm in training mode", dropout_off_by_hand),
    Case("batches apart by 1 std", batches=lambda: plain(apart=1.0)),
    Case("a layer called twice", Shared),
    Case("a frozen layer", frozen_network),
    Case("a model in bfloat16", lambda: Network().bfloat16(), lambda: [x.bfloat16() for x in plain()]),
)


def layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def received(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """All values that each BatchNorm layer receives, (C, N) in float64, at fixed weights and without dropout."""
    frozen = {name for name, layer in layers_of(model).items() if model.training and not layer.training}
    model = copy.deepcopy(model).eval()
    values: dict[str, list[Tensor]] = {}
    for name, layer in layers_of(model).items():
        layer.training = name not in frozen
        put = values.setdefault(name, []).append
        layer.register_forward_pre_hook(
            lambda _, args, put=put: put(args[0].double().transpose(0, 1).flatten(1).clone())
        )
    with torch.no_grad():
        for x in batches:
            model(x)
    return {name: torch.cat(parts, dim=1).numpy() for name, parts in values.items()}


def errors_of(mean: Tensor, var: Tensor, eps: float, values: np.ndarray, kept: _BatchNorm | None) -> Errors:
    """Errors of running statistics, by what the layer receives; of a frozen one, by those that it had."""
    mean, var = mean.double().numpy(), var.double().numpy()
    candidates = []
    for ddof in (0, 1):
        true_mean, true_var = values.mean(axis=1), values.var(axis=1, ddof=ddof)
        if kept is not None:
            true_mean, true_var = kept.running_mean.double().numpy(), kept.running_var.double().numpy()
        std = np.sqrt(true_var + eps)
        with np.errstate(invalid="ignore"):  # a negative variance is told as what eval() makes of it: NaN
            seen = (values - mean[:, None]) / np.sqrt(var + eps)[:, None]
        error = seen - (values - true_mean[:, None]) / std[:, None]
        rms = np.sqrt((error**2).mean(axis=1))
        candidates.append(Errors(rms.max(), abs((mean - true_mean) / std).max(), abs((var - true_var) / std**2).max()))
    return Errors(*(min(pair) for pair in zip(*candidates, strict=True)))


def worst(errors: Iterable[Errors]) -> Errors:
    """Of several layers."""
    return Errors(*(float(np.max(column)) for column in zip(*errors, strict=True)))


class Row(NamedTuple):
    """What the methods have made of a case."""

    case: Case
    errors: dict[str, Errors | str]  # the type of the error that a method has raised
    rounding: Errors  # those of what is true, once rounded to the precision of the buffers
    calls: dict[str, int]  # of the model


def compare(case: Case, seed: int = 0) -> Row:
    """Each method on a copy of the same model, with the same batches."""
    torch.manual_seed(seed)
    model, batches = case.model(), case.batches()
    values = received(model, batches)
    kept = {name: layer for name, layer in layers_of(model).items() if model.training and not layer.training}
    ideal = []
    for name, layer in layers_of(model).items():
        if name not in kept:
            moments = (torch.from_numpy(f(values[name])) for f in (lambda x: x.mean(1), lambda x: x.var(1, ddof=1)))
            rounded = (moment.to(layer.running_mean.dtype) for moment in moments)
            ideal.append(errors_of(*rounded, layer.eps, values[name], None))
    errors: dict[str, Errors | str] = {}
    calls = dict.fromkeys(METHODS, 0)
    for method, run in METHODS.items():
        net = copy.deepcopy(model)

        def count(*_: Any, method: str = method) -> None:
            calls[method] += 1

        net.register_forward_pre_hook(count)
        try:
            run(net, batches)
        except Exception as error:
            errors[method] = type(error).__name__
            continue
        errors[method] = worst(
            errors_of(layer.running_mean, layer.running_var, layer.eps, values[name], kept.get(name))
            for name, layer in layers_of(net).items()
        )
    return Row(case, errors, worst(ideal), calls)


def is_most_exact(row: Row) -> bool:
    """Whether no other method is closer in any of the errors, up to rounding."""
    ours = row.errors["recalibrate"]
    others = [errors for errors in row.errors.values() if not isinstance(errors, str)]
    best = [min((x for x in column if not math.isnan(x)), default=0.0) for column in zip(*others, strict=True)]
    # No NaN of ours passes: it is not <= anything.
    return not isinstance(ours, str) and all(
        x <= y + floor + EXACT for x, y, floor in zip(ours, best, row.rounding, strict=True)
    )


class Training(nn.Module):
    """A model that has all that a pass could change: dropout, a frozen layer, momenta, statistics of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS, momentum=0.3)),
        )
        self.frozen = nn.BatchNorm2d(CHANNELS)
        for _ in range(20):
            self(torch.randn(BATCH_SIZE, 3, SIZE, SIZE))
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images to maps."""
        return self.frozen(self.net(x))


def augmented(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """As a loader does it: from all random states."""
    for x in batches:
        yield x * (1 + 0.1 * np.random.randn()) + 0.1 * random.random() + 0.1 * torch.randn(())


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Whatever a method could have changed."""
    layers = layers_of(model)
    statistics = {name: [layer.running_mean, layer.running_var] for name, layer in layers.items()}
    in_bytes = {name: b"".join(x.numpy().tobytes() for x in pair) for name, pair in statistics.items()}
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    return {
        "momentum": {name: layer.momentum for name, layer in layers.items()},
        "training modes": {name: "train" if m.training else "eval" for name, m in model.named_modules()},
        "num_batches_tracked": {name: int(layer.num_batches_tracked) for name, layer in layers.items()},
        "running statistics": {name: x for name, x in in_bytes.items() if name != "frozen"},
        "those of the frozen layer": {"frozen": in_bytes["frozen"]},
        "buffers are the same tensors": {name: tuple(map(id, pair)) for name, pair in statistics.items()},
        "hooks": hooks,
        "random state: torch": {"": torch.get_rng_state().numpy().tobytes()},
        "random state: NumPy": {"": repr(np.random.get_state(legacy=False))},
        "random state: Python": {"": random.getstate()},
    }


def change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """In words, with an example if it can be read."""
    for name, value in before.items():
        if after[name] != value:
            readable = isinstance(value, (int, float, str)) and len(str(value)) < 10
            return f"changed: {value} to {after[name]}" if readable else "changed"
    return AS_BEFORE


def state_after(run: Method, fails: bool, seed: int = 0) -> dict[str, str]:
    """What a method leaves behind, if the third batch cannot be run, or all can."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model, batches = Training(), plain()
    if fails:
        batches[2] = batches[2][:, :2]  # a channel is missing
    keep = [buffer for layer in layers_of(model).values() for buffer in layer.buffers()]  # else ids are used again
    before = state_of(model)
    try:
        run(model, augmented(batches))
        raised = False
    except Exception:
        raised = True
    assert raised == fails
    after = state_of(model)
    assert keep
    told = {what: change(before[what], after[what]) for what in before}
    try:
        for x in plain():
            model.train()(x)
        told["the next epoch of training"] = "runs"
    except Exception as error:
        told["the next epoch of training"] = type(error).__name__
    return told


def keeps_its_word(told: dict[str, str], fails: bool) -> bool:
    """Whether all is as before, but for the running statistics after success."""
    want = dict.fromkeys(told, AS_BEFORE) | {"the next epoch of training": "runs"}
    if not fails:
        want["running statistics"] = "changed"
    return told == want


def main() -> None:
    """Print the tables; exit with an error if ``recalibrate`` is not the most exact, or leaves anything behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    seed = parser.parse_args().seed
    rows = [compare(case, seed) for case in CASES]
    for number, title in enumerate(TITLES):
        table = [
            [row.case.name, *(_cell(errors, number) for errors in row.errors.values()), _cell(row.rounding, number)]
            for row in rows
        ]
        headers = [title, *METHODS, "rounding alone"]
        print(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True), end="\n\n")
    ran = [row for row in rows if not any(isinstance(errors, str) for errors in row.errors.values())]
    table = [[f"for {NUM_BATCHES * len(ran)} batches", *(sum(row.calls[method] for row in ran) for method in METHODS)]]
    print(tabulate(table, headers=["Forward passes", *METHODS], tablefmt="github"), end="\n\n")
    words = True
    for fails in (False, True):
        told = {method: state_after(run, fails, seed) for method, run in METHODS.items()}
        words &= keeps_its_word(told["recalibrate"], fails)
        table = [[what, *(column[what] for column in told.values())] for what in told["recalibrate"]]
        headers = ["After an exception in batch 3" if fails else "After success", *METHODS]
        print(tabulate(table, headers=headers, tablefmt="github", disable_numparse=True), end="\n\n")
    exact = sum(map(is_most_exact, rows))
    once = all(row.calls["recalibrate"] == NUM_BATCHES for row in rows)
    print(f"recalibrate is the most exact, up to rounding, in {exact} of {len(rows)} cases.")
    if exact < len(rows) or not once or not words:
        raise SystemExit("It is not the most exact, needs more than one pass, or leaves something behind.")


def _cell(errors: Errors | str, number: int) -> str:
    if isinstance(errors, str):
        return errors
    return "NaN" if math.isnan(errors[number]) else f"{errors[number]:.1e}"


if __name__ == "__main__":
    main()
