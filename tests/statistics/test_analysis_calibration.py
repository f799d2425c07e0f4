"""On stationary data scores are those of chance; what moves is found, and measured."""

from __future__ import annotations

import numpy as np
import pytest

from tests.statistics.analysis_reference import (
    FLOAT32,
    MOMENTA,
    SIZES,
    Call,
    Layer,
    analyses,
    assert_as_defined,
    random_layer,
    rms,
    unit_of,
)

# On stationary data


def stationary(momentum, sizes, length, width=400, positions=1, **kwargs):
    """Three windows of a layer whose inputs' law never changes."""
    rng = np.random.default_rng([length, list(MOMENTA).index(momentum), list(SIZES).index(sizes), positions])
    layer = random_layer(rng, [length] * 3, width, momentum, sizes, **kwargs)
    if positions > 1:
        for calls in layer.windows:
            calls[:] = [Call(np.repeat(call.values, positions, axis=0), call.momentum, positions) for call in calls]
    return list(analyses([layer]))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5", "cumulative"])
def test_z_has_unit_variance_on_stationary_data(momentum, sizes):
    z = np.concatenate([analysis.z for analysis in stationary(momentum, sizes, 200)], axis=1)
    if (momentum, sizes) == ("cumulative", "equal"):  # the buffers are the window's reference
        assert (z == 0).all()
    else:
        np.testing.assert_allclose(rms(z), [1, 1], atol=0.1)


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5"])
def test_z_of_rounded_buffers_of_means_far_from_zero_has_no_more_than_unit_variance(momentum):
    for analysis in stationary(momentum, "equal", 200, mean=1e3, rounding=FLOAT32):
        assert (rms(analysis.z) < 1.1).all()


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5"])
def test_correlated_positions_leave_scores_and_grouping_as_they_are(momentum):
    windows = stationary(momentum, "equal", 200, width=100, positions=8)
    scores = np.concatenate([analysis.z for analysis in windows], axis=1)
    np.testing.assert_allclose(rms(scores), [1, 1], atol=0.15)
    for analysis in windows:
        assert analysis.batch_size == 8
        assert analysis.samples_per_batch == 64
        np.testing.assert_allclose(analysis.batching.grouping_ratio, [1], atol=0.1)
        np.testing.assert_allclose(analysis.batching.grouping_share, [0], atol=0.02)
        np.testing.assert_allclose(analysis.batching.ordering_ratio, [1], atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", ["0.01", "0.5", "cumulative"])
def test_gates_hardly_ever_fire_on_stationary_data(momentum):
    rng = np.random.default_rng(12)
    alarms = {}
    for width, number in ((8, 60), (1, 100)):
        layers = [random_layer(rng, [64] * 2, width, momentum, "unequal") for _ in range(number)]
        fired = [(analysis.lag_error > 0) | (analysis.drift_error > 0) for analysis in analyses(layers)]
        alarms[width] = np.mean(fired)
    assert alarms[8] == 0
    assert alarms[1] < 0.04


@pytest.mark.parametrize("momentum", ["0.1", "0.5"])
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_the_errors_that_noise_makes_are_those_predicted(momentum, sizes):
    rng = np.random.default_rng(13)
    layer = random_layer(rng, [200], 0, momentum, sizes)
    layer.width = 400
    layer.windows = [
        [Call(rng.normal(3.0, 2.0, (SIZES[sizes](t, rng), 400)), MOMENTA[momentum](t, rng)) for t in range(200)]
    ]
    (analysis,) = analyses([layer])
    truth = np.array([[3.0], [4.0]])

    def error(statistics):
        return np.sqrt((((statistics - truth) / unit_of(analysis)) ** 2).mean(axis=1).sum())

    np.testing.assert_allclose(analysis.noise_error, error(layer.buffers(1)), rtol=0.1)
    np.testing.assert_allclose(analysis.now_error, error(analysis.now), rtol=0.1)
    batches = [error(call.x) ** 2 for call in layer.windows[0]]
    if sizes == "equal":
        np.testing.assert_allclose(analysis.jitter, np.sqrt(np.mean(batches)), rtol=0.05)


def test_what_is_left_of_the_initial_values_is_known():
    rng = np.random.default_rng(14)
    layer = Layer(100, windows=[[Call(rng.normal(3.0, 2.0, (32, 100)), 0.01) for _ in range(20)] for _ in range(3)])
    for number, analysis in enumerate(analyses([layer]), start=1):
        left = 0.99 ** (20 * number)
        np.testing.assert_allclose(analysis.initial_weight, [left], rtol=1e-12)
        np.testing.assert_allclose(analysis.warmup_error, [left * np.hypot(3 / 2, 3 / 8)], rtol=0.03)
        assert analysis.lag_error < 0.03


# When something moves


def test_a_steady_drift_is_measured():
    rng = np.random.default_rng(15)
    delta, length, m = 0.01, 400, 0.05
    layer = Layer(64, windows=[[Call(rng.normal(delta * t, 1.0, (16, 64)), m) for t in range(length)]])
    (analysis,) = analyses([layer])
    unit = unit_of(analysis)[0].mean()
    np.testing.assert_allclose(analysis.now[0].mean(), delta * length, atol=2 * delta)
    np.testing.assert_allclose(analysis.lag_error, [delta * (1 - m) / m / unit], rtol=0.1)
    np.testing.assert_allclose(analysis.drift_error, [delta * length / 2 / unit], rtol=0.02)
    np.testing.assert_allclose(analysis.slope, [delta / unit], rtol=0.02)
    assert analysis.batching.smooth_share > 0.98
    assert analysis.batching.ordering_ratio > analysis.batching.ordering_limit


@pytest.mark.slow
@pytest.mark.parametrize("momentum", ["0.01", "0.1", "cumulative"])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_gates_fire_for_a_clear_drift(width, momentum):
    rng = np.random.default_rng(16)
    drift = 4.0 if width == 1 else 2.0
    layers = [random_layer(rng, [64] * 2, width, momentum, "unequal", drift=drift) for _ in range(10)]
    for analysis in assert_as_defined(layers):
        assert (analysis.drift_error > 0.2).all()
        assert (analysis.lag_error > 0).mean() > 0.5


def test_a_drift_of_the_variance_alone_is_noticed():
    rng = np.random.default_rng(17)
    windows = [[Call(rng.normal(0.0, 1 + t / 100, (16, 8)), 0.01) for t in range(100)] for _ in range(2)]
    for analysis in analyses([Layer(8, windows=windows)]):
        assert analysis.drift_error > 0.15
        assert analysis.lag_error > 0.15
        assert (abs(analysis.z[0]) < 5).all()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3, 8, 9])
def test_a_faint_drift_fires_a_gate_where_its_limit_is(width):
    rng = np.random.default_rng(22)
    growth = rng.uniform(0.05, 0.25 if width > 4 else 0.5, 20)
    layers = [
        Layer(width, windows=[[Call(rng.normal(0.0, 1 + g * t / 100, (16, width)), 0.1) for t in range(100)]])
        for g in growth
    ]
    (analysis,) = assert_as_defined(layers)
    assert 0 < (analysis.drift_error > 0).mean() < 1


def test_the_variance_now_is_never_negative_however_fast_it_falls():
    rng = np.random.default_rng(21)
    scales = np.sqrt([9.0] * 48 + [5.0] * 8 + [1.0] * 8)  # a straight line would go to -1 at the end
    layer = Layer(8, windows=[[Call(rng.normal(0.0, scale, (64, 8)), 0.1) for scale in scales]])
    (analysis,) = assert_as_defined([layer])
    assert (analysis.now[1] == 0).any()
    assert (analysis.now[1] >= 0).all()


def test_buffers_that_remember_another_law_lag_even_if_nothing_moves_now():
    rng = np.random.default_rng(18)
    windows = [[Call(rng.normal(mean, 1.0, (16, 8)), 0.001) for _ in range(100)] for mean in (5.0, 0.0)]
    layer = Layer(8, windows=windows)
    _, analysis = analyses([layer])
    # What the window before has left in the buffers.
    remembered = 5.0 * (0.999**100 - 0.999**200)
    np.testing.assert_allclose(analysis.lag_error, [remembered / unit_of(analysis)[0].mean()], rtol=0.1)
    assert analysis.drift_error == 0


def test_ordered_data_lie_between_blocks_and_not_on_a_line():
    rng = np.random.default_rng(19)
    centers = rng.normal(size=(8, 16))
    windows = [[Call(rng.normal(centers[t // 16], 1.0, (16, 16)), 0.1) for t in range(128)]]
    layer = Layer(16, windows=windows)
    (analysis,) = assert_as_defined([layer])
    assert analysis.batching.ordering_ratio > analysis.batching.ordering_limit
    variance = centers.var(axis=0)
    # Each block of 8 batches is of one center.
    np.testing.assert_allclose(analysis.batching.ordering_share, [(variance / (1 + variance)).mean()], rtol=0.15)
    assert analysis.batching.smooth_share < 0.6
    assert analysis.batching.grouping_ratio < analysis.batching.grouping_limit + 1


def test_batches_of_kinds_are_grouped_and_their_variance_counts_now():
    rng = np.random.default_rng(20)
    layer = Layer(64, windows=[[Call(rng.normal(rng.normal(size=64), 1.0, (16, 64)), 0.1) for _ in range(200)]])
    (analysis,) = assert_as_defined([layer])
    assert analysis.batching.grouping_ratio > analysis.batching.grouping_limit
    np.testing.assert_allclose(analysis.batching.grouping_ratio, [(1 + 1 / 16) / (2 / 16)], rtol=0.1)
    np.testing.assert_allclose(analysis.batching.grouping_share, [(1 + 1 / 16) / 2 - 1 / 16], rtol=0.1)
    np.testing.assert_allclose(analysis.now[1].mean(), 2.0, rtol=0.05)
    assert analysis.batching.ordering_ratio < analysis.batching.ordering_limit
