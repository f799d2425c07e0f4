"""What a window's blocks say, against the definitions, and what cannot be told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.analysis import Analysis, analyse
from lightning_bnmonitor.statistics.noise import RunningStats
from lightning_bnmonitor.statistics.window import Window
from tests.statistics.analysis_reference import (
    EXACT,
    FLOAT32,
    LENGTHS,
    MOMENTA,
    OF_ALL_VALUES,
    PER_CHANNEL,
    SIZES,
    UNDEFINED,
    Call,
    analyses,
    assert_as_defined,
    expected_analysis,
    last_of,
    part_of,
    random_layer,
    unit_of,
)
from tests.statistics.window_reference import update

# The definitions


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("length", [*LENGTHS, pytest.param(100, marks=pytest.mark.slow)])
def test_a_profile_is_what_the_definitions_say(length, momentum):
    rng = np.random.default_rng([length, list(MOMENTA).index(momentum)])
    layers = [
        random_layer(rng, [length] * 3, 3, momentum, "unequal"),
        random_layer(rng, [length] * 3, 1, momentum, "equal", eps=0.1),
        random_layer(rng, [length] * 3, 4, momentum, "one of two", rounding=FLOAT32),
        random_layer(rng, [length] * 3, 2, momentum, "last one short", drift=1.0),
        random_layer(rng, [length] * 3, 5, momentum, "unequal", mean=-30.0, drift=2.0, rounding=FLOAT32),
    ]
    assert_as_defined(layers, step=32 if length % 2 else 7)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", ["0.01", "cumulative"])
def test_a_long_window_is_what_the_definitions_say(momentum):
    rng = np.random.default_rng(1)
    layers = [
        random_layer(rng, [600] * 2, 2, momentum, "unequal", rounding=FLOAT32),
        random_layer(rng, [600] * 2, 1, momentum, "equal", drift=1.0),
    ]
    assert_as_defined(layers)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [EXACT, FLOAT32])
@pytest.mark.parametrize("length", [9, 33, 100])
def test_means_far_from_zero_cost_no_more_than_their_own_rounding(length, rounding):
    rng = np.random.default_rng(length)
    layers = [
        random_layer(rng, [length] * 3, 4, momentum, "unequal", mean=1e3, drift=drift, rounding=rounding)
        for momentum in ("0.01", "0.1", "0.5")
        for drift in (0.0, 2.0)
    ]
    assert_as_defined(layers, rtol=1e-6)


def test_layers_may_differ_in_how_often_they_are_called_in_each_window():
    rng = np.random.default_rng(2)
    lengths = [(40, 17, 3), (5, 64, 100), (33, 33, 33), (2, 1, 16), (100, 5, 40)]
    momenta = ["0.1", "varying", "cumulative", "0.5", "with pauses"]
    layers = [random_layer(rng, lengths[i], 1 + i, momenta[i], rounding=FLOAT32 if i % 2 else EXACT) for i in range(5)]
    for step in (1, 9, 100):
        assert_as_defined(layers, step=step)


def test_the_company_of_other_layers_does_not_matter():
    rng = np.random.default_rng(3)
    layers = [random_layer(rng, [n, n], 1 + n % 4, "varying", drift=n % 3) for n in (20, 7, 40, 33)]
    together = list(analyses(layers))
    for number, layer in enumerate(layers):
        for analysis, alone in zip(together, analyses([layer]), strict=True):
            for name, value in part_of(analysis, layers, number).items():
                np.testing.assert_allclose(value, part_of(alone, [layer], 0)[name], rtol=1e-10, atol=1e-10)


def test_buffers_of_an_unknown_past_are_a_constant_like_any_other():
    rng = np.random.default_rng(4)
    layers = [
        random_layer(rng, [20, 40], 3, momentum, drift=drift, trained=True)
        for momentum in ("0.01", "0.1", "varying")
        for drift in (0.0, 1.0)
    ]
    for analysis in assert_as_defined(layers):
        assert (analysis.initial_weight == 0).all()
        assert (analysis.warmup_error == 0).all()


def test_the_history_that_a_window_is_given_adds_to_the_noise():
    rng = np.random.default_rng(5)
    layer = random_layer(rng, [20], 2, "0.1", trained=True)
    expected = expected_analysis(layer, 0)
    window = Window(torch.device("cpu"))
    window.add_layers([2])
    update(window, {0: [call.batch for call in layer.windows[0]]})
    start, end, earlier = layer.buffers(0), layer.buffers(1), np.array([[0.02], [0.03]])
    buffers = RunningStats(start, end, np.zeros(1), earlier, np.array([EXACT]), np.array([True]), last_of([layer], 0))
    analysis = analyse(window.blocks(), buffers, np.array([layer.eps]))
    noise = expected["noise"] + 0.9**40 * earlier[:, 0]
    np.testing.assert_allclose(analysis.noise[:, 0], noise, rtol=1e-9)
    error = np.sqrt((expected["within"] / expected["dof"] / unit_of(analysis) ** 2 * noise[:, None]).mean(axis=1).sum())
    np.testing.assert_allclose(analysis.noise_error, [error], rtol=1e-9)
    np.testing.assert_allclose(analysis.z, expected["z"], rtol=1e-9)


# What cannot be told


def test_of_a_layer_whose_weights_are_unknown_only_the_window_is_told():
    rng = np.random.default_rng(6)
    layers = [
        random_layer(rng, [40] * 2, 3, "0.1", drift=drift, ordered=ordered, known=False)
        for drift, ordered in ((0.0, 0.0), (3.0, 0.0), (0.0, 3.0))
    ]
    layers.append(random_layer(rng, [40] * 2, 2, "0.1"))
    for analysis in assert_as_defined(layers):
        assert (analysis.z[:, :9] == 0).all()
        for error in (analysis.noise_error, analysis.warmup_error, analysis.lag_error):
            assert np.isnan(error).tolist() == [True, True, True, False]
        assert analysis.drift_error[1] > 0.5
        assert analysis.batching.ordering_ratio[2] > analysis.batching.ordering_limit[2]
        assert np.isfinite(analysis.batching.grouping_ratio).all()
        assert np.isfinite(analysis.max_score).all()


def test_a_channel_that_is_not_finite_is_left_out_and_no_other_changes():
    rng = np.random.default_rng(7)
    for momentum in ("0.1", "cumulative"):
        layers = [random_layer(rng, [30] * 2, 4, momentum, sizes, drift=1.0) for sizes in SIZES]
        for layer in layers:
            broken = layer.windows[0][11]
            values = broken.values.copy()
            values[1, 2] = np.nan
            layer.windows[0][11] = Call(values, broken.momentum)
        first, second = assert_as_defined(layers)
        for name in ("within", "now"):
            assert np.isnan(getattr(first, name)[:, 2::4]).all()
        for name in Analysis.__dataclass_fields__:
            if name not in (*OF_ALL_VALUES, *PER_CHANNEL):
                assert np.isfinite(getattr(first, name)).all(), name
        assert first.first_bad.tolist() == 4 * [np.inf, np.inf, 12, np.inf]
        # The buffers stay as they are, the window's data are fine again.
        assert np.isfinite(second.population).all()
        assert np.isfinite(second.within).all()
        assert second.first_bad.tolist() == 16 * [np.inf]


def test_of_a_layer_without_a_finite_channel_nothing_is_told():
    layers = [random_layer(np.random.default_rng(8), [30], 2) for _ in range(2)]
    layers[0].windows[0][0] = Call(layers[0].windows[0][0].values * np.nan, 0.1)
    (analysis,) = analyses(layers)
    for name in ("noise_error", "now_error", "warmup_error", "jitter", "ordering_ratio", "grouping_ratio", "max_score"):
        assert [np.isnan(part_of(analysis, layers, i)[name]) for i in (0, 1)] == [True, False], name


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pauses", [0, 5])
def test_without_a_batch_nothing_is_told_and_history_stays(pauses, known):
    rng = np.random.default_rng(9)
    layers = [
        random_layer(rng, [4, 0, 30], 2, known=known),
        random_layer(rng, [20, 20, 20], 3),
        random_layer(rng, [0, 0, 0], 1, known=known),
    ]
    for layer in layers[::2]:
        layer.windows[1] += [Call(rng.normal(size=(4, layer.width)), 0.0) for _ in range(pauses)]
    before, without, after = assert_as_defined(layers)
    assert without.num_batches.tolist() == [0, 20, 0]
    assert without.initial_weight[0] == before.initial_weight[0]
    assert without.noise[:, 0].tolist() == before.noise[:, 0].tolist()
    for analysis, empty in ((before, [2]), (without, [0, 2]), (after, [2])):
        for number in empty:
            part = part_of(analysis, layers, number)
            for name in (*UNDEFINED, "now", "warmup_error"):
                assert np.isnan(part[name]).all(), name


@pytest.mark.parametrize("known", [True, False])
def test_of_one_batch_there_is_no_noise(known):
    rng = np.random.default_rng(10)
    layers = [random_layer(rng, [1, 1], 3, known=known), random_layer(rng, [20, 20], 2)]
    for analysis in assert_as_defined(layers):
        part = part_of(analysis, layers, 0)
        for name in UNDEFINED:
            assert np.isnan(part[name]).all(), name
        assert np.isfinite(part["now"][0]).all()


@pytest.mark.parametrize("rounding", [EXACT, FLOAT32])
@pytest.mark.parametrize("value", [0.0, 0.7, -1e3 / 3])
@pytest.mark.parametrize("length", [9, 40, 100])
def test_a_channel_that_never_changes_is_evidence_of_nothing(length, value, rounding):
    rng = np.random.default_rng(11)
    layers = [random_layer(rng, [length] * 2, 4, "0.1", sizes, rounding=rounding) for sizes in ("equal", "unequal")]
    for layer in layers:
        for calls in layer.windows:
            for call in calls:
                call.values[:, 1] = value
            calls[:] = [Call(call.values, call.momentum) for call in calls]
    for analysis in analyses(layers):
        assert (abs(analysis.z[:, 1::4]) < 2).all()
        assert (analysis.max_score < 6).all()
        assert (analysis.drift_error == 0).all()
        assert (analysis.lag_error == 0).all()
        np.testing.assert_allclose(analysis.population[1, 1::4], 0, atol=1e-11)
        np.testing.assert_allclose(analysis.now[:, 1::4], np.full((2, 2), [[value], [0.0]]), rtol=1e-12, atol=1e-12)
