"""What a tracker counts: the layers, the windows that their calls go into, and when calls count."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_bnmonitor.capture.batch_moments import owned
from lightning_bnmonitor.capture.guard import Guard
from lightning_bnmonitor.capture.layer_hook import Gate
from lightning_bnmonitor.capture.masked_calls import MaskedMoments, MaskHook
from lightning_bnmonitor.capture.masks import BatchMasks
from lightning_bnmonitor.capture.model_inputs import inputs_in
from lightning_bnmonitor.compat import BatchNorm, never_compiled
from lightning_bnmonitor.diagnosis.circumstances import bad_batch
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.affine import AffineWeights, has_frozen_weights
from lightning_bnmonitor.tracking.assessment import assess
from lightning_bnmonitor.tracking.buffers import History, Snapshot, snapshots
from lightning_bnmonitor.tracking.measurement import is_inexact, keep_short_windows
from lightning_bnmonitor.tracking.places import Places
from lightning_bnmonitor.tracking.standings import Standings
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.windows import Windows

STATE_VERSION = 8

_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


class Recorder:
    """Layers, the windows in which what they receive is merged, and whether their calls count.

    Args:
        root: Calls count while it is in training mode. It is not kept alive.
        by_pass: Whether moments are taken by a pass over every input, whatever a kernel has saved.
        at_fixed_weights: Whether calls are kept in the order of time though they update nothing.
        mask: What tells of a batch which positions count; None: all.
        is_guarded: Whether calls whose moments are not finite are to leave nothing behind.
    """

    def __init__(
        self,
        root: nn.Module,
        by_pass: bool,
        at_fixed_weights: bool = False,
        mask: Callable[[Any], Any] | None = None,
        is_guarded: bool = False,
    ) -> None:
        self.gate = Gate(root)
        self.gate.is_guarded = is_guarded
        self.guard: Guard | None = None  # of the layers that are followed
        self.layers: list[TrackedLayer] = []  # in the order of the model's modules
        self.masks = None if mask is None else BatchMasks(mask)
        self.windows = Windows(has_masks=mask is not None)
        self.places = Places(self.gate)
        self.is_attached = False  # whether a tracker records a model with it
        self._by_pass = by_pass
        self._at_fixed_weights = at_fixed_weights
        self._is_told_of_inputs = False  # by whoever runs the training steps
        self._was_told_of_steps = False  # before the state that was restored was saved
        self._last_seen_step = -1  # of which the model's arguments were seen
        self._standings = Standings()
        self._at_start = AffineWeights([])  # as the window began
        _recorders.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether the window has ended, and nothing counts until the next one begins."""
        return self.gate.is_closed

    def follow(self, modules: Mapping[str, BatchNorm]) -> None:
        """Record these layers, by name. Those that were recorded before go on, the others begin a window."""
        known = {layer.module: layer for layer in self.layers}
        self.layers = [known.get(module) or self._new_layer(name, module) for name, module in modules.items()]
        self.guard = Guard(modules.values(), self.gate.lock) if self.gate.is_guarded else None
        self._begin([layer for layer in self.layers if layer.module not in known])
        self._keep_weights()

    def mask_hooks(self) -> dict[BatchNorm, MaskHook]:
        """What has to be called after each layer for masks to be seen; nothing if there are none."""
        if self.masks is None:
            return {}
        return {
            layer.module: MaskHook(layer.name, self.gate, self.masks, partial(self._take_masked, layer))
            for layer in self.layers
        }

    def _take_masked(self, layer: TrackedLayer, moments: MaskedMoments) -> None:
        if self.windows.paddings is not None:
            self.windows.paddings.add(layer, moments)

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Merge what waits into the windows, all layers at once. This changes no result, whenever it is done."""
        with self.gate.lock:
            self.drain()
            self.gate.is_full = False
            self.windows.merge(self.layers, self.gate.is_guarded)
            self._follow_places()

    def put_back(self) -> None:
        """Put back running statistics that are not finite, if they are guarded."""
        if self.guard is not None:
            self.guard.put_back()

    @never_compiled
    def see_inputs(self, batch: object, group: str | None = None) -> None:
        """Look at what a training step is given, and take note of the group that it is of, if any."""
        if self.masks is not None and self._counts:
            self.masks.see(batch)
        self._is_told_of_inputs = True
        counts = self._see(batch)
        if group is not None and counts:
            groups = self.windows.groups
            number = groups.number(group)
            groups.log.add(number)
            self.gate.begin_group(number)
        else:
            self.gate.begin_group(0)

    def see_arguments(self, arguments: object) -> None:
        """Look at what the model is given, unless somebody else tells of that, or has been given in this step."""
        steps = self.gate.steps
        has_seen = self._last_seen_step == steps and (steps or self._was_told_of_steps)
        if not has_seen and not self._is_told_of_inputs and self._see(arguments):
            self._last_seen_step = steps

    @property
    def _counts(self) -> bool:
        """Whether what is called now would count."""
        gate, root = self.gate, self.gate.root()
        return not (root is None or not root.training or gate.paused or gate.is_closed)

    @property
    def _has_seen_step(self) -> bool:
        return self._last_seen_step == self.gate.steps

    def _see(self, batch: object) -> bool:
        """Returns whether it counts."""
        if not self._counts:
            return False
        probe = self.windows.probe
        if not probe.is_due:
            probe.skip()
            return True
        with self.gate.lock:
            self._look_at(batch)
        return True

    @never_compiled
    def _look_at(self, batch: object) -> None:
        probe, ends = self.windows.probe, self.windows.ends
        try:
            inputs = inputs_in(batch)
            probe.see(inputs)
            if self.masks is None and ends.is_due and any(isinstance(it.module, nn.BatchNorm1d) for it in self.layers):
                ends.see(inputs)
        except Exception as error:  # no reason not to train
            probe.give_up()
            warnings.warn(f"What the model is given cannot be looked at: {error!r}", stacklevel=5)

    def step_ended(self) -> None:
        """Count a training step. The first is merged at once if it called a layer twice: where that stands is asked."""
        self.gate.end_step()
        if self.masks is not None:
            self.masks.forget()
        if self.gate.steps == 1 and any(len(layer.hook.stash) > 1 for layer in self.layers):
            self.gate.is_full = True
        self.merge_if_full()

    # Where a graph breaks, what runs eagerly is compiled, too, function by function.
    @never_compiled
    def merge_if_full(self) -> None:
        """Merge what waits if there is enough of it, after a part of a step."""
        self.put_back()
        if self.gate.is_traced:
            self.drain()
        if self.gate.is_full:
            self.flush()

    @never_compiled
    def drain(self) -> None:
        """Take what compiled graphs have left behind."""
        self.gate.is_traced = False
        left = [each for layer in self.layers for each in layer.left_behind()]
        for moments, (_, take) in zip(owned([moments for moments, _ in left]), left, strict=True):
            take(moments)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which no call counts."""
        self.drain()
        self.gate.paused += 1
        self._forget_last_calls()
        try:
            yield
        finally:
            self.drain()
            self.gate.paused -= 1

    def end_window(self, all_ranks: bool) -> Report:
        """Report the window, keep what the next one goes on from, and count no more until that begins."""
        self.put_back()
        self.flush()
        if self.masks is not None:
            was_called = any(layer.num_calls for layer in self.layers)
            self.masks.check_use(was_called, any(layer.counts.paths["traced"] for layer in self.layers))
        self.look_at_weights()
        report, endings = assess(self.layers, self.windows, all_ranks=all_ranks)
        for ending in endings:
            layer, known, now = ending.state
            layer.end_window(now._replace(history=ending.history), known.updates_per_call)
            evidence = report[layer.name].evidence
            layer.call_shift = evidence.get("call_shift", math.nan)
            layer.bad = bad_batch(evidence)
            layer.earlier, layer.end_edges = ending.earlier, ending.edges
            if layer.num_calls:
                layer.hook.by_pass = self._by_pass or is_inexact(ending)
        self.places.window_ended()
        self._standings.window_ended(self.layers)
        self._stop_counting()
        return report

    def look_at_weights(self) -> None:
        """Find out whose weights neither train in this window nor follow others, as those of an averaged copy."""
        changed, same = self._at_start.compared()
        for layer in self.layers:
            module = layer.module
            # Nothing has learnt with the running statistics of a layer that begins anew (as SWA ends).
            stays = module in same and self.gate.has_stepped and not layer.start.is_initial
            layer.has_fixed_weights = stays or (has_frozen_weights(module) and module not in changed)

    def has_other_weights(self) -> bool:
        """Whether layers have other weights than the window has ended with, and no statistics of their own."""
        return self.is_closed and self._standings.are_others()

    def begin_window(self) -> None:
        """Begin the next window, after one has ended."""
        keep_short_windows(self.layers, self.windows)
        self._standings.forget()
        self.gate.steps_in_eval_mode = 0
        self.gate.begin_group(0)
        self.windows.reset()
        self._begin(self.layers)
        self._keep_weights()
        self.windows.make_room()
        self._reopen()

    @torch.inference_mode(False)
    def start_validation(self, loader: int, are_averaged: bool = False) -> None:
        """Look at what is called in eval mode from now on, as batches of that loader, perhaps with averaged weights."""
        self.put_back()
        seen = {loader for layer in self.layers for loader in layer.validation}
        if not seen or loader in seen:  # it is the first one
            self.gate.is_validation_new, self._standings.are_averaged = True, are_averaged
            for layer in self.layers:
                layer.hook.trained_in_validation = False
        for layer in self.layers:
            layer.start_validation(loader)
        self.go_on_with_validation()

    def go_on_with_validation(self) -> None:
        """Look at what is called in eval mode again."""
        self._forget_last_calls()  # what goes the short way does not ask whether it is within validation
        self.gate.validating = True

    # Not before the first call: weights may be swapped for it as late as in a validation step.
    @never_compiled
    @torch.inference_mode(False)
    def _keep_for_validation(self) -> None:
        """Keep the running statistics that a validation begins with."""
        self.gate.is_validation_new = False
        self._standings.keep(self.layers)

    def rewritten(self, histories: Mapping[BatchNorm, History | None]) -> None:
        """Take note that we have just written the running statistics of these layers, and what they are made of.

        None: what they were made of before.
        """
        self.flush()
        here = [layer for layer in self.layers if layer.module in histories]
        for layer, now in _with_snapshots(here):
            if not self.is_closed and layer.window is not None:
                layer.window.forget_weights(layer.index)
            layer.rewritten(now._replace(history=histories[layer.module]), self.is_closed)
        self._standings.rewritten(here)

    def state(self) -> dict[str, Any]:
        """The window so far, as one CPU tensor and primitives."""
        self.put_back()
        self.flush()
        rows = self.windows.state(self.layers)
        return {
            "version": STATE_VERSION,
            "rank": collectives.rank(),
            "closed": self.is_closed,
            "steps_in_eval_mode": self.gate.steps_in_eval_mode,
            "told_of_steps": self.gate.steps > 0 or self._was_told_of_steps,
            "seen_step": self._has_seen_step,
            **rows,
        }

    @torch.inference_mode(False)
    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Put a saved window in the place of the present one.

        What another rank had seen is left out: on this one the window begins anew.

        Returns:
            What does not fit, in words: layers that were left out, and layers that the state does not know.
        """
        self.windows = Windows(has_masks=self.masks is not None)
        self.places.forget()
        self._standings.forget()
        self.gate.steps_in_eval_mode = state["steps_in_eval_mode"]
        self._was_told_of_steps = state["told_of_steps"]
        self._last_seen_step = self.gate.steps if state["seen_step"] else -1
        self.gate.begin_group(0)
        self._reopen()
        for layer in self.layers:
            layer.forget()
        by_name = {layer.name: layer for layer in self.layers}
        known, left_out = self.windows.restore(state, by_name)
        new = [layer for name, layer in by_name.items() if name not in known]
        self._begin(new)
        if state["rank"] != collectives.rank():
            self.windows.reset()
            self.gate.steps_in_eval_mode = 0
            for layer, now in _with_snapshots(self.layers):
                layer.restart(layer.end if state["closed"] and layer.end is not None else now)
        self._keep_weights()
        if state["closed"]:
            self._stop_counting()
        differences = {
            "left out, as the model has none of that name and width": left_out,
            "new": [layer.name for layer in new],
        }
        return [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]

    def _follow_places(self) -> None:
        """Find out where layers stand that are called several times in a step; what is compiled is left alone."""
        called_again = self.windows.call_sites.layers
        if called_again and self.is_attached and not any(layer.counts.paths["traced"] for layer in self.layers):
            self.places.follow(called_again)
        for layer in called_again:
            if not math.isnan(counted := self.places.calls_per_model_call(layer)):
                layer.calls_per_model_call = counted

    def _keep_weights(self) -> None:
        self.gate.has_stepped = False
        self._at_start = AffineWeights([layer.module for layer in self.layers])

    def _new_layer(self, name: str, module: BatchNorm) -> TrackedLayer:
        layer = TrackedLayer(name, module, self.gate, self.flush, self._keep_for_validation, self._at_fixed_weights)
        layer.hook.by_pass = self._by_pass
        return layer

    @staticmethod
    def _begin(layers: Sequence[TrackedLayer]) -> None:
        for layer, now in _with_snapshots(layers):
            layer.begin_window(now)

    def _stop_counting(self) -> None:
        self.gate.is_closed = True
        self._forget_last_calls()

    def _forget_last_calls(self) -> None:
        for layer in self.layers:
            layer.hook.forget_last_call()  # what goes the short way does not ask whether it counts

    def _reopen(self) -> None:
        if self.is_closed:
            self.drain()  # of what was called since, which does not count
            self.gate.is_closed = False


def _with_snapshots(layers: Sequence[TrackedLayer]) -> list[tuple[TrackedLayer, Snapshot]]:
    """Layers, and their running statistics as they are now."""
    return list(zip(layers, snapshots([layer.module for layer in layers]), strict=True))


def recorders_of(layers: Iterable[BatchNorm]) -> list[Recorder]:
    """What records any of these layers for a tracker that is attached."""
    modules, attached = set(layers), [recorder for recorder in list(_recorders) if recorder.is_attached]
    return [recorder for recorder in attached if any(layer.module in modules for layer in recorder.layers)]
