"""What is said of a window, by the definitions: explicit sums over every batch that a layer has ever seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from lightning_bnmonitor.statistics.analysis import Analysis, analyse
from lightning_bnmonitor.statistics.noise import LastBatch, RunningStats
from lightning_bnmonitor.statistics.window import Window
from tests.statistics.window_reference import Batch, update

LENGTHS = [2, 3, 8, 9, 16, 17, 18, 33]
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
def expected_analysis(layer, index):
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
    everything = np.maximum((1 - ratio) * ref_window[1] + ratio * noise_scale[0], 0)
    stretched = 1 / np.sqrt(ref_window[1] + layer.eps) - 1 / np.sqrt(everything + layer.eps)  # by eval()

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

    # The present is no further from the buffers than these can be behind.
    walk, most, step = lags_behind(blocks, g, block_mean, noise_scale, unit, calls[-1].momentum)
    chance, distance, share = rms(relative * c2_lag[1][:, None]), rms((lags[1] / unit) ** 2), 1.0
    of_last = step**2 * ((np.arange(len(runs[0])) + 1) ** 2).sum() / len(runs[0]) ** 2
    left = max(most**2 + chance**2, distance**2 - of_last)
    if layer.known and lagging.any() and w[runs[0]].sum() > 0.99 and distance**2 > left:
        share = np.sqrt(left) / distance
    nearer = (1 - share) * lags[1] if share < 1 else np.zeros_like(lags[1])
    mixture, of_earlier = share * now * g + (1 - share) * w, (1 - share) ** 2 * h

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
    of_mean, of_var = noise_scale / np.stack([n_batch * s, max(n_batch - 1, 1) * s**2])
    of_last = calls[-1].momentum ** 2 / calls[-1].g
    without = rms(relative * ((noise - of_last) / (1 - calls[-1].momentum) ** 2)[:, None])
    smooth = (smooth_part(x[0], g[0], time) - 3 * noise_scale[0]) / s
    return {
        "num_batches": num_batches,
        "samples_per_batch": n_batch,
        "batch_size": batch_size,
        "dof": dof,
        "initial_weight": initial_weight,
        "noise": noise,
        "within": np.where(dof > 0, noise_scale * dof, 0),
        "std_error": known * np.sqrt(noise_scale * noise[:, None]),
        "z": z,
        "reference": (g[..., None] * x).sum(axis=1) / g.sum(axis=1, keepdims=True),
        "now": np.stack([ref_now[0] + nearer[0], np.maximum(now_var + (1 - ratio) * nearer[1], 0)]),
        "noise_error": known * rms(relative * noise[:, None]),
        "now_error": rms(relative * (variance(mixture) + of_earlier)[:, None]),
        "warmup_error": known * rms((warm / unit) ** 2),
        "lag_error": known * net(share * lags[1], c2_lag[1], lagging),
        "drift_error": net(ref_now - ref_window, variance((now - window) * g), moving),
        "unseen_error": np.sqrt(np.mean(everything[fine] * stretched[fine] ** 2)),
        "walk_error": known * walk,
        "max_score": np.fmax.reduce(np.abs(scores), axis=None),
        "slope": net(trend / c2_trend[:, None], 1 / c2_trend, moving),
        "jitter": rms(relative * (num_batches / g.sum(axis=1))[:, None]),
        "reference_error": reference_error(rms(relative / g.sum(axis=1)[:, None]), dof, batch_size * num_batches),
        "initial_distance": rms(((INITIAL - ref_window) / unit) ** 2),
        "ordering_ratio": (ssb / s)[fine].mean() / among_blocks / (noise_scale[0] / s)[fine].mean(),
        "ordering_limit": 1 + 4 * np.sqrt(2 / among_blocks + 2 / dof),
        "ordering_share": slow / (len(values) * fine.sum()),
        "smooth_share": smooth[fine].sum() / slow if slow > 0 and num_blocks >= 5 else 1.0,
        "grouping_ratio": (noise_scale[0] / n_batch / base)[fine].mean(),
        "grouping_limit": 1 + 4 * np.sqrt(2 / dof),
        "grouping_share": ((noise_scale[0] / n_batch - base) / s)[fine].mean(),
        "batch_jitter": np.sqrt(np.mean((of_mean + 2 - 2 * (1 + of_var) ** -0.125)[fine])),
        "independent_values": 1 / of_mean[fine].mean(),
        "last_batch_num_samples": calls[-1].g[0],
        "last_batch_share": rms(relative * of_last[:, None]) ** 2 / rms(relative * noise[:, None]) ** 2,
        "last_batch_without": without if calls[-1].momentum < 1 else np.nan,
        "first_bad": first_bad,
        "fine": fine,
    }


def smooth_part(values, weights, time):
    """How much smaller the weighted sum of squares about the best cubic in time is than about the mean."""
    root = np.sqrt(weights)[:, None]

    def residual(degree):
        powers = np.vander((time - time.mean()) / max(np.ptp(time), 1), degree + 1)
        coefficients, *_ = np.linalg.lstsq(root * powers, root * values, rcond=None)
        return (weights[:, None] * (values - powers @ coefficients) ** 2).sum(axis=0)

    return residual(0) - residual(3)


@np.errstate(divide="ignore", invalid="ignore")
def lags_behind(blocks, weights, block_mean, noise_scale, unit, momentum):
    """How far an average lags behind a random walk, and behind what moves like one or along a line, at most; its step.

    By what each single step adds to every difference: a walk's steps one by one, those of a line together.
    """
    num_batches = weights.shape[1]
    steps = np.tri(num_batches)  # a batch's value is the sum of the steps up to it
    pairs = list(pairwise(blocks))

    def square(values):
        return mean_of(values[0] / unit[0] ** 2) + mean_of(values[1] / unit[1] ** 2)

    def observed(pairs):
        differences = by_chance = 0.0
        for one, other in pairs:
            differences += square((block_mean[:, other[0]] - block_mean[:, one[0]]) ** 2)
            added = 1 / weights[:, one].sum(axis=1) + 1 / weights[:, other].sum(axis=1)
            by_chance += square(noise_scale * added[:, None])
        return differences - by_chance, by_chance

    def extent(path, pairs):
        inner = sum(((path[block] - path[block].mean(axis=0)) ** 2).sum() for block in blocks)
        inner /= np.float64(num_batches - len(blocks))
        between = (((path[other].mean(axis=0) - path[one].mean(axis=0)) ** 2).sum() for one, other in pairs)
        return sum(between) - sum(inner * (1 / len(one) + 1 / len(other)) for one, other in pairs)

    excess, by_chance = observed(pairs)
    if not pairs or np.isnan(by_chance):
        return np.nan, np.nan, np.nan
    late = pairs[len(pairs) // 2 :]
    late_excess, _ = observed(late)
    of_walk = late_excess / extent(steps, late)
    of_line = late_excess / extent(steps.sum(axis=1, keepdims=True), late)
    ages = np.arange(4000 if momentum < 1 else 1)
    remains = (1 - momentum) ** ages  # of a step in the average's distance from the end, the next one's first
    most = np.sqrt(max(of_walk * (remains**2).sum(), of_line * remains.sum() ** 2, 0))
    step = np.sqrt(max(of_walk, 0))
    if excess <= 3 * np.sqrt(3 / len(pairs)) * by_chance:
        return 0.0, most, step
    variance = max(min(excess / extent(steps, pairs), of_walk), 0)
    return np.sqrt(variance * (remains[1:] ** 2).sum()), most, step


def reference_error(observed, dof, num_samples):
    return max(observed, np.sqrt(1.75 / num_samples)) if dof else np.sqrt(3.5 / num_samples)


def last_of(layers, index):
    """The last batch of each layer in a window, as it is told."""
    calls = [updating([layer.windows[index]])[-1:] for layer in layers]
    return LastBatch(
        np.array([its[0].g[0] if its else np.nan for its in calls]),
        np.array([its[0].momentum if its else np.nan for its in calls]),
    )


# What the package says


def analyses(layers, step=32):
    """What it says of layers that share their windows: the analysis of each, one window after the other."""
    window = Window(torch.device("cpu"))
    window.add_layers([layer.width for layer in layers])
    fresh = [layer.known and not layer.trained for layer in layers]
    initial_weight, noise = np.array(fresh, dtype=float), np.zeros((2, len(layers)))
    for index in range(len(layers[0].windows)):
        window.reset()
        batches = [[call.batch for call in layer.windows[index]] for layer in layers]
        for start in range(0, max(map(len, batches)), step):
            update(window, {i: calls[start : start + step] for i, calls in enumerate(batches) if calls[start:]})
        buffers = RunningStats(
            start=np.concatenate([layer.buffers(index) for layer in layers], axis=1),
            end=np.concatenate([layer.buffers(index + 1) for layer in layers], axis=1),
            initial_weight=initial_weight,
            noise=noise,
            rounding=np.array([layer.rounding for layer in layers]),
            known=np.array([layer.known for layer in layers]),
            last=last_of(layers, index),
        )
        analysis = analyse(window.blocks(), buffers, np.array([layer.eps for layer in layers]))
        yield analysis
        initial_weight, noise = analysis.initial_weight, analysis.noise


OF_ALL_VALUES = ("layout", "num_samples", "population")  # compared with all values themselves
PER_CHANNEL = ("within", "std_error", "z", "reference", "now", "first_bad")


def part_of(analysis, layers, index):
    """One layer's part of a analysis, by name."""
    first = sum(layer.width for layer in layers[:index])
    own = slice(first, first + layers[index].width)
    names = Analysis.__dataclass_fields__.keys() - {*OF_ALL_VALUES, "batching", "last_batch"}
    values = {name: getattr(analysis, name) for name in names} | analysis.batching._asdict()
    values |= {f"last_batch_{name}": value for name, value in analysis.last_batch._asdict().items()}
    return {name: value[..., own] if name in PER_CHANNEL else value[..., index] for name, value in values.items()}


def assert_as_defined(layers, rtol=1e-8, step=32):
    """Everything that is said of every layer in every window is what the definitions say. Returns all analyses."""
    result = []
    for index, analysis in enumerate(analyses(layers, step)):
        result.append(analysis)
        for number, layer in enumerate(layers):
            assert_population(analysis, layers, number, layer.windows[index])
            if not updating([layer.windows[index]]):
                continue
            expected, actual = expected_analysis(layer, index), part_of(analysis, layers, number)
            fine = expected.pop("fine")
            assert actual.keys() == expected.keys()
            for name in actual:
                mine, theirs = np.asarray(actual[name]), np.asarray(expected[name])
                if name in PER_CHANNEL and name != "first_bad":
                    mine, theirs = mine[..., fine], theirs[..., fine]
                message = f"{name} of layer {number} in window {index}"
                np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol, err_msg=message)
    return result


def assert_population(analysis, layers, number, calls):
    values = np.concatenate([call.values for call in calls]) if calls else np.empty((0, layers[number].width))
    first = sum(layer.width for layer in layers[:number])
    own = slice(first, first + layers[number].width)
    assert analysis.num_samples[number] == len(values)
    if not len(values):
        assert np.isnan(analysis.population[0, own]).all()
        return
    mean = values.mean(axis=0)
    var = ((values - mean) ** 2).sum(axis=0) / (len(values) - 1)
    error = np.abs(analysis.population[0, own] - mean) / np.sqrt(var + (var == 0))
    assert (error[np.isfinite(mean)] < 1e-9).all()
    np.testing.assert_allclose(analysis.population[1, own], var, rtol=1e-9)


def unit_of(analysis, eps=1e-5):
    """What errors are measured in, ``(2, C)``: the standard deviation for means, twice the variance for variances."""
    s = analysis.population[1] + eps
    return np.stack([np.sqrt(s), 2 * s])


def rms(values, axis=-1):
    return np.sqrt((np.asarray(values) ** 2).mean(axis=axis))


UNDEFINED = ("noise_error", "now_error", "jitter", "ordering_ratio", "grouping_ratio", "grouping_share")
