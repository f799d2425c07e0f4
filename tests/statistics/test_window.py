"""The window's blocks and population against a simulation that keeps every batch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.blocks import block_size, paired
from lightning_bnmonitor.statistics.window import Window
from tests.statistics.window_reference import (
    CPU,
    LAW,
    LENGTHS,
    MOMENTA,
    Batch,
    Call,
    LayerBlocks,
    assert_blocks,
    assert_layer,
    assert_population,
    assert_same,
    blocks_by_rule,
    blocks_of,
    close,
    every,
    fed,
    population_of,
    random_calls,
    update,
    window_of,
)

# Blocks


def test_block_sizes_are_those_of_adding_batches_one_by_one():
    assert [block_size(length) for length in (0, 1, 16, 17, 32, 33, 64, 65, 600)] == [1, 1, 1, 2, 2, 4, 4, 8, 64]
    for length in range(1, 601):
        assert block_size(length) == blocks_by_rule(length)[1]


def test_at_every_length_the_blocks_hold_the_batches_that_the_rule_gives_them():
    window = window_of(1)
    call = Call(np.array([[1.0], [2.0], [4.0]]), 0.1)
    for length in range(1, 601):
        update(window, {0: [call.batch]})
        assert blocks_of(window).num_batches.tolist() == [len(block) for block in blocks_by_rule(length)[0]]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("length", [*LENGTHS, *(pytest.param(n, marks=pytest.mark.slow) for n in (257, 600))])
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
    update(reference, {0: [b._replace(mean=b.mean.double(), spread=b.spread.double()) for b in batches]})
    for t, batch in enumerate(batches):
        mean_dtype = torch.float64 if t % 2 else dtype
        update(window, {0: [batch._replace(mean=batch.mean.to(mean_dtype), spread=batch.spread.to(dtype))]})
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
    return copy.deepcopy(blocks)


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
    update(window, {layer: [call.batch for call in calls[layer]] for layer in range(len(lengths))})
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
    update(window, {0: batches})
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
        update(window, {0: [Batch(4, torch.full((3,), mean, dtype=dtype), invstd, eps, momentum, 4)]})
    var = population_of(window).var
    close(var[:2], [8 / 7, 8 / 7])  # between the batches alone
    close(var[2:], [(8 + 8) / 7], rtol=1e-6)
    if momentum:
        assert (blocks_of(window).var[:, :2] == 0).all()
        assert (blocks_of(window).var_m2[:, :2] == 0).all()


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_of_a_single_value_there_is_no_population_variance(momentum):
    window = window_of(2)
    update(window, {0: [Batch(1, torch.tensor([5.0, -1.0]), torch.zeros(2), None, momentum, 1)]})
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
    update(window, {})
    update(window, {0: []})
    population, blocks = population_of(window), blocks_of(window, 1)
    assert population.num_samples.tolist() == [0, 0]
    assert population.mean.shape == population.var.shape == (5,)
    assert population.mean.isnan().all()
    assert population.var.isnan().all()
    assert blocks.num_batches.shape == (0,)
    assert blocks.mean.shape == blocks.var_m2.shape == (0, 3)
    assert (blocks.decay, blocks.rounding) == (1.0, 0.0)


# Batches that updated no running statistics


@pytest.mark.slow
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
        update(window, {layer: [call.batch for call in calls[layer][start : start + step]] for layer in order})
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
        update(window, batches)
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
        update(window, batches)
    for layer in range(len(widths)):
        assert_layer(window, layer, calls[layer])


def test_layers_added_later_leave_the_others_as_they_are():
    rng = np.random.default_rng(12)
    first, second, third = (random_calls(rng, n, width) for n, width in ((40, 2), (23, 3), (9, 1)))
    window = Window(CPU)
    assert list(window.add_layers([2])) == [0]
    update(window, {0: [call.batch for call in first[:20]]})
    before = blocks_of(window), population_of(window)
    assert list(window.add_layers([3, 1])) == [1, 2]
    assert window.widths == [2, 3, 1]
    assert [window.channels(layer) for layer in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert_same(blocks_of(window), before[0], rtol=0, atol=0)
    assert torch.equal(population_of(window).mean[:2], before[1].mean)
    assert torch.equal(population_of(window).var[:2], before[1].var)
    update(window, {0: [call.batch for call in first[20:]], 1: [call.batch for call in second[:10]]})
    update(window, {1: [call.batch for call in second[10:]], 2: [call.batch for call in third]})
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
    update(window, {0: [call.batch for call in new]})
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


@pytest.mark.slow
@given(data=st.data(), calls=histories(width=2))
@LAW
def test_the_cut_into_updates_does_not_matter(data, calls):
    at_once, cut = fed(2, calls), fed(2, calls, draw_cuts(data, len(calls)))
    assert_same(blocks_of(cut), blocks_of(at_once))
    assert_same(population_of(cut), population_of(at_once))
    assert_layer(cut, 0, calls)


@pytest.mark.slow
@given(data=st.data(), calls=st.tuples(*(histories(width=width, max_length=20) for width in (2, 1, 3))))
@LAW
def test_the_company_of_other_layers_does_not_matter(data, calls):
    order = data.draw(st.permutations(range(3)))
    widths = (2, 1, 3)
    window = window_of(*(widths[i] for i in order))
    cuts = {i: [0, *draw_cuts(data, len(calls[i])), len(calls[i])] for i in order}
    for step in range(8):
        update(
            window,
            {
                layer: [call.batch for call in calls[i][cuts[i][step] : cuts[i][step + 1]]]
                for layer, i in enumerate(order)
                if step + 1 < len(cuts[i])
            },
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


@pytest.mark.slow
@given(data=st.data(), calls=histories(width=2, mean=100.0))
@LAW
def test_the_population_does_not_depend_on_the_order_of_batches(data, calls):
    shuffled = data.draw(st.permutations(calls))
    close_to = population_of(fed(2, calls))
    assert_same(population_of(fed(2, shuffled, draw_cuts(data, len(calls)))), close_to)
    assert_population(close_to, 0, slice(0, 2), shuffled)
