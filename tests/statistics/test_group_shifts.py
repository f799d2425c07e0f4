"""How far groups of batches are from all, against two float64 passes; what chance makes of it, by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.group_moments import (
    MAX_LETTERS,
    GroupMoments,
    SeenGroups,
    packed_names,
    seen_together,
    unpacked_names,
    with_batches,
)
from lightning_bnmonitor.statistics.group_order import GroupLog
from lightning_bnmonitor.statistics.group_shifts import group_shifts

EPS = 1e-5


def log_of(labels: Sequence[object]) -> GroupLog:
    log = GroupLog()
    for label in labels:
        log.add(log.number(str(label)))
    return log


def layout_of(*widths: int) -> ChannelLayout:
    return ChannelLayout(np.array(widths, dtype=np.int64))


def seen_of(labels: Sequence[object], x: np.ndarray) -> SeenGroups:
    """What one layer has seen: ``(T, n, C)`` values in batches of these groups, pooled by numpy."""
    log, names = log_of(labels), np.array([str(label) for label in labels])
    fields = []
    for name in log.names:
        own = x[names == name]
        mean, var, n = own.mean(axis=1), own.var(axis=1, ddof=1), x.shape[1]
        value = np.stack([mean.mean(axis=0), var.mean(axis=0)])
        m2 = np.stack([n * np.square(mean - value[0]).sum(axis=0), (n - 1) * np.square(var - value[1]).sum(axis=0)])
        fields.append(([len(own)], [len(own) * n], value, m2))
    moments = GroupMoments(*(np.array(field, dtype=float) for field in zip(*fields, strict=True)))
    return SeenGroups(tuple(log.names), log.order, moments)


def shifts_of(labels: Sequence[object], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and noise of each group, ``(G,)``."""
    values = x.reshape(-1, x.shape[-1])
    population = np.stack([values.mean(axis=0), values.var(axis=0, ddof=1)])
    seen, layout = seen_of(labels, x), layout_of(x.shape[-1])
    found = group_shifts(seen, population, np.array([float(len(values))]), np.array([EPS]), layout)
    return found.shift[:, 0], found.noise[:, 0]


# --- moments ----------------------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    mean=st.sampled_from([0.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_batches_merged_in_any_portions_go_to_their_groups(groups: list[int], cuts: list[int], mean: float) -> None:
    rng = np.random.default_rng(len(groups))
    sizes = rng.integers(2, 9, len(groups))
    x = [rng.normal(mean, 1, (size, 2)) for size in sizes]
    rows, weights = torch.zeros(2, 3, 2, 2, dtype=torch.float64), torch.zeros(3, 2, 2, dtype=torch.float64)
    batches = torch.from_numpy(np.stack([np.stack([b.mean(axis=0), b.var(axis=0, ddof=1)]) for b in x]))
    of_batches = torch.from_numpy(np.stack([sizes, sizes - 1], axis=1)).double()[..., None].expand(-1, 2, 2)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(groups)], strict=True):
        part = slice(start, min(stop, len(groups)))
        if not groups[part]:
            continue
        rows = with_batches(rows, weights, batches[part], of_batches[part], groups[part])
        for group, weight in zip(groups[part], of_batches[part], strict=True):
            if group:
                weights[group - 1] += weight
    for group in (1, 2, 3):
        own = [index for index, its in enumerate(groups) if its == group]
        if own:
            value = np.stack([np.average(batches[own, f], axis=0, weights=of_batches[own, f, 0]) for f in (0, 1)])
            np.testing.assert_allclose(rows[0, group - 1], value, rtol=1e-10)
            squares = (of_batches[own] * (batches[own] - value) ** 2).sum(dim=0)
            np.testing.assert_allclose(rows[1, group - 1], squares, rtol=1e-6, atol=1e-9 * max(mean, 1))


def test_the_population_of_a_group_is_that_of_all_its_values() -> None:
    rng = np.random.default_rng(0)
    labels, x = rng.integers(0, 3, 40), rng.normal(3, 2, (40, 5, 4))
    seen = seen_of(labels, x)
    for name, (mean, var) in zip(seen.names, seen.moments.population(layout_of(4)), strict=True):
        values = x[labels == int(name)].reshape(-1, 4)
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(var, values.var(axis=0, ddof=1), rtol=1e-12)


def test_of_one_value_there_is_no_variance_and_of_none_nothing() -> None:
    moments = GroupMoments(
        np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]), np.full((2, 2, 1), 5.0), np.zeros((2, 2, 1))
    )
    population = moments.population(layout_of(1))
    assert population[0, 0] == 5
    assert np.isnan(population[0, 1])
    assert np.isnan(population[1]).all()


@pytest.mark.parametrize("names", [(), ("a",), ("", "b"), (*"abcdefgh", "other"), ("😀" * MAX_LETTERS, "日本")])
def test_names_are_told_as_numbers(names: tuple[str, ...]) -> None:
    assert unpacked_names(packed_names(names)) == tuple(name for name in names)


def test_ranks_together_are_one_that_has_seen_all() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 3, 30), rng.integers(1, 5, 20)
    x, y = rng.normal(0, 1, (30, 6, 4)), rng.normal(1, 2, (20, 6, 4))
    layout = layout_of(4)
    shares = [SeenGroups.unpacked(seen_of(*each).packed(), layout) for each in ((one, x), (two, y))]
    together = seen_together(shares, layout)
    assert sorted(together.names) == ["0", "1", "2", "3", "4"]
    every, values = np.concatenate([one, two]), np.concatenate([x, y])
    expected = seen_of(every, values).moments.population(layout)
    order = {name: index for index, name in enumerate(seen_of(every, values).names)}
    for name, moments in zip(together.names, together.moments.population(layout), strict=True):
        np.testing.assert_allclose(moments, expected[order[name]], rtol=1e-10)
    assert together.order.moments_of_time[0] == 50


def test_more_than_eight_groups_of_all_ranks_are_told_as_eight_and_others() -> None:
    rng = np.random.default_rng(2)
    layout = layout_of(3)
    labels = [[f"{rank}.{index}" for index in range(6)] * 2 for rank in range(2)]
    values = [rng.normal(0, 1, (12, 5, 3)) for _ in range(2)]
    together = seen_together([seen_of(*each) for each in zip(labels, values, strict=True)], layout)
    assert together.names == (*[f"0.{index}" for index in range(6)], "1.0", "1.1", "other")
    rest = values[1][[label in ("1.2", "1.3", "1.4", "1.5") for label in labels[1]]].reshape(-1, 3)
    mean, var = together.moments.population(layout)[-1]
    np.testing.assert_allclose(mean, rest.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(var, rest.var(axis=0, ddof=1), rtol=1e-10)
    assert together.moments.num_batches[-1] == 8
    assert together.order.num_batches.sum() == 24


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "is_mixed"),
    [
        ("ab" * 20, True),
        ("aabb" * 10, True),
        ("a" * 20 + "b" * 20, False),
        ("a" * 10 + "b" * 20 + "a" * 10, False),  # at the same time on average, but in a row
        ("aaab" * 8, True),
        ("a" * 30 + "ab" * 10, False),  # b comes late
        ("ababab", True),
        ("ab", True),
        ("a", False),
    ],
)
def test_which_groups_are_mixed(labels: str, is_mixed: bool) -> None:
    order = log_of(labels).order
    index = log_of(labels).names.index("b") if "b" in labels else 0
    assert bool(order.is_mixed[index]) is is_mixed


def test_runs_and_times_are_those_of_a_random_order() -> None:
    rng, orders = np.random.default_rng(3), []
    for _ in range(2000):
        labels = rng.permutation(["a"] * 12 + ["b"] * 28)
        log = log_of(labels)
        orders.append((log.order, log.names.index("a")))
    runs = np.mean([order.runs[a] for order, a in orders])
    assert runs == pytest.approx(orders[0][0].expected_runs[orders[0][1]], rel=0.02)
    assert orders[0][0].expected_runs[orders[0][1]] == 12 * 29 / 40
    assert np.mean([order.is_mixed[a] for order, a in orders]) > 0.99
    times = np.array([order.times[a] for order, a in orders])
    assert times.mean() == pytest.approx(12 * 19.5, rel=0.02)
    assert times.var() == pytest.approx(12 * 28 / 40 * np.arange(40).var(ddof=1), rel=0.1)


def test_an_order_that_is_saved_goes_on() -> None:
    log, again = log_of("abcab"), GroupLog()
    again.restore(log.state())
    for each in (log, again):
        each.add(each.number("c"))
    for one, other in zip(log.order, again.order, strict=True):
        np.testing.assert_array_equal(one, other)


# --- shifts -----------------------------------------------------------------------------------------------------------


def test_a_shift_is_the_error_of_normalising_a_group_by_all() -> None:
    rng = np.random.default_rng(4)
    labels = rng.permutation(np.arange(40) % 4)
    x = rng.normal(0, 1, (40, 8, 3)) * (1 + labels[:, None, None]) + (labels == 2)[:, None, None]
    mean, std = x.mean(axis=(0, 1)), np.sqrt(x.reshape(-1, 3).var(axis=0, ddof=1) + EPS)
    shift, _ = shifts_of(labels, x)
    for group, found in zip(log_of(labels).names, shift, strict=True):
        own = x[labels == int(group)].reshape(-1, 3)
        gain = np.sqrt(own.var(axis=0, ddof=1) + EPS) / std - 1
        expected = np.sqrt((gain**2 + ((own.mean(axis=0) - mean) / std) ** 2).mean())
        assert found == pytest.approx(expected, rel=1e-4)  # eps has a part in own variances alone


def test_what_cannot_be_told_is_not() -> None:
    rng = np.random.default_rng(5)
    shift, noise = shifts_of("a" * 20, rng.normal(0, 1, (20, 8, 3)))
    assert np.isnan([*shift, *noise]).all()
    shift, noise = shifts_of("abab", rng.normal(0, 1, (4, 8, 3)))  # two degrees of freedom
    assert np.isfinite(shift).all()
    assert np.isnan(noise).all()


def draw(rng: np.random.Generator, labels: np.ndarray, n: int, channels: int, motion: float) -> np.ndarray:
    """Batches of exchangeable groups whose samples resemble each other, while the weights move."""
    num = len(labels)
    time = np.linspace(0, 1, num)
    path = motion * [time, 1 - np.exp(-5 * time), np.sin(6 * time) / 2][rng.integers(3)]
    x = rng.normal(0, 1, (num, n, channels)) + 0.3 * rng.normal(0, 1, (num, 1, channels))
    return x * (1 + 0.3 * path[:, None, None]) + path[:, None, None] * rng.normal(0, 1, channels)


@pytest.mark.slow
@pytest.mark.parametrize("motion", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_groups", [2, 5])
def test_noise_is_within_a_fifth_of_what_is_realised_while_weights_move(num_groups: int, motion: float) -> None:
    rng = np.random.default_rng(6)
    shifts, noises = [], []
    for _ in range(150):
        labels = rng.integers(0, num_groups, 60)
        shift, noise = shifts_of(labels, draw(rng, labels, 16, 16, motion))
        shifts += list(shift[np.isfinite(noise)])
        noises += list(noise[np.isfinite(noise)])
    ratio = math.sqrt(np.square(noises).mean() / np.square(shifts).mean())
    print(f"{num_groups} groups, motion {motion}: noise over what is realised {ratio:.2f}")
    assert 0.8 < ratio < 1.2
    assert len(noises) > 0.98 * 150 * num_groups


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "in turn", "runs", "gradual", "one after another"])
def test_groups_that_can_be_exchanged_raise_no_alarm_in_whatever_order(kind: str) -> None:
    rng, alarms, total = np.random.default_rng(7), 0, 0
    for _ in range(200):
        num = int(rng.choice([16, 40, 100]))
        labels = {
            "random": rng.integers(0, 3, num),
            "in turn": np.arange(num) % 3,
            "runs": np.repeat(rng.integers(0, 3, num // 4 + 1), 4)[:num],
            "gradual": (rng.random(num) < np.linspace(0.1, 0.9, num)).astype(int),
            "one after another": np.arange(num) * 3 // num,
        }[kind]
        x = draw(rng, labels, 16, int(rng.choice([1, 4, 32])), float(rng.choice([0.0, 0.3, 1.0])))
        shift, noise = shifts_of(labels, x)
        alarms += ((shift > 3 * noise) & (shift**2 - noise**2 >= 0.01)).sum()
        total += len(shift)
    print(f"{kind}: {alarms} of {total} groups")
    assert alarms <= 0.01 * total


@pytest.mark.slow
def test_a_group_that_differs_is_found() -> None:
    rng, found = np.random.default_rng(8), 0
    for _ in range(100):
        labels = rng.integers(0, 3, 60)
        x = draw(rng, labels, 16, 16, 0.3) + 0.6 * (labels == 1)[:, None, None]
        shift, noise = shifts_of(labels, x)
        index = log_of(labels).names.index("1")
        found += shift[index] > 3 * noise[index] and shift[index] ** 2 - noise[index] ** 2 >= 0.01
    assert found >= 95
