"""What a window's blocks say, against the definitions: everything as explicit sums over every batch ever seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.analysis import Buffers, Profile, evaluate
from lightning_bnmonitor.statistics.window import Batch, Window

LENGTHS = [2, 3, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 64, 100, 257]
MOMENTA = {
    "0.01": lambda t, rng: 0.01,
    "0.1": lambda t, rng: 0.1,
    "0.5": lambda t, rng: 0.5,
    "1.0": lambda t, rng: 1.0,
    "cumulative": lambda t, rng: 1 / (t + 1),
    "falling": lambda t, rng: max(0.3 * 0.98**t, 0.01),
    "varying": lambda t, rng: rng.uniform(0.01, 0.9),
    "with pauses": lambda t, rng: 0.1 * (t % 5 != 2),
}
SIZES = {
    "equal": lambda t, rng: 8,
    "unequal": lambda t, rng: int(rng.integers(2, 20)),
    "one of two": lambda t, rng: 2 if t == 5 else 16,
    "last one short": lambda t, rng: 3 if t % 7 == 6 else 12,
}
INITIAL = np.array([[0.0], [1.0]])
EXACT, FLOAT32 = 2.0**-53, 2.0**-24


@dataclass
class Call:
    """One call of a layer with all its values."""

    values: Any  # (n, C) float64
    momentum: float
    positions: int = 1

    def __post_init__(self):
        n = len(self.values)
        mean = self.values.mean(axis=0)
        squares = ((self.values - mean) ** 2).sum(axis=0)
        self.x = np.stack([mean, squares / (n - 1)])  # what enters the buffers, (2, C)
        self.g = np.array([n, n - 1.0])  # its weight
        self.batch_size = n // self.positions
        self.batch = Batch(
            n, torch.from_numpy(mean), torch.from_numpy(squares / n), None, self.momentum, self.batch_size
        )


@dataclass
class Layer:
    """A layer, its calls in each window, and its buffers as PyTorch updates them."""

    width: int
    eps: float = 1e-5
    rounding: float = EXACT
    known: bool = True
    trained: bool = False  # monitoring starts with buffers of an unknown past
    windows: list[list[Call]] = field(default_factory=list)

    def initial(self):
        return np.tile(INITIAL + 0.3 * self.trained, self.width)

    def buffers(self, num_windows):
        """The buffers after so many windows, ``(2, C)``, rounded at every update."""
        dtype = np.float32 if self.rounding == FLOAT32 else np.float64
        running = self.initial().astype(dtype)
        for call in updating(self.windows[:num_windows]):
            running = ((1 - call.momentum) * running.astype(np.float64) + call.momentum * call.x).astype(dtype)
        return running.astype(np.float64)


def random_layer(rng, lengths, width=3, momentum="0.1", sizes="unequal", mean=1.0, drift=0.0, ordered=0.0, **kwargs):
    """A layer whose inputs' mean and spread move by ``drift`` standard deviations over each window.

    Of ``ordered`` data the first half of a window has another mean than the second, by so many standard deviations.
    """
    layer, t = Layer(width, **kwargs), 0
    center, scale = mean * rng.uniform(0.5, 2.0, width), rng.uniform(0.5, 2.0, width)
    direction = rng.choice([-1.0, 1.0], width)
    for length in lengths:
        calls = []
        for i in range(length):
            n = SIZES[sizes](t, rng)
            shift = drift * (t + 1) / length + ordered * (2 * i >= length)
            spread = scale * (1 + 0.3 * drift * (t + 1) / length)
            calls.append(
                Call(rng.normal(center + direction * shift * scale, spread, (n, width)), MOMENTA[momentum](t, rng))
            )
            t += 1
        layer.windows.append(calls)
    return layer


def updating(windows):
    return [call for calls in windows for call in calls if call.momentum]


# The reference


def partition(num_batches):
    """Which batches are in which block: adding one after the other, then a variance within each if possible."""
    blocks, size = [], 1
    for t in range(num_batches):
        if blocks and len(blocks[-1]) < size:
            blocks[-1].append(t)
            continue
        if len(blocks) == 16:
            blocks = [blocks[i] + blocks[i + 1] for i in range(0, 16, 2)]
            size *= 2
        blocks.append([t])
    if size == 1:
        blocks = [[*chain(*blocks[i : i + 2])] for i in range(0, len(blocks), 2)]
    return blocks


def weights_after_updates(momenta):
    """The weight of each batch and of what was there before in an average after all updates, and S."""
    weights, remains, rounding = [], 1.0, 0.0
    for m in reversed(momenta):
        weights.insert(0, m * remains)
        rounding += remains
        remains *= 1 - m
    return np.array(weights), remains, rounding


def exact_buffers(layer, num_windows):
    """The buffers after so many windows, had no update been rounded."""
    calls = updating(layer.windows[:num_windows])
    weights, remains, _ = weights_after_updates([call.momentum for call in calls])
    return remains * layer.initial() + sum(weight * call.x for weight, call in zip(weights, calls, strict=True))


def last_runs(blocks):
    """The last eighth of the batches in whole blocks, and as many before it twice, last first."""
    runs, stop, target = [], len(blocks), sum(len(block) for block in blocks) / 8
    while stop and len(runs) < 3:
        candidates = [[*chain(*blocks[start:stop])] for start in range(stop)]
        run = min(candidates, key=lambda batches: (abs(len(batches) - target), -len(batches)))
        runs.append(run)
        stop -= sum(1 for block in blocks if block[0] in run)
        target = len(runs[0])
    return runs


def mean_of(values):
    """Mean over the channels that are finite."""
    finite = values[np.isfinite(values)]
    return finite.mean() if len(finite) else np.nan


def score_of(z, df):
    return np.sign(z) * (8 * df + 1) / (8 * df + 3) * np.sqrt(df * np.log(1 + z**2 / df))


@np.errstate(divide="ignore", invalid="ignore")
def expected_profile(layer, index):
    """All that can be said of a layer in one window, by the definitions, from every batch so far."""
    earlier, calls = updating(layer.windows[:index]), updating([layer.windows[index]])
    num_batches, width = len(calls), layer.width
    values = np.concatenate([call.values for call in calls])
    x = np.stack([call.x for call in calls], axis=1)  # (2, T, C)
    g = np.stack([call.g for call in calls], axis=1)  # (2, T)
    fine = np.isfinite(values).all(axis=0)

    first_bad = np.full(width, np.inf)
    for number, call in reversed(list(enumerate(layer.windows[index], start=1))):
        first_bad[~np.isfinite(call.values).all(axis=0)] = number

    # What the buffers are made of.
    weights, initial_weight, _ = weights_after_updates([call.momentum for call in earlier + calls])
    w, decay, rounding = weights_after_updates([call.momentum for call in calls])
    h = sum((weight**2 / call.g for weight, call in zip(weights, earlier, strict=False)), np.zeros(2))
    noise = h + (w**2 / g).sum(axis=1)
    known = 1.0 if layer.known else np.nan
    start, end = layer.buffers(index), layer.buffers(index + 1)
    tol = layer.rounding * (rounding + 1) * np.maximum(abs(start), abs(end))
    rounded = np.zeros((2, width))  # what rounding did to the buffers in this window
    if layer.rounding != EXACT:
        rounded = end - exact_buffers(layer, index + 1) - decay * (start - exact_buffers(layer, index))
    if layer.trained or not layer.known:  # what was there before is a constant
        initial_weight = 0.0

    # Population.
    mean = values.mean(axis=0)
    var = ((values - mean) ** 2).sum(axis=0) / (len(values) - 1)
    s = var + layer.eps
    unit = np.stack([np.sqrt(s), 2 * s])

    # Noise scales.
    blocks = partition(num_batches)
    num_blocks = len(blocks)
    dof = np.float64(num_batches - num_blocks)
    block_mean, w_smooth, time = np.empty_like(x), np.empty_like(g), np.empty(num_batches)
    for block in blocks:
        for f in range(2):
            block_mean[f, block] = (g[f, block, None] * x[f, block]).sum(axis=0) / g[f, block].sum()
            w_smooth[f, block] = w[block].sum() * g[f, block] / g[f, block].sum()
        time[block] = np.mean(block)
    squares = (g[..., None] * (x - block_mean) ** 2).sum(axis=1)
    noise_scale = squares / dof if dof else np.full((2, width), np.nan)
    in_buffer = (w[:, None] * (x - block_mean)).sum(axis=1) + rounded
    c_noise = ((w - w_smooth) ** 2 / g).sum(axis=1)
    c_noise[c_noise < 1e-9 * (w**2 / g).sum(axis=1)] = 0
    v_independent, df = noise_scale.copy(), np.array([dof, dof])
    for f in range(2):
        if c_noise[f] > 0 and dof > 1:
            df[f] = dof - 1
            remaining = np.maximum(squares[f] - in_buffer[f] ** 2 / c_noise[f], 0) / (dof - 1)
            separable = layer.known & (tol[f] ** 2 <= 0.01 * c_noise[f] * noise_scale[f])
            v_independent[f] = np.where(separable, remaining, noise_scale[f])

    def average(density):
        return (density * g)[..., None] * x

    def variance(coefficient):
        """Of the sum over batches of coefficient times x, per V."""
        return (coefficient**2 / g).sum(axis=1)

    def standardised(difference, c2, tolerance):
        return np.where(difference == 0, 0, difference / np.sqrt(v_independent * c2[:, None] + tolerance**2))

    # References.
    window = np.ones(num_batches) / g.sum(axis=1, keepdims=True)
    runs = last_runs(blocks)
    tails = np.zeros((3, 2, num_batches))
    for i, run in enumerate(runs):
        tails[i][:, run] = 1 / g[:, run].sum(axis=1, keepdims=True)
    now = tails[0].copy()
    if len(runs) == 3:
        a, b, c = (average(tail).sum(axis=1) / unit for tail in tails)
        c1, c2, c3 = (len(run) for run in runs)
        for f in range(2):
            d1, d2, k = (a - b)[f, fine], (b - c)[f, fine], (c2 + c3) / (c1 + c2)
            largest = max(k**2 * (d1 @ d1), d2 @ d2)
            phi = min(max(k * (d1 @ d2) / largest, 0), 1) if largest > 0 else 0
            now[f] += phi * c1 / (c1 + c2) * (tails[0, f] - tails[1, f])
    ref_window, ref_now = average(window).sum(axis=1), average(now).sum(axis=1)
    ratio = (num_batches - 1) / (len(values) - 1)
    now_var = np.maximum(ref_now[1] + ratio * (noise_scale[0] - ref_now[1]), 0)

    # The buffers against them.
    reach = 1 - initial_weight
    coefficient = w - w.sum() * window * g
    c2 = variance(coefficient)
    difference = (coefficient[..., None] * x).sum(axis=1) + rounded
    negligible = 1e-9 * noise
    z = np.where((c2 <= negligible)[:, None], 0, standardised(difference, c2, tol))
    z = z if layer.known else np.zeros_like(z)
    lags, z_lag, c2_lag = [], [], []
    for density, reference in ((window, ref_window), (now, ref_now)):
        lags.append(end - initial_weight * INITIAL - reach * reference)
        c2_lag.append(variance(w - reach * density * g) + h)
        z_lag.append(known * np.where((c2_lag[-1] <= negligible)[:, None], 0, standardised(lags[-1], c2_lag[-1], tol)))
    warm = initial_weight * (INITIAL - ref_now)

    # What moves.
    centered = time - (g * time).sum(axis=1, keepdims=True) / g.sum(axis=1, keepdims=True)
    trend, c2_trend = (centered * g)[..., None] * x, variance(centered * g)
    trend = trend.sum(axis=1)
    z_trend = standardised(trend, c2_trend, 0.0)
    tail = average(tails[0] - window).sum(axis=1)
    z_tail = standardised(tail, variance((tails[0] - window) * g), 0.0)
    scores = np.stack([score_of(value, df[:, None]) for value in (z, z_trend, z_tail, *z_lag)])

    def gate(score):
        of_mean, of_var = (row[np.isfinite(row)] ** 2 for row in score)
        limit = max(4.1, 9 - 0.7 * (len(of_var) - 1))
        return np.array([mean_of(of_mean) > 9, len(of_var) > 0 and np.median(of_var) > limit])

    def net(difference, c2, counted):
        excess = (difference**2 - noise_scale * c2[:, None]) / unit**2
        return np.sqrt(sum((max(mean_of(excess[f]), 0) for f in range(2) if counted[f]), 0.0))

    def rms(squares):
        return np.sqrt(mean_of(squares[0]) + mean_of(squares[1]))

    moving = gate(scores[1]) | gate(scores[2])
    lagging = moving | gate(scores[3]) | gate(scores[4])
    relative = noise_scale / unit**2

    # How batches are made.
    ssb = np.zeros(width)
    for block in blocks:
        ssb += g[0, block].sum() * (block_mean[0, block[0]] - ref_window[0]) ** 2
    if num_blocks == 1:
        ssb[:] = 0
    slow = ((ssb - (num_blocks - 1) * noise_scale[0]) / s)[fine].sum()
    n_batch = len(values) / num_batches
    batch_size = np.mean([call.batch_size for call in calls])
    base = s / batch_size
    among_blocks = np.float64(num_blocks - 1)
    ss_trend = trend[0] ** 2 / c2_trend[0]
    return {
        "num_batches": num_batches,
        "samples_per_batch": n_batch,
        "batch_size": batch_size,
        "dof": dof,
        "initial_weight": initial_weight,
        "noise": noise,
        "unit": unit,
        "noise_scale": noise_scale,
        "std_error": known * np.sqrt(noise_scale * noise[:, None]),
        "z": z,
        "score": scores[0],
        "z_lag": np.stack(z_lag),
        "reference": (g[..., None] * x).sum(axis=1) / g.sum(axis=1, keepdims=True),
        "now": np.stack([ref_now[0], now_var]),
        "noise_error": known * rms(relative * noise[:, None]),
        "now_error": rms(relative * variance(now * g)[:, None]),
        "warmup_error": known * rms((warm / unit) ** 2),
        "lag_error": known * net(lags[1], c2_lag[1], lagging),
        "drift_error": net(ref_now - ref_window, variance((now - window) * g), moving),
        "max_score": np.fmax.reduce(np.abs(scores), axis=None),
        "slope": net(trend / c2_trend[:, None], 1 / c2_trend, moving),
        "jitter": rms(relative * (num_batches / g.sum(axis=1))[:, None]),
        "ordering_ratio": (ssb / s)[fine].mean() / among_blocks / (noise_scale[0] / s)[fine].mean(),
        "ordering_limit": 1 + 4 * np.sqrt(2 / among_blocks + 2 / dof),
        "ordering_share": slow / (len(values) * fine.sum()),
        "trend_share": (((ss_trend - noise_scale[0]) / s)[fine].sum() / slow) if slow > 0 else 1.0,
        "grouping_ratio": (noise_scale[0] / n_batch / base)[fine].mean(),
        "grouping_limit": 1 + 4 * np.sqrt(2 / dof),
        "grouping_share": ((noise_scale[0] / n_batch - base) / s)[fine].mean(),
        "first_bad": first_bad,
        "fine": fine,
    }


# What the package says


def profiles(layers, step=32):
    """What it says of layers that share their windows: the profile of each, one window after the other."""
    window = Window(torch.device("cpu"))
    window.add_layers([layer.width for layer in layers])
    fresh = [layer.known and not layer.trained for layer in layers]
    initial_weight, noise = np.array(fresh, dtype=float), np.zeros((2, len(layers)))
    for index in range(len(layers[0].windows)):
        window.reset()
        batches = [[call.batch for call in layer.windows[index]] for layer in layers]
        for start in range(0, max(map(len, batches)), step):
            window.update({i: calls[start : start + step] for i, calls in enumerate(batches) if calls[start:]})
        buffers = Buffers(
            start=np.concatenate([layer.buffers(index) for layer in layers], axis=1),
            end=np.concatenate([layer.buffers(index + 1) for layer in layers], axis=1),
            initial_weight=initial_weight,
            noise=noise,
            rounding=np.array([layer.rounding for layer in layers]),
            known=np.array([layer.known for layer in layers]),
        )
        profile = evaluate(window.blocks(), buffers, np.array([layer.eps for layer in layers]))
        yield profile
        initial_weight, noise = profile.initial_weight, profile.noise


OF_ALL_VALUES = ("layers", "num_samples", "population")  # compared with all values themselves
PER_CHANNEL = ("unit", "noise_scale", "std_error", "z", "score", "z_lag", "reference", "now", "first_bad")


def part_of(profile, layers, index):
    """One layer's part of a profile, by name."""
    first = sum(layer.width for layer in layers[:index])
    own = slice(first, first + layers[index].width)
    values = {name: getattr(profile, name) for name in Profile.__dataclass_fields__ if name not in OF_ALL_VALUES}
    return {name: value[..., own] if name in PER_CHANNEL else value[..., index] for name, value in values.items()}


def assert_as_defined(layers, rtol=1e-8, step=32):
    """Everything that is said of every layer in every window is what the definitions say. Returns all profiles."""
    result = []
    for index, profile in enumerate(profiles(layers, step)):
        result.append(profile)
        for number, layer in enumerate(layers):
            assert_population(profile, layers, number, layer.windows[index])
            if not updating([layer.windows[index]]):
                continue
            expected, actual = expected_profile(layer, index), part_of(profile, layers, number)
            fine = expected.pop("fine")
            assert actual.keys() == expected.keys()
            for name in actual:
                mine, theirs = np.asarray(actual[name]), np.asarray(expected[name])
                if name in PER_CHANNEL and name != "first_bad":
                    mine, theirs = mine[..., fine], theirs[..., fine]
                message = f"{name} of layer {number} in window {index}"
                np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol, err_msg=message)
    return result


def assert_population(profile, layers, number, calls):
    values = np.concatenate([call.values for call in calls]) if calls else np.empty((0, layers[number].width))
    first = sum(layer.width for layer in layers[:number])
    own = slice(first, first + layers[number].width)
    assert profile.num_samples[number] == len(values)
    if not len(values):
        assert np.isnan(profile.population[0, own]).all()
        return
    mean = values.mean(axis=0)
    var = ((values - mean) ** 2).sum(axis=0) / (len(values) - 1)
    error = np.abs(profile.population[0, own] - mean) / np.sqrt(var + (var == 0))
    assert (error[np.isfinite(mean)] < 1e-9).all()
    np.testing.assert_allclose(profile.population[1, own], var, rtol=1e-9)


def rms(values, axis=-1):
    return np.sqrt((np.asarray(values) ** 2).mean(axis=axis))


# The definitions


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("length", LENGTHS)
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


@pytest.mark.parametrize("momentum", ["0.01", "cumulative"])
def test_a_long_window_is_what_the_definitions_say(momentum):
    rng = np.random.default_rng(1)
    layers = [
        random_layer(rng, [2000] * 2, 2, momentum, "unequal", rounding=FLOAT32),
        random_layer(rng, [2000] * 2, 1, momentum, "equal", drift=1.0),
    ]
    assert_as_defined(layers)


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
    together = list(profiles(layers))
    for number, layer in enumerate(layers):
        for profile, alone in zip(together, profiles([layer]), strict=True):
            for name, value in part_of(profile, layers, number).items():
                np.testing.assert_allclose(value, part_of(alone, [layer], 0)[name], rtol=1e-10, atol=1e-10)


def test_buffers_of_an_unknown_past_are_a_constant_like_any_other():
    rng = np.random.default_rng(4)
    layers = [
        random_layer(rng, [20, 40], 3, momentum, drift=drift, trained=True)
        for momentum in ("0.01", "0.1", "varying")
        for drift in (0.0, 1.0)
    ]
    for profile in assert_as_defined(layers):
        assert (profile.initial_weight == 0).all()
        assert (profile.warmup_error == 0).all()


def test_the_history_that_a_window_is_given_adds_to_the_noise():
    rng = np.random.default_rng(5)
    layer = random_layer(rng, [20], 2, "0.1", trained=True)
    expected = expected_profile(layer, 0)
    window = Window(torch.device("cpu"))
    window.add_layers([2])
    window.update({0: [call.batch for call in layer.windows[0]]})
    start, end, earlier = layer.buffers(0), layer.buffers(1), np.array([[0.02], [0.03]])
    buffers = Buffers(start, end, np.zeros(1), earlier, np.array([EXACT]), np.array([True]))
    profile = evaluate(window.blocks(), buffers, np.array([layer.eps]))
    noise = expected["noise"] + 0.9**40 * earlier[:, 0]
    np.testing.assert_allclose(profile.noise[:, 0], noise, rtol=1e-9)
    error = np.sqrt((expected["noise_scale"] / expected["unit"] ** 2 * noise[:, None]).mean(axis=1).sum())
    np.testing.assert_allclose(profile.noise_error, [error], rtol=1e-9)
    np.testing.assert_allclose(profile.z, expected["z"], rtol=1e-9)


# What cannot be told


def test_of_a_layer_whose_weights_are_unknown_only_the_window_is_told():
    rng = np.random.default_rng(6)
    layers = [
        random_layer(rng, [40] * 2, 3, "0.1", drift=drift, ordered=ordered, known=False)
        for drift, ordered in ((0.0, 0.0), (3.0, 0.0), (0.0, 3.0))
    ]
    layers.append(random_layer(rng, [40] * 2, 2, "0.1"))
    for profile in assert_as_defined(layers):
        assert (profile.z[:, :9] == 0).all()
        assert np.isnan(profile.z_lag[..., :9]).all()
        for error in (profile.noise_error, profile.warmup_error, profile.lag_error):
            assert np.isnan(error).tolist() == [True, True, True, False]
        assert profile.drift_error[1] > 0.5
        assert profile.ordering_ratio[2] > profile.ordering_limit[2]
        assert np.isfinite(profile.grouping_ratio).all()
        assert np.isfinite(profile.max_score).all()


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
        for name in ("unit", "noise_scale", "now"):
            assert np.isnan(getattr(first, name)[:, 2::4]).all()
        for name in Profile.__dataclass_fields__:
            if name not in (*OF_ALL_VALUES, *PER_CHANNEL):
                assert np.isfinite(getattr(first, name)).all(), name
        assert first.first_bad.tolist() == 4 * [np.inf, np.inf, 12, np.inf]
        # The buffers stay as they are, the window's data are fine again.
        assert np.isfinite(second.unit).all()
        assert np.isfinite(second.noise_scale).all()
        assert second.first_bad.tolist() == 16 * [np.inf]


def test_of_a_layer_without_a_finite_channel_nothing_is_told():
    layers = [random_layer(np.random.default_rng(8), [30], 2) for _ in range(2)]
    layers[0].windows[0][0] = Call(layers[0].windows[0][0].values * np.nan, 0.1)
    (profile,) = profiles(layers)
    for name in ("noise_error", "now_error", "warmup_error", "jitter", "ordering_ratio", "grouping_ratio", "max_score"):
        assert np.isnan(getattr(profile, name)).tolist() == [True, False], name


UNDEFINED = ("noise_scale", "noise_error", "now_error", "jitter", "ordering_ratio", "grouping_ratio", "grouping_share")


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
    for profile, empty in ((before, [2]), (without, [0, 2]), (after, [2])):
        for number in empty:
            part = part_of(profile, layers, number)
            for name in (*UNDEFINED, "unit", "now", "warmup_error"):
                assert np.isnan(part[name]).all(), name


@pytest.mark.parametrize("known", [True, False])
def test_of_one_batch_there_is_no_noise(known):
    rng = np.random.default_rng(10)
    layers = [random_layer(rng, [1, 1], 3, known=known), random_layer(rng, [20, 20], 2)]
    for profile in assert_as_defined(layers):
        part = part_of(profile, layers, 0)
        for name in UNDEFINED:
            assert np.isnan(part[name]).all(), name
        assert np.isfinite(part["unit"]).all()
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
    for profile in profiles(layers):
        assert (abs(profile.score[:, 1::4]) < 2).all()
        assert (profile.max_score < 6).all()
        assert (profile.drift_error == 0).all()
        assert (profile.lag_error == 0).all()
        np.testing.assert_allclose(profile.unit[0, 1::4], np.sqrt(1e-5), rtol=1e-6)
        np.testing.assert_allclose(profile.now[:, 1::4], np.full((2, 2), [[value], [0.0]]), rtol=1e-12, atol=1e-12)


# On stationary data


def stationary(momentum, sizes, length, width=400, positions=1, **kwargs):
    """Three windows of a layer whose inputs' law never changes."""
    rng = np.random.default_rng([length, list(MOMENTA).index(momentum), list(SIZES).index(sizes), positions])
    layer = random_layer(rng, [length] * 3, width, momentum, sizes, **kwargs)
    if positions > 1:
        for calls in layer.windows:
            calls[:] = [Call(np.repeat(call.values, positions, axis=0), call.momentum, positions) for call in calls]
    return list(profiles([layer]))


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5", "cumulative"])
def test_scores_have_unit_variance_on_stationary_data(momentum, sizes, length):
    windows = stationary(momentum, sizes, length)
    lags = [profile.z_lag for profile in windows]
    if (momentum, sizes) == ("cumulative", "equal"):  # the buffers are the window's reference
        assert all((profile.z == 0).all() for profile in windows)
        assert (lags[0][0] == 0).all()
        np.testing.assert_allclose(rms(np.concatenate([lag[0] for lag in lags[1:]], axis=1)), [1, 1], atol=0.1)
        np.testing.assert_allclose(rms(np.concatenate([lag[1] for lag in lags], axis=1)), [1, 1], atol=0.1)
        return
    np.testing.assert_allclose(rms(np.concatenate([profile.score for profile in windows], axis=1)), [1, 1], atol=0.1)
    if length >= 200:
        np.testing.assert_allclose(rms(np.concatenate([profile.z for profile in windows], axis=1)), [1, 1], atol=0.1)
        np.testing.assert_allclose(rms(np.concatenate(lags, axis=2)), np.ones((2, 2)), atol=0.1)


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5"])
def test_rounded_buffers_of_means_far_from_zero_have_scores_of_no_more_than_unit_variance(momentum):
    for profile in stationary(momentum, "equal", 200, mean=1e3, rounding=FLOAT32):
        assert (rms(profile.score) < 1.1).all()


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5"])
def test_correlated_positions_leave_scores_and_grouping_as_they_are(momentum):
    windows = stationary(momentum, "equal", 200, width=100, positions=8)
    scores = np.concatenate([profile.z for profile in windows], axis=1)
    np.testing.assert_allclose(rms(scores), [1, 1], atol=0.15)
    for profile in windows:
        assert profile.batch_size == 8
        assert profile.samples_per_batch == 64
        np.testing.assert_allclose(profile.grouping_ratio, [1], atol=0.1)
        np.testing.assert_allclose(profile.grouping_share, [0], atol=0.02)
        np.testing.assert_allclose(profile.ordering_ratio, [1], atol=0.15)


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5", "cumulative"])
def test_gates_hardly_ever_fire_on_stationary_data(momentum):
    rng = np.random.default_rng(12)
    alarms = {}
    for width, number in ((8, 60), (1, 100)):
        layers = [random_layer(rng, [64] * 2, width, momentum, "unequal") for _ in range(number)]
        fired = [(profile.lag_error > 0) | (profile.drift_error > 0) for profile in profiles(layers)]
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
    (profile,) = profiles([layer])
    truth = np.array([[3.0], [4.0]])

    def error(statistics):
        return np.sqrt((((statistics - truth) / profile.unit) ** 2).mean(axis=1).sum())

    np.testing.assert_allclose(profile.noise_error, error(layer.buffers(1)), rtol=0.1)
    np.testing.assert_allclose(profile.now_error, error(profile.now), rtol=0.1)
    batches = [error(call.x) ** 2 for call in layer.windows[0]]
    if sizes == "equal":
        np.testing.assert_allclose(profile.jitter, np.sqrt(np.mean(batches)), rtol=0.05)


def test_what_is_left_of_the_initial_values_is_known():
    rng = np.random.default_rng(14)
    layer = Layer(100, windows=[[Call(rng.normal(3.0, 2.0, (32, 100)), 0.01) for _ in range(20)] for _ in range(3)])
    for number, profile in enumerate(profiles([layer]), start=1):
        left = 0.99 ** (20 * number)
        np.testing.assert_allclose(profile.initial_weight, [left], rtol=1e-12)
        np.testing.assert_allclose(profile.warmup_error, [left * np.hypot(3 / 2, 3 / 8)], rtol=0.03)
        assert profile.lag_error < 0.03


# When something moves


def test_a_steady_drift_is_measured():
    rng = np.random.default_rng(15)
    delta, length, m = 0.01, 400, 0.05
    layer = Layer(64, windows=[[Call(rng.normal(delta * t, 1.0, (16, 64)), m) for t in range(length)]])
    (profile,) = profiles([layer])
    unit = profile.unit[0].mean()
    np.testing.assert_allclose(profile.now[0].mean(), delta * length, atol=2 * delta)
    np.testing.assert_allclose(profile.lag_error, [delta * (1 - m) / m / unit], rtol=0.1)
    np.testing.assert_allclose(profile.drift_error, [delta * length / 2 / unit], rtol=0.02)
    np.testing.assert_allclose(profile.slope, [delta / unit], rtol=0.02)
    assert profile.trend_share > 0.98
    assert profile.ordering_ratio > profile.ordering_limit


@pytest.mark.parametrize("momentum", ["0.01", "0.1", "cumulative"])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_gates_fire_for_a_clear_drift(width, momentum):
    rng = np.random.default_rng(16)
    drift = 4.0 if width == 1 else 2.0
    layers = [random_layer(rng, [64] * 2, width, momentum, "unequal", drift=drift) for _ in range(10)]
    for profile in assert_as_defined(layers):
        assert (profile.drift_error > 0.2).all()
        assert (profile.lag_error > 0).mean() > 0.5


def test_a_drift_of_the_variance_alone_is_noticed():
    rng = np.random.default_rng(17)
    windows = [[Call(rng.normal(0.0, 1 + t / 100, (16, 8)), 0.01) for t in range(100)] for _ in range(2)]
    for profile in profiles([Layer(8, windows=windows)]):
        assert profile.drift_error > 0.15
        assert profile.lag_error > 0.15
        assert (abs(profile.z[0]) < 5).all()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9])
def test_a_faint_drift_fires_a_gate_where_its_limit_is(width):
    rng = np.random.default_rng(22)
    growth = rng.uniform(0.05, 0.25 if width > 4 else 0.5, 20)
    layers = [
        Layer(width, windows=[[Call(rng.normal(0.0, 1 + g * t / 100, (16, width)), 0.1) for t in range(100)]])
        for g in growth
    ]
    (profile,) = assert_as_defined(layers)
    assert 0 < (profile.drift_error > 0).mean() < 1


def test_the_variance_now_is_never_negative_however_fast_it_falls():
    rng = np.random.default_rng(21)
    scales = np.sqrt([9.0] * 48 + [5.0] * 8 + [1.0] * 8)  # a straight line would go to -1 at the end
    layer = Layer(8, windows=[[Call(rng.normal(0.0, scale, (64, 8)), 0.1) for scale in scales]])
    (profile,) = assert_as_defined([layer])
    assert (profile.now[1] == 0).any()
    assert (profile.now[1] >= 0).all()


def test_buffers_that_remember_another_law_lag_even_if_nothing_moves_now():
    rng = np.random.default_rng(18)
    windows = [[Call(rng.normal(mean, 1.0, (16, 8)), 0.001) for _ in range(100)] for mean in (5.0, 0.0)]
    layer = Layer(8, windows=windows)
    _, profile = profiles([layer])
    # What the window before has left in the buffers.
    remembered = 5.0 * (0.999**100 - 0.999**200)
    np.testing.assert_allclose(profile.lag_error, [remembered / profile.unit[0].mean()], rtol=0.1)
    assert profile.drift_error == 0


def test_ordered_data_lie_between_blocks_and_not_on_a_line():
    rng = np.random.default_rng(19)
    centers = rng.normal(size=(4, 16))
    windows = [[Call(rng.normal(centers[t // 25], 1.0, (16, 16)), 0.1) for t in range(100)]]
    layer = Layer(16, windows=windows)
    (profile,) = assert_as_defined([layer])
    assert profile.ordering_ratio > profile.ordering_limit
    variance = centers.var(axis=0)
    # Each block is of one center, but for the two that the blocks of 8 batches share.
    np.testing.assert_allclose(profile.ordering_share, [(variance / (1 + variance)).mean()], rtol=0.15)
    assert profile.trend_share < 0.6
    assert profile.grouping_ratio < profile.grouping_limit + 1


def test_batches_of_kinds_are_grouped_and_their_variance_counts_now():
    rng = np.random.default_rng(20)
    layer = Layer(64, windows=[[Call(rng.normal(rng.normal(size=64), 1.0, (16, 64)), 0.1) for _ in range(200)]])
    (profile,) = assert_as_defined([layer])
    assert profile.grouping_ratio > profile.grouping_limit
    np.testing.assert_allclose(profile.grouping_ratio, [(1 + 1 / 16) / (2 / 16)], rtol=0.1)
    np.testing.assert_allclose(profile.grouping_share, [(1 + 1 / 16) / 2 - 1 / 16], rtol=0.1)
    np.testing.assert_allclose(profile.now[1].mean(), 2.0, rtol=0.05)
    assert profile.ordering_ratio < profile.ordering_limit
