r"""Whether the calls of a layer within a training step differ: real and fake, left and right, source and target.

The calls of one step have the same weights, so that what tells them apart is what they are given. With :math:`x_{t,j}`
the mean (the unbiased variance) of call j of step t, the *contrasts* of a step of :math:`J_t \ge 2` calls are

.. math:: d_{t,k} = x_{t,k} - \frac{1}{J_t} \sum_j x_{t,j}, \qquad k = 1, 2, 3,

and a fourth, the mean of those of all further calls. Steps of one call have none. Of each contrast the mean D over its
:math:`T_k` steps and the sum of squares about it are kept, V the latter over :math:`T_k - 1`.

**Shift.** With s the population variance plus ``eps``, unit :math:`\sqrt s` for means and :math:`2 s` for variances,

.. math:: \text{shift}_k^2 = \sum_f g_{k,f}
    \max\Bigl(\operatorname{mean}\frac{D_f^2 - V_f / T_k}{\text{unit}_f^2},\, 0\Bigr),

in standard deviations of the normalised activation, to first order (0.35 for 0.43). :math:`g_{k,f}` is 1 where the
scores of :math:`D / \sqrt{V / T_k}`, Student's t with :math:`T_k - 1` degrees of freedom, exceed chance over the
layer's channels (:func:`~lightning_bnmonitor.statistics.scores.exceeds_chance`, with the limit 9 where steps have two
calls, and 12 where they have more, as more is compared), else 0; and 0 with fewer than 8 steps. Calls that could be
exchanged, such as micro-batches or crops, cannot have one but by chance.

Where an optimizer moves the weights between the calls of a step, it counts as several steps.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.scores import exceeds_chance, squared_score

KINDS = 4
"""Contrasts of a step: of its first three calls, and of all further ones."""
_FIRST = KINDS - 1
_MIN_STEPS = 8
_LIMIT_OF_TWO, _LIMIT_OF_MORE = 9.0, 12.0
_CONTRAST, _M2, _OPEN = range(3)

ROWS = (3, KINDS, 2)
"""What is kept per channel, of mean and variance each: D, the sum of squares about it, and of the step in progress the
values of its first three calls and the sum of those of all further ones."""
SAVED = 2 * KINDS * 2
"""Rows of these that outlive a step: the first two."""


class Progress(NamedTuple):
    """What has been seen of a layer's steps. Layers with the same go on together."""

    num_steps: tuple[int, ...] = (0,) * KINDS
    """T_k: steps that have each contrast."""
    steps: int = 0
    """Steps with a call."""
    calls: int = 0
    """Calls in them."""
    open_step: int = -1
    """Steps that had ended before the one in progress."""
    open_calls: int = 0
    """Calls of that so far."""
    lost_step: int = -1
    """The same of a step that does not count, as calls of it were not kept."""

    def restarted(self) -> Progress:
        """That of a window that begins. A step that goes on does not count in it."""
        return Progress(lost_step=self.open_step if self.open_calls else self.lost_step)


class CallContrasts(NamedTuple):
    """The contrasts of layers that are called several times in a step, flat over their channels."""

    layers: list[int]
    """Which of the layers that were asked for they are of, L of them."""
    progress: list[Progress]
    """Of each."""
    mean: FloatArray
    """D, ``(4, 2, C)``."""
    m2: FloatArray
    """Sum of squares about it, ``(4, 2, C)``."""


class CallShifts(NamedTuple):
    """How far the calls of a step are apart, ``(L,)`` each."""

    shift: FloatArray
    """The largest of the shifts; 0 if all may be chance; NaN with fewer than 8 steps of several calls."""
    kind: FloatArray
    """k of that, from 1."""
    calls_per_step: FloatArray
    """Calls in a step, on average."""


class _Merged(NamedTuple):
    """A contrast of some steps: its mean and the sum of squares about that, ``(2, C)`` each."""

    mean: Tensor
    m2: Tensor


@torch.no_grad()
def with_steps(
    rows: Tensor, progress: Progress, values: Tensor, steps: tuple[int, ...], ended: int
) -> tuple[Tensor, Progress]:
    """Add consecutive calls of layers that go on together.

    Args:
        rows: What is kept of them, ``(3, 4, 2, C)``: see :data:`ROWS`.
        progress: What has been seen of them.
        values: Means and unbiased variances of the calls, ``(N, 2, C)`` float64.
        steps: Training steps that had ended before each call, ``(N,)``.
        ended: Training steps that have ended now: calls of earlier ones are complete.

    Returns:
        The same of all calls so far, in new memory.
    """
    rows = rows.clone()
    runs = _runs_of(steps)
    if runs and runs[0][0] == progress.lost_step:
        del runs[0]
    going_on = progress.open_calls and (progress.open_step < ended or (runs and runs[0][0] == progress.open_step))
    if going_on:
        more = 0
        if runs and runs[0][0] == progress.open_step:
            _, start, more = runs.pop(0)
            _add_to_open(rows[_OPEN], progress.open_calls, values[start : start + more])
        progress = progress._replace(open_calls=progress.open_calls + more)
        if progress.open_step < ended:
            progress = _with_contrasts(rows, progress, 1, _contrasts_of_open(rows[_OPEN], progress.open_calls))
            progress = _counted(progress, 1, progress.open_calls)._replace(open_step=-1, open_calls=0)
    starts: dict[int, list[int]] = defaultdict(list)
    for step, start, num_calls in runs:
        if step < ended:
            starts[num_calls].append(start)
        else:
            rows[_OPEN] = 0
            _add_to_open(rows[_OPEN], 0, values[start : start + num_calls])
            progress = progress._replace(open_step=step, open_calls=num_calls)
    for num_calls, firsts in starts.items():
        if num_calls > 1:
            progress = _with_contrasts(rows, progress, len(firsts), _contrasts_of(values, firsts, num_calls))
        progress = _counted(progress, len(firsts), num_calls)
    return rows, progress


def call_shifts(contrasts: CallContrasts, layout: ChannelLayout, scaled: FloatArray) -> CallShifts:
    """How far the calls of a step are apart, chance taken off.

    Args:
        contrasts: Of L layers.
        layout: Which channels are whose, of these layers.
        scaled: s: population variance plus ``eps``, ``(C,)``.
    """
    num_steps: FloatArray = np.array([its.num_steps for its in contrasts.progress], dtype=float).T  # (4, L)
    enough = num_steps >= _MIN_STEPS
    with np.errstate(all="ignore"):
        count = layout.spread(np.where(enough, num_steps, np.nan))[:, None]
        variance = contrasts.m2 / (count - 1) / count
        z = np.where(contrasts.mean == 0, 0 * count, np.clip(contrasts.mean / np.sqrt(variance), -1e100, 1e100))
        limit = np.where(num_steps[2] > 0, _LIMIT_OF_MORE, _LIMIT_OF_TWO)
        counted = exceeds_chance(layout, squared_score(z, np.broadcast_to(count - 1, z.shape)), limit)
        excess = layout.mean((contrasts.mean**2 - variance) / np.stack([scaled, 4 * scaled**2]))
        squares = np.where(counted, np.maximum(excess, 0), 0).sum(axis=1)
        shift = np.where(enough.any(axis=0), np.sqrt(squares.max(axis=0)), np.nan)
        calls, steps = (np.array([getattr(its, of) for its in contrasts.progress]) for of in ("calls", "steps"))
        largest = squares >= 0.999 * squares.max(axis=0)  # of two calls, both are
        return CallShifts(shift, largest.argmax(axis=0) + 1.0, calls / steps)


def _runs_of(steps: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Of each step: its number, the first of its calls, and how many it has."""
    starts = [0, *(index for index in range(1, len(steps)) if steps[index] != steps[index - 1])] if steps else []
    stops = [*starts[1:], len(steps)]
    return [(steps[start], start, stop - start) for start, stop in zip(starts, stops, strict=bool(steps))]


def _counted(progress: Progress, num_steps: int, num_calls: int) -> Progress:
    return progress._replace(steps=progress.steps + num_steps, calls=progress.calls + num_steps * num_calls)


def _add_to_open(opened: Tensor, before: int, values: Tensor) -> None:
    """Add calls to the step in progress, ``(4, 2, C)``, that has had so many."""
    first = max(min(_FIRST - before, len(values)), 0)
    opened[before : before + first] = values[:first]
    opened[_FIRST] += values[first:].sum(dim=0)


def _contrasts_of_open(opened: Tensor, num_calls: int) -> list[_Merged]:
    """The contrasts of the step in progress, once it has ended; none if it has had one call."""
    if num_calls < 2:
        return []
    mean = opened.sum(dim=0) / num_calls
    first = min(num_calls, _FIRST)
    contrasts = [*(opened[:first] - mean)]
    contrasts += [opened[_FIRST] / (num_calls - _FIRST) - mean] * (num_calls > _FIRST)
    return [_Merged(contrast, torch.zeros_like(contrast)) for contrast in contrasts]


def _contrasts_of(values: Tensor, firsts: list[int], num_calls: int) -> list[_Merged]:
    """The contrasts of steps of so many calls each, which begin at these calls."""
    start, stop = firsts[0], firsts[0] + len(firsts) * num_calls
    if firsts == [*range(start, stop, num_calls)]:
        steps = values[start:stop].view(len(firsts), num_calls, *values.shape[1:])
    else:
        steps = torch.stack([values[first : first + num_calls] for first in firsts])
    if num_calls == 2:  # the second contrast is the first with the other sign
        mean, m2 = _merged(steps[:, 0] - steps[:, 1])
        return [_Merged(mean / 2, m2 / 4), _Merged(mean / -2, m2 / 4)]
    mean = steps.mean(dim=1)
    contrasts = [_merged(call - mean) for call in steps[:, :_FIRST].unbind(1)]
    if num_calls > _FIRST:
        contrasts.append(_merged(steps[:, _FIRST:].mean(dim=1) - mean))
    return contrasts


def _merged(contrasts: Tensor) -> _Merged:
    """A contrast of several steps, ``(T, 2, C)``, whose memory is used. As it is about 0, its squares may be summed."""
    mean = contrasts.mean(dim=0)
    squares = contrasts.square_().sum(dim=0)
    return _Merged(mean, squares.addcmul_(mean, mean, value=-len(contrasts)).clamp_min_(0))


def _with_contrasts(rows: Tensor, progress: Progress, added: int, contrasts: list[_Merged]) -> Progress:
    """Add the contrasts of so many steps: Chan's merge. ``rows`` change in place."""
    num_steps = list(progress.num_steps)
    for kind, (mean, m2) in enumerate(contrasts):
        before = num_steps[kind]
        num_steps[kind] = total = before + added
        apart = mean - rows[_CONTRAST, kind]
        rows[_CONTRAST, kind].add_(apart, alpha=added / total)
        rows[_M2, kind].add_(m2).add_(apart.square_(), alpha=before * added / total)
    return progress._replace(num_steps=tuple(num_steps))
