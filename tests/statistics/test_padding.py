"""What padding does to the statistics of a layer: as defined, and as it is realised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.padding import PaddedSums, padding_of, pooled, with_batches

EPS = 1e-3
CPU = torch.device("cpu")


def batch(values, mask):
    """What is known of one call: ``(n, C)`` values of which ``mask``, ``(n,)``, lets some count."""
    kept = values[mask]
    own = np.stack([kept.mean(axis=0), kept.var(axis=0)]) if len(kept) else np.zeros((2, values.shape[1]))
    return float(len(values)), float(len(kept)), own, np.stack([values.mean(axis=0), values.var(axis=0)])


def added(sums, batches):
    total, count, kept, every = (torch.from_numpy(np.array(part)) for part in zip(*batches, strict=True))
    return with_batches(sums, total, count, kept, every)


def sums_of(batches, chunk=5):
    sums = PaddedSums.empty(batches[0][2].shape[-1], CPU)
    for start in range(0, len(batches), chunk):
        sums = added(sums, batches[start : start + chunk])
    return sums


def effect(sums, population):
    layout = ChannelLayout(np.array([sums.width]))
    scalars, channels = sums.scalars.numpy()[:, None], sums.channels.numpy()
    return padding_of(scalars, channels, population, layout, np.array([EPS]))


def two_pass(calls):
    values = np.concatenate([values for values, _ in calls])
    return np.stack([values.mean(axis=0), values.var(axis=0, ddof=1)])


def drawn(rng, num=24, channels=3, padded=(0.0, 0.0), offset=2.0):
    """Calls of sequences of any lengths, padded by values of this mean and standard deviation."""
    calls = []
    for _ in range(num):
        mask = rng.random(60) > rng.uniform(0, 0.8)
        values = rng.normal(offset, 1.5, (60, channels))
        values[~mask] = rng.normal(*padded, ((~mask).sum(), channels))
        calls.append((values, mask))
    return calls


def test_statistics_without_padding_are_those_of_the_values_that_count():
    calls = drawn(np.random.default_rng(0), offset=1e4)
    found = effect(sums_of([batch(*call) for call in calls]), two_pass(calls))
    kept = np.concatenate([values[mask] for values, mask in calls])
    np.testing.assert_allclose(found.unpadded[0], kept.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.unpadded[1], kept.var(axis=0, ddof=1), rtol=1e-9)
    shares = np.array([1 - mask.mean() for _, mask in calls])
    assert found.batches == len(calls)
    assert found.share == pytest.approx(shares.mean(), rel=1e-12)  # as all calls have as many values
    assert found.scatter == pytest.approx(shares.std(), rel=1e-12)


def test_the_offset_is_the_error_that_statistics_with_padding_make_on_what_counts():
    calls = drawn(np.random.default_rng(1), channels=1)
    population = two_pass(calls)
    kept = np.concatenate([values[mask] for values, mask in calls])
    right = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + EPS)
    wrong = (kept - population[0]) / np.sqrt(population[1] + EPS)
    found = effect(sums_of([batch(*call) for call in calls]), population)
    assert found.offset == pytest.approx(np.sqrt(np.mean((wrong - right) ** 2)), rel=1e-3)  # divisors n and n - 1


def test_the_shift_is_that_of_its_formula():
    calls = drawn(np.random.default_rng(2))
    population = two_pass(calls)
    displaced, shares = [], []
    for values, mask in calls:
        without = values[mask].mean(axis=0), values[mask].var(axis=0, ddof=1)
        displaced.append(np.stack([values.mean(axis=0), values.var(axis=0, ddof=1)]) - without)
        shares.append(1 - mask.mean())
    displaced, shares = np.array(displaced), np.array(shares)
    s = population[1] + EPS
    movement = noise = 0.0
    for moment, unit in ((0, s), (1, 4 * s**2)):
        slope = np.array([np.dot(shares, each) for each in displaced[:, moment].T]) / np.dot(shares, shares)
        rest = displaced[:, moment] - shares[:, None] * slope
        movement += np.mean(slope**2 / unit)
        noise += np.mean((rest**2).sum(axis=0) / (len(calls) - 1) / np.dot(shares, shares) / unit)
    found = effect(sums_of([batch(*call) for call in calls]), population)
    assert found.noise == pytest.approx(np.sqrt(noise * shares.var()), rel=1e-9)
    assert found.shift == pytest.approx(np.sqrt((movement - noise) * shares.var()), rel=1e-9)


def test_zeros_between_values_of_mean_two_move_the_mean_of_batches_by_two_times_the_scatter_of_their_share():
    half = np.array([True, False] * 10)
    third = np.array([True, True, False, True] * 5)
    calls = [(np.where(mask, 2.0, 0.0)[:, None], mask) for mask in [half, third] * 4]
    found = effect(sums_of([batch(*call) for call in calls]), np.array([[1.25], [1.0 - EPS]]))  # s is 1
    # The share is 1/2 or 1/4, the mean 2 less twice that. The variance of a batch, unbiased, is 20/19 of 1 and 3/4: the
    # line through 0 that is nearest to them.
    slope = (0.5 * 20 / 19 * 1 + 0.25 * 20 / 19 * 0.75) / (0.5**2 + 0.25**2)
    assert found.scatter == pytest.approx(1 / 8)
    rest = np.array([1, 0.75]) * 20 / 19 - slope * np.array([0.5, 0.25])
    noise = 4 * (rest**2).sum() / 7 / (4 * (0.5**2 + 0.25**2)) / 4
    assert found.noise == pytest.approx(np.sqrt(noise) / 8)
    assert found.shift == pytest.approx(np.sqrt(4 + slope**2 / 4 - noise) / 8)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 23), max_size=4), ranks=st.integers(1, 3))
def test_how_batches_are_merged_and_which_rank_sees_them_makes_no_difference(seed, cuts, ranks):
    batches = [batch(*call) for call in drawn(np.random.default_rng(seed))]
    whole, rng = sums_of(batches, chunk=len(batches)), np.random.default_rng(seed)
    borders = [0, *sorted(set(cuts)), len(batches)]
    parts = [PaddedSums.empty(3, CPU) for _ in range(ranks)]
    for start, stop in itertools.pairwise(borders):
        rank = rng.integers(ranks)
        parts[rank] = added(parts[rank], batches[start:stop])
    together = pooled([PaddedSums.unpacked(part.packed()) for part in parts])
    torch.testing.assert_close(together.scalars, whole.scalars, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.channels, whole.channels, rtol=1e-10, atol=1e-9)


def test_batches_that_are_padding_alone_or_almost_count_as_padding_and_tell_nothing_else():
    rng = np.random.default_rng(3)
    calls = drawn(rng)
    empty, single = np.zeros(60, dtype=bool), np.zeros(60, dtype=bool)
    single[7] = True
    more = [(np.zeros((60, 3)), empty), (rng.normal(size=(60, 3)), single)]
    population = two_pass(calls)
    with_, without = (effect(sums_of([batch(*call) for call in its]), population) for its in (calls + more, calls))
    assert (with_.batches, with_.shift, with_.noise) == (without.batches, without.shift, without.noise)
    assert with_.share > without.share
    kept = np.concatenate([values[mask] for values, mask in calls + more])
    np.testing.assert_allclose(with_.unpadded[0], kept.mean(axis=0), rtol=1e-12)


def test_no_value_that_counts_is_no_statistic():
    found = effect(sums_of([batch(np.zeros((6, 2)), np.zeros(6, dtype=bool))]), np.zeros((2, 2)))
    assert found.share == 1
    assert np.isnan([found.shift, found.noise, found.offset]).all()
    assert np.isnan(found.unpadded).all()


def test_what_is_padded_alike_is_not_moved_and_nothing_padded_neither():
    rng = np.random.default_rng(4)
    alike = [(values, np.arange(60) < 30) for values, _ in drawn(rng)]
    for values, mask in alike:
        values[~mask] = 0
    found = effect(sums_of([batch(*call) for call in alike]), two_pass(alike))
    assert found.shift == 0
    assert found.offset > 0.5
    unpadded = [(values, np.ones(60, dtype=bool)) for values, _ in alike]
    found = effect(sums_of([batch(*call) for call in unpadded]), two_pass(unpadded))
    assert (found.share, found.scatter, found.shift, found.noise) == (0, 0, 0, 0)
    assert found.offset < 1e-12


def test_before_eight_batches_nothing_is_said_of_movement():
    calls = drawn(np.random.default_rng(5))
    batches, population = [batch(*call) for call in calls], two_pass(calls)
    assert np.isnan(effect(sums_of(batches[:7]), population).shift)
    assert effect(sums_of(batches[:8]), population).shift > 0


def test_a_channel_that_is_not_finite_is_nan_and_the_others_are_as_without_it():
    calls = drawn(np.random.default_rng(6))
    narrow = [(values[:, :2], mask) for values, mask in calls]
    calls[3][0][~calls[3][1], 2] = np.nan  # in the padding
    with np.errstate(invalid="ignore"):
        with_ = effect(sums_of([batch(*call) for call in calls]), two_pass(calls))
    without = effect(sums_of([batch(*call) for call in narrow]), two_pass(narrow))
    assert with_.shift == pytest.approx(float(without.shift[0]), rel=1e-12)
    kept = np.concatenate([values[mask] for values, mask in calls])
    np.testing.assert_allclose(with_.unpadded[1], kept.var(axis=0, ddof=1), rtol=1e-12)


# --- simulated --------------------------------------------------------------------------------------------------------


def sequences(rng, lengths, channels, correlation):
    """Values of sequences of these lengths, one after the other, each correlated within itself."""
    parts = []
    for length in lengths:
        noise = rng.normal(size=(length, channels))
        own = rng.normal(size=channels) * np.sqrt(correlation)
        parts.append(own + np.sqrt(1 - correlation) * noise)
    return parts


def trained(rng, num, size, channels, correlation, offset, pads_like_values=False, min_length=20):
    calls = []
    for _ in range(num):
        lengths = min_length + rng.exponential(40, size).astype(int)
        parts = sequences(rng, [lengths.max()] * size, channels, correlation)
        mask = np.concatenate([np.arange(lengths.max()) < length for length in lengths])
        values = np.concatenate(parts) + offset
        if not pads_like_values:
            values[~mask] = 0
        calls.append((values, mask))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_the_noise_is_what_chance_makes_of_a_padding_that_is_like_the_values(size, correlation):
    rng = np.random.default_rng(7)
    movements, noises, shifts = [], [], []
    for _ in range(60):
        calls = trained(rng, 20, size, 8, correlation, 0.0, pads_like_values=True)
        sums, population = sums_of([batch(*call) for call in calls]), two_pass(calls)
        found = effect(sums, population)
        _, _, batches, shares, squares = sums.scalars.numpy()
        slope = sums.channels[2:4].numpy() / squares
        unit = np.stack([population[1] + EPS, 4 * (population[1] + EPS) ** 2])
        movements.append((squares / batches - (shares / batches) ** 2) * np.mean((slope**2 / unit).sum(axis=0)))
        noises.append(float(found.noise[0]) ** 2)
        shifts.append(float(found.shift[0]))
    ratio = np.sqrt(np.mean(noises) / np.mean(movements))
    print(f"noise as said over noise as realised: {ratio:.3f}; largest shift {max(shifts):.3f}")
    assert 0.8 < ratio < 1.2
    assert np.mean(np.array(shifts) > 0) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [4, 16])
def test_the_shift_is_how_far_the_statistics_of_batches_move_with_their_padding(size, offset):
    """As realised: what an endless batch of the same share of padding would have, over the shares that there were."""
    rng = np.random.default_rng(8)
    calls = trained(rng, 200, size, 4, 0.2, offset)
    population = two_pass(calls)
    found = effect(sums_of([batch(*call) for call in calls]), population)
    share = np.array([1 - mask.mean() for _, mask in calls])
    mean, var = offset * (1 - share), (1 - share) + share * (1 - share) * offset**2
    realised = np.sqrt(mean.var() / population[1].mean() + var.var() / (4 * population[1].mean() ** 2))
    print(f"shift {found.shift[0]:.4f}, realised {realised:.4f}")
    assert 0.85 < found.shift[0] / realised < 1.15
