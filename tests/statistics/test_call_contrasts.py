"""How far the calls of a step are apart: against the definition in numpy, and by simulation what chance makes of it."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_bnmonitor.statistics.call_contrasts import ROWS, CallContrasts, CallShifts, Progress, call_shifts
from lightning_bnmonitor.statistics.call_contrasts import with_steps as add_steps
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout

Values = NDArray[np.float64]


class Kept(NamedTuple):
    """What is kept after some steps."""

    rows: torch.Tensor
    progress: Progress


def streamed(steps: list[Values], chunks: list[int] | None = None) -> Kept:
    """What is kept of steps, ``(J, 2, C)`` each, that come in chunks of so many calls; the last step has ended."""
    values = torch.from_numpy(np.concatenate(steps))
    numbers = [number for number, step in enumerate(steps) for _ in step]
    rows, progress, start = torch.zeros(*ROWS, values.shape[2], dtype=torch.float64), Progress(), 0
    for chunk in [*(chunks or []), len(values)]:
        stop = min(start + chunk, len(values))
        ended = len(steps) if stop == len(values) else numbers[stop - 1]
        rows, progress = add_steps(rows, progress, values[start:stop], tuple(numbers[start:stop]), ended)
        start = stop
    return Kept(rows, progress)


def contrasts_by_definition(steps: list[Values]) -> list[Values]:
    """``(T_k, 2, C)`` for each of the four."""
    found: list[list[Values]] = [[] for _ in range(4)]
    for step in steps:
        if len(step) >= 2:
            apart = step - step.mean(axis=0)
            for k in range(min(len(step), 3)):
                found[k].append(apart[k])
            if len(step) > 3:
                found[3].append(apart[3:].mean(axis=0))
    return [np.array(each).reshape(-1, *steps[0].shape[1:]) for each in found]


def shifts_of(kept: list[Kept], scaled: Values | float = 1.0) -> CallShifts:
    """Of layers by themselves, with s as given."""
    rows = np.concatenate([each.rows.numpy() for each in kept], axis=-1)
    layout = ChannelLayout(np.array([each.rows.shape[-1] for each in kept]))
    contrasts = CallContrasts(list(range(len(kept))), [each.progress for each in kept], rows[0], rows[1])
    return call_shifts(contrasts, layout, np.broadcast_to(scaled, layout.num_channels))


def shift_by_definition(steps: list[Values], scaled: Values) -> tuple[float, int]:
    """The largest shift and its k, each step of the definition in a loop of its own."""
    shifts = []
    limit = 12.0 if any(len(step) > 2 for step in steps) else 9.0
    for values in contrasts_by_definition(steps):
        num, total = len(values), 0.0
        if num < 8:
            shifts.append(0.0)
            continue
        for f, unit in enumerate((np.sqrt(scaled), 2 * scaled)):
            mean, variance = values[:, f].mean(axis=0), values[:, f].var(axis=0, ddof=1)
            z, dof, width = mean / np.sqrt(variance / num), num - 1, len(scaled)
            score = (8 * dof + 1) / (8 * dof + 3) * np.sqrt(dof * np.log(1 + z**2 / dof))
            if f == 0:
                counted = np.mean(score**2) > limit
            else:
                counted = np.median(score**2) > max(4.1, limit - 0.7 * (width - 1))
            total += counted * max(np.mean((mean**2 - variance / num) / unit**2), 0)
        shifts.append(np.sqrt(total))
    return max(shifts), int(np.argmax(np.array(shifts) > 0.999 * max(shifts))) + 1


def drawn(rng: np.random.Generator, calls: list[int], width: int, apart: Any = 0.0) -> list[Values]:
    """Steps of so many calls, moments of 16 normal values each; the mean of the first call lies ``apart``."""
    steps = []
    for num in calls:
        x = rng.normal(size=(num, 16, width))
        x[0] += apart
        steps.append(np.stack([x.mean(axis=1), x.var(axis=1, ddof=1)], axis=1))
    return steps


# By hand and by definition


def test_the_contrasts_of_three_steps_by_hand():
    def step(*means: float) -> Values:
        return np.array([[[mean], [10.0 * mean]] for mean in means], dtype=float)

    rows, progress = streamed([step(1, 3), step(7), step(2, 8), step(5, 5, 5, 1)])
    assert progress == Progress(num_steps=(3, 3, 1, 1), steps=4, calls=9)
    np.testing.assert_allclose(rows[0, :, 0, 0], [(-1 - 3 + 1) / 3, (1 + 3 + 1) / 3, 1, -3])
    np.testing.assert_allclose(rows[0, :, 1, 0], [-10, 50 / 3, 10, -30])
    np.testing.assert_allclose(rows[1, :, 0, 0], [0 + 4 + 4, (4 + 16 + 4) / 9, 0, 0], atol=1e-12)


@given(
    calls=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    chunks=st.lists(st.integers(1, 9), max_size=20),
    mean=st.sampled_from([0.0, 1e6]),
)
def test_they_are_those_of_the_definition_however_the_calls_are_merged(calls, chunks, mean):
    rng = np.random.default_rng(len(calls))
    steps = [step + mean for step in drawn(rng, calls, 3, apart=0.7)]
    rows, progress = streamed(steps, chunks)
    assert (progress.steps, progress.calls) == (len(calls), sum(calls))
    for k, expected in enumerate(contrasts_by_definition(steps)):
        assert progress.num_steps[k] == len(expected)
        if len(expected):
            tolerance = 1e-12 * (1 + mean)
            np.testing.assert_allclose(rows[0, k], expected.mean(axis=0), atol=tolerance)
            m2 = ((expected - expected.mean(axis=0)) ** 2).sum(axis=0)
            np.testing.assert_allclose(rows[1, k], m2, rtol=1e-9, atol=10 * tolerance)


@pytest.mark.parametrize("calls", [[2] * 30, [3, 2] * 20, [5] * 12, [1, 2, 4, 6] * 9, [2] * 20 + [3] * 7])
@pytest.mark.parametrize("apart", [0.0, 0.4])
def test_the_shift_is_that_of_the_definition(calls, apart):
    rng = np.random.default_rng(1)
    steps, scaled = drawn(rng, calls, 32, apart), rng.uniform(0.5, 2, 32)
    found = shifts_of([streamed(steps)], scaled)
    shift, kind = shift_by_definition(steps, scaled)
    assert found.shift == pytest.approx(shift)
    assert found.kind == kind
    assert (shift > 0) == (apart > 0)
    assert found.calls_per_step == pytest.approx(np.mean(calls))


def test_seven_steps_are_too_few_and_eight_are_not():
    rng = np.random.default_rng(2)
    few, enough = (streamed(drawn(rng, [2] * num, 16, apart=2.0)) for num in (7, 8))
    assert np.isnan(shifts_of([few]).shift)
    assert shifts_of([enough]).shift == pytest.approx(1.0, rel=0.1)  # each is half of 2 off the middle


def test_calls_that_differ_the_same_way_in_every_step_are_apart_and_equal_calls_are_not():
    step = np.array([[[0.0], [1.0]], [[0.5], [1.0]]])
    assert shifts_of([streamed([step] * 8)]).shift == pytest.approx(0.25)
    assert shifts_of([streamed([step[[0, 0]]] * 8)]).shift == 0


def test_a_channel_that_is_not_finite_is_left_out():
    steps = drawn(np.random.default_rng(3), [2] * 40, 4, apart=1.0)
    steps[5][1, :, 2] = np.nan
    assert shifts_of([streamed(steps)]).shift == pytest.approx(0.5, rel=0.1)


def test_a_step_that_does_not_end_does_not_count():
    steps = drawn(np.random.default_rng(4), [2, 2], 1)
    values = torch.from_numpy(np.concatenate(steps))
    _, progress = add_steps(torch.zeros(*ROWS, 1, dtype=torch.float64), Progress(), values, (0, 0, 1, 1), 1)
    assert progress == Progress(num_steps=(1, 1, 0, 0), steps=1, calls=2, open_step=1, open_calls=2)
    assert progress.restarted() == Progress(lost_step=1)


# By simulation

KINDS_OF_CALLS = {
    "two": lambda rng, step: 2,
    "accumulated": lambda rng, step: 4,
    "crops": lambda rng, step: 3,
    "varying": lambda rng, step: int(rng.integers(1, 7)),
    "alternating": lambda rng, step: 2 - step % 2,
}


def exchangeable(rng: np.random.Generator, kind: str, num_steps: int, width: int, skewed: bool, equal: bool) -> Kept:
    """A layer whose calls are all of one law, with correlated channels, weights that drift and sizes as asked for."""
    steps = []
    for number in range(num_steps):
        means = []
        for _ in range(KINDS_OF_CALLS[kind](rng, number)):
            n = 16 if equal else int(rng.choice([4, 16, 64]))
            x = rng.normal(size=(n, width)) + 0.7 * rng.normal(size=(n, 1)) + number / num_steps
            x = np.exp(0.7 * x) if skewed else x
            means.append(np.stack([x.mean(axis=0), x.var(axis=0, ddof=1)]))
        steps.append(np.array(means))
    return streamed(steps)


@pytest.mark.slow
def test_no_exchangeable_calls_are_flagged():
    """480 layer-windows: none above 0.05 but where steps are few and channels one, where one in a hundred may be."""
    settings = itertools.product(KINDS_OF_CALLS, [8, 20, 60], [1, 4, 16, 64], [False, True], [False, True])
    shifts = []
    for number, (kind, num_steps, width, skewed, equal) in enumerate(settings):
        for repetition in range(2):
            rng = np.random.default_rng([number, repetition])
            kept = exchangeable(rng, kind, num_steps, width, skewed, equal)
            scale = 1.49 * (1 if not skewed else 2.5)
            shifts.append(shifts_of([kept], scale).shift.item())
    found = np.nan_to_num(shifts)
    assert len(found) == 480
    print(f"{(found > 0).sum()} of {len(found)} by chance, {(found >= 0.1).sum()} above 0.1")
    assert (found >= 0.1).sum() <= 4
    assert (found > 0).sum() <= 10


@pytest.mark.parametrize(("num_steps", "shift", "least"), [(40, 0.3, 0.6), (100, 0.3, 0.9), (100, 0.2, 0.7)])
def test_calls_that_differ_are_found(num_steps, shift, least):
    rng = np.random.default_rng(5)
    kept = [streamed(drawn(rng, [2] * num_steps, 16, apart=2 * shift)) for _ in range(40)]
    found = shifts_of(kept).shift
    assert (found > 0).mean() >= least
    np.testing.assert_allclose(found[found > 0].mean(), shift, rtol=0.15)


def test_the_contrast_of_exchangeable_calls_has_the_variance_that_is_said():
    """D / sqrt(V / T) of normal values: unit variance within 20 %, for every contrast."""
    rng = np.random.default_rng(6)
    rows, progress = streamed(drawn(rng, [5] * 60, 2000))
    z = rows[0] / (rows[1] / 59 / 60).sqrt()
    assert progress.num_steps == (60,) * 4
    np.testing.assert_allclose(z.square().mean(dim=-1).sqrt(), 1, atol=0.1)
