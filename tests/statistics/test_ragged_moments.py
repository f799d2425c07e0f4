"""Metrics whose channels have seen unequal numbers of values, merged."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor import ChannelMoments
from lightning_bnmonitor.statistics.moments import _merge_states
from tests.statistics.two_pass import two_pass

LAW = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def ragged_metrics(draw):
    """Metrics, some of them empty, each with the values of its channels, of which there may be unequal numbers."""
    loc, rng = draw(st.sampled_from([0.0, -100.0, 1e4])), np.random.default_rng(draw(SEEDS))
    metrics = []
    for kinds in draw(st.lists(st.lists(st.sampled_from(["values", "moments"]), max_size=3), min_size=1, max_size=7)):
        metric, values = ChannelMoments(2), [np.empty(0), np.empty(0)]
        for kind in kinds:
            counts = [draw(st.integers(0, 5)) for _ in range(2)] if kind == "moments" else [draw(st.integers(0, 5))] * 2
            added = [rng.normal(loc, 1.0, count) for count in counts]
            if kind == "values":
                metric.update(torch.from_numpy(np.stack(added, axis=1)))
            else:
                mean = [x.mean() if len(x) else math.nan for x in added]
                m2 = [np.square(x - m).sum() for x, m in zip(added, mean, strict=True)]
                metric.update_moments(torch.tensor(counts), *map(torch.tensor, (mean, m2)))
            values = [np.concatenate(pair) for pair in zip(values, added, strict=True)]
        metrics.append((metric, values))
    return metrics


def assert_metric(metric, values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics: nothing was updated, but only merged
        count, mean, var = (field.numpy() for field in metric.compute())
    for channel, x in enumerate(values):
        exact_mean, exact_var = two_pass(x[:, None])
        assert count[channel] == len(x)
        np.testing.assert_allclose(mean[channel : channel + 1], exact_mean, rtol=1e-14, atol=1e-13)
        np.testing.assert_allclose(var[channel : channel + 1], exact_var, rtol=1e-9, atol=1e-16)


@pytest.mark.slow
@LAW
@given(data=st.data(), metrics=ragged_metrics())
def test_metrics_whose_channels_have_unequal_counts_are_merged_in_any_tree_or_at_once(data, metrics):
    states = torch.stack([metric.state for metric, _ in metrics])
    at_once = ChannelMoments(2)
    at_once.state = _merge_states(states)  # what torchmetrics does with those of several ranks
    everything = [np.concatenate(channel) for channel in zip(*(values for _, values in metrics), strict=True)]
    assert_metric(at_once, everything)
    while len(metrics) > 1:
        i, j = data.draw(st.permutations(range(len(metrics))))[:2]
        metrics[i][0].merge_state(metrics[j][0])
        union = metrics[i][0], [np.concatenate(pair) for pair in zip(metrics[i][1], metrics[j][1], strict=True)]
        assert_metric(*union)
        assert_metric(*metrics[j])
        metrics = [metric for k, metric in enumerate(metrics) if k not in (i, j)] + [union]
    assert_metric(metrics[0][0], everything)
