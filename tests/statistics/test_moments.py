"""Streaming moments against two passes over all data, however these were split and merged; what is refused."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor import ChannelMoments
from lightning_bnmonitor.statistics.moments import merge_moments
from tests.statistics.known_moments import assert_moments, equal, filled, moments_of, normal

LAW = settings(max_examples=60, deadline=None)
NO_DATA = "was called before the ``update`` method"
SHAPES = [(7, 3), (7, 3, 5), (4, 3, 2, 5), (2, 3, 2, 3, 4), (7, 1), (1, 3, 6), (4, 1, 3, 2), (1, 1, 2)]


# merge_moments


@st.composite
def parts(draw, max_parts=8):
    """Raw values of several parts, some of them empty, ``(count, 2)`` each, and mean / std."""
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=max_parts))
    ratio = draw(st.sampled_from([0.0, 1.0, -100.0, 1e4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [rng.normal(ratio, 1.0, (count, 2)) for count in counts], ratio


def as_part(values, mean_of_nothing=0.0):
    count = len(values)
    mean = values.mean(axis=0) if count else np.full(2, mean_of_nothing)
    return tuple(map(torch.from_numpy, (np.full(2, float(count)), mean, ((values - mean) ** 2).sum(axis=0))))


def merged(several):
    weight, mean, m2 = (torch.stack(column) for column in zip(*several, strict=True))
    total, mean, m2 = merge_moments(weight, mean, m2, torch.ones(1, len(weight), dtype=torch.float64))
    return total[0], mean[0], m2[0]


def assert_part(part, values, ratio):
    total, mean, m2 = (column.numpy() for column in part)
    assert total.tolist() == [len(values)] * 2
    if len(values):
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-14, atol=1e-14)
        reference = ((values - values.mean(axis=0)) ** 2).sum(axis=0)
        error = 1e-15 * (1 + abs(ratio))  # of a mean
        np.testing.assert_allclose(m2, reference, rtol=1e-13 + 10 * error, atol=len(values) * error**2)
    else:
        assert m2.tolist() == [0.0, 0.0]


@given(data=st.data(), several=parts())
@LAW
def test_any_tree_of_merges_in_any_order_gives_the_moments_of_all_values(data, several):
    raw, ratio = several
    forest = [(as_part(values), values) for values in raw]
    while len(forest) > 1:
        order = data.draw(st.permutations(range(len(forest))))
        chosen = order[: data.draw(st.integers(2, len(forest)))]
        union = merged([forest[i][0] for i in chosen]), np.concatenate([forest[i][1] for i in chosen])
        assert_part(*union, ratio)
        forest = [tree for i, tree in enumerate(forest) if i not in chosen] + [union]
    assert_part(*forest[0], ratio)


@given(data=st.data(), several=parts())
@LAW
def test_a_part_of_weight_zero_counts_nothing_wherever_it_stands(data, several):
    raw, ratio = several
    at = data.draw(st.integers(0, len(raw)))
    with_empty = [*raw[:at], np.empty((0, 2)), *raw[at:]]
    assert_part(merged([as_part(values) for values in with_empty]), np.concatenate(raw), ratio)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("mean_of_nothing", [-1.0, 0.0, 1e3])
def test_a_part_of_weight_zero_counts_nothing_whatever_its_mean(mean_of_nothing, position):
    values = [np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[7.0, 5.0]])]
    with_empty = [*values[:position], np.empty((0, 2)), *values[position:]]
    total, mean, m2 = merged([as_part(x, mean_of_nothing) for x in with_empty])
    assert total.tolist() == [3.0, 3.0]
    np.testing.assert_allclose(mean.numpy(), [4.0, 5.0], rtol=1e-12)
    np.testing.assert_allclose(m2.numpy(), [18.0, 18.0], rtol=1e-12)


@given(data=st.data(), several=parts(max_parts=6))
@LAW
def test_several_unions_are_merged_at_once_each_of_its_own_members(data, several):
    raw, ratio = several
    union_of = [data.draw(st.integers(0, 2)) for _ in raw]
    members = torch.tensor([[float(u == union) for u in union_of] for union in range(3)], dtype=torch.float64)
    weight, mean, m2 = (torch.stack(column) for column in zip(*map(as_part, raw), strict=True))
    unions = zip(*merge_moments(weight, mean, m2, members), strict=True)
    for union, part in enumerate(unions):
        values = [x for x, u in zip(raw, union_of, strict=True) if u == union]
        assert_part(part, np.concatenate([np.empty((0, 2)), *values]), ratio)


def test_weights_differ_between_channels():
    weight = torch.tensor([[1.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    mean = torch.tensor([[1.0, 5.0], [5.0, 9.0]], dtype=torch.float64)
    m2 = torch.tensor([[0.0, 2.0], [6.0, 0.0]], dtype=torch.float64)
    total, mean, m2 = merge_moments(weight, mean, m2, torch.ones(1, 2, dtype=torch.float64))
    assert total.tolist() == [[4.0, 4.0]]
    assert mean.tolist() == [[4.0, 5.0]]
    assert m2.tolist() == [[6.0 + 1 * 9 + 3 * 1, 2.0]]


def test_a_mean_far_from_zero_cancels_nothing():
    weight = torch.full((3, 1), 1000.0, dtype=torch.float64)
    mean = 1e15 + torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    total, merged, m2 = merge_moments(weight, mean, torch.zeros_like(mean), torch.ones(1, 3, dtype=torch.float64))
    assert (total.item(), merged.item(), m2.item()) == (3000, 1e15 + 1, 2000)


# ChannelMoments: data


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_floating_dtype_has_the_moments_of_two_passes(shape, dtype):
    batches = [normal(shape, 3.0, dtype=dtype, seed=seed) for seed in range(3)]
    assert_moments(filled(*batches).compute(), *batches)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_far_from_zero_costs_no_digits(dtype, ratio):
    batches = [normal((16, 3, 5), ratio, dtype=dtype, seed=seed) for seed in range(20)]
    assert_moments(filled(*batches).compute(), *batches, ratio=ratio)


def test_channels_of_unlike_scale_do_not_disturb_each_other():
    scale = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    batches = [normal((9, 3), 2.0, seed=seed) * scale for seed in range(4)]
    moments = filled(*batches).compute()
    _, mean, var = moments_of(*batches)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-13)
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_layout_does_not_matter(dtype):
    image = normal((4, 3, 5, 6), 10.0, dtype=dtype)
    volume = normal((2, 3, 4, 5, 6), 10.0, dtype=dtype)
    channels_last = image.to(memory_format=torch.channels_last)
    channels_last_3d = volume.to(memory_format=torch.channels_last_3d)
    strided = normal((8, 6, 5), dtype=dtype)[::2, 1::2].transpose(0, 2).transpose(0, 2)
    assert not channels_last.is_contiguous()
    assert not channels_last_3d.is_contiguous()
    assert not strided.is_contiguous()
    assert_moments(filled(channels_last, channels_last_3d, strided).compute(), image, volume, strided.contiguous())


@given(data=st.data(), ratio=st.sampled_from([0.0, 100.0, 1e6]), seed=st.integers(0, 1000))
@LAW
def test_the_split_into_batches_and_metrics_does_not_matter(data, ratio, seed):
    x = normal((24, 2), ratio, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, 24), max_size=8)))
    batches = list(torch.tensor_split(x, cuts))  # some of them empty
    metrics = [ChannelMoments(2) for _ in range(3)]
    for batch in batches:
        metrics[data.draw(st.integers(0, 2))].update(batch)
    first, *others = data.draw(st.permutations(metrics))
    first.update(x[:0])
    for other in others:
        first.merge_state(other)
    assert_moments(first.compute(), x, ratio=ratio)


def test_the_variance_is_unbiased():
    moments = filled(torch.tensor([[1.0], [2.0], [6.0]])).compute()
    assert moments.mean.tolist() == [3.0]
    assert moments.var.tolist() == [(4 + 1 + 9) / 2]


def test_without_data_mean_and_variance_are_nan():
    with pytest.warns(UserWarning, match=NO_DATA):
        moments = ChannelMoments(2).compute()
    assert moments.count.tolist() == [0.0, 0.0]
    assert moments.mean.isnan().all()
    assert moments.var.isnan().all()


def test_of_one_value_only_the_variance_is_nan():
    moments = filled(torch.tensor([[2.0, -3.0]])).compute()
    assert moments.count.tolist() == [1.0, 1.0]
    assert moments.mean.tolist() == [2.0, -3.0]
    assert moments.var.isnan().all()


@pytest.mark.parametrize("empty", [(0, 3), (0, 3, 4), (5, 3, 0), (2, 3, 0, 7)], ids=str)
def test_an_empty_batch_counts_nothing(empty):
    x = normal((4, 3))
    before, after = filled(torch.empty(empty), x), filled(x, torch.empty(empty))
    assert equal(before.compute(), filled(x).compute())
    assert equal(after.compute(), filled(x).compute())
    only_empty = filled(torch.empty(empty)).compute()
    assert only_empty.count.tolist() == [0.0] * 3
    assert only_empty.mean.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_non_finite_value_spoils_its_own_channel_alone(batch, bad):
    batches = [normal((5, 3, 2), seed=seed) for seed in range(3)]
    broken = [x.clone() for x in batches]
    broken[batch][2, 1, 0] = bad
    moments, clean = filled(*broken).compute(), filled(*batches).compute()
    assert not moments.mean[1].isfinite()
    assert moments.var[1].isnan()
    assert moments.count[1] == 30
    for field, reference in zip(moments, clean, strict=True):
        assert torch.equal(field[[0, 2]], reference[[0, 2]])


def test_an_input_that_requires_grad_leaves_no_graph():
    x = normal((4, 2)).requires_grad_()
    metric = filled(x)
    metric(x)
    metric.update_moments(4, x.mean(0), x.var(0))
    assert not metric.state.requires_grad
    assert not any(field.requires_grad for field in metric.compute())


def test_a_count_that_requires_grad_leaves_no_graph():
    metric = ChannelMoments(2)
    metric.update_moments(torch.tensor(3.0, requires_grad=True), torch.zeros(2), torch.ones(2))
    assert not metric.state.requires_grad


# ChannelMoments: moments as input


def test_known_moments_count_like_the_values_they_are_of():
    x, y = normal((6, 2), 5.0), normal((9, 2), -1.0, seed=1)
    count, mean, var = moments_of(y)
    metric = filled(x)
    metric.update_moments(count, torch.from_numpy(mean), torch.from_numpy(var * (count - 1)))
    assert_moments(metric.compute(), x, y)


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3), torch.tensor([3.0, 3.0]), torch.tensor([3, 3])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_count_is_a_number_or_one_number_per_channel(count, dtype):
    metric = filled(torch.tensor([[1.0, 3.0]]))
    metric.update_moments(count, torch.tensor([1.0, 7.0], dtype=dtype), torch.tensor([6.0, 0.0], dtype=dtype))
    moments = metric.compute()
    assert moments.count.tolist() == [4.0, 4.0]
    assert moments.mean.tolist() == [1.0, 6.0]
    assert moments.var.tolist() == [2.0, 4.0]


def test_channels_may_have_counts_of_their_own():
    metric = filled(torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]))
    nan = float("nan")
    metric.update_moments(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([nan, 5.0, 9.0]), torch.tensor([nan, 0.0, 2.0]))
    moments = metric.compute()
    assert moments.count.tolist() == [2.0, 3.0, 4.0]
    assert moments.mean.tolist() == [1.0, 3.0, 6.0]
    assert moments.var.tolist() == [2.0, 4.0, (2 + 2 + 2 * 9 + 2 * 9) / 3]


def test_moments_of_nothing_count_nothing():
    x = normal((4, 2))
    metric = filled(x)
    metric.update_moments(0, torch.full((2,), torch.nan), torch.full((2,), torch.nan))
    assert equal(metric.compute(), filled(x).compute())


def test_known_moments_are_data_enough_to_compute_without_a_warning():
    metric = ChannelMoments(1)
    metric.update_moments(2, torch.tensor([1.0]), torch.tensor([2.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().var.tolist() == [2.0]


# ChannelMoments: errors


@pytest.mark.parametrize("num_channels", [0, -1, 2.5, True, None, "3"])
def test_num_channels_must_be_a_positive_integer(num_channels):
    with pytest.raises(ValueError, match=f"`num_channels` must be a positive integer, got {num_channels!r}"):
        ChannelMoments(num_channels)


@pytest.mark.parametrize("shape", [(4, 2), (3, 4), (4, 1), (5, 2, 3), (4,), (3,), (), (0, 2)], ids=str)
def test_an_input_without_the_right_number_of_channels_is_refused(shape):
    metric = filled(normal((2, 3)))
    with pytest.raises(ValueError, match=rf"`x`.*\(N, C, \*\).*num_channels = 3, got {re.escape(str(shape))}"):
        metric.update(torch.zeros(shape))
    assert_moments(metric.compute(), normal((2, 3)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_an_input_that_is_not_real_floating_point_is_refused(dtype):
    with pytest.raises(TypeError, match=f"`x` must be a real floating-point tensor, got {dtype}"):
        ChannelMoments(2).update(torch.ones(3, 2).to(dtype))


@pytest.mark.parametrize("argument", ["count", "mean", "m2"])
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), (1, 2)], ids=str)
def test_known_moments_of_another_shape_are_refused(argument, shape):
    arguments = dict.fromkeys(("count", "mean", "m2"), torch.ones(2))
    with pytest.raises(ValueError, match=rf"`{argument}` must have shape \(2,\), got {re.escape(str(shape))}"):
        ChannelMoments(2).update_moments(**{**arguments, argument: torch.ones(shape)})


@pytest.mark.parametrize("argument", ["mean", "m2"])
def test_known_moments_without_channels_are_refused(argument):
    arguments = dict.fromkeys(("count", "mean", "m2"), torch.ones(2))
    with pytest.raises(ValueError, match=rf"`{argument}` must have shape \(2,\), got \(\)"):
        ChannelMoments(2).update_moments(**{**arguments, argument: torch.tensor(1.0)})


@pytest.mark.parametrize("count", [0.5, -1.0, float("nan")])
def test_a_count_between_nothing_and_one_value_is_refused(count):
    metric = ChannelMoments(2)
    with pytest.raises(ValueError, match=rf"`count` must be 0, or finite and at least 1, .*got \[2\.0, {count}\]"):
        metric.update_moments(torch.tensor([2.0, count]), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=rf"`count` must be 0, or finite and at least 1, .*got \[{count}, {count}\]"):
        metric.update_moments(count, torch.zeros(2), torch.zeros(2))
    assert metric.state.eq(0).all()


def test_a_negative_sum_of_squares_is_refused():
    metric = ChannelMoments(2)
    with pytest.raises(ValueError, match=r"`m2` must not be negative, got -2\.5"):
        metric.update_moments(3, torch.zeros(2), torch.tensor([1.0, -2.5]))
    assert metric.state.eq(0).all()


@pytest.mark.parametrize("nothing", [None, [1.0, 2.0]])
def test_what_is_no_tensor_is_refused(nothing):
    with pytest.raises(TypeError, match=rf"`x` must be a real floating-point tensor, got {type(nothing).__name__}"):
        ChannelMoments(2).update(nothing)
