"""All batches of a window's blocks as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bnmonitor.statistics.blocks import pooled
from lightning_bnmonitor.statistics.window import Batches, Window

C = 3


def window(sizes: list[int], values: list[np.ndarray], momentum: float = 0.1) -> Window:
    made, num = Window(torch.device("cpu")), len(sizes)
    made.add_layers([2, C])
    for start in range(0, num, 7):
        part = slice(start, start + 7)
        tensors = [torch.from_numpy(x) for x in values[part]]
        batches = Batches(
            tuple(sizes[part]),
            tuple(x.mean(0) for x in tensors),
            tuple(x.var(0, correction=0) for x in tensors),
            *((each,) * len(tensors) for each in (None, momentum)),
            tuple(sizes[part]),
        )
        for write in made.merged({1: batches}):
            write()
    return made


@pytest.mark.parametrize("num", [1, 2, 16, 17, 40, 100])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_they_are_the_weighted_means_of_all_batches_and_their_squares_about_them(num: int, mean: float) -> None:
    generator = np.random.default_rng(num)
    sizes = generator.integers(2, 30, num).tolist()
    values = [generator.normal(mean, 1 + generator.random(), (size, C)) for size in sizes]
    got = pooled(window(sizes, values).blocks())
    n = np.array(sizes, dtype=float)[:, None]
    for row, (weight, x) in enumerate(
        [(n, np.array([v.mean(0) for v in values])), (n - 1, np.array([v.var(0, ddof=1) for v in values]))]
    ):
        center = (weight * x).sum(0) / weight.sum()
        np.testing.assert_allclose(got.value[row, 2:], center, rtol=1e-12)
        np.testing.assert_allclose(got.m2[row, 2:], (weight * (x - center) ** 2).sum(0), rtol=1e-8, atol=1e-12)
    assert got.num_batches.tolist() == [0, num]
    assert got.num_samples.tolist() == got.batch_size.tolist() == [0, sum(sizes)]
    assert not got.value[:, :2].any()


def test_constant_values_have_no_squares_and_what_is_not_finite_stays_in_its_channel() -> None:
    values = [np.full((4, C), 7.1) for _ in range(50)]
    values[20][1, 1] = np.nan
    got = pooled(window([4] * 50, values).blocks())
    assert got.value[0, [2, 4]].tolist() == [7.1, 7.1]
    assert got.m2[0, [2, 4]].tolist() == [0, 0]
    assert np.isnan(got.value[:, 3]).all()
