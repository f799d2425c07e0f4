"""A window that is saved and restored goes on as if nothing had happened."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.window import Window
from tests.statistics.window_reference import (
    assert_layer,
    assert_same,
    blocks_of,
    broken_calls,
    fed,
    population_of,
    random_calls,
    two_of_three,
    update,
    window_of,
)


def restored(window, order):
    """A window of the same layers in another order, from what the given one saves."""
    channels = window.channel_state()
    states = json.loads(json.dumps([window.layer_state(layer) for layer in range(len(window.widths))]))
    other = window_of(*(window.widths[layer] for layer in order))
    for index, layer in enumerate(order):
        other.restore(index, channels[:, window.channels(layer)], states[layer])
    return other


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", [0, 1, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_restored_window_goes_on_as_if_nothing_had_happened(order, saved_at):
    rng = np.random.default_rng(17)
    widths, lag = (2, 5, 1), (0, 7, 0)
    calls = [
        random_calls(rng, 70, width, lambda t, rng: rng.choice([0.0, 0.1, 0.4]), mean=5.0, eps=(None, 1e-5))
        for width in widths
    ]

    def go_on(window, start, stop, layers):
        update(
            window, {i: [c.batch for c in calls[j][max(start - lag[j], 0) : max(stop - lag[j], 0)]] for i, j in layers}
        )

    straight = window_of(*widths)
    go_on(straight, 0, saved_at, enumerate(range(3)))
    saved = straight.channel_state()
    other = restored(straight, order)
    for index, layer in enumerate(order):
        assert_same(blocks_of(other, index), blocks_of(straight, layer), rtol=0, atol=0)
        assert other.layer_state(index) == straight.layer_state(layer)
    for start in range(saved_at, 70, 9):
        go_on(straight, start, min(start + 9, 70), enumerate(range(3)))
        go_on(other, start, min(start + 9, 70), enumerate(order))
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
    update(straight, {i: batches[i][:10] for i in range(3)})
    other = restored(straight, order)
    update(other, {index: batches[i][10:] for index, i in enumerate(order)})
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
    update(window, {0: [call.batch for call in calls[10:]]})
    window.reset()
    assert torch.equal(channels, kept)
    assert json.dumps(state) == kept_state


def test_restoring_one_layer_leaves_the_others_as_they_are():
    rng = np.random.default_rng(19)
    first, second, third = (random_calls(rng, n, 2) for n in (30, 20, 25))
    source = fed(2, third)
    window = window_of(2, 2)
    update(window, {0: [call.batch for call in first], 1: [call.batch for call in second]})
    window.restore(1, source.channel_state(), source.layer_state(0))
    assert_layer(window, 0, first)
    assert_layer(window, 1, third)
