"""The statistics at the end of a window, where running statistics are made of later batches than the last eighth."""

from __future__ import annotations

import numpy as np
import pytest

from tests.statistics.analysis_reference import Call, Layer, analyses, assert_as_defined, unit_of

WIDTH, BATCH = 64, 32


def fractional(rng, exponent, length):
    """Fractional Brownian motion of unit steps, ``(length, WIDTH)``: 0.5 is a random walk, 1 a straight line."""
    apart = abs(np.subtract.outer(np.arange(length), np.arange(length)))
    power = 2 * exponent
    covariance = ((apart + 1.0) ** power + abs(apart - 1.0) ** power) / 2 - apart**power
    root = np.linalg.cholesky(covariance + 1e-9 * np.eye(length))
    return np.cumsum(root @ rng.normal(size=(length, WIDTH)), axis=0)


def moving(rng, path, momentum, spread=1.0):
    """A layer whose means move along a path, at whose end no batch comes any more: the weights after the last step."""
    calls = [Call(rng.normal(center, spread, (BATCH, WIDTH)), momentum) for center in path[:-1]]
    return Layer(WIDTH, windows=[calls])


def rms(values):
    return np.sqrt((values**2).mean())


@pytest.mark.parametrize(("momentum", "length"), [(0.1, 640), (0.3, 320), (0.9, 160)])
def test_running_statistics_that_are_newer_than_the_last_batches_together_are_not_behind_them(momentum, length):
    rng = np.random.default_rng(1)
    path = 0.1 * fractional(rng, 0.5, length + 1)
    layer = moving(rng, path, momentum)
    (analysis,) = assert_as_defined([layer])
    running, last = layer.buffers(1)[0], np.mean([call.x[0] for call in layer.windows[0][-length // 10 :]], axis=0)
    true, told, of_last = (rms(running - other) for other in (path[-1], analysis.now[0], last))
    assert rms(last - path[-1]) > 1.4 * true
    assert 0.75 * true < told < 0.9 * of_last
    assert rms(analysis.now[0] - path[-1]) < 0.9 * rms(last - path[-1])


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("exponent", [0.5, 0.7, 0.9])
def test_no_movement_leaves_them_farther_behind_than_is_said(exponent, momentum):
    rng = np.random.default_rng([2, round(10 * exponent), round(10 * momentum)])
    told, true = [], []
    for _ in range(4):
        path = 0.1 * fractional(rng, exponent, 129)
        (analysis,) = analyses([moving(rng, path, momentum)])
        average = path[0]
        for center in path[:-1]:
            average = (1 - momentum) * average + momentum * center
        told.append(analysis.lag_error[0])
        true.append(rms((average - path[-1]) / unit_of(analysis)[0]))
    assert rms(np.array(true)) < 1.1 * rms(np.array(told))


@pytest.mark.parametrize(("momentum", "length"), [(0.1, 640), (0.3, 320)])
def test_behind_a_steady_drift_they_are_as_far_as_ever(momentum, length):
    rng = np.random.default_rng(3)
    step = rng.choice([-1.0, 1.0], WIDTH) / length
    layer = moving(rng, step * np.arange(length + 1)[:, None], momentum, spread=0.05)
    (analysis,) = assert_as_defined([layer])
    told = rms(layer.buffers(1)[0] - analysis.now[0])
    np.testing.assert_allclose(told, (1 / momentum - 0.5) / length, rtol=0.1)  # behind the middle of the last step
