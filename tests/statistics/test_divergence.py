"""The divergences against closed forms in 50 digits, against exact finite samples, and by hand."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.divergence import act_rmse, is_dead, kl, log_var_ratio, mean_shift

mp.mp.dps = 50

DTYPES = [torch.float64, torch.float32]
# In units of the rounding 2^-53 or 2^-24: each step of a formula adds about one, a square doubles what came before.
# kl subtracts a logarithm from u where |u| >= 0.2: that costs up to u / (u - ln(1 + u)) = 11 times as much.
ROUNDINGS = {mean_shift: 8, log_var_ratio: 16, act_rmse: 16, kl: 128}
LAW = settings(max_examples=60, deadline=None)


def tolerance(function, dtype):
    unit = torch.finfo(dtype).eps / 2
    return max(ROUNDINGS[function] * unit, 1e-12)


def exact_mean_shift(mean, var, running_mean, running_var, eps):
    return (running_mean - mean) / mp.sqrt(var + eps)


def exact_log_var_ratio(mean, var, running_mean, running_var, eps):
    return mp.log(running_var + eps) - mp.log(var + eps)


def exact_act_rmse(mean, var, running_mean, running_var, eps):
    # x_eval - x_true = a (x - mean) + b: its second moment needs nothing of x but the variance.
    a = 1 / mp.sqrt(running_var + eps) - 1 / mp.sqrt(var + eps)
    b = (mean - running_mean) / mp.sqrt(running_var + eps)
    return mp.sqrt(a**2 * var + b**2)


def exact_kl(mean, var, running_mean, running_var, eps):
    s, q = var + eps, running_var + eps
    return mp.log(mp.sqrt(q) / mp.sqrt(s)) + (s + (mean - running_mean) ** 2) / (2 * q) - mp.mpf(1) / 2


EXACT = {mean_shift: exact_mean_shift, log_var_ratio: exact_log_var_ratio, act_rmse: exact_act_rmse, kl: exact_kl}
ARGUMENTS = {
    mean_shift: ("mean", "var", "running_mean"),
    log_var_ratio: ("var", "running_var"),
    act_rmse: ("mean", "var", "running_mean", "running_var"),
    kl: ("mean", "var", "running_mean", "running_var"),
}
FUNCTIONS = list(EXACT)
OF_RATIO = [log_var_ratio, kl]


def computed(function, eps, dtype=torch.float64, **statistics):
    values = [torch.as_tensor(statistics[name], dtype=dtype) for name in ARGUMENTS[function]]
    return function(*values, eps)


def exact(function, eps, dtype=torch.float64, **statistics):
    """The 50-digit value for the statistics as they are after rounding to ``dtype``."""
    rounded = {name: mp.mpf(torch.tensor(value, dtype=dtype).item()) for name, value in statistics.items()}
    return EXACT[function](**rounded, eps=mp.mpf(eps))


def relative_error(value, reference):
    if reference == 0:
        return abs(mp.mpf(float(value)))
    return abs(mp.mpf(float(value)) / reference - 1)


variances = st.floats(-8, 8).map(lambda exponent: 10**exponent)
means = st.just(0.0) | st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)
small = st.builds(lambda sign, exponent: sign * 10**exponent, st.sampled_from([-1, 1]), st.floats(-12, -0.31))
epsilons = st.sampled_from([0.0, 1e-5, 1e-3, 1.0])


@st.composite
def channels(draw):
    """Statistics anywhere, or close to each other."""
    mean, var = draw(means), draw(variances)
    return {
        "mean": mean,
        "var": var,
        "running_mean": draw(means | small.map(lambda d: mean + d * math.sqrt(var))),
        "running_var": draw(variances | small.map(lambda d: var * (1 + d))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@given(channel=channels(), eps=epsilons)
@example(channel={"mean": 0.0, "var": 0.805, "running_mean": 0.0, "running_var": 1.0}, eps=0.0)
@LAW
def test_every_divergence_is_its_closed_form(function, dtype, channel, eps):
    assume(channel["var"] > 1.001e-3 * eps)
    result = computed(function, eps, dtype, **{name: [value] for name, value in channel.items()})
    assert result.dtype == dtype
    assert result.shape == (1,)
    assert relative_error(result, exact(function, eps, dtype, **channel)) < tolerance(function, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(channel=channels(), eps=epsilons)
@LAW
def test_distances_are_never_negative(dtype, channel, eps):
    assume(channel["var"] > 1.001e-3 * eps)
    assert computed(kl, eps, dtype, **channel) >= 0
    assert computed(act_rmse, eps, dtype, **channel) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@given(mean=means, var=variances, eps=epsilons)
@LAW
def test_equal_statistics_give_exactly_zero(function, dtype, mean, var, eps):
    assume(var > 1.001e-3 * eps)
    assert computed(function, eps, dtype, mean=mean, var=var, running_mean=mean, running_var=var) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "u", [sign * digit * 10.0**-k for k in range(2, 10) for digit in (1, 3, 10) for sign in (1, -1)]
)
def test_kl_of_variances_that_are_close_keeps_its_digits(dtype, u):
    # With eps = 1 and small variances, u has digits to spare even in float32.
    for scale in np.linspace(0.9, 1, 8):
        var = 2e-3 + max(u * scale, 0)
        channel = {"mean": 0.0, "var": var, "running_mean": 0.0, "running_var": var - u * scale}
        value = computed(kl, 1.0, dtype, **channel)
        assert value > 0
        assert relative_error(value, exact(kl, 1.0, dtype, **channel)) < 16 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("u", "lost"), [(1e-4, 1e-4), (1e-5, 1e-3), (1e-6, 1e-2), (1e-7, 0.5), (1e-8, 0.99)])
def test_the_naive_form_of_kl_would_fail_these_tests_in_float32(u, lost):
    worst, worst_of_ours = 0.0, 0.0
    for scale in np.linspace(1, 2, 16):
        running_var = torch.tensor(2e-3)
        var = (running_var + u * scale).float()
        ratio = (var - running_var) / (running_var + 1)
        naive = 0.5 * (ratio - torch.log1p(ratio))
        channel = {"mean": 0.0, "var": var.item(), "running_mean": 0.0, "running_var": running_var.item()}
        reference = exact(kl, 1.0, torch.float32, **channel)
        worst = max(worst, relative_error(naive, reference))
        worst_of_ours = max(worst_of_ours, relative_error(computed(kl, 1.0, torch.float32, **channel), reference))
    assert worst > lost
    assert worst > 10 * tolerance(kl, torch.float32)
    assert worst_of_ours < tolerance(kl, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("switch", [-0.5, -0.2, 0.2, 0.5])
@pytest.mark.parametrize("function", OF_RATIO)
def test_both_sides_of_a_switch_of_formula_are_the_closed_form(function, switch, dtype):
    at = torch.tensor(1 + switch, dtype=dtype)
    below = torch.nextafter(at, at - 1)
    above = torch.nextafter(at, at + 1)
    for var in (below.item(), at.item(), above.item(), at.item() - 1e-3, at.item() + 1e-3):
        channel = {"mean": 0.0, "var": var, "running_mean": 0.0, "running_var": 1.0}
        value = computed(function, 0.0, dtype, **channel)
        assert relative_error(value, exact(function, 0.0, dtype, **channel)) < tolerance(function, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_act_rmse_is_continuous_where_the_variance_reaches_zero(dtype):
    at_zero, just_above = computed(
        act_rmse, 1e-5, dtype, mean=[0.0, 0.0], var=[0.0, 1e-30], running_mean=[0.1, 0.1], running_var=[2.0, 2.0]
    )
    assert at_zero == just_above
    assert relative_error(at_zero, mp.mpf("0.1") / mp.sqrt(mp.mpf("2.00001"))) < 4 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize(("mean_error", "var_factor"), [(0.4, 1.0), (0.0, 1.7), (-0.2, 0.6), (5.0, 40.0), (0.01, 1e-3)])
@pytest.mark.parametrize("distribution", ["exponential", "lognormal", "bernoulli"])
def test_act_rmse_is_the_rms_error_of_the_normalised_values_whatever_their_distribution(
    distribution, mean_error, var_factor, eps
):
    rng = np.random.default_rng(0)
    sample = {
        "exponential": lambda: rng.exponential(3.0, 999),
        "lognormal": lambda: rng.lognormal(0.0, 1.5, 999),
        "bernoulli": lambda: (rng.random(999) < 0.03) * 2.0,
    }[distribution]()
    x = [mp.mpf(value) for value in sample]
    mean = mp.fsum(x) / len(x)
    var = mp.fsum((value - mean) ** 2 for value in x) / len(x)
    running_mean, running_var = float(mean) + mean_error, float(var) * var_factor
    in_eval = 1 / mp.sqrt(mp.mpf(running_var) + mp.mpf(eps))
    in_truth = 1 / mp.sqrt(var + mp.mpf(eps))
    errors = [(value - mp.mpf(running_mean)) * in_eval - (value - mean) * in_truth for value in x]
    reference = mp.sqrt(mp.fsum(error**2 for error in errors) / len(x))
    value = computed(
        act_rmse, eps, mean=float(mean), var=float(var), running_mean=running_mean, running_var=running_var
    )
    assert relative_error(value, reference) < 1e-12


def test_hand_computed_values():
    statistics = {"mean": [1.0], "var": [3.0], "running_mean": [2.0], "running_var": [15.0]}
    assert computed(mean_shift, 1.0, **statistics).item() == pytest.approx(1 / 2, rel=1e-15)
    assert computed(log_var_ratio, 1.0, **statistics).item() == pytest.approx(math.log(4), rel=1e-15)
    # a = 1/4 - 1/2, b = -1/4: sqrt(3/16 + 1/16)
    assert computed(act_rmse, 1.0, **statistics).item() == pytest.approx(1 / 2, rel=1e-15)
    # (ln 4 + (4 + 1)/16 - 1) / 2
    assert computed(kl, 1.0, **statistics).item() == pytest.approx((math.log(4) - 11 / 16) / 2, rel=1e-14)


@pytest.mark.parametrize("excess", [1e-9, 1e-3, 0.3, 0.9, 30.0])
def test_signs_tell_whether_the_running_statistics_are_too_large(excess):
    large, little = [1.0 + excess], [1.0]
    assert computed(mean_shift, 1e-5, mean=little, var=[1.0], running_mean=large) > 0
    assert computed(mean_shift, 1e-5, mean=large, var=[1.0], running_mean=little) < 0
    assert computed(log_var_ratio, 1e-5, var=little, running_var=large) > 0
    assert computed(log_var_ratio, 1e-5, var=large, running_var=little) < 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.5, 0.999])
def test_a_dead_channel_has_its_act_rmse_and_no_ratio_of_variances(share, dtype):
    eps = 1e-5
    channel = {"mean": 1.0, "var": share * 1e-3 * eps, "running_mean": 1.0, "running_var": 1e-5}
    assert is_dead(torch.tensor(channel["var"], dtype=dtype), eps)
    reference = exact(act_rmse, eps, dtype, **channel)
    value = computed(act_rmse, eps, dtype, **channel)
    if share == 0:
        assert value == 0
    else:
        assert relative_error(value, reference) < tolerance(act_rmse, dtype)
    assert value < 0.02
    for function in OF_RATIO:
        assert computed(function, eps, dtype, **channel).isnan()
        alive = {**channel, "var": 1.001e-3 * eps}
        assert relative_error(
            computed(function, eps, dtype, **alive), exact(function, eps, dtype, **alive)
        ) < tolerance(function, dtype)


def test_a_variance_of_a_thousandth_of_eps_is_dead_and_one_above_is_not():
    var = torch.tensor([0.0, 0.000999, 0.001, 0.001001, 1.0, 0.0, torch.nan], dtype=torch.float64)
    assert is_dead(var[:5], eps=1.0).tolist() == [True, True, True, False, False]
    assert is_dead(var[4:], eps=0.0).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_channel_without_eps_is_dead(dtype):
    # The true output is 0 here by continuity, so that eval() is wrong by (mean - running_mean) / sqrt(running_var).
    channel = {"mean": [1.0, 1.0], "var": [0.0, 0.0], "running_mean": [1.0, 4.0], "running_var": [4.0, 4.0]}
    assert computed(act_rmse, 0.0, dtype, **channel).tolist() == [0.0, 1.5]
    for function in OF_RATIO:
        assert computed(function, 0.0, dtype, **channel).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("function", "argument"), [(function, name) for function in FUNCTIONS for name in ARGUMENTS[function]]
)
def test_a_non_finite_argument_makes_its_channel_nan_and_touches_no_other(function, argument, bad):
    statistics = {
        "mean": [0.0, 1.0, 2.0],
        "var": [1.0, 2.0, 3.0],
        "running_mean": [0.5, 1.0, 2.5],
        "running_var": [1.1, 2.0, 9.0],
    }
    untouched = computed(function, 1e-5, **statistics)
    broken = computed(function, 1e-5, **{**statistics, argument: [*statistics[argument][:1], bad, 3.0]})
    alone = computed(function, 1e-5, **{**statistics, argument: [*statistics[argument][:1], 1.0, 3.0]})
    assert untouched.isfinite().all()
    assert broken[1].isnan()
    assert torch.equal(broken[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("argument", ["var", "running_var"])
def test_a_negative_variance_counts_as_zero(argument, function, dtype):
    # eps is large enough that neither side divides by nearly nothing.
    channel = {"mean": [0.2], "var": [1.0], "running_mean": [0.5], "running_var": [1.5]}
    negative = computed(function, 1e-2, dtype, **{**channel, argument: [-1e-3]})
    zero = computed(function, 1e-2, dtype, **{**channel, argument: [0.0]})
    torch.testing.assert_close(negative, zero, rtol=0, atol=0, equal_nan=True)
    if argument == "running_var" or function not in OF_RATIO:
        assert negative.isfinite().all()


def test_a_pair_of_negative_variances_is_a_pair_of_equal_ones():
    channel = {"mean": [1.0], "var": [-1e-12], "running_mean": [1.0], "running_var": [-3e-12]}
    assert computed(act_rmse, 1e-5, **channel) == 0
    assert computed(mean_shift, 1e-5, **channel) == 0
