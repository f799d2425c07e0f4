r"""What a window's blocks say: how noisy running statistics are, where they come from, and the statistics now.

Everything is computed on the host in float64, for the channels of all layers at once. The noise model and its z-scores
are those of :mod:`~lightning_bnmonitor.statistics.noise`; averages and their densities those of
:mod:`~lightning_bnmonitor.statistics.contrasts`. With s the population variance plus ``eps``, a difference of means is
in units of :math:`\sqrt{s}`, one of variances in units of :math:`2 s`: both then are RMS errors of the normalised
activation, to first order.

**Now.** The statistics at the end of the window: see :mod:`~lightning_bnmonitor.statistics.present`.

**Where the running statistics come from.** With A the weight of the window's start, :math:`A_0` that of the initial
values i in it and *ref* a reference (the window, or now), the difference running - ref is exactly

.. math:: \underbrace{A A_0 (i - \text{ref})}_\text{warm-up} + \text{history} +
    \underbrace{\textstyle\sum_k W_k (x_k - \text{ref})}_\text{drift} + \underbrace{E}_\text{noise},

and all but the warm-up is the *lag*. Errors are RMS over channels; that of a lag or drift D with the variance
:math:`V c_2` under noise is :math:`\sqrt{\max(\operatorname{mean}(D^2 - V c_2), 0)}`, and counts where a comparison
exceeds chance (:func:`~lightning_bnmonitor.statistics.scores.exceeds_chance`).

**The window's own statistics** have a squared error of :math:`f = \max(\operatorname{mean}_c \sum_f V_f /
(G_f \text{unit}_f^2), 1.75 / B)` with G the sum of the weights of all batches and B that of their samples (never
pixels); 3.5 / B where no two batches can be compared. Buffers that were the initial values alone would be off by
:math:`D_0^2 = \operatorname{mean} \sum_f ((i_f - \text{ref}_f) / \text{unit}_f)^2`.

**Inputs that move at random** have the running statistics lag behind without a net movement: see
:mod:`~lightning_bnmonitor.statistics.random_walk`.

**How batches are made** is told by :mod:`~lightning_bnmonitor.statistics.batching`.

*Checked by simulation:* no false verdict in 1500 stationary layers (below 0.2 %), 24 in 2800 with heavy tails;
predicted noise within 10 % of what was realised for batches of 8 to 256 and momenta of 0.1 to 0.9.
*Not established:* large networks, beyond those that the tests train; jumps within the last eighth of a window; telling
sorted data from weights that move back and forth; last batches of one or two images; momentum schedules; a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lightning_bnmonitor.statistics.batching import Batching, LastBatchNoise, batching_of, last_batch_noise
from lightning_bnmonitor.statistics.blocks import Blocks, paired
from lightning_bnmonitor.statistics.channel_layout import BoolArray, ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.contrasts import Densities, densities_of, squares_of, sums_of, trend_variance
from lightning_bnmonitor.statistics.noise import NoiseModel, RunningStats, noise_of, variance_against
from lightning_bnmonitor.statistics.present import (
    Difference,
    Parts,
    Present,
    between,
    by_last_batches,
    by_running_stats,
)
from lightning_bnmonitor.statistics.random_walk import lag_of_running
from lightning_bnmonitor.statistics.scores import MEAN, VAR, exceeds_chance, squared_score

_INITIAL = np.array([[0.0], [1.0]])  # what PyTorch initialises the buffers to


@dataclass(frozen=True)
class Analysis:
    """What the blocks of a window say, for all layers."""

    layout: ChannelLayout
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
    """Sum of squared weights over n (n - 1) in the buffers now, ``(2, L)``: the Q0 of the next window."""
    within: FloatArray
    """Weighted sum of squares of batch means and variances within blocks, ``(2, C)``: ``dof`` times the noise scale."""
    std_error: FloatArray
    """Standard deviation of the buffers' own sampling noise, ``(2, C)``; NaN if not known."""
    z: FloatArray
    """The buffers against this window's reference, over what sampling noise explains, ``(2, C)``.

    0, no evidence of anything, if that is not known."""
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
    """RMS error that the sampling noise in ``now`` adds to a comparison with it, ``(L,)``."""
    warmup_error: FloatArray
    """RMS error that what is left of the initial values makes, ``(L,)``."""
    lag_error: FloatArray
    """RMS error of being made of earlier weights or data, chance taken off, ``(L,)``; 0 if it may be chance."""
    drift_error: FloatArray
    """RMS error of the whole window's statistics against now's, chance taken off, ``(L,)``; 0 if it may be chance."""
    unseen_error: FloatArray
    """RMS error of the mean of batch variances in the place of the variance of all values, ``(L,)``, without movements
    from block to block: of the variance between batches that their samples do not explain, which no average has."""
    walk_error: FloatArray
    """RMS error of being behind inputs that move at random, whatever the net movement, chance taken off, ``(L,)``; 0 if
    it may be chance."""
    max_score: FloatArray
    """Largest magnitude of any channel's score in any of these comparisons, ``(L,)``."""
    slope: FloatArray
    """Drift per batch in normalised activations, chance taken off, ``(L,)``."""
    reference_error: FloatArray
    """What chance makes of the window's own statistics, as an RMS error of the normalised activation, ``(L,)``."""
    initial_distance: FloatArray
    """RMS error that the initial values would make on the window, to first order, ``(L,)``."""
    jitter: FloatArray
    """RMS difference that a batch's own sampling noise makes in training, ``(L,)``."""
    batching: Batching
    """How batches are made."""
    last_batch: LastBatchNoise
    """What the last batch makes of the noise in the running statistics."""
    first_bad: FloatArray
    """The first call with a value that is not finite, ``(C,)``; inf if none."""


def analyse(blocks: Blocks, running: RunningStats, eps: FloatArray) -> Analysis:
    """Everything that the blocks of a window say.

    Args:
        blocks: All layers' blocks.
        running: Their running statistics at the window's ends.
        eps: Of each layer, ``(L,)``.

    Returns:
        What cannot be told (too few batches, values that are not finite) is NaN.
    """
    with np.errstate(all="ignore"):
        return _analyse(paired(blocks), running, eps)


def of_the_last(analysis: Analysis, blocks: Blocks, running: RunningStats, eps: FloatArray) -> Analysis:
    """An analysis of several windows, but what was received is that of the last window alone.

    That is the population, the batches with their scatter, and the statistics now; nothing that tells of noise.

    Args:
        analysis: Of several windows.
        blocks: Of the last one.
        running: Running statistics at its ends.
        eps: Of each layer, ``(L,)``.
    """
    with np.errstate(all="ignore"):
        window, squares = _window_of(paired(blocks), running, eps)
        blocks, densities, sums, *_, layout = window
        count = densities.total[MEAN]
        return replace(
            analysis,
            num_batches=densities.num_batches,
            samples_per_batch=count / densities.num_batches,
            batch_size=blocks.batch_size.sum(axis=1) / densities.num_batches,
            dof=densities.dof,
            within=np.where(layout.spread(densities.dof) > 0, sums.within, 0),
            num_samples=count + blocks.beside.num_samples,
            population=_with_beside(layout, blocks, count, sums.reference[MEAN], squares),
            reference=sums.reference,
            now=by_last_batches(window).now,
        )


def _window_of(blocks: Blocks, running: RunningStats, eps: FloatArray) -> tuple[Parts, FloatArray]:
    """What is known of a window before anything is compared, and its values' sum of squares about their mean."""
    layout = ChannelLayout(blocks.widths)
    densities = densities_of(blocks)
    sums = sums_of(blocks, densities, layout)
    noise = noise_of(blocks, densities, sums, running, layout)
    squares = squares_of(densities, sums, layout)
    scaled = squares / layout.spread(densities.total[MEAN] - 1) + layout.spread(eps)
    unit = np.stack([np.sqrt(scaled), 2 * scaled])
    return Parts(blocks, densities, sums, noise, running, unit, layout), squares


def _analyse(blocks: Blocks, running: RunningStats, eps: FloatArray) -> Analysis:
    window, squares = _window_of(blocks, running, eps)
    _, densities, sums, noise, _, unit, layout = window
    count = densities.total[MEAN]
    behind = lag_of_running(blocks, densities, sums, noise, running.last.weight, unit, layout)
    present = by_last_batches(window)
    comparisons = _compare(window, present)
    present, lag = by_running_stats(window, present, comparisons.lag, behind)
    comparisons = comparisons._replace(lag=lag)
    known = np.where(running.known, 1.0, np.nan)
    of_one_batch = densities.num_batches / densities.total
    return Analysis(
        layout=layout,
        num_batches=densities.num_batches,
        samples_per_batch=count / densities.num_batches,
        batch_size=blocks.batch_size.sum(axis=1) / densities.num_batches,
        dof=densities.dof,
        initial_weight=blocks.decay * running.initial_weight,
        noise=noise.total,
        within=np.where(layout.spread(densities.dof) > 0, sums.within, 0),
        std_error=layout.spread(known) * np.sqrt(noise.scale * layout.spread(noise.total)),
        z=comparisons.z,
        num_samples=count + blocks.beside.num_samples,
        population=_with_beside(layout, blocks, count, sums.reference[MEAN], squares),
        reference=sums.reference,
        now=present.now,
        noise_error=known * noise.error(noise.total, unit),
        now_error=noise.error(present.noise, unit),
        reference_error=np.sqrt(_variance_of_reference(blocks, densities, noise, unit)),
        initial_distance=np.sqrt(layout.mean(((_INITIAL - sums.reference) / unit) ** 2).sum(axis=0)),
        jitter=noise.error(of_one_batch, unit),
        unseen_error=_unseen(window, eps),
        walk_error=known * behind.walk,
        max_score=comparisons.max_score,
        first_bad=blocks.first_bad,
        **_movements(window, present, comparisons),
        batching=batching_of(blocks, densities, sums, noise.scale, unit[VAR] / 2, layout),
        last_batch=last_batch_noise(running.last, noise, unit),
    )


class _Comparisons(NamedTuple):
    """The running statistics and the parts of the window against each other."""

    z: FloatArray
    """Running statistics against the window, ``(2, C)``; 0 if not known."""
    max_score: FloatArray
    """Largest score in any comparison, ``(L,)``."""
    moving: BoolArray
    """Whether the inputs moved in the window, ``(2, L)``."""
    lagging: BoolArray
    """Whether the running statistics are behind, or may be as the inputs moved, ``(2, L)``."""
    lag: Difference
    """The running statistics against now."""


def _variance_of_reference(blocks: Blocks, densities: Densities, noise: NoiseModel, unit: FloatArray) -> FloatArray:
    """Squared RMS error that sampling noise makes of the window's statistics, ``(L,)``.

    With B samples at least 1.75 / B, which is that of independent ones of kurtosis 4; twice as much where batches
    cannot be compared.
    """
    least = 1.75 / blocks.batch_size.sum(axis=1)
    observed = np.maximum(noise.error(1 / densities.total, unit) ** 2, least)
    variance: FloatArray = np.where(densities.dof >= 1, observed, 2 * least)
    return variance


def _unseen(window: Parts, eps: FloatArray) -> FloatArray:
    """RMS error that the mean of batch variances makes where the variance of all values is to be, ``(L,)``."""
    _, densities, sums, noise, _, _, layout = window
    seen, own = sums.reference[VAR], layout.spread(eps)
    everything = np.maximum(seen + between(densities, layout) * (noise.scale[MEAN] - seen), 0)
    stretched = np.sqrt((everything + own) / (seen + own)) - 1
    error: FloatArray = np.sqrt(layout.mean(stretched**2 * everything / (everything + own)))
    return error


def _compare(window: Parts, present: Present) -> _Comparisons:
    blocks, densities, sums, noise, running, _, layout = window
    spread, total = layout.spread, densities.total
    in_window = np.broadcast_to(blocks.weight.sum(axis=1), total.shape)
    z = noise.z_of_running(
        sums.weighted + noise.unsmoothed - spread(in_window) * sums.reference,
        variance_against(blocks, densities, densities.window, in_window),
    )
    z = np.where(spread(running.known), z, 0)

    several = densities.num_blocks > 1
    trend_z = noise.z(sums.trend, np.where(several, (densities.weights * densities.time**2).sum(axis=2), 0))
    apart = (densities.weights * (densities.recent[0] - densities.window) ** 2).sum(axis=2)
    recent_z = noise.z(sums.last - sums.reference, np.where(several, apart, 0))

    initial_weight = blocks.decay * running.initial_weight
    end = np.where(spread(running.known), running.end, np.nan)
    reach = np.broadcast_to(1 - initial_weight, total.shape)
    warm = spread(initial_weight)
    lag = end - present.value - warm * (_INITIAL - present.value)
    lag_variance = variance_against(blocks, densities, present.density, reach) + noise.earlier
    lag_of_window = end - sums.reference - warm * (_INITIAL - sums.reference)
    against_window = variance_against(blocks, densities, densities.window, reach) + noise.earlier
    lag_z = noise.z_of_running(lag_of_window, against_window), noise.z_of_running(lag, lag_variance)

    squares = squared_score(np.stack([z, trend_z, recent_z, *lag_z]), spread(noise.student))
    _, has_trend, has_moved, behind_window, behind_now = exceeds_chance(layout, squares)
    moving = has_trend | has_moved
    lagging = (moving | behind_window | behind_now) & running.known
    return _Comparisons(
        z=z,
        max_score=np.sqrt(layout.maximum(squares)),
        moving=moving,
        lagging=lagging,
        lag=Difference(lag, lag_variance, ~lagging.any(axis=0)),
    )


def _movements(window: Parts, present: Present, comparisons: _Comparisons) -> dict[str, FloatArray]:
    """Errors that are no noise: of the initial values, of running statistics that are behind, of the window itself."""
    blocks, densities, sums, noise, running, unit, layout = window

    def net(difference: FloatArray, variance: FloatArray, counted: BoolArray) -> FloatArray:
        excess = (difference**2 - noise.scale * layout.spread(variance)) / unit**2
        error: FloatArray = np.sqrt(np.where(counted, np.maximum(layout.mean(excess), 0), 0).sum(axis=0))
        return error

    known = np.where(running.known, 1.0, np.nan)
    warm = layout.spread(blocks.decay * running.initial_weight) * (_INITIAL - present.value)
    drift_variance = (densities.weights * (present.density - densities.window) ** 2).sum(axis=2)
    variance_of_trend = trend_variance(densities)
    slope = sums.trend / layout.spread(variance_of_trend)
    return {
        "warmup_error": known * np.sqrt(layout.mean((warm / unit) ** 2).sum(axis=0)),
        "lag_error": known * net(comparisons.lag.value, comparisons.lag.variance, comparisons.lagging),
        "drift_error": net(present.value - sums.reference, drift_variance, comparisons.moving),
        "slope": net(slope, 1 / variance_of_trend, comparisons.moving),
    }


def _with_beside(
    layout: ChannelLayout, blocks: Blocks, count: FloatArray, mean: FloatArray, squares: FloatArray
) -> FloatArray:
    """Mean and unbiased variance of what updated the running statistics and of what did not, ``(2, C)``."""
    beside = blocks.beside
    if beside.num_samples.any():
        one, other = layout.spread(count), layout.spread(beside.num_samples)
        within = layout.spread(beside.weight[VAR]) * beside.value[VAR]
        step, share = beside.value[MEAN] - mean, other / (one + other)
        merged = squares + (beside.m2[MEAN] + within + step**2 * one * share)
        alone = beside.value[MEAN], beside.m2[MEAN] + within
        mean, squares = (
            np.where(other == 0, first, np.where(one == 0, only, both))
            for first, only, both in zip((mean, squares), alone, (mean + step * share, merged), strict=True)
        )
        count = count + beside.num_samples
    finite = np.isfinite(mean) & np.isfinite(squares)
    population = np.stack([mean, np.where(layout.spread(count) > 1, squares / layout.spread(count - 1), np.nan)])
    return np.where(finite, population, np.nan)
