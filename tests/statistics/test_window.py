"""The window against a simulation that keeps every batch and updates a running buffer one batch at a time."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.analysis import Buffers, evaluate
from lightning_bnmonitor.statistics.window import MAX_BLOCKS, Batch, Blocks, Window, block_size, paired

LAW = settings(max_examples=200, deadline=None)
CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 15, 16, 17, 18, 31, 32, 33, 34, 63, 64, 65, 66, 129, 257, 600]
MOMENTA = {
    "0.1": lambda t, rng: 0.1,
    "0.5": lambda t, rng: 0.5,
    "1.0": lambda t, rng: 1.0,
    "0.001": lambda t, rng: 0.001,
    "varying": lambda t, rng: rng.uniform(0.01, 0.9),
    "cumulative": lambda t, rng: 1 / (t + 1),
}


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
    assert blocks.value.shape == blocks.m2.shape == (MAX_BLOCKS, 2, channels)
    assert blocks.decay.shape == blocks.rounding.shape == (layers,)
    assert blocks.first_bad.shape == (channels,)
    assert all(field.dtype == np.float64 for field in blocks[1:])
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
    buffers = Buffers(
        nothing, nothing, np.zeros(layers), np.zeros((2, layers)), np.zeros(layers), np.zeros(layers, dtype=bool)
    )
    profile = evaluate(blocks, buffers, np.full(layers, 1e-5))
    return Population(profile.num_samples, *torch.from_numpy(profile.population))


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
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol, equal_nan=True)


def window_of(*widths):
    window = Window(CPU)
    window.add_layers(widths)
    return window


def fed(width, calls, cuts=()):
    """A window of one layer after all calls, in updates that end at the cuts."""
    window = window_of(width)
    for start, stop in zip([0, *cuts], [*cuts, len(calls)], strict=True):
        window.update({0: [call.batch for call in calls[start:stop]]})
    return window


def every(step, length):
    return range(step, length, step)


# Blocks


def test_block_sizes_are_those_of_adding_batches_one_by_one():
    assert [block_size(length) for length in (0, 1, 16, 17, 32, 33, 64, 65, 600)] == [1, 1, 1, 2, 2, 4, 4, 8, 64]
    for length in range(1, 601):
        assert block_size(length) == blocks_by_rule(length)[1]


def test_at_every_length_the_blocks_hold_the_batches_that_the_rule_gives_them():
    window = window_of(1)
    call = Call(np.array([[1.0], [2.0], [4.0]]), 0.1)
    for length in range(1, 601):
        window.update({0: [call.batch]})
        assert blocks_of(window).num_batches.tolist() == [len(block) for block in blocks_by_rule(length)[0]]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_and_population_are_those_of_a_simulation_that_keeps_every_batch(length, momentum):
    rng = np.random.default_rng(length)
    calls = random_calls(rng, length, 3, MOMENTA[momentum])
    for cuts in ([], every(1, length) if length <= 66 else every(7, length), every(32, length)):
        assert_layer(fed(3, calls, cuts), 0, calls)


def test_the_weights_are_those_that_the_batches_have_in_the_running_mean():
    rng = np.random.default_rng(0)
    calls = random_calls(rng, 40, 2, MOMENTA["varying"])
    running = start = rng.normal(size=2)
    for call in calls[:16]:
        running = (1 - call.momentum) * running + call.momentum * call.mean
    # With one batch a block, the running mean is the weighted sum of the blocks.
    blocks = blocks_of(fed(2, calls[:16]))
    close(blocks.decay * start + blocks.weight @ blocks.mean, running)
    # In any case the weights and what the start has left add up to 1.
    blocks = blocks_of(fed(2, calls))
    assert blocks.weight.sum() + blocks.decay == pytest.approx(1, rel=1e-12)


def test_a_hand_computed_window():
    calls = [Call(np.array([[0.0], [4.0]]), 0.5), Call(np.array([[1.0], [2.0], [6.0]]), 0.25)]
    window = fed(1, calls)
    blocks, population = blocks_of(window), population_of(window)
    assert blocks.num_batches.tolist() == [1, 1]
    assert blocks.num_samples.tolist() == [2, 3]
    assert blocks.weight.tolist() == [0.375, 0.25]
    close(blocks.noise_mean, [0.375**2 / 2, 0.25**2 / 3])
    close(blocks.noise_var, [0.375**2, 0.25**2 / 2])
    assert blocks.decay == 0.375
    assert blocks.rounding == 1.75
    close(blocks.mean, [[2.0], [3.0]])
    close(blocks.var, [[8.0], [7.0]])
    close(blocks.mean_m2, [[0.0], [0.0]], atol=1e-28)
    close(population.mean, [2.6])
    close(population.var, [(2.6**2 + 1.4**2 + 1.6**2 + 0.6**2 + 3.4**2) / 4])


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_more_than_its_own_rounding(ratio):
    calls = random_calls(np.random.default_rng(3), 100, 3, sizes=(4, 30), mean=ratio)
    for cuts in ([], every(1, 100), every(32, 100)):
        window = fed(3, calls, cuts)
        assert_blocks(blocks_of(window), calls, ratio=ratio)
        assert_population(population_of(window), 0, window.channels(0), calls, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_batches_are_accumulated_in_float64(dtype):
    calls = random_calls(np.random.default_rng(4), 50, 2, eps=(None, None, 1e-5, 1e-3))
    # Statistics that float32 holds exactly, so that any digit lost is lost by the window.
    batches = [call.batch._replace(mean=call.batch.mean.float(), spread=call.batch.spread.float()) for call in calls]
    window, reference = window_of(2), window_of(2)
    reference.update({0: [b._replace(mean=b.mean.double(), spread=b.spread.double()) for b in batches]})
    for t, batch in enumerate(batches):
        mean_dtype = torch.float64 if t % 2 else dtype
        window.update({0: [batch._replace(mean=batch.mean.to(mean_dtype), spread=batch.spread.to(dtype))]})
    assert_same(blocks_of(window), blocks_of(reference))
    assert_same(population_of(window), population_of(reference))


@pytest.mark.parametrize("length", [1, 7, 16, 17, 40, 100])
def test_a_block_counts_its_samples_beside_its_values(length):
    rng = np.random.default_rng(length)
    positions = [int(rng.integers(1, 6)) for _ in range(length)]
    calls = [Call(rng.normal(size=(int(rng.integers(2, 5)) * p, 2)), 0.1, positions=p) for p in positions]
    expected = [sum(calls[t].n / positions[t] for t in members) for members in blocks_by_rule(length)[0]]
    for cuts in ([], every(1, length), every(9, length)):
        blocks = blocks_of(fed(2, calls, cuts))
        assert blocks.batch_size.tolist() == expected
        assert blocks.num_samples.sum() == sum(call.n for call in calls)


# Blocks of single batches, merged in pairs


def merged_by_hand(blocks):
    """Neighbours of blocks that hold one batch each, merged by the formulas for two values."""
    rows = []
    for first in range(0, len(blocks.num_batches), 2):
        pair = LayerBlocks(*(field[first : first + 2] for field in blocks[:-2]), *blocks[-2:])
        n, g = pair.num_samples, pair.num_samples - pair.num_batches
        if len(n) == 2:
            mean, var = (n[:, None] * pair.mean).sum(axis=0) / n.sum(), (g[:, None] * pair.var).sum(axis=0) / g.sum()
            mean_m2 = n[0] * n[1] / n.sum() * (pair.mean[1] - pair.mean[0]) ** 2
            var_m2 = g[0] * g[1] / g.sum() * (pair.var[1] - pair.var[0]) ** 2
        else:
            mean, mean_m2, var, var_m2 = pair.mean[0], 0 * pair.mean[0], pair.var[0], 0 * pair.var[0]
        sums = [field.sum() for field in pair[:6]]
        rows.append(LayerBlocks(*sums, mean, mean_m2, var, var_m2, *pair[-2:]))
    return LayerBlocks(*(np.array(column) for column in zip(*rows, strict=True)))._replace(
        decay=blocks.decay, rounding=blocks.rounding
    )


def copied(blocks):
    return Blocks(*(field.copy() for field in blocks))


@pytest.mark.parametrize("length", range(1, 17))
def test_single_batches_are_merged_in_pairs_and_an_odd_one_stays_alone(length):
    calls = random_calls(np.random.default_rng(length), length, 3, MOMENTA["varying"])
    window = fed(3, calls)
    pairs = blocks_of(paired(window.blocks()))
    assert pairs.num_batches.tolist() == [2] * (length // 2) + [1] * (length % 2)
    assert_same(pairs, merged_by_hand(blocks_of(window)), rtol=1e-12, atol=1e-20)
    if length % 2:
        assert (pairs.mean_m2[-1] == 0).all()
        assert (pairs.var_m2[-1] == 0).all()


@pytest.mark.parametrize("lengths", [(5, 40, 16, 17, 0, 1), (40, 17, 0), (0, 3), (16, 16)])
def test_only_blocks_of_single_batches_are_merged_and_what_is_given_stays_as_it_is(lengths):
    rng = np.random.default_rng(20)
    widths = [2, 1, 3, 2, 4, 1][: len(lengths)]
    calls = [random_calls(rng, n, width, MOMENTA["varying"]) for n, width in zip(lengths, widths, strict=True)]
    window = window_of(*widths)
    window.update({layer: [call.batch for call in calls[layer]] for layer in range(len(lengths))})
    blocks = window.blocks()
    before = copied(blocks)
    pairs = paired(blocks)
    assert_same(blocks, before, rtol=0, atol=0)
    assert pairs.first_bad.tolist() == blocks.first_bad.tolist()
    for layer, length in enumerate(lengths):
        if 0 < length <= 16:
            assert_same(blocks_of(pairs, layer), merged_by_hand(blocks_of(blocks, layer)), rtol=1e-12, atol=1e-20)
        else:
            assert_same(blocks_of(pairs, layer), blocks_of(blocks, layer), rtol=0, atol=0)


def test_a_pair_of_batches_of_which_one_has_no_variance_has_that_of_the_other():
    for sizes in ((1, 4), (4, 1)):
        calls = [Call(np.random.default_rng(n).normal(size=(n, 2)), 0.1) for n in sizes]
        pairs = blocks_of(paired(fed(2, calls).blocks()))
        close(pairs.var, [next(call for call in calls if call.n > 1).values.var(axis=0, ddof=1)])
        assert (pairs.var_m2 == 0).all()


def test_a_pair_is_nan_in_the_channels_where_one_of_its_batches_is():
    calls = random_calls(np.random.default_rng(21), 6, 3)
    batches = [call.batch for call in calls]
    batches[2].mean[1] = batches[2].spread[1] = math.nan
    window = window_of(3)
    window.update({0: batches})
    pairs, clean = blocks_of(paired(window.blocks())), blocks_of(paired(fed(3, calls).blocks()))
    for values, expected in zip(pairs[6:10], clean[6:10], strict=True):
        assert np.isnan(values[1, 1])
        assert (values[:, ::2] == expected[:, ::2]).all()


# What a batch tells


@pytest.mark.parametrize("eps", [(1e-5,), (1e-3, None), (None, 1e-5, 0.1, 0.0)])
def test_a_spread_is_a_biased_variance_or_an_inverse_standard_deviation(eps):
    calls = random_calls(np.random.default_rng(5), 37, 3, MOMENTA["varying"], eps=eps)
    for cuts in ([], every(1, 37), every(5, 37)):
        assert_layer(fed(3, calls, cuts), 0, calls)


@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_recovered_as_slightly_negative_counts_as_zero(dtype, momentum):
    eps = 1e-5
    invstd = torch.tensor([eps**-0.5 * 1.0001, eps**-0.5 * 1.01, (1 + eps) ** -0.5], dtype=dtype)
    assert (invstd.double()[:2].pow(-2) - eps < 0).all()
    window = window_of(3)
    for mean in (1.0, 3.0):
        window.update({0: [Batch(4, torch.full((3,), mean, dtype=dtype), invstd, eps, momentum, 4)]})
    var = population_of(window).var
    close(var[:2], [8 / 7, 8 / 7])  # between the batches alone
    close(var[2:], [(8 + 8) / 7], rtol=1e-6)
    if momentum:
        assert (blocks_of(window).var[:, :2] == 0).all()
        assert (blocks_of(window).var_m2[:, :2] == 0).all()


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_of_a_single_value_there_is_no_population_variance(momentum):
    window = window_of(2)
    window.update({0: [Batch(1, torch.tensor([5.0, -1.0]), torch.zeros(2), None, momentum, 1)]})
    population = population_of(window)
    assert population.num_samples.tolist() == [1]
    assert population.mean.tolist() == [5.0, -1.0]
    assert population.var.isnan().all()


def test_batches_of_a_single_value_count_in_the_population():
    rng = np.random.default_rng(6)
    calls = [Call(rng.normal(7.0, 2.0, (n, 2)), 0.1 * (t % 2)) for t, n in enumerate([1, 1, 1, 5, 1, 2, 1] * 6)]
    window = fed(2, calls, every(4, len(calls)))
    assert_population(population_of(window), 0, slice(0, 2), calls)


def test_without_batches_the_population_is_nan_and_there_are_no_blocks():
    window = window_of(2, 3)
    window.update({})
    window.update({0: []})
    population, blocks = population_of(window), blocks_of(window, 1)
    assert population.num_samples.tolist() == [0, 0]
    assert population.mean.shape == population.var.shape == (5,)
    assert population.mean.isnan().all()
    assert population.var.isnan().all()
    assert blocks.num_batches.shape == (0,)
    assert blocks.mean.shape == blocks.var_m2.shape == (0, 3)
    assert (blocks.decay, blocks.rounding) == (1.0, 0.0)


# Batches that updated no running statistics


@pytest.mark.parametrize("length", [1, 2, 17, 33, 100])
@pytest.mark.parametrize("pattern", ["0", "01", "10", "0010", "111110", "0111111111111111111"])
def test_batches_without_momentum_count_in_the_population_alone(pattern, length):
    rng = np.random.default_rng(7)
    calls = random_calls(rng, length, 2, lambda t, rng: 0.2 * int(pattern[t % len(pattern)]))
    for cuts in ([], every(1, length), every(6, length)):
        assert_layer(fed(2, calls, cuts), 0, calls)


def test_a_profile_does_not_know_of_batches_without_momentum():
    rng = np.random.default_rng(8)
    calls = random_calls(rng, 70, 2, lambda t, rng: 0.3 * (t % 3 > 0))
    interleaved, alone = fed(2, calls, every(4, 70)), fed(2, [call for call in calls if call.momentum])
    assert_same(blocks_of(interleaved), blocks_of(alone))


# Several layers


WIDTHS = [2, 1, 7, 3]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("step", [1, 3, 32, 100])
def test_layers_of_unequal_width_share_a_window_and_are_named_in_any_order(step, order):
    rng = np.random.default_rng(9)
    calls = [random_calls(rng, 70, width, MOMENTA["varying"], mean=10.0 * width) for width in WIDTHS]
    window = window_of(*WIDTHS)
    for start in range(0, 70, step):
        window.update({layer: [call.batch for call in calls[layer][start : start + step]] for layer in order})
    for layer in range(4):
        assert_layer(window, layer, calls[layer])


@pytest.mark.parametrize("lengths", [(40, 40, 17, 3), (1, 64, 0, 33), (16, 17, 18, 600)])
def test_layers_may_differ_in_how_often_they_are_called(lengths):
    rng = np.random.default_rng(10)
    calls = [random_calls(rng, n, width, MOMENTA["0.1"]) for n, width in zip(lengths, WIDTHS, strict=True)]
    window = window_of(*WIDTHS)
    position = [0] * 4
    while position != list(lengths):
        batches = {}
        for layer in rng.permutation(4):
            until = min(position[layer] + int(rng.integers(0, 30)), lengths[layer])
            if until > position[layer]:
                batches[int(layer)] = [call.batch for call in calls[layer][position[layer] : until]]
            position[layer] = until
        window.update(batches)
    for layer in range(4):
        if lengths[layer]:
            assert_layer(window, layer, calls[layer])
        else:
            assert population_of(window).mean[window.channels(layer)].isnan().all()
            assert len(blocks_of(window, layer).num_batches) == 0


def test_layers_called_at_random_many_times_stay_exact():
    rng = np.random.default_rng(11)
    widths = [1, 2, 3, 1, 2, 3, 4, 1]
    calls = [[] for _ in widths]
    window = window_of(*widths)
    for _ in range(150):  # more groups of layers than any cache of groups would keep
        chosen = [layer for layer in range(len(widths)) if rng.random() < 0.4]
        batches = {}
        for layer in chosen:
            added = random_calls(rng, 1, widths[layer], lambda t, rng: rng.choice([0.0, 0.1, 0.3]))
            calls[layer] += added
            batches[layer] = [call.batch for call in added]
        window.update(batches)
    for layer in range(len(widths)):
        assert_layer(window, layer, calls[layer])


def test_layers_added_later_leave_the_others_as_they_are():
    rng = np.random.default_rng(12)
    first, second, third = (random_calls(rng, n, width) for n, width in ((40, 2), (23, 3), (9, 1)))
    window = Window(CPU)
    assert list(window.add_layers([2])) == [0]
    window.update({0: [call.batch for call in first[:20]]})
    before = blocks_of(window), population_of(window)
    assert list(window.add_layers([3, 1])) == [1, 2]
    assert window.widths == [2, 3, 1]
    assert [window.channels(layer) for layer in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert_same(blocks_of(window), before[0], rtol=0, atol=0)
    assert torch.equal(population_of(window).mean[:2], before[1].mean)
    assert torch.equal(population_of(window).var[:2], before[1].var)
    window.update({0: [call.batch for call in first[20:]], 1: [call.batch for call in second[:10]]})
    window.update({1: [call.batch for call in second[10:]], 2: [call.batch for call in third]})
    for layer, calls in enumerate((first, second, third)):
        assert_layer(window, layer, calls)


def test_after_reset_a_window_is_like_new():
    rng = np.random.default_rng(13)
    old, new = random_calls(rng, 50, 3, MOMENTA["varying"]), random_calls(rng, 20, 3, lambda t, rng: 0.1 * (t % 2))
    window = fed(3, old + random_calls(rng, 3, 3, lambda t, rng: 0.0))
    window.reset()
    assert window.widths == [3]
    assert_same([window.channel_state()], [window_of(3).channel_state()], atol=0)
    assert window.layer_state(0) == window_of(3).layer_state(0)
    window.update({0: [call.batch for call in new]})
    assert_layer(window, 0, new)


# Laws


@st.composite
def histories(draw, width, max_length=40, mean=1.0):
    """Calls of a layer, some of which update nothing."""
    shapes = draw(
        st.lists(
            st.tuples(
                st.integers(2, 6), st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0, 0.37]), st.sampled_from([None, 1e-5])
            ),
            min_size=1,
            max_size=max_length,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [Call(rng.normal(mean, 1.0, (n, width)), momentum, eps) for n, momentum, eps in shapes]


def draw_cuts(data, length):
    return sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))


@given(data=st.data(), calls=histories(width=2))
@LAW
def test_the_cut_into_updates_does_not_matter(data, calls):
    at_once, cut = fed(2, calls), fed(2, calls, draw_cuts(data, len(calls)))
    assert_same(blocks_of(cut), blocks_of(at_once))
    assert_same(population_of(cut), population_of(at_once))
    assert_layer(cut, 0, calls)


@given(data=st.data(), calls=st.tuples(*(histories(width=width, max_length=20) for width in (2, 1, 3))))
@LAW
def test_the_company_of_other_layers_does_not_matter(data, calls):
    order = data.draw(st.permutations(range(3)))
    widths = (2, 1, 3)
    window = window_of(*(widths[i] for i in order))
    cuts = {i: [0, *draw_cuts(data, len(calls[i])), len(calls[i])] for i in order}
    for step in range(8):
        window.update(
            {
                layer: [call.batch for call in calls[i][cuts[i][step] : cuts[i][step + 1]]]
                for layer, i in enumerate(order)
                if step + 1 < len(cuts[i])
            }
        )
    population = population_of(window)
    for layer, i in enumerate(order):
        alone = fed(widths[i], calls[i])
        assert_same(blocks_of(window, layer), blocks_of(alone))
        assert_same([population.mean[window.channels(layer)]], [population_of(alone).mean])
        assert_same([population.var[window.channels(layer)]], [population_of(alone).var])


@given(data=st.data(), ratio=st.sampled_from([0.0, 1.0, -100.0, 1e4]), seed=st.integers(0, 2**32 - 1))
@LAW
def test_the_population_is_that_of_all_values_however_they_are_split_into_batches(data, ratio, seed):
    values = np.random.default_rng(seed).normal(ratio, 1.0, (60, 2))
    ends = sorted(data.draw(st.sets(st.integers(1, 59), max_size=30)))
    momenta = st.sampled_from([0.0, 0.1, 1.0])
    calls = [Call(batch, data.draw(momenta)) for batch in np.split(values, ends)]
    window = fed(2, calls, draw_cuts(data, len(calls)))
    assert_population(population_of(window), 0, slice(0, 2), [Call(values, 0.1)], rtol=1e-9)


@given(data=st.data(), calls=histories(width=2, mean=100.0))
@LAW
def test_the_population_does_not_depend_on_the_order_of_batches(data, calls):
    shuffled = data.draw(st.permutations(calls))
    close_to = population_of(fed(2, calls))
    assert_same(population_of(fed(2, shuffled, draw_cuts(data, len(calls)))), close_to)
    assert_population(close_to, 0, slice(0, 2), shuffled)


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


@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("at", [0, 19, 39])
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_with_a_non_finite_channel_touches_no_other_and_is_forgotten_at_reset(bad, at, momentum):
    field, value, as_invstd = BAD[bad]
    calls, batches = poisoned(field, value, at, momentum, as_invstd)
    other = random_calls(np.random.default_rng(15), 40, 2, lambda t, rng: momentum)
    for step in (1, 32, 40):
        broken, clean = window_of(3, 2), window_of(3, 2)
        for start in range(0, 40, step):
            neighbour = [call.batch for call in other[start : start + step]]
            broken.update({0: batches[start : start + step], 1: neighbour})
            clean.update({0: [call.batch for call in calls[start : start + step]], 1: neighbour})
        population, reference = population_of(broken), population_of(clean)
        others = [0, 2, 3, 4]
        assert not population.var[1].isfinite()
        assert torch.equal(population.mean[others], reference.mean[others])
        assert torch.equal(population.var[others], reference.var[others])
        assert population.num_samples.tolist() == reference.num_samples.tolist()
        blocks, reference_blocks = blocks_of(broken), blocks_of(clean)
        for values, expected in zip(blocks[6:10], reference_blocks[6:10], strict=True):
            assert (values[:, ::2] == expected[:, ::2]).all()
        assert_same(blocks[:6] + blocks[10:], reference_blocks[:6] + reference_blocks[10:], rtol=0, atol=0)

        broken.reset()
        broken.update({0: [call.batch for call in calls]})
        assert_layer(broken, 0, calls)


@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_with_a_non_finite_channel_makes_it_nan(bad, momentum):
    field, value, as_invstd = BAD[bad]
    for at in (0, 19, 39):
        _, batches = poisoned(field, value, at, momentum, as_invstd)
        for step in (1, 32, 40):
            window = window_of(3)
            for start in range(0, 40, step):
                window.update({0: batches[start : start + step]})
            population = population_of(window)
            assert population.var[1].isnan(), population.var
            assert population.mean[1].isnan(), population.mean


def broken_calls(rng, length, width, bad, momentum=lambda t, rng: 0.1):
    """What calls tell of which some are not finite: ``bad`` maps their number, from 1, to a channel."""
    batches = [call.batch for call in random_calls(rng, length, width, momentum)]
    for number, channel in bad:
        batches[number - 1].mean[channel] = batches[number - 1].spread[channel] = math.nan
    return batches


def updated(window, layer, batches, step):
    for start in range(0, len(batches), step):
        window.update({layer: batches[start : start + step]})
    return window


def two_of_three(t, rng):
    return 0.1 * (t % 3 > 0)


@pytest.mark.parametrize("step", [1, 2, 7, 32, 50])
@pytest.mark.parametrize("momentum", ["0.1", "0", "two of three"])
def test_the_first_call_that_is_not_finite_is_known_per_channel(momentum, step):
    rule = {"0.1": MOMENTA["0.1"], "0": lambda t, rng: 0.0, "two of three": two_of_three}[momentum]
    # Of calls that updated nothing some, of those that did some: all of them count.
    bad = [(1, 0), (2, 0), (17, 1), (30, 1), (49, 3), (50, 4), (33, 3)]
    batches = broken_calls(np.random.default_rng(22), 50, 6, bad, rule)
    window = updated(window_of(6), 0, batches, step)
    assert window.blocks().first_bad.tolist() == [1, 17, math.inf, 33, 50, math.inf]


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_not_finite_is_noticed(bad):
    field, value, as_invstd = BAD[bad]
    for momentum in (0.1, 0.0):
        _, batches = poisoned(field, value, 19, momentum, as_invstd)
        for step in (1, 32, 40):
            first_bad = updated(window_of(3), 0, batches, step).blocks().first_bad
            assert first_bad.tolist() == [math.inf, 20, math.inf]


def test_a_mean_that_is_not_finite_is_noticed_beside_a_finite_variance():
    window = window_of(2)
    window.update({0: [Batch(4, torch.tensor([1.0, math.inf]), torch.ones(2), None, 0.1, 4)]})
    assert window.blocks().first_bad.tolist() == [math.inf, 1]


@pytest.mark.parametrize("step", [1, 4, 40])
def test_every_layer_counts_its_own_calls(step):
    rng = np.random.default_rng(23)
    bad = {0: [(3, 1)], 1: [(20, 0)], 2: [], 3: [(5, 2), (1, 2), (8, 0)]}
    lengths, widths = {0: 40, 1: 20, 2: 40, 3: 9}, {0: 2, 1: 1, 2: 2, 3: 3}
    batches = {
        i: broken_calls(rng, lengths[i], widths[i], bad[i], two_of_three if i % 2 else MOMENTA["0.1"]) for i in bad
    }
    window = window_of(*widths.values())
    for start in range(0, 40, step):
        window.update({i: calls[start : start + step] for i, calls in batches.items() if calls[start : start + step]})
    assert window.blocks().first_bad.tolist() == [math.inf, 3, 20, math.inf, math.inf, 8, math.inf, 1]


def test_layers_updated_one_at_a_time_know_their_first_call_that_is_not_finite():
    rng = np.random.default_rng(24)
    window = window_of(2, 3, 2)
    updated(window, 1, broken_calls(rng, 5, 3, [(4, 2), (5, 0)]), 2)
    assert window.blocks().first_bad.tolist() == [math.inf, math.inf, 5, math.inf, 4, math.inf, math.inf]
    updated(window, 2, broken_calls(rng, 5, 2, [(1, 0)]), 5)
    updated(window, 1, broken_calls(rng, 5, 3, [(1, 0), (1, 1), (1, 2)]), 1)
    assert window.blocks().first_bad.tolist() == [math.inf, math.inf, 5, 6, 4, 1, math.inf]


def test_reset_forgets_the_calls_that_were_not_finite_and_counts_anew():
    rng = np.random.default_rng(25)
    window = updated(window_of(2), 0, broken_calls(rng, 20, 2, [(7, 0)]), 20)
    window.reset()
    assert window.blocks().first_bad.tolist() == [math.inf, math.inf]
    updated(window, 0, broken_calls(rng, 20, 2, [(12, 1)]), 3)
    assert window.blocks().first_bad.tolist() == [math.inf, 12]


def test_layers_added_later_leave_what_is_known_of_the_others():
    rng = np.random.default_rng(26)
    window = updated(window_of(2), 0, broken_calls(rng, 20, 2, [(7, 0)]), 20)
    window.add_layers([1])
    updated(window, 1, broken_calls(rng, 3, 1, [(2, 0)]), 3)
    assert window.blocks().first_bad.tolist() == [7, math.inf, 2]


# Saving and restoring


def restored(window, order):
    """A window of the same layers in another order, from what the given one saves."""
    channels = window.channel_state()
    states = json.loads(json.dumps([window.layer_state(layer) for layer in range(len(window.widths))]))
    other = window_of(*(window.widths[layer] for layer in order))
    for index, layer in enumerate(order):
        other.restore(index, channels[:, window.channels(layer)], states[layer])
    return other


@pytest.mark.parametrize("saved_at", [0, 1, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_restored_window_goes_on_as_if_nothing_had_happened(order, saved_at):
    rng = np.random.default_rng(17)
    widths, lag = (2, 5, 1), (0, 7, 0)
    calls = [
        random_calls(rng, 70, width, lambda t, rng: rng.choice([0.0, 0.1, 0.4]), mean=5.0, eps=(None, 1e-5))
        for width in widths
    ]

    def update(window, start, stop, layers):
        window.update(
            {i: [c.batch for c in calls[j][max(start - lag[j], 0) : max(stop - lag[j], 0)]] for i, j in layers}
        )

    straight = window_of(*widths)
    update(straight, 0, saved_at, enumerate(range(3)))
    saved = straight.channel_state()
    other = restored(straight, order)
    for index, layer in enumerate(order):
        assert_same(blocks_of(other, index), blocks_of(straight, layer), rtol=0, atol=0)
        assert other.layer_state(index) == straight.layer_state(layer)
    for start in range(saved_at, 70, 9):
        update(straight, start, min(start + 9, 70), enumerate(range(3)))
        update(other, start, min(start + 9, 70), enumerate(order))
    # The same operations in the same order give the same bits; in another one the roundings may differ.
    tolerance = {"rtol": 0, "atol": 0} if order == (0, 1, 2) else {"rtol": 1e-13, "atol": 1e-13}
    for index, layer in enumerate(order):
        assert_same(blocks_of(other, index), blocks_of(straight, layer), **tolerance)
        mine, theirs = population_of(other), population_of(straight)
        assert_same([mine.mean[other.channels(index)]], [theirs.mean[straight.channels(layer)]], **tolerance)
        assert_same([mine.var[other.channels(index)]], [theirs.var[straight.channels(layer)]], **tolerance)
        assert_layer(other, index, calls[layer][: 70 - lag[layer]])
    if saved_at == 0:
        assert saved[:-1].eq(0).all()
        assert saved[-1].isposinf().all()
    else:
        assert not torch.equal(saved, straight.channel_state())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_restored_window_knows_the_calls_that_were_not_finite_and_goes_on_counting(order):
    rng = np.random.default_rng(27)
    bad, widths = [[(4, 1), (15, 0)], [(12, 2)], []], (2, 3, 1)
    batches = [broken_calls(rng, 20, widths[i], bad[i], two_of_three) for i in range(3)]
    straight = window_of(*widths)
    straight.update({i: batches[i][:10] for i in range(3)})
    other = restored(straight, order)
    other.update({index: batches[i][10:] for index, i in enumerate(order)})
    first_bad = other.blocks().first_bad
    expected = [[15, 4], [math.inf, math.inf, 12], [math.inf]]
    assert [first_bad[other.channels(index)].tolist() for index in range(3)] == [expected[i] for i in order]


def test_what_is_saved_does_not_change_when_the_window_goes_on():
    calls = random_calls(np.random.default_rng(18), 30, 2)
    window = fed(2, calls[:10])
    channels, state = window.channel_state(), window.layer_state(0)
    kept, kept_state = channels.clone(), json.dumps(state)
    assert channels.shape == (Window.CHANNEL_ROWS, 2)
    assert channels.dtype == torch.float64
    window.update({0: [call.batch for call in calls[10:]]})
    window.reset()
    assert torch.equal(channels, kept)
    assert json.dumps(state) == kept_state


def test_restoring_one_layer_leaves_the_others_as_they_are():
    rng = np.random.default_rng(19)
    first, second, third = (random_calls(rng, n, 2) for n in (30, 20, 25))
    source = fed(2, third)
    window = window_of(2, 2)
    window.update({0: [call.batch for call in first], 1: [call.batch for call in second]})
    window.restore(1, source.channel_state(), source.layer_state(0))
    assert_layer(window, 0, first)
    assert_layer(window, 1, third)
