"""The window by simulation: every batch is kept, and a running buffer is updated one batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import settings

from lightning_bnmonitor.statistics.analysis import analyse
from lightning_bnmonitor.statistics.blocks import MAX_BLOCKS, Blocks
from lightning_bnmonitor.statistics.noise import LastBatch, RunningStats
from lightning_bnmonitor.statistics.window import Batches, Window, commit

LAW = settings(max_examples=50, deadline=None)
CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 15, 16, 17, 18, 32, 33, 34, 64, 65, 66]
MOMENTA = {
    "0.1": lambda t, rng: 0.1,
    "0.5": lambda t, rng: 0.5,
    "1.0": lambda t, rng: 1.0,
    "0.001": lambda t, rng: 0.001,
    "varying": lambda t, rng: rng.uniform(0.01, 0.9),
    "cumulative": lambda t, rng: 1 / (t + 1),
}


class Batch(NamedTuple):
    """What the window is told of one call: a row of its :class:`Batches`."""

    num_samples: int
    mean: torch.Tensor
    spread: torch.Tensor
    eps: float | None
    momentum: float
    batch_size: int


def update(window, calls):
    """Add calls of layers, batch by batch, to a window."""
    empty = Batches(*[()] * len(Batches._fields))
    commit(window.merged({layer: Batches(*zip(*its, strict=True)) if its else empty for layer, its in calls.items()}))


@dataclass
class Call:
    """One call of a layer: the values it saw, and what the window is told of them."""

    values: Any  # (n, C) float64
    momentum: float
    eps: float | None = None
    positions: int = 1

    @property
    def n(self):
        return len(self.values)

    @property
    def mean(self):
        return self.values.mean(axis=0)

    @property
    def biased_var(self):
        return ((self.values - self.mean) ** 2).mean(axis=0)

    @property
    def batch(self):
        var = self.biased_var
        spread = var if self.eps is None else 1 / np.sqrt(var + self.eps)
        mean, spread = torch.from_numpy(self.mean), torch.from_numpy(spread)
        return Batch(self.n, mean, spread, self.eps, self.momentum, self.n // self.positions)


class LayerBlocks(NamedTuple):
    """The blocks of one layer that hold anything: ``(J,)`` each, ``(J, C)`` for what is kept per channel."""

    num_batches: Any
    num_samples: Any
    batch_size: Any
    weight: Any
    noise_mean: Any
    noise_var: Any
    mean: Any
    mean_m2: Any
    var: Any
    var_m2: Any
    decay: float
    rounding: float


def blocks_of(source, layer=0):
    """A copy of one layer's blocks in a window (or in what it says of all layers). The others must be 0 throughout."""
    blocks = source.blocks() if isinstance(source, Window) else source
    assert isinstance(blocks, Blocks)
    layers, channels = len(blocks.widths), sum(blocks.widths)
    for field in (blocks.num_batches, blocks.num_samples, blocks.batch_size, blocks.weight):
        assert field.shape == (layers, MAX_BLOCKS)
    assert blocks.noise.shape == (2, layers, MAX_BLOCKS)
    assert blocks.value.shape == blocks.m2.shape == (len(blocks.value), 2, channels)
    assert (blocks.num_batches > 0).sum(axis=1).max() <= len(blocks.value) <= MAX_BLOCKS
    assert blocks.decay.shape == blocks.rounding.shape == (layers,)
    assert blocks.first_bad.shape == (channels,)
    assert all(field.dtype == np.float64 for field in (*blocks[1:-1], *blocks.beside))
    own = slice(sum(blocks.widths[:layer]), sum(blocks.widths[: layer + 1]))
    everything = LayerBlocks(
        blocks.num_batches[layer],
        blocks.num_samples[layer],
        blocks.batch_size[layer],
        blocks.weight[layer],
        *blocks.noise[:, layer],
        blocks.value[:, 0, own],
        blocks.m2[:, 0, own],
        blocks.value[:, 1, own],
        blocks.m2[:, 1, own],
        blocks.decay[layer],
        blocks.rounding[layer],
    )
    used = np.count_nonzero(everything.num_batches)
    for field in everything[:-2]:
        assert (field[used:] == 0).all()
    return LayerBlocks(*(field[:used].copy() for field in everything[:-2]), *everything[-2:])


class Population(NamedTuple):
    num_samples: Any
    mean: Any
    var: Any


def population_of(window):
    """Exact moments over all that a window holds: values per channel of the layers, mean and variance of channels."""
    blocks = window.blocks()
    layers, nothing = len(blocks.widths), np.zeros((2, sum(blocks.widths)))
    none, unknown = np.zeros(layers), np.zeros(layers, dtype=bool)
    buffers = RunningStats(nothing, nothing, none, np.zeros((2, layers)), none, unknown, LastBatch(none, none))
    analysis = analyse(blocks, buffers, np.full(layers, 1e-5))
    return Population(analysis.num_samples, *torch.from_numpy(analysis.population))


def random_calls(rng, length, width, momentum=lambda t, rng: 0.1, sizes=(2, 9), mean=1.0, eps=(None,)):
    drift = rng.normal(size=width)
    return [
        Call(
            rng.normal(mean + drift * t / length, 1.0, (int(rng.integers(*sizes)), width)),
            momentum(t, rng),
            eps[t % len(eps)],
        )
        for t in range(length)
    ]


# The reference


def blocks_by_rule(length):
    """Which batches are in which block, by adding one after the other."""
    blocks, size = [], 1
    for t in range(length):
        if blocks and len(blocks[-1]) < size:
            blocks[-1] = [*blocks[-1], t]
            continue
        if len(blocks) == 16:
            blocks = [blocks[i] + blocks[i + 1] for i in range(0, 16, 2)]
            size *= 2
        blocks.append([t])
    return blocks, size


def weights_by_running_update(momenta):
    """The weight of each batch and of what was there before in an average after all updates, and S."""
    weights, before, rounding = np.zeros(0), 1.0, 0.0
    for m in momenta:
        weights = np.append((1 - m) * weights, m)
        before *= 1 - m
        rounding = (1 - m) * rounding + 1
    return weights, before, rounding


def weighted_two_pass(values, weights):
    values, weights = np.array(values), np.array(weights, dtype=float)[:, None]
    mean = (weights * values).sum(axis=0) / weights.sum()
    return mean, (weights * (values - mean) ** 2).sum(axis=0)


def expected_blocks(calls):
    updating = [call for call in calls if call.momentum > 0]
    weights, decay, rounding = weights_by_running_update([call.momentum for call in updating])
    rows = []
    for members in blocks_by_rule(len(updating))[0]:
        block = [updating[t] for t in members]
        w, n = weights[members], np.array([call.n for call in block])
        unbiased = [call.values.var(axis=0, ddof=1) for call in block]
        mean, mean_m2 = weighted_two_pass([call.mean for call in block], n)
        var, var_m2 = weighted_two_pass(unbiased, n - 1)
        rows.append(
            LayerBlocks(
                len(block),
                n.sum(),
                sum(call.n // call.positions for call in block),
                w.sum(),
                (w**2 / n).sum(),
                (w**2 / (n - 1)).sum(),
                mean,
                mean_m2,
                var,
                var_m2,
                decay,
                rounding,
            )
        )
    return LayerBlocks(*zip(*rows, strict=True))


def assert_blocks(blocks, calls, ratio=1.0):
    expected = expected_blocks(calls)
    assert isinstance(blocks, LayerBlocks)
    assert blocks.num_batches.tolist() == list(expected.num_batches)
    assert blocks.num_samples.tolist() == list(expected.num_samples)
    assert blocks.batch_size.tolist() == list(expected.batch_size)
    close(blocks.weight, expected.weight)
    close(blocks.noise_mean, expected.noise_mean)
    close(blocks.noise_var, expected.noise_var)
    close(blocks.decay, expected.decay[0])
    close(blocks.rounding, expected.rounding[0])
    # Where nothing cancels, sums of squares are as exact as all else; of equal values they are roundings squared.
    close(blocks.mean, expected.mean, rtol=1e-12, atol=1e-12)
    close(blocks.mean_m2, expected.mean_m2, rtol=1e-12 * ratio, atol=1e-20 * ratio**2)
    close(blocks.var, expected.var, rtol=1e-12, atol=1e-12)
    close(blocks.var_m2, expected.var_m2, rtol=1e-12, atol=1e-20)


def close(value, reference, rtol=1e-12, atol=1e-290):
    np.testing.assert_allclose(np.asarray(value), np.asarray(reference, dtype=float), rtol=rtol, atol=atol)


def assert_population(population, layer, channels, calls, rtol=1e-12):
    values = np.concatenate([call.values for call in calls])
    var = values.var(axis=0, ddof=1)
    assert population.num_samples[layer] == len(values)
    close(population.mean[channels], values.mean(axis=0), rtol, atol=rtol * np.sqrt(var.max()))
    close(population.var[channels], var, rtol)


def assert_layer(window, layer, calls, rtol=1e-12):
    assert_population(population_of(window), layer, window.channels(layer), calls, rtol)
    if any(call.momentum for call in calls):
        assert_blocks(blocks_of(window, layer), calls)
    else:
        assert len(blocks_of(window, layer).num_batches) == 0


def assert_same(left, right, rtol=1e-12, atol=1e-12):
    for a, b in zip(left, right, strict=True):
        if isinstance(a, tuple):
            assert_same(a, b, rtol, atol)
            continue
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol, equal_nan=True)


def window_of(*widths):
    window = Window(CPU)
    window.add_layers(widths)
    return window


def fed(width, calls, cuts=()):
    """A window of one layer after all calls, in updates that end at the cuts."""
    window = window_of(width)
    for start, stop in zip([0, *cuts], [*cuts, len(calls)], strict=True):
        update(window, {0: [call.batch for call in calls[start:stop]]})
    return window


def every(step, length):
    return range(step, length, step)


# Values that are not finite


def poisoned(field, value, at, momentum, as_invstd):
    """40 calls, and what they tell, with a value that is not finite in channel 1 of one batch."""
    eps = (1e-5,) if as_invstd else (None,)
    calls = random_calls(np.random.default_rng(14), 40, 3, lambda t, rng: momentum, eps=eps)
    batches = [call.batch for call in calls]
    getattr(batches[at], field)[1] = value
    if field == "mean":
        batches[at].spread[1] = math.nan  # as every kernel has it
    return calls, batches


BAD = {
    "mean nan": ("mean", math.nan, False),
    "mean inf": ("mean", math.inf, False),
    "mean -inf": ("mean", -math.inf, True),
    "variance nan": ("spread", math.nan, False),
    "variance inf": ("spread", math.inf, False),
    "invstd nan": ("spread", math.nan, True),
    "invstd 0": ("spread", 0.0, True),
}


def broken_calls(rng, length, width, bad, momentum=lambda t, rng: 0.1):
    """What calls tell of which some are not finite: ``bad`` maps their number, from 1, to a channel."""
    batches = [call.batch for call in random_calls(rng, length, width, momentum)]
    for number, channel in bad:
        batches[number - 1].mean[channel] = batches[number - 1].spread[channel] = math.nan
    return batches


def updated(window, layer, batches, step):
    for start in range(0, len(batches), step):
        update(window, {layer: batches[start : start + step]})
    return window


def two_of_three(t, rng):
    return 0.1 * (t % 3 > 0)
