"""What chance makes of the distances of an evaluation: as defined, and as it is realised."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.blocks import PooledBatches
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.evaluation import TrainingNoise, evaluation_noise, scatter_of_calls
from lightning_bnmonitor.statistics.pooled_calls import PooledCalls
from lightning_bnmonitor.statistics.pooling import PooledStatistics

EPS = 1e-3


def pooled(*batches):
    """Calls of a layer, each ``(n, C)``, pooled as they come."""
    calls = PooledCalls()
    for x in batches:
        x = torch.from_numpy(x)
        calls.add(len(x), len(x), x.mean(dim=0), x.var(dim=0, correction=0))
    return calls


def received(*layers):
    """What layers have received in evaluation, from their calls."""
    layout = ChannelLayout(np.array([calls.value.shape[1] for calls in layers]))
    counts = np.array([(calls.num_batches, calls.num_samples, calls.batch_size) for calls in layers], dtype=float).T
    value, m2, within = (
        np.concatenate([getattr(calls, name).numpy() for calls in layers], axis=1)
        for name in ("value", "m2", "between_neighbours")
    )
    batches = PooledBatches(*counts, value, m2)
    statistics = PooledStatistics.of_batches(batches, np.full(layout.num_channels, np.inf), layout)
    return statistics._replace(within=within), layout


def noise_of(training, *layers):
    statistics, layout = received(*layers)
    return evaluation_noise(training, statistics, layout, np.full(layout.num_layers, EPS))


def nothing_known(num=1):
    return TrainingNoise(*(np.full(num, fill) for fill in (np.nan, np.nan, np.nan, 0.0, 0.0)))


def test_neighbouring_calls_are_compared_with_the_weights_of_both():
    rng = np.random.default_rng(1)
    batches = [rng.normal(k, 1 + k, (n, 3)) for k, n in enumerate([4, 9, 2, 1, 6])]
    expected = np.zeros((2, 3))
    for one, other in itertools.pairwise(batches):
        n, m = len(one), len(other)
        expected[0] += n * m / (n + m) * (one.mean(axis=0) - other.mean(axis=0)) ** 2
        if n > 1 and m > 1:
            variances = one.var(axis=0, ddof=1) - other.var(axis=0, ddof=1)
            expected[1] += (n - 1) * (m - 1) / (n + m - 2) * variances**2
    np.testing.assert_allclose(pooled(*batches).between_neighbours, expected, rtol=1e-12)


def test_the_larger_of_what_training_and_evaluation_say_of_chance_is_taken():
    rng = np.random.default_rng(2)
    layers = [pooled(*rng.normal(size=(k, 8, 2))) for k in (3, 1)]
    training = TrainingNoise(*(np.array(pair) for pair in ([0.5, 0.9], [16.0, 4], [50.0, 20], [0.05, 0], [0.02, 0.1])))
    noise = noise_of(training, *layers)
    first = 0.5**2 * (16 / 24 + 1 / 50) + 0.05**2
    second = 0.9**2 * (4 / 8 + 1 / 20)
    np.testing.assert_allclose(noise.of_error, np.sqrt([first, second]), rtol=1e-12)
    first, second = 0.5**2 * 16 / 24 + 0.02**2, 0.9**2 * 4 / 8 + 0.1**2
    np.testing.assert_allclose(noise.of_shift, np.sqrt([first, second]), rtol=1e-12)
    # Of batches that hardly differ in training, as behind a layer that normalises by the same batch, evaluation tells.
    own = noise_of(nothing_known(2), *layers)
    noise = noise_of(training._replace(jitter=np.full(2, 0.01)), *layers)
    added = 0.01**2 / np.array([50, 20]) + np.array([0.05, 0]) ** 2
    np.testing.assert_allclose(noise.of_error, np.sqrt(own.of_error**2 + added), rtol=1e-12)


def test_else_neighbouring_calls_tell_and_of_one_call_its_samples():
    rng = np.random.default_rng(3)
    batches = rng.normal(size=(5, 8, 2))
    values = batches.reshape(-1, 2)
    scaled = values.var(axis=0, ddof=1) + EPS
    scale = pooled(*batches).between_neighbours.numpy() / 4  # of neighbours there are four
    expected = math.sqrt((scale[0] / 40 / scaled + scale[1] / 35 / (4 * scaled**2)).mean())
    noise = noise_of(nothing_known(2), pooled(*batches), pooled(batches[0]))
    np.testing.assert_allclose(noise.of_error, [expected, math.sqrt(1.5 / 8)], rtol=1e-12)
    np.testing.assert_allclose(noise.of_shift, noise.of_error, rtol=1e-12)


def test_of_what_was_not_called_nothing_is_known():
    layout = ChannelLayout(np.array([2]))
    batches = PooledBatches(*np.zeros((3, 1)), np.zeros((2, 2)), np.zeros((2, 2)))
    statistics = PooledStatistics.of_batches(batches, np.full(2, np.inf), layout)
    assert np.isnan(evaluation_noise(nothing_known(), statistics, layout, np.array([EPS])).of_error)


# ------------------------------------------------------------------------------------------------------------ simulated


def draw(rng, law, num, positions, share, width):
    """Samples of correlated positions: a part of the variance is common to all positions of a sample."""
    common, own = rng.normal(size=(num, 1, width)), rng.normal(size=(num, positions, width))
    values = math.sqrt(share) * common + math.sqrt(1 - share) * own
    return {"normal": values, "relu": np.maximum(values, 0), "lognormal": np.exp(0.5 * values)}[law]


def realised(law, batch, positions, share, momentum, calls, windows=40, num_batches=40, width=16):
    """RMS of ``val_error`` and of its floor over windows of layers whose inputs' law never changes.

    By numpy: the running average of T batches, against calls in evaluation.
    """
    rng = np.random.default_rng([len(law), batch, positions, calls])
    errors, floors, fallbacks = [], [], []
    for _ in range(windows):
        x = draw(rng, law, batch * (2 * num_batches + calls), positions, share, width)
        x = x.reshape(2 * num_batches + calls, -1, width)
        means, variances = x.mean(axis=1), x.var(axis=1, ddof=1)
        n, running, weights = x.shape[1], [means[0], variances[0]], np.zeros(2 * num_batches)
        weights[0] = 1.0
        for t in range(1, 2 * num_batches):
            running = [(1 - momentum) * r + momentum * v[t] for r, v in zip(running, (means, variances), strict=True)]
            weights *= 1 - momentum
            weights[t] = momentum
        window = x[num_batches : 2 * num_batches]
        s = window.reshape(-1, width).var(axis=0, ddof=1)
        of_batch = [v[num_batches : 2 * num_batches].var(axis=0, ddof=1) for v in (means, variances)]
        jitter = math.sqrt((of_batch[0] / s + of_batch[1] / (4 * s**2)).mean())
        evaluated = x[2 * num_batches :].reshape(-1, width)
        mean, var = evaluated.mean(axis=0), evaluated.var(axis=0, ddof=1)
        squares = (np.sqrt(var / running[1]) - 1) ** 2 + (mean - running[0]) ** 2 / running[1]
        errors.append(squares.mean())
        noise = jitter * math.sqrt((weights**2).sum())
        training = TrainingNoise(*(np.array([v]) for v in (jitter, float(n), float(num_batches), noise, 0.0)))
        pool = PooledCalls()
        for call in x[2 * num_batches :]:
            call = torch.from_numpy(call)
            pool.add(len(call), batch, call.mean(dim=0), call.var(dim=0, correction=0))
        statistics, layout = received(pool)
        floors.append(evaluation_noise(training, statistics, layout, np.zeros(1)).of_error.item())
        fallbacks.append(evaluation_noise(nothing_known(), statistics, layout, np.zeros(1)).of_error.item())
    return math.sqrt(np.mean(errors)), np.array(floors), np.array(errors) ** 0.5, np.array(fallbacks)


@pytest.mark.parametrize("law", ["normal", "relu"])
@pytest.mark.parametrize(
    ("batch", "positions", "share", "momentum", "calls"),
    [(32, 1, 0.0, 0.1, 8), (16, 9, 0.5, 0.1, 4), (64, 4, 0.2, 0.01, 16), (32, 4, 0.5, 0.1, 2), (8, 16, 0.3, 0.05, 8)],
)
def test_the_floor_is_what_chance_makes_of_the_error_and_no_layer_exceeds_it_three_times(
    law, batch, positions, share, momentum, calls
):
    error, floors, errors, _ = realised(law, batch, positions, share, momentum, calls)
    assert np.sqrt((floors**2).mean()) == pytest.approx(error, rel=0.2)
    assert (errors < 3 * floors).all()  # ten settings of 40 layers


def test_of_one_call_the_floor_is_rather_too_large():
    error, floors, errors, _ = realised("normal", 32, 4, 0.5, 0.1, calls=1)
    assert error < np.sqrt((floors**2).mean()) < 2 * error
    assert (errors < 3 * floors).all()


@pytest.mark.parametrize(("batch", "positions", "share"), [(32, 1, 0.0), (16, 9, 0.5)])
def test_without_training_neighbouring_calls_tell_what_the_sampling_of_evaluation_makes(batch, positions, share):
    error, _, _, fallbacks = realised("normal", batch, positions, share, 1e-3, calls=8, num_batches=1000, windows=4)
    assert np.sqrt((fallbacks**2).mean()) == pytest.approx(error, rel=0.25)


def test_the_scatter_of_calls_is_that_of_their_means():
    rng = np.random.default_rng(5)
    batches = [rng.normal(k % 3, 2, (n, 4)) for k, n in enumerate([8, 3, 5, 8, 1])]
    statistics, layout = received(pooled(*batches))
    values = np.concatenate(batches)
    square = sum(len(x) * (x.mean(axis=0) - values.mean(axis=0)) ** 2 for x in batches) / len(values)
    expected = np.sqrt((square / (values.var(axis=0, ddof=1) + EPS)).mean())
    np.testing.assert_allclose(scatter_of_calls(statistics, layout, np.array([EPS])), [expected], rtol=1e-9)


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("draw", ["normal", "lognormal"])
def test_batches_of_random_samples_scatter_by_their_size(size, draw):
    rng = np.random.default_rng(6)
    batches = [getattr(rng, draw)(size=(size, 300)) for _ in range(64)]
    statistics, layout = received(pooled(*batches))
    assert scatter_of_calls(statistics, layout, np.array([0.0]))[0] == pytest.approx(size**-0.5, rel=0.05)
