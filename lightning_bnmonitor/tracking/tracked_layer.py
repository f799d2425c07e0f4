"""The layers that are monitored: how they are found and named, and what is kept of each between two updates."""

from __future__ import annotations

import itertools
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bnmonitor.capture.batch_moments import PATHS, BatchMoments, Path
from lightning_bnmonitor.capture.calls import Call, Kind
from lightning_bnmonitor.capture.layer_hook import Gate, LayerHook
from lightning_bnmonitor.statistics.window import Batch, Batches, Window

log = logging.getLogger(__name__)

VALIDATION_LIMIT = 64
"""Calls of a layer that are looked at in one validation."""
ROOT = "(root)"
"""Name of a layer that is itself the monitored model."""
_SAVED = (
    *("calls", "training_calls", "tracked_before", "tracked_calls", "updates_per_call", "momentum"),
    *("next_updates_per_call", "history", "tracked_end", "last_history", "history_since", "written_outside"),
    *("serial", "num_ranks", "interrupted"),
)
_SAVED_BUFFERS = ("start", "end", "since")
_SAVED_OF_HOOK = ("by_pass", "skipped", "checkpointed")
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


History = tuple[float, float, float]
"""The weight that the initial values have in the buffers, and the sums of squared weights over n and n - 1 of all
batches since. None in its place: not known, as the buffers were there before."""
_FRESH: History = (1.0, 0.0, 0.0)


class Waiting(NamedTuple):
    """Calls of a layer that wait for an update, and what they contribute."""

    num_calls: int
    """How many they are, those that contribute nothing included. The other fields are of those that do."""
    batches: Batches | None = None
    """Their batches; None if there are none."""
    kinds: tuple[Kind, ...] = ()
    """Of what kind they were; one for all if they were alike."""
    last_step: int = 0
    """Training steps before the last of them."""


class TrackedLayer:
    """One BatchNorm layer: its hook, its calls since the last update, and how it has been called in this window.

    Args:
        name: Its name in the report.
        module: The layer. (The layer alone: a reference to the model would keep that alive.)
        gate: Tells its hook whether a call counts.
        flush: Merges what waits for an update.
    """

    def __init__(self, name: str, module: _BatchNorm, gate: Gate, flush: Callable[[], None]) -> None:
        self.name = name
        self.module = module
        self.gate = gate
        self.hook = LayerHook(gate, flush, self.receive_empty, self.validate)
        self.stash = self.hook.stash  # calls since the last update
        self.flush = flush
        self.validation: list[Batch] = []  # batches received in validation
        self.window: Window | None = None  # where its channels are accumulated, from its first update on
        self.index = -1
        self.width = 0  # channels of what is stashed and accumulated; 0 before the first call
        self.num_ranks = 1  # over how many SyncBatchNorm takes its moments
        self.serial = False  # whether its moments came from a kernel that sums value by value
        self.next_updates_per_call = 1
        self.steps_before = gate.steps  # when it was made or restored: its step may have begun before that
        self.step_of_last_call = -1
        self.momentum: float | None = None  # the effective one of the last call
        self.end: Tensor | None = None  # the buffers when the last window ended
        self.tracked_end: int | None = None  # and how often they had been updated
        self.history: History | None = None  # what the buffers were made of when the window began
        self.last_history: History | None = None  # and what they were made of
        self.since: Tensor | None = None  # the buffers as we have written them since
        self.history_since: History | None = None  # and what these are made of
        self.begin_window(None, None)

    def begin_window(self, buffers: Tensor | None, num_batches_tracked: int | None) -> None:
        """Count calls from 0, on these buffers, ``(2, C)``, that were updated so often before (None: not known)."""
        self.calls: dict[Path, int] = dict.fromkeys(PATHS, 0)
        self.training_calls = 0
        self.tracked_before = num_batches_tracked
        self.tracked_calls = 0
        self.updates_per_call = self.next_updates_per_call
        self.hook.skipped, self.hook.checkpointed, self.hook.is_wide = 0, False, False
        self.interrupted = False  # whether it was resumed from the middle of a step
        self.start = buffers
        continued = self.end is not None and _same(self.end, buffers)
        known = self.since is not None and _same(self.since, buffers)
        self.written_outside = self.end is not None and not continued and not known
        self.history = self.last_history if continued else self.history_since if known else None
        self.since = self.history_since = None
        if self.history is None and not num_batches_tracked and (buffers is None or _are_initial(buffers)):
            self.history = _FRESH

    def restart(self, buffers: Tensor | None, num_batches_tracked: int | None) -> None:
        """Count calls from 0 again in the same window, on these buffers, ``(2, C)``, that were updated so often."""
        self.calls = dict.fromkeys(PATHS, 0)
        self.training_calls = self.tracked_calls = 0
        self.tracked_before = num_batches_tracked
        self.rewritten(buffers, None, window_ended=False)

    def history_without_updates(self, buffers: Tensor | None) -> History | None:
        """What the buffers are made of if no batch of the window updated them: something else may have written them."""
        return self.history if self.start is None or _same(self.start, buffers) else None

    def end_window(
        self, buffers: Tensor | None, num_batches_tracked: int | None, history: History | None, updates: float
    ) -> None:
        """Keep what the next window goes on from: the buffers, what they are made of, how often a call updates them.

        A call is taken to update them repeatedly if it was recomputed and that is what they were updated by.
        """
        self.end, self.tracked_end, self.last_history = buffers, num_batches_tracked, history
        repeated = self.hook.checkpointed and updates >= 1 and float(updates).is_integer()
        if not math.isnan(updates):
            self.next_updates_per_call = int(updates) if repeated else 1

    def rewritten(self, buffers: Tensor | None, history: History | None, window_ended: bool) -> None:
        """Go on from buffers, ``(2, C)``, that we have written: what they are made of (None: as before)."""
        if window_ended:
            self.since, self.history_since = (buffers, history) if history is not None else (None, None)
            return
        self.start, self.history = buffers, history
        if history is None and not self.tracked_before and (buffers is None or _are_initial(buffers)):
            self.history = _FRESH

    @property
    def num_calls(self) -> int:
        """Counted calls in this window, those that wait included."""
        return sum(self.calls.values()) + len(self.stash)

    @property
    def running_stats(self) -> tuple[Tensor, ...]:
        """Running mean and variance, ``(C,)`` each; nothing if the layer has none, or (a lazy one) not yet."""
        mean, var = self.module.running_mean, self.module.running_var
        return () if mean is None or var is None or is_lazy(mean) or mean.is_meta else (mean, var)

    def receive_empty(self, updating: bool) -> None:
        """Count a call with an empty batch, which has no moments. ``updating`` tells whether BatchNorm counted it."""
        with self.gate.lock:
            self.flush()
            self.tracked_calls += updating

    def start_validation(self) -> None:
        """Look at what is called in validation from now on."""
        self.validation, self.hook.validation_room = [], VALIDATION_LIMIT

    def validate(self, moments: BatchMoments) -> None:
        """Take the moments of one call in validation."""
        batch = Batch(moments.num_samples, moments.mean, moments.spread, moments.eps, 0.0, moments.batch_size)
        with self.gate.lock:
            if self.hook.validation_room:
                self.hook.validation_room -= 1
                self.validation.append(batch)

    def waiting(self, calls: Sequence[Call]) -> Waiting:
        """Calls that wait for an update, field by field. Those of another width than the first contribute nothing."""
        mean, spread, steps, kinds = zip(*calls, strict=True)
        num_calls, kind = len(kinds), kinds[0]
        if kinds.count(kind) == num_calls:
            kinds = kinds[:1]
        if any(kind.width != self.width for kind in kinds):  # it may be given others
            fitting = [call for call in calls if call[-1].width == self.width]
            return self.waiting(fitting)._replace(num_calls=num_calls) if fitting else Waiting(num_calls)
        weights: tuple[float, ...]
        if len(kinds) == 1 and kind.updating and kind.momentum is not None:
            weights = (self._effective_momentum(kind.momentum, self.tracked_calls),) * num_calls
        else:
            each = kinds * num_calls if len(kinds) == 1 else kinds
            before = itertools.accumulate((kind.updating for kind in each), initial=self.tracked_calls)
            weights = tuple(
                self._effective_momentum(kind.momentum, tracked) if kind.updating else 0.0
                for kind, tracked in zip(each, before, strict=False)
            )
        num_samples, eps, batch_size = zip(*((k.num_samples, k.eps, k.batch_size) for k in kinds), strict=True)
        times = num_calls // len(kinds)
        batches = Batches(num_samples * times, mean, spread, eps * times, weights, batch_size * times)
        return Waiting(num_calls, batches, kinds, steps[-1])

    def count(self, waiting: Waiting) -> None:
        """Take calls from those that wait, from the first on, as they have been merged."""
        num_calls, batches, kinds, step = waiting
        num_counted = 0
        if batches is not None:
            num_counted = len(batches.momentum)
            each = num_counted // len(kinds)
            for kind in kinds:
                self.calls[kind.path] += each
                self.training_calls += each * kind.training
                self.tracked_calls += each * kind.updating
                self.serial |= kind.serial
            updating = [index for index, kind in enumerate(kinds) if kind.updating]
            if updating:
                self.momentum = batches.momentum[-1 if len(kinds) == 1 else updating[-1]]
            self.step_of_last_call, self.num_ranks = step, kinds[-1].num_ranks
        self.hook.skipped += num_calls - num_counted
        del self.stash[:num_calls]

    @property
    def is_within_step(self) -> bool:
        """Whether it was called since the last training step ended. False before the first has."""
        return self.step_of_last_call == self.gate.steps > self.steps_before

    def updates_of_a_call(self, num_batches_tracked: int | None) -> float:
        """Updates of the buffers for each call that was to update them; NaN before the first, or if not counted.

        Negative if the counter was set back.
        """
        if num_batches_tracked is None or not self.tracked_calls:
            return float("nan")
        return (num_batches_tracked - (self.tracked_before or 0)) / self.tracked_calls

    def forget(self) -> None:
        """Drop what waits for an update, the place in the window, and the windows before."""
        self.stash.clear()
        self.hook.look_closer()
        self.window, self.index, self.width = None, -1, 0
        self.hook.traced, self.end, self.since = (), None, None

    def buffer_state(self, width: int) -> Tensor:
        """What :meth:`restore` needs per channel, ``(6, C)``: the buffers at the windows' ends, and written since."""
        missing = torch.full((2, width), torch.nan, dtype=torch.float64, device="cpu")
        known = [getattr(self, name) for name in _SAVED_BUFFERS]
        return torch.cat([missing if buffers is None or buffers.shape[1] != width else buffers for buffers in known])

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides, in primitives."""
        hook = {field: getattr(self.hook, field) for field in _SAVED_OF_HOOK}
        known = {f"has_{name}": getattr(self, name) is not None for name in _SAVED_BUFFERS}
        known["within_step"] = self.is_within_step
        return {field: copy(getattr(self, field)) for field in _SAVED} | hook | known

    def restore(self, state: Mapping[str, Any], buffers: Tensor) -> None:
        """Go on as the layer whose :meth:`state` and :meth:`buffer_state` these are."""
        for name, saved in zip(_SAVED_BUFFERS, torch.split(buffers, 2), strict=True):
            setattr(self, name, saved.clone() if state[f"has_{name}"] else None)
        for field in _SAVED:
            setattr(self, field, copy(state[field]))
        for field in _SAVED_OF_HOOK:
            setattr(self.hook, field, state[field])
        self.interrupted |= state["within_step"]
        self.steps_before, self.step_of_last_call = self.gate.steps, -1

    def _effective_momentum(self, momentum: float | None, tracked_calls: int) -> float:
        """Weight of a call in the buffers right after it, if it updates them ``updates_per_call`` times.

        ``tracked_calls`` is how many calls of the window have updated them before.
        """
        updates = self.updates_per_call
        if momentum is None:  # a cumulative average: its k-th update has weight 1/k
            if self.tracked_before is None:
                return 0.0  # without a counter of updates, BatchNorm makes none
            return updates / (self.tracked_before + (tracked_calls + 1) * updates)
        return momentum if updates == 1 else 1 - (1 - momentum) ** updates


def find_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a model by name, each once, in the order of its modules.

    Says which normalisation layers there are that are not BatchNorm: in a warning if there is no BatchNorm.

    Raises:
        ValueError: If a pattern matches no BatchNorm layer, naming those there are.
    """
    layers: dict[str, _BatchNorm] = {}
    others: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
            layers[path if name in layers else name or ROOT] = module
        elif re.search(r"(?i)^[^_].*norm(\d+d)?$", type(module).__name__) and not any(module.children()):
            others[type(module).__name__] += 1
    listed = ", ".join(f"{count} {name}" for name, count in others.items())
    if not layers:
        instead = (
            f"the normalisation layers it has instead are not monitored: {listed}"
            if listed
            else "nor other normalisation"
        )
        warnings.warn(f"No BatchNorm layer to monitor in {type(model).__name__} ({instead}).", stacklevel=2)
        return layers
    if others:
        log.info("Normalisation layers that are not BatchNorm are not monitored: %s.", listed)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"`{argument}` pattern {pattern!r} matches no BatchNorm layer. The layers are: {', '.join(layers)}."
                )
    chosen = {
        name: module
        for name, module in layers.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        warnings.warn(
            f"`include` and `exclude` leave no BatchNorm layer to monitor of {', '.join(layers)}.", stacklevel=2
        )
    return chosen


def running_stats(layers: Sequence[TrackedLayer]) -> list[Tensor | None]:
    """Float64 CPU copies of the layers' running statistics, ``(2, C)``, None if there are none; one copy per device."""
    of_layers = [layer.running_stats for layer in layers]
    by_device: dict[torch.device, list[int]] = {}
    for index, buffers in enumerate(of_layers):
        if buffers:
            by_device.setdefault(buffers[0].device, []).append(index)
    copies: list[Tensor | None] = [None] * len(layers)
    for there in by_device.values():
        means, variances = zip(*(of_layers[index] for index in there), strict=True)
        stats = torch.stack([torch.cat(means), torch.cat(variances)]).detach().cpu().double()
        for index, copy_ in zip(there, torch.split(stats, [mean.numel() for mean in means], dim=1), strict=True):
            copies[index] = copy_
    return copies


def num_batches_tracked(layers: Sequence[TrackedLayer]) -> list[int | None]:
    """``num_batches_tracked`` of each layer, None where there is none, by one copy per device."""
    known = [
        (index, tracked)
        for index, layer in enumerate(layers)
        if (tracked := layer.module.num_batches_tracked) is not None and not tracked.is_meta
    ]
    counts: list[int | None] = [None] * len(layers)
    for device in {tracked.device for _, tracked in known}:
        there = [(index, tracked) for index, tracked in known if tracked.device == device]
        values = torch.stack([tracked.reshape(()) for _, tracked in there]).tolist()
        for (index, _), count in zip(there, values, strict=True):
            counts[index] = count
    return counts


def device_of(module: nn.Module) -> torch.device:
    """Where a layer is; the CPU if it has no values."""
    for tensor in (*module.buffers(), *module.parameters()):
        return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")


def _are_initial(buffers: Tensor) -> bool:
    mean, var = buffers.numpy()
    return bool((mean == 0).all() and (var == 1).all())


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and np.array_equal(one.numpy(), other.numpy(), equal_nan=True)
