"""What a window's blocks say: the sampling noise of running statistics, where they come from, and the statistics now.

The model is that of PyTorch's update, ``running = (1 - m) * running + m * x``, with x the mean of a batch (weight
g = n) or its unbiased variance (weight g = n - 1), and Var(x) = V / g: V is estimated from the differences between
neighbouring batches, so that neither correlated pixels nor a slow drift of the weights enters. Whatever is asked of the
window is a contrast, a weighted sum of the blocks' values: its variance is V times a number known from the weights.

Everything is computed on the host in float64, for the channels of all layers at once. ``f`` is 0 for the mean and 1 for
the variance buffer; arrays per layer are ``(L,)`` or ``(2, L)``, per channel ``(C,)`` or ``(2, C)``, flat over layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lightning_bnmonitor.statistics.segments import BoolArray, FloatArray, Segments, student_score
from lightning_bnmonitor.statistics.window import MAX_BLOCKS, Blocks, paired

_INITIAL = np.array([[0.0], [1.0]])  # what PyTorch initialises the buffers to
_NEGLIGIBLE = 1e-9  # relative size of a sum of squares that is rounding
ROUNDING = 1e-14  # relative rounding of a sum over blocks
_MEAN, _VAR = 0, 1


class Buffers(NamedTuple):
    """Running statistics at a window's two ends, and what is known of the time before it."""

    start: FloatArray
    """Running mean and variance when the window began, ``(2, C)``."""
    end: FloatArray
    """The same now, ``(2, C)``."""
    initial_weight: FloatArray
    """A0: the weight that the initial 0 and 1 still had in ``start``, ``(L,)``; 0 if unknown."""
    noise: FloatArray
    """Q0: the sum over earlier batches of their squared weights in ``start`` over n and n - 1, ``(2, L)``."""
    rounding: FloatArray
    """Half the spacing of the buffers' numbers at 1, ``(L,)``."""
    known: BoolArray
    """Whether the weights of the window's batches in ``end`` are known, ``(L,)``."""


@dataclass(frozen=True)
class Profile:
    """What the blocks of a window say, for all layers of one device."""

    layers: Segments
    """Which channels are whose."""
    num_batches: FloatArray
    """T: batches that updated the running statistics, ``(L,)``."""
    samples_per_batch: FloatArray
    """Mean number of values per channel in them, ``(L,)``."""
    batch_size: FloatArray
    """Mean number of samples in them, ``(L,)``."""
    dof: FloatArray
    """Degrees of freedom of the variance between batches, ``(L,)``."""
    initial_weight: FloatArray
    """Weight of the initial values in the buffers now, ``(L,)``."""
    noise: FloatArray
    """Sum of squared weights over n (n - 1) in the buffers now, ``(2, L)``: what A0 and Q0 are for the next window."""
    unit: FloatArray
    """Population standard deviation, and twice the population variance, both with ``eps``, ``(2, C)``."""
    noise_scale: FloatArray
    """V: variance of a batch's mean (variance) times its weight, ``(2, C)``."""
    std_error: FloatArray
    """Standard deviation of the buffers' own sampling noise, ``(2, C)``; NaN if not known."""
    z: FloatArray
    """The buffers against this window's reference, over what sampling noise explains, ``(2, C)``: 0 if not known."""
    score: FloatArray
    """``z`` on the scale of a standard normal variable, ``(2, C)``."""
    z_lag: FloatArray
    """The same against the whole window and against now, what is left of the initial values apart, ``(2, 2, C)``."""
    num_samples: FloatArray
    """Values per channel in all calls, whether they updated the running statistics or not, ``(L,)``."""
    population: FloatArray
    """Exact mean and unbiased variance of all these values, ``(2, C)``; NaN where there are none, or just one."""
    reference: FloatArray
    """Mean of the means (weight n) and variances (n - 1) of batches that updated the running statistics, ``(2, C)``."""
    now: FloatArray
    """Mean, and unbiased variance over all values, as the weights are at the end of the window, ``(2, C)``."""
    noise_error: FloatArray
    """RMS error of the normalised activation that the buffers' own sampling noise makes, ``(L,)``."""
    now_error: FloatArray
    """The same of the sampling noise in ``now``, ``(L,)``."""
    warmup_error: FloatArray
    """The same of what is left of the initial values, ``(L,)``."""
    lag_error: FloatArray
    """The same of batches of other weights (or data) than now's, chance taken off, ``(L,)``; 0 if it may be chance."""
    drift_error: FloatArray
    """The same of the whole window's statistics against now's, ``(L,)``; 0 if it may be chance."""
    max_score: FloatArray
    """Largest magnitude of any channel's score in any of these comparisons, ``(L,)``."""
    slope: FloatArray
    """Drift per batch in normalised activations, chance taken off, ``(L,)``."""
    jitter: FloatArray
    """RMS difference that a batch's own sampling noise makes in training, ``(L,)``."""
    ordering_ratio: FloatArray
    """Variance between blocks of batch means over that expected from the variance within, ``(L,)``."""
    ordering_limit: FloatArray
    """What chance explains of it, ``(L,)``."""
    ordering_share: FloatArray
    """Share of the population variance that lies between blocks, chance taken off, ``(L,)``."""
    trend_share: FloatArray
    """Share of that which is a straight line in time, ``(L,)``."""
    grouping_ratio: FloatArray
    """Variance of batch means over that of as many independent samples, ``(L,)``."""
    grouping_limit: FloatArray
    """What chance explains of it, ``(L,)``."""
    grouping_share: FloatArray
    """Share of the population variance by which batches differ more than by chance, ``(L,)``."""
    first_bad: FloatArray
    """The first call with a value that is not finite, ``(C,)``; inf if none."""


class Tails(NamedTuple):
    """The last three runs of blocks of about an eighth of the batches each, the last one first."""

    members: FloatArray
    """Which blocks are in which, ``(3, 16)`` of 0 and 1."""
    step: float
    """h: how far the end of the window lies beyond the middle of the last run, in distances of the last two."""
    ratio: float
    """k: the distance between the earlier two over that between the later two; 0 with fewer than three."""


def evaluate(blocks: Blocks, buffers: Buffers, eps: FloatArray) -> Profile:
    """Everything that the blocks of a window say.

    Args:
        blocks: All layers' blocks.
        buffers: Their running statistics at the window's ends.
        eps: Of each layer, ``(L,)``.

    Returns:
        What cannot be told (too few batches, values that are not finite) is NaN.
    """
    with np.errstate(all="ignore"):
        return _evaluate(paired(blocks), buffers, eps)


def _evaluate(blocks: Blocks, buffers: Buffers, eps: FloatArray) -> Profile:
    layers = Segments(blocks.widths)
    spread = layers.spread
    num_batches = blocks.num_batches.sum(axis=1)
    weights = np.stack([blocks.num_samples, blocks.num_samples - blocks.num_batches])  # g, (2, L, 16)
    total = weights.sum(axis=2)  # (2, L)
    num_blocks = (blocks.num_batches > 0).sum(axis=1)
    dof = num_batches - num_blocks

    # Reference densities: values of a density times g are the weights of an average.
    window = np.broadcast_to(1 / total[..., None], weights.shape)
    tails = [_tails(tuple(row)) for row in blocks.num_batches]
    members = np.stack([t.members for t in tails], axis=1)  # (3, L, 16)
    step, ratio = np.array([t.step for t in tails]), np.array([t.ratio for t in tails])
    tail_total = np.einsum("slk,flk->sfl", members, weights)
    tail = members[:, None] / np.where(tail_total > 0, tail_total, np.nan)[..., None]  # (3, 2, L, 16)
    tail = np.where(np.isnan(tail), window, tail)  # a run that does not exist is the window: it is not used
    middle = np.cumsum(blocks.num_batches, axis=1) - (blocks.num_batches - 1) / 2
    time = middle - (weights * middle).sum(axis=2, keepdims=True) / total[..., None]

    # One pass over the blocks, layer by layer: the contrasts that everything else is made of.
    coefficients = np.stack([np.broadcast_to(blocks.weight, weights.shape), weights * window], axis=2)
    coefficients = np.concatenate([coefficients, weights[:, :, None] * tail.transpose(1, 2, 0, 3)], axis=2)
    coefficients = np.concatenate([coefficients, (weights * time)[:, :, None]], axis=2)  # (2, L, 6, 16)
    contrasts = np.empty((6, 2, layers.num_channels))
    m2 = np.empty((2, layers.num_channels))
    between = np.empty(layers.num_channels)
    for layer, own in enumerate(layers.slices):
        if not num_blocks[layer]:
            contrasts[..., own] = m2[:, own] = between[own] = np.nan
            continue
        used = slice(0, num_blocks[layer])
        value = blocks.value[used, :, own]
        for f in (_MEAN, _VAR):
            np.matmul(coefficients[f, layer, :, used], value[:, f], out=contrasts[:, f, own])
        blocks.m2[used, :, own].sum(axis=0, out=m2[:, own])
        difference = value[:, _MEAN] - contrasts[1, _MEAN, own]
        np.matmul(weights[_MEAN, layer, used], np.square(difference, out=difference), out=between[own])
    weighted, reference, last, before, earlier, trend = contrasts

    # Population of these batches, and the units of differences.
    squares = m2[_MEAN] + between + np.where(spread(total[_VAR]) > 0, spread(total[_VAR]) * reference[_VAR], 0)
    var = squares / spread(total[_MEAN] - 1)
    scaled = var + spread(eps)
    unit = np.stack([np.sqrt(scaled), 2 * scaled])

    # The noise scale, and one that is independent of the noise in the buffers (items 7 and 8).
    start, end = np.where(spread(buffers.known), np.stack([buffers.start, buffers.end]), np.nan)
    decay = spread(blocks.decay)
    noise_scale = m2 / spread(np.where(dof > 0, dof, np.nan))
    squared = np.broadcast_to(blocks.weight**2, weights.shape)
    shares = np.maximum(blocks.noise - _ratio(squared, weights), 0).sum(axis=2)  # C_E
    noise_now = blocks.decay**2 * buffers.noise + blocks.noise.sum(axis=2)
    has_noise = (shares >= _NEGLIGIBLE * blocks.noise.sum(axis=2)) & (shares > 0) & (dof > 1)
    rounding = spread(buffers.rounding * (blocks.rounding + 1)) * np.maximum(abs(start), abs(end))
    unsmoothed = end - decay * start - weighted  # E
    remaining = np.maximum(m2 - _ratio(unsmoothed**2, spread(shares)), 0) / spread(np.maximum(dof - 1, 1))
    separable = spread(has_noise) & (rounding**2 <= 0.01 * spread(shares) * noise_scale)
    # A channel that never changes has no noise but that of these sums themselves.
    floor = spread(total) * np.square(ROUNDING * reference)
    independent = np.maximum(np.where(separable, remaining, noise_scale), floor)
    student = np.where(has_noise, dof - 1, dof)  # (2, L)

    def z_score(difference: FloatArray, variance: FloatArray, tolerance: FloatArray | float = 0.0) -> FloatArray:
        deviation = np.sqrt(independent * spread(variance) + np.square(tolerance))
        nothing = spread(variance == 0) | (difference == 0)
        return np.where(nothing, 0, np.clip(difference / deviation, -1e100, 1e100))

    # The buffers against a reference: in the window, and with all history but the initial values (items 9 and 16).
    def running_z(difference: FloatArray, density: FloatArray, reach: FloatArray, history: FloatArray) -> FloatArray:
        variance = _contrast(blocks, weights, density, reach) + history
        return z_score(difference, np.where(variance > _NEGLIGIBLE * noise_now, variance, 0), rounding)

    initial_weight = blocks.decay * buffers.initial_weight
    history = blocks.decay**2 * buffers.noise
    in_window = np.broadcast_to(blocks.weight.sum(axis=1), total.shape)
    z = running_z(weighted + unsmoothed - spread(in_window) * reference, window, in_window, np.zeros_like(total))
    z = np.where(spread(buffers.known), z, 0)

    # Now: the last eighth, extrapolated as far as the three last eighths agree on a direction (items 13 to 15).
    first, second = (last - before) / unit, (before - earlier) / unit
    agreement = layers.total(first * second)
    extent = np.maximum(ratio**2 * layers.total(first**2), layers.total(second**2))
    trust = np.where((ratio > 0) & (extent > 0), np.clip(ratio * agreement / extent, 0, 1), 0)
    density = tail[0] + (trust * step)[..., None] * (tail[0] - tail[1])
    at_end = last + spread(trust * step) * (last - before)
    between_share = spread((num_batches - 1) / (total[_MEAN] - 1))
    now_var = np.maximum(at_end[_VAR] + between_share * (noise_scale[_MEAN] - at_end[_VAR]), 0)
    now = np.stack([at_end[_MEAN], now_var])

    # What moves (items 10, 12 and 18).
    several = num_blocks > 1
    trend_variance = np.where(several, (weights * time**2).sum(axis=2), 0)
    trend_z = z_score(trend, trend_variance)
    tail_variance = np.where(several, (weights * (tail[0] - window) ** 2).sum(axis=2), 0)
    tail_z = z_score(last - reference, tail_variance)
    reach = np.broadcast_to(1 - initial_weight, total.shape)
    warm = spread(initial_weight) * (_INITIAL - at_end)
    lag = end - at_end - warm
    z_lag_window = running_z(end - reference - spread(initial_weight) * (_INITIAL - reference), window, reach, history)
    z_lag = running_z(lag, density, reach, history)
    scores = student_score(np.stack([z, trend_z, tail_z, z_lag_window, z_lag]), spread(student))
    passed = gates(layers, scores)  # (5, 2, L)
    moving = passed[1] | passed[2]
    lagging = (moving | passed[3] | passed[4]) & buffers.known

    def net(difference: FloatArray, variance: FloatArray, counted: BoolArray) -> FloatArray:
        excess = (difference**2 - noise_scale * spread(variance)) / unit**2
        error: FloatArray = np.sqrt(np.where(counted, np.maximum(layers.mean(excess), 0), 0).sum(axis=0))
        return error

    lag_variance = _contrast(blocks, weights, density, reach) + history
    drift_variance = (weights * (density - window) ** 2).sum(axis=2)
    relative = noise_scale / unit**2
    trend_scale = spread(trend_variance)

    # How batches are made (items 19 and 20).
    relative_noise = noise_scale[_MEAN] / scaled
    chance = (num_blocks - 1) * layers.mean(relative_noise)
    excess = layers.mean(between / scaled) - chance
    straight = layers.mean((trend[_MEAN] ** 2 / trend_scale[_MEAN] - noise_scale[_MEAN]) / scaled)
    samples_per_batch = total[_MEAN] / num_batches
    batch_size = blocks.batch_size.sum(axis=1) / num_batches
    of_batches = layers.mean(relative_noise) / samples_per_batch
    known = np.where(buffers.known, 1.0, np.nan)
    return Profile(
        layers=layers,
        num_batches=num_batches,
        samples_per_batch=samples_per_batch,
        batch_size=batch_size,
        dof=dof,
        initial_weight=initial_weight,
        noise=noise_now,
        unit=unit,
        noise_scale=noise_scale,
        std_error=spread(known) * np.sqrt(noise_scale * spread(noise_now)),
        z=z,
        score=scores[0],
        z_lag=np.stack([z_lag_window, z_lag]),
        num_samples=total[_MEAN] + blocks.aside_samples,
        population=_with_aside(layers, blocks, total[_MEAN], reference[_MEAN], squares),
        reference=reference,
        now=now,
        noise_error=known * np.sqrt(layers.mean(relative * spread(noise_now)).sum(axis=0)),
        now_error=np.sqrt(layers.mean(relative * spread((weights * density**2).sum(axis=2))).sum(axis=0)),
        warmup_error=known * np.sqrt(layers.mean((warm / unit) ** 2).sum(axis=0)),
        lag_error=known * net(lag, lag_variance, lagging),
        drift_error=net(at_end - reference, drift_variance, moving),
        max_score=layers.maximum(abs(scores)),
        slope=net(trend / trend_scale, 1 / trend_variance, moving),
        jitter=np.sqrt(layers.mean(relative * spread(num_batches / total)).sum(axis=0)),
        ordering_ratio=(excess + chance) / chance,
        ordering_limit=1 + 4 * np.sqrt(2 / (num_blocks - 1) + 2 / dof),
        ordering_share=excess / total[_MEAN],
        trend_share=np.where(excess > 0, straight / excess, 1),
        grouping_ratio=of_batches * batch_size,
        grouping_limit=1 + 4 * np.sqrt(2 / dof),
        grouping_share=of_batches - 1 / batch_size,
        first_bad=blocks.first_bad,
    )


def _with_aside(
    layers: Segments, blocks: Blocks, count: FloatArray, mean: FloatArray, squares: FloatArray
) -> FloatArray:
    """Mean and unbiased variance of what updated the running statistics and of what did not, ``(2, C)``."""
    if blocks.aside_samples.any():
        one, other = layers.spread(count), layers.spread(blocks.aside_samples)
        within = layers.spread(blocks.aside_samples - blocks.aside_batches) * blocks.aside_value[_VAR]
        step, share = blocks.aside_value[_MEAN] - mean, other / (one + other)
        merged = squares + (blocks.aside_m2[_MEAN] + within + step**2 * one * share)
        alone = blocks.aside_value[_MEAN], blocks.aside_m2[_MEAN] + within
        mean, squares = (
            np.where(other == 0, first, np.where(one == 0, only, both))
            for first, only, both in zip((mean, squares), alone, (mean + step * share, merged), strict=True)
        )
        count = count + blocks.aside_samples
    finite = np.isfinite(mean) & np.isfinite(squares)
    population = np.stack([mean, np.where(layers.spread(count) > 1, squares / layers.spread(count - 1), np.nan)])
    return np.where(finite, population, np.nan)


def _contrast(blocks: Blocks, weights: FloatArray, density: FloatArray, reach: FloatArray) -> FloatArray:
    """Variance over V of the window's part of the buffers minus ``reach`` times a reference, ``(2, L)``."""
    mixed = (density * blocks.weight).sum(axis=2)
    alone = (density**2 * weights).sum(axis=2)
    variance: FloatArray = np.maximum(blocks.noise.sum(axis=2) - 2 * reach * mixed + reach**2 * alone, 0)
    return variance


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return ratio


@lru_cache(maxsize=1024)
def _tails(num_batches: tuple[float, ...]) -> Tails:
    """Runs of whole blocks from the end: the first nearest an eighth of all batches, the others nearest the first."""
    blocks = [count for count in num_batches if count]
    members, counts = np.zeros((3, MAX_BLOCKS)), [0.0, 0.0, 0.0]
    stop, target = len(blocks), sum(blocks) / 8
    for run in range(3):
        if stop == 0:
            break
        lengths = np.cumsum(blocks[:stop][::-1])
        distance = abs(lengths - target)
        length = len(distance) - int(np.argmin(distance[::-1]))  # of two as near, the longer
        members[run, stop - length : stop] = 1
        counts[run] = float(lengths[length - 1])
        stop, target = stop - length, counts[0]
    last, before, earlier = counts
    return Tails(
        members=members,
        step=last / (last + before) if last else 0.0,
        ratio=(before + earlier) / (last + before) if earlier else 0.0,
    )


def gates(layers: Segments, scores: FloatArray) -> BoolArray:
    """Whether a layer's scores are more than chance, ``(K, 2, C)`` to ``(K, 2, L)`` (item 12).

    The mean of their squares tells for the mean, their median, which heavy tails do not move, for the variance.
    """
    squares = scores**2
    passed = layers.mean(squares) > 9
    squares = squares[:, _VAR]
    count = layers.count(np.isfinite(squares))
    limit = np.maximum(4.1, 9 - 0.7 * (count - 1))
    above = layers.count(squares > layers.spread(limit))
    passed[:, _VAR] = 2 * above > count
    for contrast, layer in np.argwhere((2 * above == count) & (above > 0)):  # the median is halfway between two
        median = np.nanmedian(squares[contrast, layers.slices[layer]])
        passed[contrast, _VAR, layer] = median > limit[contrast, layer]
    return passed
