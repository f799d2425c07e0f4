"""The engine: takes what a model's BatchNorm layers receive, and reports. Needs no Lightning."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import nn

from lightning_bnmonitor.capture.attachment import Attachment
from lightning_bnmonitor.capture.batch_moments import CaptureMode, owned
from lightning_bnmonitor.capture.layer_hook import Gate
from lightning_bnmonitor.compat import BatchNorm
from lightning_bnmonitor.report.report import Report
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.arguments import as_patterns, check_choice
from lightning_bnmonitor.tracking.assessment import assess
from lightning_bnmonitor.tracking.buffers import History, snapshots
from lightning_bnmonitor.tracking.discovery import find_layers
from lightning_bnmonitor.tracking.measurement import is_inexact
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from lightning_bnmonitor.tracking.validation import with_validation
from lightning_bnmonitor.tracking.windows import Windows

_STATE_VERSION = 6
_NO_MODEL = "The model of this BatchNormTracker no longer exists. Make a new tracker."

_attached: weakref.WeakSet[BatchNormTracker] = weakref.WeakSet()


class BatchNormTracker:
    """Exact statistics of every BatchNorm layer's inputs beside its running statistics, in any PyTorch loop.

    A call counts while the model (the root, not the layer) is in training mode and :meth:`paused` is not in force, so
    that validation does not, and frozen layers inside a training model do. Nothing that is computed changes: hooks only
    read, and never wait for the device within a step.

    State is 600 bytes a channel, about 850 bytes a layer, and the batch moments of up to 72 calls (8 bytes a channel
    each, twice as many in float64 or by a pass): as many as keep it below 1 KiB a channel + 64 KiB. It is float64, on
    the layers' device (on the CPU for MPS, which has none).

    Args:
        model: The root module. It is not kept alive; its BatchNorm layers are, for the report. If it is compiled, pass
            what ``torch.compile`` returned.
        include: ``fnmatch`` patterns of the names of layers to monitor; None for all.
        exclude: ``fnmatch`` patterns of the names of layers to leave out.
        capture: ``"auto"`` takes the batch moments in the cheapest way that is exact; ``"pass"`` makes a pass of its
            own over every input: slower, and the reference for the others. What ``torch.compile`` has compiled takes
            them in its graph either way.

    Raises:
        TypeError: If ``include`` or ``exclude`` is neither None nor strings.
        ValueError: If ``capture`` is unknown.

    Example::

        >>> import torch
        >>> from lightning_bnmonitor import BatchNormTracker
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> with BatchNormTracker(model) as tracker:
        ...     for _ in range(10):
        ...         _ = model(torch.randn(8, 4))
        >>> report = tracker.report()
        >>> report["1"].num_batches, report["1"].num_samples
        (10, 80)
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        capture: CaptureMode = "auto",
    ) -> None:
        check_choice("capture", capture, get_args(CaptureMode))
        self._include = as_patterns("include", include)
        self._exclude = as_patterns("exclude", exclude)
        self._always_pass = capture == "pass"
        self._model = weakref.ref(model)
        self._gate = Gate(model)
        self._layers: list[TrackedLayer] = []  # in the order of the model's modules
        self._windows = Windows()
        self._attachment: Attachment | None = None
        self._closing: Report | None = None  # the report of a window that has ended, once it was asked for
        self._pending: Mapping[str, Any] | None = None  # a state that waits for `attach`

    def __enter__(self) -> BatchNormTracker:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormTracker:
        # A detached one, of the copy of the model if that is what is copied.
        model = self._model()
        if model is None:
            raise RuntimeError(_NO_MODEL)
        twin = BatchNormTracker(
            memo.get(id(model), model), self._include, self._exclude, "pass" if self._always_pass else "auto"
        )
        twin.load_state_dict(self.state_dict())
        return twin

    @property
    def is_attached(self) -> bool:
        """Whether hooks are on the model."""
        return self._attachment is not None

    def attach(self) -> BatchNormTracker:
        """Put hooks on the model's layers and begin a window; after :meth:`detach`, go on with the one it interrupted.

        Harmless when attached. What ``torch.compile`` compiled before is compiled once more.

        Returns:
            This tracker.

        Raises:
            RuntimeError: If the model no longer exists.
            ValueError: If a pattern matches no BatchNorm layer.
        """
        if self._attachment is not None:
            return self
        model = self._model()
        if model is None:
            raise RuntimeError(_NO_MODEL)
        known = {layer.module: layer for layer in self._layers}
        found = find_layers(model, self._include, self._exclude)
        self._layers = [known.get(module) or self._new_layer(name, module) for name, module in found.items()]
        _begin_window([layer for layer in self._layers if layer.module not in known])
        hooks = {layer.module: layer.hook for layer in self._layers}
        self._attachment = Attachment(model, self._gate, hooks, drain=self._drain, after_step=self._merge_if_full)
        _attached.add(self)
        if self._pending is not None:
            self._restore(self._pending)
            self._pending = None
        return self

    def detach(self) -> None:
        """Remove every hook and keep the statistics. Harmless when detached."""
        if self._attachment is not None:
            self._drain()
            self._attachment.remove()
            self._attachment = None
            _attached.discard(self)

    def step(self) -> None:
        """Tell that a training step has ended, one batch with all that belongs to it.

        A loop that does so is told when a window was resumed from a state saved in the middle of a step (flag
        ``interrupted-batch``). It is a good time to merge what waits, too, as after the steps of ``torch.optim``
        optimizers, which are noticed without it.
        """
        self._gate.steps += 1
        self._merge_if_full()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which no call counts."""
        self._drain()
        self._gate.paused += 1
        self._forget_last_calls()
        try:
            yield
        finally:
            self._drain()
            self._gate.paused -= 1

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Merge what waits into the window, all layers at once. This changes no result, whenever it is done."""
        with self._gate.lock:
            self._drain()
            self._gate.is_full = False
            self._windows.merge(self._layers)

    def close(self, all_ranks: bool = False) -> Report:
        """End the window and report it. What is called until :meth:`reset` does not count.

        If something else writes running statistics in between, this is noticed when the next window begins.

        Args:
            all_ranks: Whether to report on all ranks of the default process group of ``torch.distributed`` together:
                the population is that of all their data, running statistics, verdicts and numbers of calls are those
                of rank 0. Every rank has to call this, and gets the same report, also one whose layers were never
                called. It takes two collectives: a gather to rank 0 of 56 bytes a channel from each rank, and a
                broadcast of 64. One that a rank never joins ends with the timeout of the process group. Without a
                process group, and for a window that has ended, it is as if False.

        Raises:
            RuntimeError: If another rank has failed.
        """
        if not self._gate.is_closed:
            self._closing = self._end_window(all_ranks and collectives.num_ranks() > 1)
        return self.report()

    @torch.inference_mode(False)
    def reset(self) -> None:
        """End the window, if that has not been done, and begin another.

        What this one has shown decides how the next one looks. If the absolute mean exceeded 100 times sqrt(var + eps)
        in any channel of a layer (10 times if its inputs had one position a sample or were in channels-last format),
        its moments are taken by a pass. If its buffers were updated u times a call (activation checkpointing), its
        momentum is taken to be that of u updates.
        """
        self.close()
        self._windows.reset()
        _begin_window(self._layers)
        self._reopen()

    def rewritten(self, histories: Mapping[BatchNorm, History | None]) -> None:
        """Take note that we have just written the running statistics of these layers, and what they are made of.

        None: what they were made of before.
        """
        self.flush()
        here = [layer for layer in self._layers if layer.module in histories]
        for layer, now in zip(here, snapshots([layer.module for layer in here]), strict=True):
            if not self._gate.is_closed and layer.window is not None:
                layer.window.forget_weights(layer.index)
            layer.rewritten(now._replace(history=histories[layer.module]), self._gate.is_closed)

    def start_validation(self, loader: int = 0) -> None:
        """Look at what is called in eval mode from now on, by a pass over each input.

        Calls are pooled as they come: until :meth:`validation_report`, this takes 32 bytes a channel. Calls within
        :meth:`paused` are not looked at.

        Args:
            loader: The validation loader whose batches follow, counted from 0. What was seen of it before is dropped,
                and what was seen of others is kept.
        """
        self.stop_validation()
        for layer in self._layers:
            layer.start_validation(loader)
        self._gate.validating = True

    def stop_validation(self) -> None:
        """Look at no more of it. Harmless when repeated."""
        self._drain()
        self._gate.validating = False

    @torch.inference_mode(False)
    def validation_report(self, all_ranks: bool = False, num_loaders: int | None = None) -> Report:
        """:meth:`report`, and how far from training is what was looked at since :meth:`start_validation`.

        If the window has ended, it is the report from then on.

        Args:
            all_ranks: Whether all ranks call this, and tell of what they have seen together: a gather to rank 0 of 64
                bytes a channel and loader, and a broadcast of as many.
            num_loaders: How many validation loaders there are, where a rank may have seen no batch of one of them.
        """
        self.stop_validation()
        seen = max((loader + 1 for layer in self._layers for loader in layer.validation), default=0)
        together = all_ranks and collectives.num_ranks() > 1
        report = with_validation(self.report(), self._layers, together, num_loaders or max(seen, together))
        if self._gate.is_closed:
            self._closing = report
        for layer in self._layers:
            layer.validation = {}
        return report

    @torch.inference_mode(False)
    def report(self) -> Report:
        """Where the running statistics stand against what the layers have received in this window, on this rank.

        After :meth:`close`, where they stood then.
        """
        if self._closing is not None:
            return self._closing
        self.flush()
        report, _ = assess(self._layers, self._windows, ended=self._gate.is_closed)
        self._closing = report if self._gate.is_closed else None
        return report

    def state_dict(self) -> dict[str, Any]:
        """The window so far, as one CPU tensor and primitives: for a checkpoint in mid-window.

        Of several ranks it is this one's: no rank waits for another.
        """
        if self._pending is not None:
            return dict(self._pending)
        self.flush()
        state = self._windows.state(self._layers)
        return {"version": _STATE_VERSION, "rank": collectives.rank(), "closed": self._gate.is_closed, **state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a saved window in the place of the present one; before :meth:`attach`, as soon as that is called.

        A layer of the model that the state does not know begins with an empty window. What is saved of layers that the
        model does not have, or with another width, is left out. A warning names them all. What another rank had seen
        is left out, too: on this one the window begins anew.

        Raises:
            ValueError: If the state is not one that :meth:`state_dict` of this version returned.
        """
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"`state_dict` must be what BatchNormTracker.state_dict() returned, of version {_STATE_VERSION}; "
                f"got version {state_dict.get('version')!r}."
            )
        if self._attachment is not None:
            self._restore(state_dict)
        else:
            self._pending = state_dict

    @torch.inference_mode(False)
    def _end_window(self, all_ranks: bool) -> Report:
        """Report the window, keep what the next one goes on from, and count no more."""
        self.flush()
        report, endings = assess(self._layers, self._windows, all_ranks=all_ranks)
        for ending in endings:
            layer, known, now = ending.state
            layer.end_window(now._replace(history=ending.history), known.updates_per_call)
            if layer.num_calls:
                layer.hook.by_pass = self._always_pass or is_inexact(ending)
        self._stop_counting()
        return report

    def _stop_counting(self) -> None:
        self._gate.is_closed = True
        self._forget_last_calls()

    def _forget_last_calls(self) -> None:
        for layer in self._layers:
            layer.hook.forget_last_call()  # what goes the short way does not ask

    def _reopen(self) -> None:
        if self._gate.is_closed:
            self._drain()  # of what was called since, which does not count
            self._closing = None
            self._gate.is_closed = False

    def _new_layer(self, name: str, module: BatchNorm) -> TrackedLayer:
        layer = TrackedLayer(name, module, self._gate, self.flush)
        layer.hook.by_pass = self._always_pass
        return layer

    def _merge_if_full(self) -> None:
        if self._gate.is_traced:
            self._drain()
        if self._gate.is_full:
            self.flush()

    def _drain(self) -> None:
        """Take what compiled graphs have left behind."""
        gate = self._gate
        gate.is_traced = False
        for layer in self._layers:
            hook = layer.hook
            if hook.traced_validation:
                traced_validation, hook.traced_validation = hook.traced_validation, ()
                for batch in traced_validation if gate.validating and not gate.paused else ():
                    if batch.num_samples:
                        layer.validate(owned(batch))
            if hook.traced:
                traced, hook.traced = hook.traced, ()
                for moments, training, updating in traced if not (gate.paused or gate.is_closed) else ():
                    moments_or_none = owned(moments) if moments.num_samples else None
                    hook.receive(layer.module, moments_or_none, training, updating)

    @torch.inference_mode(False)
    def _restore(self, state: Mapping[str, Any]) -> None:
        """Put a saved window in the place of the present one."""
        self._windows = Windows()
        self._reopen()
        for layer in self._layers:
            layer.forget()
        by_name = {layer.name: layer for layer in self._layers}
        known, left_out = self._windows.restore(state, by_name)
        new = [layer for name, layer in by_name.items() if name not in known]
        _begin_window(new)
        if state["rank"] != collectives.rank():
            self._windows.reset()
            for layer, now in zip(self._layers, snapshots([layer.module for layer in self._layers]), strict=True):
                layer.restart(now if not state["closed"] or layer.end is None else layer.end)
        if state["closed"]:
            self._stop_counting()
        changes = [
            f"{what}: {', '.join(names)}"
            for what, names in (
                ("left out, as the model has none of that name and width", left_out),
                ("new", [layer.name for layer in new]),
            )
            if names
        ]
        if changes:
            warnings.warn(
                f"BatchNorm layers have changed since the state was saved; {'; '.join(changes)}.", stacklevel=3
            )


def _begin_window(layers: Sequence[TrackedLayer]) -> None:
    for layer, now in zip(layers, snapshots([layer.module for layer in layers]), strict=True):
        layer.begin_window(now)


def trackers_of(layers: Iterable[BatchNorm]) -> list[BatchNormTracker]:
    """The trackers that are attached to any of these layers."""
    modules = set(layers)
    return [tracker for tracker in list(_attached) if any(layer.module in modules for layer in tracker._layers)]
