"""Values that are not finite: they stay in their channel, and the window knows the first call that had any."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.statistics.window_reference import (
    BAD,
    MOMENTA,
    Batch,
    assert_layer,
    assert_same,
    blocks_of,
    broken_calls,
    poisoned,
    population_of,
    random_calls,
    two_of_three,
    update,
    updated,
    window_of,
)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("at", [0, 39])
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_with_a_non_finite_channel_touches_no_other_and_is_forgotten_at_reset(bad, at, momentum):
    field, value, as_invstd = BAD[bad]
    calls, batches = poisoned(field, value, at, momentum, as_invstd)
    other = random_calls(np.random.default_rng(15), 40, 2, lambda t, rng: momentum)
    for step in (1, 32, 40):
        broken, clean = window_of(3, 2), window_of(3, 2)
        for start in range(0, 40, step):
            neighbour = [call.batch for call in other[start : start + step]]
            update(broken, {0: batches[start : start + step], 1: neighbour})
            update(clean, {0: [call.batch for call in calls[start : start + step]], 1: neighbour})
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
        update(broken, {0: [call.batch for call in calls]})
        assert_layer(broken, 0, calls)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("bad", BAD)
def test_a_batch_with_a_non_finite_channel_makes_it_nan(bad, momentum):
    field, value, as_invstd = BAD[bad]
    for at in (0, 19, 39):
        _, batches = poisoned(field, value, at, momentum, as_invstd)
        for step in (1, 32, 40):
            window = window_of(3)
            for start in range(0, 40, step):
                update(window, {0: batches[start : start + step]})
            population = population_of(window)
            assert population.var[1].isnan(), population.var
            assert population.mean[1].isnan(), population.mean


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
    update(window, {0: [Batch(4, torch.tensor([1.0, math.inf]), torch.ones(2), None, 0.1, 4)]})
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
        update(window, {i: calls[start : start + step] for i, calls in batches.items() if calls[start : start + step]})
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
