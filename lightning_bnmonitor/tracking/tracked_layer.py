"""One monitored layer: its hook, how it has been called in the window, and what the windows before have left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import delitem, setitem
from typing import Any

import torch
from torch import Tensor

from lightning_bnmonitor.capture.batch_moments import PATHS, BatchMoments
from lightning_bnmonitor.capture.calls import Call, CallKind
from lightning_bnmonitor.capture.layer_hook import Gate, LayerHook, group_of, parts_of
from lightning_bnmonitor.capture.saved import has_own_forward
from lightning_bnmonitor.compat import BatchNorm, is_capturing
from lightning_bnmonitor.diagnosis.circumstances import BadBatch
from lightning_bnmonitor.diagnosis.validation import Standing
from lightning_bnmonitor.statistics.borders import Edges
from lightning_bnmonitor.statistics.joined_windows import KeptWindow
from lightning_bnmonitor.statistics.pooled_calls import PooledCalls
from lightning_bnmonitor.statistics.window import Batches, Window, Write
from lightning_bnmonitor.tracking.buffers import FRESH, History, Snapshot
from lightning_bnmonitor.tracking.call_counts import CallCounts, WaitingCalls, effective_momentum

_ANY_WEIGHT = 0.1  # of calls that update nothing, where that plays no part
_SAVED_OF_HOOK = ("by_pass", "skipped", "checkpointed", "own_forward", "calls_in_eval_mode")


LeftBehind = tuple[BatchMoments, Callable[[BatchMoments], None]]
"""The moments of one call in compiled code, in memory that may be the compiler's own, and what takes them."""


class TrackedLayer:
    """One BatchNorm layer: its hook, its calls since the last merge, and how it has been called in this window.

    Args:
        name: Its name in the report.
        module: The layer. (The layer alone: a reference to the model would keep that alive.)
        gate: Tells its hook whether a call counts.
        flush: Merges what waits.
        begin_validation: Called before the first call in a validation is taken, of whatever layer.
        at_fixed_weights: Whether calls that update nothing are kept in the order of time, as those that do are
            otherwise.
    """

    def __init__(
        self,
        name: str,
        module: BatchNorm,
        gate: Gate,
        flush: Callable[[], None],
        begin_validation: Callable[[], None],
        at_fixed_weights: bool = False,
    ) -> None:
        self._at_fixed_weights = at_fixed_weights
        self.name = name
        self.module = module
        self.gate = gate
        self.flush = flush
        self.begin_validation = begin_validation
        self.hook = LayerHook(gate, flush, self.receive_empty, self.validate)
        self.validation: dict[int, PooledCalls] = {}  # by the loader of the batches
        self._in_validation = PooledCalls()  # of the present loader
        self.val_running: Tensor | None = None  # running statistics as validation began, if they have a part in it
        self.val_standing = Standing.ABSENT  # what they were then
        self.window: Window | None = None  # where its channels are accumulated, from its first merge on
        self.index = -1
        self.width = 0  # channels of what is stashed and accumulated; 0 before the first call
        self.counts = CallCounts(dict.fromkeys(PATHS, 0))
        self.steps_before = gate.steps  # when it was made or restored: its step may have begun before that
        self.interrupted = False  # whether the window was resumed from the middle of a step
        self.written_outside = False  # whether something else wrote the buffers before the window began
        self.assumed_updates: float = 1  # of the buffers by one call
        self.next_assumed_updates: float = 1
        self.start = Snapshot()  # the running statistics when the window began,
        self.end: Snapshot | None = None  # when the last one ended,
        self.written: Snapshot | None = None  # and as we have written them since
        self.earlier: Sequence[KeptWindow] = ()  # short windows that this one goes on from
        self.edges: Edges | None = None  # of the window before, if its data may have come in an order,
        self.end_edges: Edges | None = None  # and of the one that has ended
        self.has_fixed_weights = False  # whether they neither train nor change otherwise, when last looked at
        self.call_shift = math.nan  # of the last window that had one
        self.bad: BadBatch | None = None  # what the running statistics are not finite of, if it is known
        self.calls_per_model_call = math.nan  # as it was last known

    def begin_window(self, now: Snapshot) -> None:
        """Count calls from 0, on the running statistics as they are now."""
        self.counts = self.counts.restarted()
        self.assumed_updates = self.next_assumed_updates
        self.hook.skipped, self.hook.checkpointed, self.hook.is_wide = 0, False, False
        self.hook.calls_in_eval_mode = self.hook.recomputed = 0
        self.interrupted = False
        known = [old for old in (self.end, self.written) if old is not None and old.has_same_buffers(now)]
        has_ended = self.end is not None and self.end.buffers is not None
        self.written_outside = has_ended and not known
        if self.end is None or self.end.history is None or not self.end.has_same_buffers(now):
            self.earlier = ()
        self.start = now._replace(history=known[0].history if known else None)
        self.written = None
        self.edges, self.end_edges = self.end_edges, None
        self.bad = self.bad and self.bad._replace(windows_ago=self.bad.windows_ago + 1)
        self._assume_fresh_if_initial()

    def restart(self, now: Snapshot) -> None:
        """Count calls from 0 again in the same window, on these running statistics."""
        self.counts = self.counts.restarted()
        self.hook.skipped, self.hook.checkpointed = 0, False
        self.hook.calls_in_eval_mode = self.hook.recomputed = 0
        self.interrupted = self.written_outside = False
        self.start, self.earlier = now._replace(history=None), ()
        self.edges = self.end_edges = None
        self._assume_fresh_if_initial()

    def rewritten(self, now: Snapshot, window_ended: bool) -> None:
        """Go on from running statistics that we have written; without a history they are made of what they were."""
        if window_ended:
            self.written = now if now.history is not None else None
            return
        self.start, self.earlier = self.start._replace(buffers=now.buffers, history=now.history), ()
        self._assume_fresh_if_initial()

    def end_window(self, end: Snapshot, updates: float) -> None:
        """Keep what the next window goes on from, and how often a call updated the running statistics in this one.

        A call is taken to update them repeatedly if it was recomputed, or normalises in parts, and that is what they
        were updated by. Where some were recomputed and it is not known which, all have their mean.
        """
        self.end = end
        if not math.isnan(updates):
            of_repeated = self.updates_of_repeated(updates)
            may_repeat = self.hook.checkpointed or self.normalises_in_parts
            if not (may_repeat and of_repeated >= 1 and float(of_repeated).is_integer()):
                self.next_assumed_updates = 1
            else:
                self.next_assumed_updates = int(of_repeated) if self.counts.repeated else updates

    @property
    def num_calls(self) -> int:
        """Counted calls in this window, those that wait included."""
        return self.counts.total + len(self.hook.stash)

    def receive_empty(self, updating: bool) -> None:
        """Count a call with an empty batch, which has no moments. ``updating`` tells whether BatchNorm counted it."""
        with self.gate.lock:
            self.flush()
            self.counts = self.counts._replace(updating=self.counts.updating + updating)

    def start_validation(self, loader: int) -> None:
        """Look at what is called in validation from now on, as batches of that loader."""
        self.validation[loader] = self._in_validation = PooledCalls()

    def end_validation(self) -> None:
        """Drop what was seen in validation."""
        self.validation, self.val_running, self.val_standing = {}, None, Standing.ABSENT

    def validate(self, moments: BatchMoments) -> None:
        """Take the moments of one call in validation."""
        if self.gate.is_validation_new:
            self.begin_validation()
        if self.module.training:  # it normalises by the batch there, too
            self.val_running, self.val_standing = None, Standing.ABSENT
        with self.gate.lock:
            self._in_validation.add(moments.num_samples, moments.batch_size, moments.mean, moments.spread)

    def left_behind(self) -> list[LeftBehind]:
        """What compiled graphs have left behind, if it counts, and what takes each. It is not there any more then."""
        gate, hook = self.gate, self.hook
        if not (hook.traced or hook.traced_validation or hook.traced_in_eval_mode):
            return []
        in_eval_mode, hook.traced_in_eval_mode = hook.traced_in_eval_mode, ()
        if not (gate.paused or gate.is_closed):
            hook.calls_in_eval_mode += len(in_eval_mode)
        validated, hook.traced_validation = hook.traced_validation, ()
        traced, hook.traced = hook.traced, ()
        if is_capturing():  # a CUDA graph, whose replays write over them
            hook.skipped += len(traced)
            return []
        left: list[LeftBehind] = []
        if gate.validating and not gate.paused:
            left += [(moments, self.validate) for moments in validated if moments.num_samples]
        if not (gate.paused or gate.is_closed):
            left += [
                (moments, partial(hook.receive, self.module, training, updating))
                for moments, training, updating in traced
            ]
        return left

    def waiting(self, calls: Sequence[Call]) -> WaitingCalls:
        """Calls that wait to be merged, field by field. Those of another width than the first contribute nothing."""
        mean, spread, marks, kinds = zip(*calls, strict=True)
        num_calls = len(calls)
        if kinds.count(kinds[0]) == num_calls:  # as a rule: one for all
            kinds = kinds[:1]
        if any(kind.width != self.width for kind in kinds):  # it may be given others
            fitting = [call for call in calls if call[-1].width == self.width]
            rest = self.waiting(fitting) if fitting else WaitingCalls(None, self.counts, 0, 0)
            return rest._replace(skipped=num_calls - len(fitting), num_calls=num_calls)
        times = num_calls // len(kinds)
        parts: tuple[int, ...] = marks
        groups: tuple[int, ...] = ()
        if self.gate.has_groups:
            parts, groups = tuple(map(parts_of, marks)), tuple(map(group_of, marks))
        num_samples, eps, batch_size = zip(*((k.num_samples, k.eps, k.batch_size) for k in kinds), strict=True)
        momentum = self._effective_momenta(kinds, times)
        batches = Batches(num_samples * times, mean, spread, eps * times, momentum, batch_size * times)
        paths = dict(self.counts.paths)
        for kind in kinds:
            paths[kind.path] += times
        kept = self._at_fixed_weights
        updating = (call for call in zip(reversed(momentum), reversed(kinds), strict=False) if kept or call[1].updating)
        last = next(updating, None)
        counts = CallCounts(
            paths=paths,
            training=self.counts.training + times * sum(kind.training for kind in kinds),
            updating=self.counts.updating + times * sum(kind.updating for kind in kinds),
            repeated=self.counts.repeated + times * sum(kind.updating and kind.intercepted for kind in kinds),
            momentum=self.counts.momentum if last is None else last[0],
            last_num_samples=self.counts.last_num_samples if last is None else last[1].num_samples,
            last_part=parts[-1],
            num_ranks=kinds[-1].num_ranks,
            left_out=self.counts.left_out,
            serial=self.counts.serial or any(kind.serial for kind in kinds),
        )
        return WaitingCalls(batches, counts, 0, num_calls, parts, groups)

    def taken(self, waiting: WaitingCalls) -> list[Write]:
        """What is to be written when calls that waited, from the first on, are merged."""
        return [
            partial(setitem, vars(self), "counts", waiting.counts),
            partial(setitem, vars(self.hook), "skipped", self.hook.skipped + waiting.skipped),
            partial(delitem, self.hook.stash, slice(waiting.num_calls)),
        ]

    @property
    def is_within_step(self) -> bool:
        """Whether it was called since a training step was last told to have ended. False before the first was."""
        return self.gate.steps > self.steps_before and self.counts.last_part >= self.gate.parts_before

    def updates_of_a_call(self, now: Snapshot) -> float:
        """Updates of the buffers for each call that was to update them; NaN before the first, or if not counted.

        Negative if the counter was set back.
        """
        if now.num_tracked is None or not self.counts.updating:
            return float("nan")
        updates = now.num_tracked - (self.start.num_tracked or 0)
        if not updates and now.buffers is not None and not self.start.has_same_buffers(now):
            return float("nan")  # a `forward` of its own that counts none
        if self.counts.left_out and now.buffers is not None and not now.buffers.isfinite().all():
            return float("nan")  # a guard puts back only what was finite before, and its count with it
        return updates / self.counts.updating

    @property
    def normalises_in_parts(self) -> bool:
        """Whether a ``forward`` of its own has a BatchNorm kernel in it, but the output is not that of one alone."""
        return self.hook.own_forward is False and has_own_forward(self.module)

    def updates_of_repeated(self, updates: float) -> float:
        """Updates by a call that is made again, if all calls make so many on average and the others make one each."""
        return self.counts.updates_of_repeated(updates, self.hook.recomputed)

    @property
    def assumed_updates_of_a_call(self) -> float:
        """What the weights of the batches rest on, on average over all calls."""
        updating, repeated = self.counts.updating, self.counts.repeated
        return 1 + (self.assumed_updates - 1) * repeated / updating if repeated else self.assumed_updates

    def forget(self) -> None:
        """Drop what waits, the place in the window, and the windows before."""
        self.hook.stash.clear()
        self.hook.forget_last_call()
        self.window, self.index, self.width = None, -1, 0
        self.hook.traced, self.end, self.written, self.earlier = (), None, None, ()
        self.edges = self.end_edges = self.bad = None
        self.call_shift = self.calls_per_model_call = math.nan

    def buffer_state(self, width: int) -> Tensor:
        """What :meth:`restore` needs per channel, ``(6, C)``: the buffers at the windows' ends, and written since."""
        missing = torch.full((2, width), torch.nan, dtype=torch.float64, device="cpu")
        known = [snapshot and snapshot.buffers for snapshot in (self.start, self.end, self.written)]
        return torch.cat([missing if buffers is None or buffers.shape[1] != width else buffers for buffers in known])

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides, in primitives."""
        end, written = self.end or Snapshot(), self.written or Snapshot()
        return {
            "calls": dict(self.counts.paths),
            "training_calls": self.counts.training,
            "tracked_calls": self.counts.updating,
            "repeated_calls": self.counts.repeated,
            "momentum": self.counts.momentum,
            "last_num_samples": self.counts.last_num_samples,
            "serial": self.counts.serial,
            "left_out": self.counts.left_out,
            "num_ranks": self.counts.num_ranks,
            "within_step": self.is_within_step,
            "interrupted": self.interrupted,
            "written_outside": self.written_outside,
            "updates_per_call": self.assumed_updates,
            "next_updates_per_call": self.next_assumed_updates,
            "call_shift": self.call_shift,
            "calls_per_model_call": self.calls_per_model_call,
            "bad": self.bad and tuple(self.bad),
            "edges": [edges and edges.state() for edges in (self.edges, self.end_edges)],
            "tracked_before": self.start.num_tracked,
            "history": self.start.history and tuple(self.start.history),
            "has_start": self.start.buffers is not None,
            "tracked_end": end.num_tracked,
            "last_history": end.history and tuple(end.history),
            "has_end": end.buffers is not None,
            "history_since": written.history and tuple(written.history),
            "has_since": written.buffers is not None,
            "recomputed": self.hook.recomputed,
            **{field: getattr(self.hook, field) for field in _SAVED_OF_HOOK},
        }

    def restore(self, state: Mapping[str, Any], buffers: Tensor) -> None:
        """Go on as the layer whose :meth:`state` and :meth:`buffer_state` these are."""
        start, end, written = (part.clone() for part in torch.split(buffers.cpu(), 2))
        self.counts = CallCounts(
            paths={path: state["calls"].get(path, 0) for path in PATHS},
            training=state["training_calls"],
            updating=state["tracked_calls"],
            repeated=state["repeated_calls"],
            momentum=state["momentum"],
            last_num_samples=state["last_num_samples"],
            num_ranks=state["num_ranks"],
            serial=state["serial"],
            left_out=state.get("left_out", 0),  # the states of 0.5.0 have none
        )
        self.steps_before = self.gate.steps
        self.interrupted = state["interrupted"] or state["within_step"]
        self.written_outside = state["written_outside"]
        self.call_shift = state["call_shift"]
        self.calls_per_model_call = state.get("calls_per_model_call", math.nan)  # the first states had none
        self.bad = state["bad"] and BadBatch(*state["bad"])
        self.edges, self.end_edges = (saved and Edges.of_state(saved) for saved in state["edges"])
        self.assumed_updates, self.next_assumed_updates = state["updates_per_call"], state["next_updates_per_call"]
        history, last_history = _history(state["history"]), _history(state["last_history"])
        self.start = Snapshot(start if state["has_start"] else None, state["tracked_before"], history)
        ended = Snapshot(end if state["has_end"] else None, state["tracked_end"], last_history)
        self.end = None if ended == Snapshot() else ended
        self.written = Snapshot(written, None, _history(state["history_since"])) if state["has_since"] else None
        for field in _SAVED_OF_HOOK:
            setattr(self.hook, field, state[field])
        self.hook.recomputed = state.get("recomputed", 0)  # likewise

    def _assume_fresh_if_initial(self) -> None:
        """What no batch has updated yet is made of the initial values alone."""
        if self.start.history is None and self.start.is_initial:
            self.start = self.start._replace(history=FRESH)

    def _effective_momenta(self, kinds: Sequence[CallKind], times: int) -> tuple[float, ...]:
        """Weight of each call in the buffers right after it; 0 for a call that updates nothing.

        It updates them :attr:`assumed_updates` times, or once if others are known to be made again and it is not.
        ``kinds`` are of the calls, or one, so many times, if they are alike.
        """
        if self._at_fixed_weights:
            return (_ANY_WEIGHT,) * (len(kinds) * times)
        some_are = self.counts.repeated > 0 or any(kind.updating and kind.intercepted for kind in kinds)
        updates = [
            0 if not kind.updating else self.assumed_updates if kind.intercepted or not some_are else 1
            for kind in kinds
        ]
        if times > 1 and updates[0] and kinds[0].momentum is not None:
            return (effective_momentum(kinds[0].momentum, updates[0]),) * times
        before = self.counts.updating * (1 if some_are else self.assumed_updates)
        before += self.counts.repeated * (self.assumed_updates - 1)
        weights = []
        for kind, number in zip([*kinds] * times, updates * times, strict=True):
            before += number
            if not number or (kind.momentum is None and self.start.num_tracked is None):
                weights.append(0.0)  # without a counter of updates, BatchNorm makes none
            elif kind.momentum is None:  # a cumulative average: its k-th update has weight 1/k
                weights.append(number / ((self.start.num_tracked or 0) + before))
            else:
                weights.append(effective_momentum(kind.momentum, number))
        return tuple(weights)


def _history(saved: Sequence[float] | None) -> History | None:
    return None if saved is None else History(*saved)
