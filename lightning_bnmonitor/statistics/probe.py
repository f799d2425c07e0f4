r"""Whether the data come in random order: random projections of what a training step is given.

Batch means of a layer's inputs move with the order of the data *and* with the weights, and one window does not tell the
two apart. In a projection of the model's inputs no weight enters. With x a batch's inputs, ``(B, D)``, and U standard
normal numbers of a fixed seed, divided by the root of their number, a batch is seen through

.. math:: q = x U - c, \qquad a = |q|,

16 channels each, c the mean of :math:`x U` over the first batch of the window: a change of the mean shows in q, one of
the spread in a. Both go through the machinery of :mod:`~lightning_bnmonitor.statistics.window` as if a BatchNorm layer
received them. The *scores* are the ordering ratio (J - 1 and :math:`\nu` degrees of freedom) and the grouping ratio
(:math:`\nu`, and the number of samples) of :mod:`~lightning_bnmonitor.statistics.batching` on the scale of a standard
normal variable (:func:`~lightning_bnmonitor.statistics.scores.f_score`), the larger of the two sets each. Their degrees
of freedom are those of a single channel, as all 16 are one if the inputs have one direction that dominates: then random
order exceeds :data:`LIMIT` by chance in some 2 % of windows for each score, and as a rule in none.

**Bounded.** Of a sample at most 256 values are looked at, at points of a Sobol sequence in the unit cube: the same
relative positions at any size, so that images of varying size, or sequences of varying length, are comparable. Of a
batch at most 64 samples. Token ids are looked up in U, modulo 256, and averaged over the positions. Several inputs are
added, each weighted so that it scatters as the first does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from operator import delitem
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from lightning_bnmonitor.statistics.batching import batching_of
from lightning_bnmonitor.statistics.blocks import Blocks, paired
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.contrasts import densities_of, squares_of, sums_of
from lightning_bnmonitor.statistics.scores import MEAN, f_score
from lightning_bnmonitor.statistics.side_by_side import on_device
from lightning_bnmonitor.statistics.window import Batches, Window, commit

LIMIT = 2.0
"""Score from which on data are not in random order."""
_CHANNELS = 16
_POINTS, _SAMPLES = 256, 64
_STEPS = 64  # of a window that are all looked at, and then a quarter as many of each doubling
_TOGETHER = 2 * _SAMPLES  # samples that are summed up at once,
_ROWS = 16  # of at most so many batches
_WAITING = 64  # batches that may wait to be merged
_PLANS = 4  # shapes of inputs of which it is kept how they are projected
_WINDOW_BYTES = 8 * Window.CHANNEL_ROWS * 2 * _CHANNELS
_WAITING_BYTES = 4 * _CHANNELS * (_TOGETHER + 3 * (_WAITING + _ROWS))
_MOMENTUM = 0.1  # any: there are no running statistics
_MIN_BATCHES, _MIN_DOF = 8, 4
_ROUNDING = 1e-6  # of a projection in float32, up to which batches do not differ


class Scores(NamedTuple):
    """How far data are from random order, on the scale of a standard normal variable; NaN if that cannot be told."""

    order: float
    """By how much parts of the window differ."""
    group: float
    """By how much the samples of a batch resemble each other."""


class _Sums(NamedTuple):
    """What is kept of T batches, of 16 channels."""

    num_batches: int
    """T."""
    num_samples: int
    """Samples of each that were looked at, B."""
    total: Tensor
    """Sums of q, ``(T, 16)``."""
    size: Tensor
    """Sums of a, ``(T, 16)``."""
    length: Tensor
    """Roots of the sums of the squares of either, ``(T, 16)``."""


class InputProbe:
    """A window of what training steps are given, in the place of a layer's."""

    def __init__(self) -> None:
        self._window: Window | None = None  # of q and a, from the first batch on
        self._projection: _Projection | None = None
        self._rows: list[Tensor] = []  # q of the last batches, which all have as many samples
        self._waiting: list[_Sums] = []  # of those before, to be merged
        self.reset()

    @property
    def max_bytes(self) -> int:
        """Memory that it takes of inputs of the shapes that it knows; 0 before the first."""
        return 0 if self._projection is None else _WINDOW_BYTES + _WAITING_BYTES + self._projection.nbytes

    def reset(self) -> None:
        """Forget all batches."""
        self._rows.clear()
        self._waiting.clear()
        self._num_steps = self._due_step = 0  # so far, and when the next one is to be looked at
        self._is_complete = True  # whether there was something to look at in each step
        self._center: Tensor | None = None  # c
        self._scales = torch.empty(0, device="cpu")  # of several inputs, what each is multiplied by
        if self._window is not None:
            self._window.reset()

    def give_up(self) -> None:
        """Tell nothing of this window, as not all of it was seen."""
        self._is_complete = False

    @property
    def is_due(self) -> bool:
        """Whether the next training step would be looked at."""
        return self._num_steps >= self._due_step and self._is_complete

    def skip(self) -> None:
        """Count a training step without looking at it."""
        self._num_steps += 1

    @property
    def _num_waiting(self) -> int:
        return sum(sums.num_batches for sums in self._waiting)

    def see(self, inputs: Sequence[Tensor]) -> None:
        """Look at what a training step is given: floating-point inputs or token ids ``(B, *)`` on one device.

        Of the first 64 steps of a window each is looked at; from then on 16 in each doubling of their number.
        """
        is_due = self.is_due
        self.skip()
        if not is_due:
            return
        self._due_step = _due_from(self._num_steps)
        if torch.is_inference_mode_enabled():  # what is kept is gone on with in any mode
            with torch.inference_mode(False):
                self._look_at(inputs)
        else:
            self._look_at(inputs)

    @torch.no_grad()
    def _look_at(self, inputs: Sequence[Tensor]) -> None:
        if self._num_waiting >= _WAITING:
            self._merge()
        device = inputs[0].device if inputs else None
        projection = self._projection
        is_elsewhere = projection is None or projection.device != device
        if device is not None and is_elsewhere and self._center is None:  # nothing of this window was seen
            projection, is_elsewhere = self._place(device), False
        if projection is None or is_elsewhere:
            self._is_complete = False
        elif torch.is_autocast_enabled(projection.device.type):
            with torch.autocast(projection.device.type, enabled=False):
                self._take(projection, inputs)
        else:
            self._take(projection, inputs)

    @torch.no_grad()
    def _merge(self) -> None:
        """Merge what waits into the window, in one step."""
        self._sum_up()
        waiting = self._waiting[:]
        if self._window is None or not waiting:
            return
        counts = tuple(sums.num_samples for sums in waiting for _ in range(sums.num_batches))
        samples = on_device(np.array(counts, dtype=np.float32)[:, None], waiting[0].total.device)
        _, _, totals, sizes, lengths = zip(*waiting, strict=True)
        means, squares = [torch.cat(each) / samples for each in (totals, sizes)], torch.cat(lengths).square() / samples
        same = (None,) * len(counts), (_MOMENTUM,) * len(counts), counts
        batches = {
            layer: Batches(counts, mean.unbind(), (squares - mean.square()).clamp_min_(0).unbind(), *same)
            for layer, mean in enumerate(means)
        }
        commit([*self._window.merged(batches), partial(delitem, self._waiting, slice(len(waiting)))])

    def scores(self) -> Scores | None:
        """How far the data of the window so far are from random order; None if that is not known."""
        self._merge()
        if self._window is None or self._center is None or not self._is_complete:
            return None
        scores = scores_of(self._window.blocks(), float(self._center.square().mean()))
        return scores if all(map(math.isfinite, scores)) else None  # of batches that are all the same, they are not

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        self._merge()
        window = self._window
        return {
            "channels": None if window is None else window.channel_state(),
            "layers": [] if window is None else [window.layer_state(layer) for layer in range(2)],
            "center": None if self._center is None else self._center.cpu(),
            "scales": self._scales.cpu(),
            "num_steps": self._num_steps,
            "is_complete": self._is_complete,
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a :meth:`state`, on a device, where nothing was seen yet."""
        self._num_steps, self._is_complete = state["num_steps"], state["is_complete"]
        self._due_step = _due_from(self._num_steps)
        if state["channels"] is not None:
            self._place(device)
            assert self._window is not None
            for layer, own in enumerate(state["channels"].split(_CHANNELS, dim=1)):
                self._window.restore(layer, own, state["layers"][layer])
            self._center = None if state["center"] is None else state["center"].to(device)
            self._scales = state["scales"].to(device)

    def _place(self, device: torch.device) -> _Projection:
        self._projection = _Projection(device)
        self._window = Window(torch.device("cpu") if device.type == "mps" else device)
        self._window.add_layers([_CHANNELS] * 2)
        return self._projection

    def _take(self, projection: _Projection, inputs: Sequence[Tensor]) -> None:
        first, *others = inputs
        if self._center is not None and len(others) != len(self._scales):
            self._is_complete = False
            return
        if not others and self._center is not None:
            q = projection(first, self._center)
        else:
            parts = [projection(x) for x in inputs]
            if self._center is None and others:
                extent = torch.stack([part.var(0, correction=0).mean().sqrt() for part in parts])
                scales = extent[0] / extent[1:]
                self._scales = torch.where(scales.isfinite() & (scales > 0), scales, 1)
            q = sum((part * scale for part, scale in zip(parts[1:], self._scales, strict=True)), parts[0])
            self._center = q.mean(0) if self._center is None else self._center
            q = q - self._center
        rows, num_samples = self._rows, q.shape[0]
        is_full = len(rows) == _ROWS or (len(rows) + 1) * num_samples > _TOGETHER
        if rows and (is_full or rows[0].shape[0] != num_samples):
            self._sum_up()
        self._rows.append(q)

    def _sum_up(self) -> None:
        """Several batches at once: each operation takes as long as for one."""
        rows = self._rows[:]
        if rows:
            q = torch.stack(rows)
            norms = (torch.linalg.vector_norm(q, order, dim=1) for order in (1, 2))
            sums = _Sums(len(rows), q.shape[1], q.sum(1), *norms)
            commit([partial(self._waiting.append, sums), partial(delitem, self._rows, slice(len(rows)))])


def _due_from(step: int) -> int:
    """The first step from this one on that is to be looked at."""
    doublings = (step // _STEPS).bit_length()
    stride = 2 << doublings if doublings else 1
    return -(-step // stride) * stride


class _Plan(NamedTuple):
    """How inputs of one shape are projected."""

    points: Tensor | None
    """Which of a sample's values are looked at, ``(256,)``; None if all are."""
    weights: Tensor
    """U, ``(D, 16)``."""


class _Projection:
    """Random projections of inputs of any shapes.

    Args:
        device: Where the inputs are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._plans: dict[tuple[torch.Size, bool], _Plan] = {}

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        kept = {id(part): part.nbytes for plan in self._plans.values() for part in plan if part is not None}
        return sum(kept.values())

    def __call__(self, x: Tensor, center: Tensor | None = None) -> Tensor:
        """XU less ``center``, ``(B, 16)`` float32, of the first 64 samples of an input ``(N, *)``."""
        x = x if x.shape[0] <= _SAMPLES else x[:_SAMPLES]
        is_number = x.is_floating_point() or x.dtype == torch.uint8
        plan = self._plans.get((x.shape[1:], is_number)) or self._new_plan(x.shape[1:], is_number)
        if x.ndim != 2:
            x = x.flatten(1) if x.ndim > 1 else x[:, None]
        if plan.points is not None:
            x = x.index_select(1, plan.points)
        if is_number and center is not None:
            return torch.addmm(center, x.float(), plan.weights, beta=-1)
        if is_number:
            return x.float() @ plan.weights
        of_tokens = nn.functional.embedding_bag(x.remainder(_POINTS), plan.weights, mode="mean")
        return of_tokens if center is None else of_tokens - center

    @cached_property
    def _directions(self) -> Tensor:
        """U for the points of a sample, for all shapes."""
        return on_device(_directions(), self.device)

    def _new_plan(self, shape: torch.Size, is_number: bool) -> _Plan:
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        size = shape.numel()
        if size > _POINTS:
            plan = _Plan(on_device(_points(shape).astype(np.int32), self.device), self._directions)
        elif is_number:  # the same, without a step that selects: a value counts as often as there are points in it
            directions = np.zeros((size, _CHANNELS), dtype=np.float32)
            np.add.at(directions, _points(shape), _directions())
            plan = _Plan(None, on_device(directions, self.device))
        else:
            plan = _Plan(None, self._directions)
        self._plans[shape, is_number] = plan
        return plan


def scores_of(blocks: Blocks, offset: float) -> Scores:
    """The scores of blocks of q and a, which are two layers there; NaN if batches differ by rounding alone.

    Args:
        blocks: Theirs.
        offset: Mean square of c, which tells how large rounding is.
    """
    with np.errstate(all="ignore"):
        blocks = paired(blocks)
        layout, densities = ChannelLayout(blocks.widths), densities_of(blocks)
        sums = sums_of(blocks, densities, layout)
        population = squares_of(densities, sums, layout) / layout.spread(densities.total[MEAN] - 1)
        scale = sums.within / layout.spread(densities.dof)
        of_batches = scale[MEAN] * layout.spread(densities.num_batches / densities.total[MEAN])
        population = np.where(of_batches > _ROUNDING**2 * (population + offset), population, np.nan)
        its = batching_of(blocks, densities, sums, scale, population, layout)
        dof = densities.dof
        order = f_score(its.ordering_ratio, densities.num_blocks - 1, dof)
        group = f_score(its.grouping_ratio, dof, densities.total[MEAN])
        is_known = (densities.num_batches >= _MIN_BATCHES) & (dof >= _MIN_DOF)
        largest = (np.fmax.reduce(np.where(is_known, score, np.nan)) for score in (order, group))
    return Scores(*(float(score) for score in largest))


@cache
def _directions() -> NDArray[np.float32]:
    """U for the points of a sample, ``(256, 16)``."""
    numbers = np.random.default_rng(0).standard_normal((_POINTS, _CHANNELS), dtype=np.float32)
    directions: NDArray[np.float32] = numbers / np.float32(math.sqrt(_POINTS))
    return directions


def _points(shape: Sequence[int]) -> NDArray[np.int64]:
    """The points of a sample of this shape, as indices of its values, ``(256,)``."""
    if not shape:
        return np.zeros(_POINTS, dtype=np.int64)
    inside = np.minimum((_unit_points(len(shape)) * shape).astype(np.int64), np.array(shape) - 1)
    points: NDArray[np.int64] = np.ravel_multi_index(tuple(inside.T), tuple(shape))
    return points


@cache
def _unit_points(num_dims: int) -> NDArray[np.float64]:
    """The points in the unit cube, ``(256, num_dims)``."""
    engine = SobolEngine(num_dims, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    unit: NDArray[np.float64] = engine.draw(_POINTS, dtype=torch.float64).numpy()
    return unit
