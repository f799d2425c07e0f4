"""What several ranks have seen, pooled: any tree of ranks, in any order, is one rank that has seen it all."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout
from lightning_bnmonitor.statistics.pooling import PooledStatistics, pool

LAW = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = (2, 1, 3)
LAYERS = ChannelLayout(np.array(WIDTHS))
NO_CALLS: list[list[Any]] = [[] for _ in WIDTHS]


def nothing():
    """What a rank has seen that was never called."""
    return PooledStatistics(
        num_samples=np.zeros(len(WIDTHS)),
        dof=np.zeros(len(WIDTHS)),
        batch_size=np.zeros(len(WIDTHS)),
        weight=np.zeros((2, len(WIDTHS))),
        left_out=np.zeros(len(WIDTHS)),
        mean=np.zeros(sum(WIDTHS)),
        squares=np.zeros(sum(WIDTHS)),
        value=np.zeros((2, sum(WIDTHS))),
        within=np.zeros((2, sum(WIDTHS))),
        first_bad=np.full(sum(WIDTHS), np.inf),
    )


@st.composite
def ranks_calls(draw):
    """For each rank and layer its calls: values, whether they updated buffers, degrees of freedom, sums of squares."""
    loc, rng = draw(st.sampled_from([0.0, 3.0, -1e3])), np.random.default_rng(draw(SEEDS))
    ranks = []
    for _ in range(draw(st.integers(1, 6))):
        calls = []
        for width in WIDTHS:
            sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4))
            calls.append([])
            for size, updating in sizes:
                values = rng.normal(loc, 1.0, (size, width))
                if draw(st.integers(0, 30)) == 0:
                    values[-1, 0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
                call = values, updating, float(updating) * rng.integers(1, 4), rng.uniform(1, 2, (2, width))
                calls[-1].append(call)
        ranks.append(calls)
    return ranks


def share_of(calls):
    """By the definitions, in two passes over all calls."""
    share = nothing()
    for index, (own, width) in enumerate(zip(LAYERS.slices, WIDTHS, strict=True)):
        received, updating = calls[index], [call for call in calls[index] if call[1]]
        values = np.concatenate([np.empty((0, width)), *(call[0] for call in received)])
        if len(values):
            with np.errstate(invalid="ignore"):
                share.mean[own] = values.mean(axis=0)
                share.squares[own] = np.square(values - values.mean(axis=0)).sum(axis=0)
        share.num_samples[index] = len(values)
        share.batch_size[index] = sum(len(call[0]) for call in updating)
        for row, (weigh, moment) in enumerate(((len, np.mean), (lambda x: len(x) - 1, np.std))):
            weighing = [call for call in updating if weigh(call[0])]
            weights = np.array([float(weigh(call[0])) for call in weighing])
            share.weight[row, index] = weights.sum()
            if weighing:
                with np.errstate(invalid="ignore"):
                    share.value[row, own] = np.average(
                        [moment(call[0], axis=0) for call in weighing], axis=0, weights=weights
                    )
        share.dof[index] = sum(call[2] for call in updating)
        share.within[:, own] = sum((call[3] for call in updating), np.zeros((2, width)))
        for number, call in enumerate(received, start=1):
            bad = ~np.isfinite(call[0]).all(axis=0)
            share.first_bad[own] = np.fmin(share.first_bad[own], np.where(bad, number, np.inf))
    return share


def assert_share(share, expected):
    for name, one, other in zip(PooledStatistics._fields, share, expected, strict=True):
        assert one.shape == other.shape, name
        finite = np.isfinite(other)  # what is not is NaN in the population, whatever is said of it here
        if name == "first_bad":
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one[finite], other[finite], rtol=1e-9, atol=1e-9, err_msg=name)
            assert not np.isfinite(one[~finite]).any(), name
    np.testing.assert_allclose(
        share.population(LAYERS), expected.population(LAYERS), rtol=1e-9, atol=1e-9, equal_nan=True
    )


def first_bad_of(ranks):
    return functools.reduce(np.fmin, (share_of(calls).first_bad for calls in ranks))


def union_of(ranks):
    calls = [[call for of_rank in ranks for call in of_rank[index]] for index in range(len(WIDTHS))]
    return share_of(calls)._replace(first_bad=first_bad_of(ranks))


@pytest.mark.slow
@LAW
@given(data=st.data(), ranks=ranks_calls())
def test_any_tree_of_ranks_in_any_order_is_one_rank_with_all_calls(data, ranks):
    assert_share(pool([share_of(calls) for calls in ranks], LAYERS), union_of(ranks))
    forest = [(share_of(calls), [calls]) for calls in ranks]
    while len(forest) > 1:
        order = data.draw(st.permutations(range(len(forest))))
        chosen = order[: data.draw(st.integers(2, len(forest)))]
        members = [calls for i in chosen for calls in forest[i][1]]
        union = pool([forest[i][0] for i in chosen], LAYERS), members
        assert_share(union[0], union_of(members))
        forest = [tree for i, tree in enumerate(forest) if i not in chosen] + [union]


@pytest.mark.slow
@LAW
@given(data=st.data(), ranks=ranks_calls())
def test_ranks_that_saw_nothing_add_nothing_wherever_they_stand(data, ranks):
    shares = [share_of(calls) for calls in ranks]
    for _ in range(data.draw(st.integers(1, 3))):
        shares.insert(data.draw(st.integers(0, len(shares))), nothing())
    assert_share(nothing(), share_of(NO_CALLS))
    assert_share(pool(shares, LAYERS), union_of(ranks))
    for share in shares:
        assert_share(pool([share], LAYERS), share)


@LAW
@given(ranks=ranks_calls())
def test_what_a_rank_sends_is_what_is_received(ranks):
    for calls in ranks:
        sent = share_of(calls)
        for one, other in zip(PooledStatistics.unpacked(sent.packed(), LAYERS), sent, strict=True):
            np.testing.assert_array_equal(one, other)
