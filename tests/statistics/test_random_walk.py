"""How far an average is behind a random walk, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.statistics.analysis_reference import Call, Layer, analyses, assert_as_defined, random_layer, unit_of

WIDTH = 400


def walking(rng, step, moves, momentum, length, batch_size):
    """Normal values of which one moment is a random walk, and how far an average without noise is behind it."""
    walk = np.cumsum(rng.normal(0.0, step, (length, WIDTH)), axis=0)
    mean, variance = (walk, np.ones_like(walk)) if moves == "mean" else (np.zeros_like(walk), 4 * np.exp(walk))
    path, average = walk if moves == "mean" else variance, 0.0
    for value in path:
        average = (1 - momentum) * average + momentum * value
    calls = [
        Call(rng.normal(center, np.sqrt(square), (batch_size, WIDTH)), momentum)
        for center, square in zip(mean, variance, strict=True)
    ]
    return Layer(WIDTH, windows=[calls]), average - path[-1]


@pytest.mark.parametrize("momentum", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize(("length", "batch_size", "step"), [(128, 16, 0.1), (100, 64, 0.08), (32, 64, 0.15)])
def test_an_average_is_as_far_behind_a_walk_of_means_as_is_said(momentum, length, batch_size, step):
    lags, told = [], []
    for seed in range(3):
        rng = np.random.default_rng([seed, length])
        layer, lag = walking(rng, step, "mean", momentum, length + round(3 / momentum), batch_size)
        (analysis,) = analyses([layer])
        lags.append((lag / unit_of(analysis)[0]) ** 2)
        told.append(analysis.walk_error**2)
    assert np.sqrt(np.mean(told)) == pytest.approx(np.sqrt(np.mean(lags)), rel=0.2)


@pytest.mark.parametrize("momentum", [0.05, 0.2])
def test_an_average_is_as_far_behind_a_walk_of_variances_as_is_said(momentum):
    layer, lag = walking(np.random.default_rng(1), 0.05, "variance", momentum, 128, 256)
    (analysis,) = analyses([layer])
    expected = np.sqrt(np.mean((lag / unit_of(analysis)[1]) ** 2))
    assert analysis.walk_error == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("sizes", ["equal", "unequal", "last one short"])
@pytest.mark.parametrize("width", [1, 16])
def test_what_stays_as_it_is_does_not_walk(width, sizes):
    rng = np.random.default_rng(2)
    layers = [random_layer(rng, [100], width, "0.1", sizes) for _ in range(200)]
    (analysis,) = analyses(layers)
    assert (analysis.walk_error > 0).mean() <= 0.02


def test_the_net_movement_of_a_window_does_not_matter():
    rng = np.random.default_rng(3)
    there = np.cumsum(rng.normal(0.0, 0.1, (64, 64)), axis=0)
    path = np.concatenate([there, there[::-1]])  # and back again
    layer = Layer(64, windows=[[Call(rng.normal(center, 1.0, (128, 64)), 0.1) for center in path]])
    (analysis,) = assert_as_defined([layer])
    (one_way,) = analyses([Layer(64, windows=[layer.windows[0][:64]])])
    told = (analysis.walk_error * unit_of(analysis)[0].mean()) ** 2
    assert told == pytest.approx((one_way.walk_error * unit_of(one_way)[0].mean()) ** 2, rel=0.35)


@pytest.mark.parametrize("is_early", [True, False])
def test_what_moved_early_and_has_settled_is_forgotten(is_early):
    rng = np.random.default_rng(6)
    walk = np.cumsum(rng.normal(0.0, 0.15, (48, 64)), axis=0)
    path = np.concatenate([walk, np.broadcast_to(walk[-1], (80, 64))][:: 1 if is_early else -1])
    layer = Layer(64, windows=[[Call(rng.normal(center, 1.0, (128, 64)), 0.1) for center in path]])
    (analysis,) = assert_as_defined([layer])
    assert analysis.walk_error < 0.03 if is_early else analysis.walk_error > 0.1


def test_an_average_that_is_the_last_batch_is_not_behind_it():
    layer, _ = walking(np.random.default_rng(4), 0.2, "mean", 1.0, 64, 32)
    (analysis,) = analyses([layer])
    assert analysis.walk_error == 0


def test_of_a_single_block_nothing_is_told():
    rng = np.random.default_rng(5)
    (analysis,) = analyses([random_layer(rng, [2], 3)])
    assert np.isnan(analysis.walk_error)
