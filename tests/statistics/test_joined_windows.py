"""Short windows laid end to end are what one window of all their batches is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.analysis import analyse
from lightning_bnmonitor.statistics.joined_windows import KeptWindow, fewest, joined, kept_window
from lightning_bnmonitor.statistics.noise import RunningStats
from lightning_bnmonitor.statistics.window import Window
from tests.statistics.analysis_reference import (
    FLOAT32,
    PER_CHANNEL,
    Layer,
    expected_analysis,
    last_of,
    part_of,
    random_layer,
)
from tests.statistics.window_reference import update

LENGTHS = {
    "two of five": [5, 5],
    "three": [3, 2, 4],
    "one batch each": [1] * 8,
    "seven and one": [7, 1],
    "seven and seven": [7, 7],
    "after a long one": [20, 4, 6],
    "of which the first are not needed": [6, 7, 1, 2, 5],
}


def blocks_of(layers, index):
    """The blocks of one window of layers, each by itself."""
    window = Window(torch.device("cpu"))
    window.add_layers([layer.width for layer in layers])
    update(window, {i: [call.batch for call in layer.windows[index]] for i, layer in enumerate(layers)})
    return window.blocks()


def running(layers, index, initial_weight, noise):
    return RunningStats(
        start=np.concatenate([layer.buffers(index) for layer in layers], axis=1),
        end=np.concatenate([layer.buffers(index + 1) for layer in layers], axis=1),
        initial_weight=initial_weight,
        noise=noise,
        rounding=np.array([layer.rounding for layer in layers]),
        known=np.array([True] * len(layers)),
        last=last_of(layers, index),
    )


def judged(layers):
    """The analysis of the last window of layers together with the short ones before, and how many these are."""
    eps = np.array([layer.eps for layer in layers])
    initial_weight, noise = np.ones(len(layers)), np.zeros((2, len(layers)))
    kept = [[] for _ in layers]
    for index in range(len(layers[0].windows) - 1):
        blocks, stats = blocks_of(layers, index), running(layers, index, initial_weight, noise)
        analysis = analyse(blocks, stats, eps)
        starts = np.split(stats.start, np.cumsum(blocks.widths)[:-1], axis=1)
        for i, layer in enumerate(layers):
            is_short = len(layer.windows[index]) < 8
            own = kept_window(blocks, i, starts[i], initial_weight[i], noise[:, i]) if is_short else None
            kept[i] = [] if own is None else [*kept[i], own]
        initial_weight, noise = analysis.initial_weight, analysis.noise
    last = len(layers[0].windows) - 1
    needed = {i: fewest(kept[i], 8 - len(layer.windows[last])) for i, layer in enumerate(layers)}
    stats = running(layers, last, initial_weight, noise)
    start = np.concatenate([windows[0].start for windows in needed.values()], axis=1)
    initial_weight = np.array([windows[0].initial_weight for windows in needed.values()])
    noise = np.stack([windows[0].noise for windows in needed.values()], axis=1)
    stats = stats._replace(start=start, initial_weight=initial_weight, noise=noise)
    return analyse(joined(blocks_of(layers, last), needed), stats, eps), [1 + len(its) for its in needed.values()]


def as_one_window(layer, num_windows):
    """The same layer, had its last windows been one."""
    before, last = layer.windows[:-num_windows], layer.windows[-num_windows:]
    joined_calls = [call for calls in last for call in calls]
    return Layer(layer.width, layer.eps, layer.rounding, layer.known, layer.trained, [*before, joined_calls])


@pytest.mark.parametrize("rounding", [None, FLOAT32], ids=["exact buffers", "float32 buffers"])
@pytest.mark.parametrize("momentum", ["0.01", "0.1", "0.5", "cumulative", "varying"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_windows_laid_end_to_end_are_one_window_of_all_batches(lengths, momentum, rounding):
    rng = np.random.default_rng([*map(ord, lengths), *map(ord, momentum)])
    options = {} if rounding is None else {"rounding": rounding}
    layers = [random_layer(rng, LENGTHS[lengths], width, momentum, "unequal", **options) for width in (3, 1, 5)]
    analysis, num_windows = judged(layers)
    for number, layer in enumerate(layers):
        whole = as_one_window(layer, num_windows[number])
        expected, actual = expected_analysis(whole, len(whole.windows) - 1), part_of(analysis, layers, number)
        expected.pop("fine")
        for name in actual:
            message = f"{name} of layer {number}, {'per channel' if name in PER_CHANNEL else ''}"
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-8, atol=1e-8, err_msg=message)


@pytest.mark.parametrize(
    ("lengths", "needed"), [([], []), ([3], [3]), ([3, 5], [5]), ([5, 3], [5, 3]), ([7, 1, 1, 2, 1], [1, 1, 2, 1])]
)
def test_no_more_windows_are_taken_than_are_needed(lengths, needed):
    windows = [window_of(length) for length in lengths]
    assert [window.num_batches for window in fewest(windows, 5)] == needed


def window_of(num_batches, width=2):
    rng = np.random.default_rng(num_batches)
    of_batches = rng.random((3, num_batches))
    return KeptWindow(
        0.5, 1.5, 0.25, rng.random(2), *of_batches, rng.random((2, width)), rng.random((num_batches, 2, width))
    )


@pytest.mark.parametrize("num_batches", [1, 7])
@pytest.mark.parametrize("width", [1, 5])
def test_what_is_kept_survives_packing(num_batches, width):
    window = window_of(num_batches, width)
    packed = window.packed()
    assert len(packed) == KeptWindow.packed_size(num_batches, width)
    assert window.nbytes == packed.nbytes
    again = KeptWindow.unpacked(packed, num_batches, width)
    for mine, theirs in zip(again, window, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_layer_without_earlier_windows_stays_as_it_was():
    rng = np.random.default_rng(0)
    layers = [random_layer(rng, [5, 5], 3) for _ in range(2)]
    blocks = blocks_of(layers, 1)
    kept = kept_window(blocks_of(layers, 0), 0, layers[0].buffers(0), 1.0, (0.0, 0.0))
    together = joined(blocks, {0: [kept]})
    assert together.num_batches.sum(axis=1).tolist() == [10, 5]
    for name in ("num_batches", "num_samples", "batch_size", "weight", "decay", "rounding"):
        np.testing.assert_array_equal(getattr(together, name)[1], getattr(blocks, name)[1])
    np.testing.assert_array_equal(together.value[..., 3:], blocks.value[..., 3:])
    assert blocks.num_batches.sum(axis=1).tolist() == [5, 5]
