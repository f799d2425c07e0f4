"""What monitoring costs: CPU time of training steps, the end of a window, and memory.

Ratios: in one process, each network is trained once for each variant, from the same seed on the same batch. A round
lets every variant make some steps, in random order, and divides each one's CPU time by that without a monitor in the
same round: what is shown is the median over the rounds and its 95 % interval by order statistics (the range, of fewer
than 6 rounds). "no monitor, again" is the same as none: what it shows is the noise of the measurement.

Direct share: the time inside our hooks and updates (and in what tells of groups) over the time of the steps, in a
training of its own, for as many steps at a time as have one update. The hooks are wrapped where they sit; what the
wrapper takes in such steps is measured and subtracted. What PyTorch takes to call a hook at all is not in it (see
"empty hook"). In a compiled network the hooks are part of the graph: there, only what is done between graphs counts.
Where groups or a mask are told of, the share without these is that of the same network in a training of its own;
likewise with ``guard=True``.

Memory: bytes of all tensors and arrays that a variant keeps, the model's own left out.

The end of a window: CPU time of everything between the last batch and the report, logging apart. Layers are of unequal
width. Python's garbage is collected before each: a full collection takes as long, and comes when it pleases.

Operations: aten operations of a step beyond the model's own, on average over as many steps as have one update, on two
samples (a pass over more takes a few more). In a compiled network they are fused with the model's: not counted.

All of it on one thread; ``overhead_cuda.py`` measures on a GPU. ``--only "narrow MLP"`` measures one network, which
takes minutes. Exits with 1 if a target is missed: by a ratio, which is noisy, with its whole interval, by all else at
the median.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import shutil
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from logging_cost import Residual, resnet18
from networks import checkpointed, efficientnet
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from variants import AGAIN, EMPTY, GUARDED, NONE, OURS, VARIANTS, Stack

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.capture.batch_moments import CaptureMode
from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT

UPDATE_STEPS = STASH_LIMIT  # after so many there has been an update of everything, at the latest
MAX_SHARE = {
    "ResNet-18": 0.01,
    "120 layers": 0.01,
    "narrow MLP": 0.05,
    "EfficientNet-B0": 0.01,
    "ResNet-18, checkpointing": 0.03,
    "ResNet-18, pass": 0.03,
    "ResNet-18, bfloat16": 0.03,
    "ResNet-18, 4 groups": 0.015,
    "sequences, mask": 0.2,
}
MAX_OPERATIONS = dict.fromkeys(("ResNet-18", "120 layers", "narrow MLP", "EfficientNet-B0"), 5.0)  # a step
MAX_RATIO = {("narrow MLP", EMPTY): 1.05, ("compiled", NONE): 1.02}
MAX_WINDOW_END = {100_000: 0.3}  # seconds by channels
SHARE, UNTOLD_SHARE = "**direct share of ours**", "direct share without group=, mask="
GUARDED_SHARE = "direct share with guard=True"
MEMORY, WINDOW_ENDS = "memory", "window ends"  # tables beside that of the networks


class Summary(NamedTuple):
    """A median, and the interval that holds it in 95 % of all cases."""

    median: float
    low: float
    high: float


def summary(values: list[float]) -> Summary:
    """Of independent values, by order statistics; the range if there are fewer than 6."""
    ranked, n = sorted(values), len(values)
    outside, tail = 0, 0.5**n  # values below the interval, and the probability that so many are below the median
    while tail <= 0.025:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    outside = max(outside - 1, 0)
    return Summary(statistics.median(ranked), ranked[outside], ranked[n - 1 - outside])


# --- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What is trained, and how."""

    name: str
    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    steps: int  # in a round
    chunks: int = 2  # of steps with an update each, of which the direct share is measured
    backend: str | None = None  # of `torch.compile`; None for eager
    compared: tuple[str, ...] = tuple(VARIANTS)
    capture: CaptureMode = "auto"
    dtype: torch.dtype = torch.float32  # of the module and of what it is given
    device: str = "cpu"
    layout: torch.memory_format = torch.preserve_format
    is_mixed: bool = False  # whether under autocast, in bfloat16
    groups: int = 0  # that the batches are said to be of, in turn
    mask: Callable[[Tensor], Tensor] | None = None  # of what it is given, which positions count

    @property
    def is_told(self) -> bool:
        """Whether we are told of its batches what we cannot see."""
        return self.groups > 0 or self.mask is not None

    @property
    def variants(self) -> list[str]:
        """Lists that grow make compiled code start anew at every call."""
        return [name for name in self.compared if self.backend is None or VARIANTS[name] is not Stack]


def narrow_mlp() -> nn.Module:
    """The worst case: hardly any work between the hooks."""
    return nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())))


def deep(width: int = 32, blocks: int = 60) -> nn.Sequential:
    """Two convolutions a block, each with a BatchNorm layer."""
    return nn.Sequential(nn.Conv2d(3, width, 1), *(Residual(width, width, 1) for _ in range(blocks)))


def plain(width: int = 64) -> nn.Module:
    """Eight convolutions, each with a BatchNorm layer."""
    widths = [3, *[width] * 8]
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())))


def of_sequences(width: int = 64) -> nn.Module:
    """Six convolutions over sequences, each with a BatchNorm layer."""
    pairs = itertools.pairwise([3, *[width] * 6])
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Conv1d(a, b, 5, padding=2), nn.BatchNorm1d(b), nn.ReLU())))


def all_lengths(x: Tensor) -> Tensor:
    """A mask of sequences ``(B, C, T)`` of lengths from T / B to T."""
    lengths = torch.arange(1, len(x) + 1, device=x.device) * x.shape[-1] // len(x)
    return torch.arange(x.shape[-1], device=x.device) < lengths[:, None]


def networks(quick: bool) -> list[Network]:
    """All that are measured; small ones to try the script."""
    few = (NONE, AGAIN, EMPTY, OURS)
    if quick:
        tiny = partial(efficientnet, stages=[(8, 2, 3, 1, 2)], stem=8, head=16)
        small, shape = partial(deep, width=4, blocks=2), (4, 3, 4, 4)
        return [
            Network("narrow MLP", narrow_mlp, (48, 64), 2, 1),
            Network("compiled", plain, shape, 1, 1, "aot_eager"),
            Network("EfficientNet-B0", tiny, shape, 1, 1, compared=few),
            Network("ResNet-18, checkpointing", lambda: checkpointed(small(), Residual), shape, 1, 1, compared=few),
            Network("ResNet-18, pass", small, shape, 1, 1, compared=few, capture="pass"),
            Network("ResNet-18, bfloat16", small, shape, 1, 1, compared=few, dtype=torch.bfloat16),
            Network("ResNet-18, 4 groups", small, shape, 1, 1, compared=few, groups=4),
            Network("sequences, mask", partial(of_sequences, 4), (4, 3, 8), 1, 1, compared=few, mask=all_lengths),
        ]
    shape = (16, 3, 32, 32)
    return [
        Network("ResNet-18", resnet18, shape, 1),
        Network("120 layers", deep, (16, 3, 16, 16), 1),
        Network("narrow MLP", narrow_mlp, (48, 64), UPDATE_STEPS, 20),
        Network("compiled", plain, (16, 3, 16, 16), 4, 6, "inductor"),
        Network("EfficientNet-B0", partial(efficientnet, stem_stride=1), shape, 1, compared=few),
        Network("ResNet-18, checkpointing", lambda: checkpointed(resnet18(), Residual), shape, 1, compared=few),
        Network("ResNet-18, pass", resnet18, shape, 1, compared=few, capture="pass"),
        # So little, as a CPU without instructions for bfloat16 takes 60 times as long for its convolutions.
        Network("ResNet-18, bfloat16", resnet18, (2, 3, 8, 8), 1, 1, compared=few, dtype=torch.bfloat16),
        Network("ResNet-18, 4 groups", resnet18, shape, 1, compared=few, groups=4),
        Network("sequences, mask", of_sequences, (16, 3, 400), 2, compared=few, mask=all_lengths),
    ]


class Training:
    """A variant of the training of a network."""

    def __init__(self, network: Network, variant: str) -> None:
        torch.manual_seed(0)
        to = {"device": network.device, "dtype": network.dtype, "memory_format": network.layout}
        self.module = network.build().to(**to)
        self.model = self.module if network.backend is None else torch.compile(self.module, backend=network.backend)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        self.x = torch.randn(network.batch).to(**to)
        self.mixed: Callable[[], AbstractContextManager[Any]] = nullcontext
        if network.is_mixed:
            self.mixed = partial(torch.autocast, network.device, torch.bfloat16)
        options = {"capture": network.capture, "mask": network.mask} if variant == OURS else {}
        self.monitor = VARIANTS[variant](self.model, **options)
        self.is_told = variant == OURS and network.is_told
        self.groups = itertools.cycle([f"group {index}" for index in range(network.groups)] or [None])
        self.tell: Callable[..., None] = getattr(self.monitor.kept, "see_inputs", lambda batch, group: None)

    def steps(self, num: int) -> None:
        """Some training steps."""
        for _ in range(num):
            self.optimizer.zero_grad()
            if self.is_told:
                self.tell(self.x, next(self.groups))
            with self.mixed():
                loss = self.model(self.x).square().mean()
            loss.backward()
            self.optimizer.step()

    def prepare_update(self) -> int:
        """Let nothing wait. Returns after how many steps there will be an update of everything."""
        self.steps(2)
        self.monitor.kept.flush()
        return max(layer.hook.limit for layer in self.monitor.kept._recorder.layers)


def is_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether parameters and buffers are bit-identical."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- measuring --------------------------------------------------------------------------------------------------------


def step_seconds(
    trainings: dict[str, Any], steps: int, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of a step of each training in each round, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    order = list(trainings)
    shuffle = random.Random(0).shuffle
    for number in range(1 + rounds):
        shuffle(order)
        for name in order:
            began = clock()
            trainings[name].steps(steps)
            taken = clock() - began
            trainings[name].monitor.end_round()
            if number:
                seconds[name].append(taken / steps)
    return seconds


class Stopwatch:
    """Time within functions that it wraps; within one that another one calls, it counts once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.calls = 0
        self._is_running = False

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured."""
        clock = self.clock

        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running = True
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += clock() - began
                self.calls += 1
                self._is_running = False

        return measured

    @contextmanager
    def on_our_hooks(self, model: nn.Module, is_compiled: bool) -> Iterator[None]:
        """Wrap our hooks where they sit, but for those that are part of a compiled graph."""
        modules = [model] if is_compiled else list(model.modules())
        hooks = [each for module in modules for each in (module._forward_pre_hooks, module._forward_hooks)]
        hooks.append(_global_optimizer_post_hooks)
        before = [dict(each) for each in hooks]
        for each in hooks:
            for key, hook in each.items():
                if hook.__module__.startswith("lightning_bnmonitor"):
                    each[key] = self.wrapped(hook)
        try:
            yield
        finally:
            for each, hooked in zip(hooks, before, strict=True):
                each.update(hooked)


def wrapper_seconds(network: Network, calls: int = 200) -> float:
    """What a stopwatch measures, a call, of hooks that do nothing: it is in all that it measures.

    In training steps, where the processor's caches are as cold as they are for our hooks: it takes four times as long
    as in a loop.
    """
    training, stopwatch = Training(network, NONE), Stopwatch()
    is_compiled = network.backend is not None
    layers = [module for module in training.module.modules() if isinstance(module, _BatchNorm)]
    for module in [training.model] if is_compiled else layers:
        module.register_forward_hook(stopwatch.wrapped(lambda *args: None))
    training.steps(2)
    seconds = []
    for _ in range(0, calls, 1 if is_compiled else len(layers)):
        stopwatch.seconds, stopwatch.calls = 0.0, 0
        training.steps(1)
        seconds.append(stopwatch.seconds / stopwatch.calls)
    return statistics.median(seconds)


def shares_of(network: Network, training: Training, chunks: int, steps: int | None = None) -> list[float]:
    """Share of the time of training steps of a network that passes within our hooks and updates, several times.

    So many steps at a time; None: as many as have one update.
    """
    stopwatch, shares, own = Stopwatch(), [], wrapper_seconds(network)
    with stopwatch.on_our_hooks(training.model, network.backend is not None):
        update = training.prepare_update()
        training.tell = stopwatch.wrapped(training.tell)
        for _ in range(chunks):
            stopwatch.seconds, stopwatch.calls = 0.0, 0
            began = stopwatch.clock()  # the same clock: what interrupts us, interrupts both in proportion
            training.steps(steps or update)
            if training.x.is_cuda:
                torch.cuda.synchronize()
            taken = stopwatch.clock() - began
            shares.append((stopwatch.seconds - stopwatch.calls * own) / taken)
    return shares


def direct_shares(network: Network, steps: int | None = None, variant: str = OURS) -> list[float]:
    """:func:`shares_of` a training of its own."""
    training = Training(network, variant)
    shares = shares_of(network, training, network.chunks, steps)
    training.monitor.close()
    return shares


def all_shares(network: Network, steps: int | None = None) -> dict[str, Summary]:
    """Direct shares by their rows in the table: as the network says, and beside that with less or more asked for."""
    shares = {SHARE: direct_shares(network, steps)}
    if network.is_told:
        shares[UNTOLD_SHARE] = direct_shares(replace(network, groups=0, mask=None), steps)
    if GUARDED in network.variants and network.backend is None:
        shares[GUARDED_SHARE] = direct_shares(network, steps, GUARDED)
    return {row: summary(each) for row, each in shares.items()}


class Operations(TorchDispatchMode):
    """Counts the aten operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_a_step(network: Network) -> float:
    """Aten operations of a step beyond the model's own, on average over as many as have one update."""
    network = replace(network, batch=(2, *network.batch[1:]))
    bare, training = Training(network, NONE), Training(network, OURS)
    bare.steps(2)
    steps = training.prepare_update()
    with Operations() as own:
        bare.steps(1)
    with Operations() as monitored:
        training.steps(steps)
    training.monitor.close()
    return monitored.count / steps - own.count


def bytes_of(*roots: Any) -> int:
    """Bytes of all tensors and arrays that can be reached without going through a module."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module | type | weakref.ref):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, np.ndarray):
            storages[value.__array_interface__["data"][0]] = value.nbytes
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif type(value).__module__.startswith("lightning_bnmonitor"):
            pending += vars(value).values()
    return sum(storages.values())


def bytes_kept(network: Network, variant: str, steps: int) -> list[int]:
    """After each of so many steps."""
    training = Training(network, variant)
    kept = []
    for _ in range(steps):
        training.steps(1)
        kept.append(bytes_of(training.monitor.kept))
    training.monitor.close()
    return kept


def widths_of(num_layers: int, num_channels: int, seed: int = 0) -> list[int]:
    """Widths of so many layers, unequal, that add up to so many channels."""
    cuts = sorted(random.Random(seed).sample(range(1, num_channels), num_layers - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, num_channels], strict=True)]


def window_ends(
    widths: list[int], num_batches: int, repeats: int, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Seconds of each of several window ends, after so many batches each."""
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
            began = clock()
            tracker.close()
            seconds.append(clock() - began)
    return seconds


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(value: Summary, digits: int, factor: float = 1.0) -> str:
    """A median with its interval."""
    median, low, high = (f"{factor * part:.{digits}f}" for part in value)
    return f"{median} ({low}-{high})"


def ratio(seconds: dict[str, list[float]], variant: str, to: str) -> Summary:
    """Of the CPU times of two variants in the same round."""
    return summary([one / other for one, other in zip(seconds[variant], seconds[to], strict=True)])


@dataclass
class Column:
    """What was measured of the steps of a network."""

    seconds: dict[str, list[float]]
    """A step of each variant, in each round."""
    shares: Mapping[str, Summary] = field(default_factory=dict)
    """Direct shares by row."""
    operations: float | None = None
    """Of ours, a step; None if they cannot be counted."""


def time_table(columns: Mapping[str, Column]) -> str:
    """Ratios of all variants to none, our direct shares and operations, by network."""
    measured = columns.values()
    rows = [
        ["a step without monitor", *(f"{1000 * statistics.median(each.seconds[NONE]):.4g} ms" for each in measured)]
    ]
    rows += [
        [
            variant,
            *(shown(ratio(each.seconds, variant, NONE), 3) if variant in each.seconds else "-" for each in measured),
        ]
        for variant in VARIANTS
        if variant != NONE
    ]
    rows += [
        [row, *(f"{shown(each.shares[row], 2, 100)} %" if row in each.shares else "-" for each in measured)]
        for row in (SHARE, UNTOLD_SHARE, GUARDED_SHARE)
    ]
    operations = ("-" if each.operations is None else f"{each.operations:.1f}" for each in measured)
    rows.append(["operations of ours, a step", *operations])
    return tabulate(rows, headers=["CPU time", *columns], tablefmt="github", disable_numparse=True)


def memory_table(small: Network, steps: int, large: Network) -> str:
    """What each variant keeps."""
    channels = sum(module.num_features for module in small.build().modules() if isinstance(module, _BatchNorm))
    rows = []
    for variant in VARIANTS:
        if variant in (NONE, AGAIN):
            continue
        kept = bytes_kept(small, variant, 2 * steps)
        growth = (kept[-1] - kept[steps - 1]) / steps
        first = bytes_kept(large, variant, 1)[0]
        rows.append([variant, max(kept) / channels, growth / 1000, first / 1e6])
    headers = [
        "kept",
        f"{small.name}, {2 * steps} steps: most, bytes a channel",
        "growth, kB a step",
        f"{large.name}: after one step, MB",
    ]
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", ".0f", ".1f", ".2f"))


def window_table(seconds: dict[tuple[int, int, int], list[float]]) -> str:
    """CPU time of the end of a window by layers, channels and batches."""
    rows = [[*size, 1000 * statistics.median(each), 1000 * max(each)] for size, each in seconds.items()]
    headers = ["layers", "channels", "batches", "end of a window: CPU ms, median", "largest"]
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".0f")


def verdict(what: str, value: Summary, most: float, unit: str, is_stable: bool) -> tuple[bool, str]:
    """Whether a target is met, and the line that says so. If it is not stable, it is missed by the whole interval."""
    is_met = (value.median if is_stable else value.low) <= most
    factor, digits = {"%": (100.0, 2), "ms": (1000.0, 0), "": (1.0, 3)}[unit]
    line = f"{what}: {shown(value, digits, factor)} {unit}".rstrip()
    return is_met, f"{'Met' if is_met else 'MISSED'}: {line}, target at most {factor * most:g} {unit}".rstrip() + "."


def column_of(network: Network, rounds: int, is_quick: bool) -> Column:
    """Measure the steps of a network.

    Raises:
        RuntimeError: If it is trained otherwise with the monitor than without.
    """
    trainings = {variant: Training(network, variant) for variant in network.variants}
    column = Column(step_seconds(trainings, network.steps, rounds))
    if not is_same(trainings[OURS].module, trainings[NONE].module):
        raise RuntimeError(f"{network.name} was trained otherwise with the monitor than without.")
    for training in trainings.values():
        training.monitor.close()
    del trainings
    column.shares = all_shares(network, 2 if is_quick else None)
    if network.backend is None:
        column.operations = operations_a_step(network)
    return column


def verdicts_on(
    columns: Mapping[str, Column], ends: Mapping[tuple[int, int, int], list[float]]
) -> list[tuple[bool, str]]:
    """Whether each target of what was measured is met, and the lines that say so."""
    verdicts = [
        verdict(f"direct share, {name}", columns[name].shares[SHARE], most, "%", is_stable=True)
        for name, most in MAX_SHARE.items()
        if name in columns
    ]
    verdicts += [
        verdict(f"operations a step, {name}", Summary(*[columns[name].operations] * 3), most, "", is_stable=True)
        for name, most in MAX_OPERATIONS.items()
        if name in columns
    ]
    verdicts += [
        verdict(f"end of a window of {size[1]} channels after {size[2]} batches", summary(each), most, "ms", True)
        for size, each in ends.items()
        for channels, most in MAX_WINDOW_END.items()
        if size[1] == channels
    ]
    return verdicts + [
        verdict(f"ratio to {to}, {name}", ratio(columns[name].seconds, OURS, to), most, "", is_stable=False)
        for (name, to), most in MAX_RATIO.items()
        if name in columns
    ]


def measure(networks: Collection[Network], only: Collection[str], rounds: int, repeats: int, is_quick: bool) -> int:
    """Print the tables that are asked for, and whether their targets are met."""
    columns: dict[str, Column] = {}
    for network in networks:
        if network.name not in only:
            continue
        if network.backend == "inductor" and shutil.which("g++") is None:
            print("The compiled network is left out: Inductor needs a C++ compiler (g++).\n")
            continue
        columns[network.name] = column_of(network, rounds, is_quick)
    if columns:
        print(time_table(columns) + "\n")
    if MEMORY in only:
        small = next(network for network in networks if network.name == "narrow MLP")
        large = next(iter(networks))
        print(memory_table(small, 2 if is_quick else UPDATE_STEPS, large) + "\n")
    ends = {}
    if WINDOW_ENDS in only:
        sizes = [(10, 1000, 40), (100, 10_000, 40)]
        if not is_quick:
            sizes += [(1000, 100_000, 10), (1000, 100_000, 40), (1000, 1_000_000, 10)]
        ends = {size: window_ends(widths_of(*size[:2]), size[2], repeats) for size in sizes}
        print(window_table(ends) + "\n")
    verdicts = verdicts_on(columns, ends)
    for _, line in verdicts:
        print(line)
    return 0 if all(is_met for is_met, _ in verdicts) else 1


def main() -> int:
    """Print the tables, and whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each network (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="windows that end (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f'networks to measure, as the table names them; "{MEMORY}", "{WINDOW_ENDS}" for the other tables',
    )
    parser.add_argument("--quick", action="store_true", help="small networks and short windows, to try the script")
    parser.add_argument("--device", default="cpu", help="cuda: as overhead_cuda.py, with its options (default: cpu)")
    args, others = parser.parse_known_args()
    if torch.device(args.device).type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {args.device}")
    if torch.device(args.device).type == "cuda":
        from overhead_cuda import main as on_a_gpu

        return on_a_gpu()
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    measured = networks(args.quick)
    names = [*(network.name for network in measured), MEMORY, WINDOW_ENDS]
    only = args.only or names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only must be of {', '.join(map(repr, names))}, got {', '.join(map(repr, unknown))}")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 4 * len(VARIANTS)  # each variant compiles the same code
    gc.collect()
    gc.freeze()
    return measure(measured, only, args.rounds, args.repeats, args.quick)


if __name__ == "__main__":
    sys.exit(main())
