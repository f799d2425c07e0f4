"""Masks of a batch: how they fit what layers receive, and what is said of those that do not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_bnmonitor.capture.masks import BatchMasks, fitted_mask
from lightning_bnmonitor.capture.reduction import masked_moments_of
from tests.statistics.two_pass import rows, two_pass

LENGTHS = torch.tensor([12, 7, 1])
MASK = torch.arange(12) < LENGTHS[:, None]


def seen(given):
    masks = BatchMasks(lambda batch: given)
    masks.see(None)
    return masks


def test_a_mask_fits_its_own_shape_and_whole_samples_fit_any():
    assert torch.equal(fitted_mask(MASK, (3, 5, 12)), MASK)
    samples = torch.tensor([True, False, True])
    assert torch.equal(fitted_mask(samples, (3, 5, 12)).expand(3, 12), samples[:, None].expand(3, 12))
    assert fitted_mask(samples, (3, 5, 4, 4)).shape == (3, 1, 1)
    assert torch.equal(fitted_mask(samples, (3, 5)), samples)


def test_a_flattened_input_takes_the_mask_flattened():
    assert torch.equal(fitted_mask(MASK, (36, 5)), MASK.reshape(36))
    assert torch.equal(fitted_mask(MASK, (36, 5, 8, 8)).expand(36, 8, 8)[:, 3, 3], MASK.reshape(36))


def test_of_a_pooled_input_those_samples_count_that_have_anything():
    mask = torch.cat([MASK, torch.zeros(1, 12, dtype=torch.bool)])
    assert fitted_mask(mask, (4, 5)).tolist() == [True, True, True, False]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (7, 4), (1, 3), (8, 4)])
@pytest.mark.parametrize("size", [100, 101, 64])
def test_behind_strided_convolutions_the_nearest_position_counts(kernel, stride, size):
    lengths = torch.tensor([size, size // 2, size // 3, 10])
    mask = torch.arange(size) < lengths[:, None]
    out = F.conv1d(mask[:, None].double(), torch.ones(1, 1, kernel).double(), stride=stride, padding=kernel // 2)
    centre = torch.arange(out.shape[-1]) * stride + (kernel - 1) / 2 - kernel // 2
    true = centre < lengths[:, None]  # a position counts if what it looks at in the middle does
    fitted = fitted_mask(mask, (4, 1, out.shape[-1]))
    assert (fitted.sum(1) - true.sum(1)).abs().max() <= 1


def test_unpadded_convolutions_and_upsampling_are_followed_to_half_a_kernel():
    mask = torch.arange(96) < torch.tensor([96, 48])[:, None]
    assert fitted_mask(mask, (2, 1, 92)).sum(1).tolist() == [92, 46]
    assert fitted_mask(mask, (2, 1, 192)).sum(1).tolist() == [192, 96]


def test_two_dimensions_of_positions_are_fitted_each_and_one_of_size_one_stands_for_all():
    frames = MASK[:, None, :]  # (B, 1, T) for spectrograms (B, C, F, T)
    fitted = fitted_mask(frames, (3, 8, 40, 6))
    assert fitted.shape == (3, 1, 6)
    assert fitted[:, 0].sum(1).tolist() == [6, 3, 0]
    image = torch.ones(2, 8, 8, dtype=torch.bool)
    image[:, 4:] = False
    assert fitted_mask(image, (2, 3, 4, 4)).sum((1, 2)).tolist() == [8, 8]


@pytest.mark.parametrize("shape", [(3, 5, 12, 12), (5, 5, 12), (6, 5, 6), (35, 5), (24, 5)])
def test_what_does_not_fit_is_not_guessed(shape):
    assert fitted_mask(MASK, shape) is None


def test_a_mask_that_does_not_fit_is_told_once_with_the_layer_and_both_shapes():
    masks = seen(MASK)
    with pytest.warns(UserWarning, match=r"\(3, 12\).*'stem'.*\(3, 5, 6, 6\)"):
        assert masks.of("stem", torch.zeros(3, 5, 6, 6)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert masks.of("other", torch.zeros(4, 5, 12)) is None
        assert masks.of("fits", torch.zeros(3, 5, 12)) is not None


def test_of_what_the_mask_has_selected_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seen(MASK).of("packed", torch.zeros(20, 5)) is None


def test_the_first_pattern_that_matches_a_name_gives_its_mask():
    other = MASK[:, :6]
    masks = seen({"encoder.*": MASK, "decoder.full": None, "decoder.*": other})
    assert torch.equal(masks.of("encoder.0", torch.zeros(3, 5, 12)), MASK)
    assert torch.equal(masks.of("decoder.1", torch.zeros(3, 5, 6)), other)
    assert masks.of("decoder.full", torch.zeros(3, 5, 6)).all()
    assert masks.of("head", torch.zeros(3, 5)) is None


def test_none_lets_all_count():
    assert seen(None).of("any", torch.zeros(3, 5, 6, 6)).all()


def test_before_a_batch_and_after_its_step_nothing_is_known():
    masks = BatchMasks(lambda batch: MASK)
    assert masks.of("layer", torch.zeros(3, 5, 12)) is None
    masks.see(None)
    assert masks.of("layer", torch.zeros(3, 5, 12)) is not None
    masks.forget()
    assert masks.of("layer", torch.zeros(3, 5, 12)) is None


def test_the_mask_of_a_tokenizer_is_taken():
    masks = seen(MASK.long())
    assert torch.equal(masks.of("layer", torch.zeros(3, 5, 12)), MASK)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (LENGTHS, r"\(3,\) of torch.int64"),
        (MASK.float(), r"\(3, 12\) of torch.float32"),
        ([[True] * 12], "list"),
        (torch.tensor(True), r"\(\) of torch.bool"),
        ({"a": MASK, "b": LENGTHS}, r"\(3,\)"),
    ],
)
def test_what_is_no_mask_is_told_once_with_what_would_be_and_not_asked_for_again(given, named):
    asked = []
    masks = BatchMasks(lambda batch: asked.append(batch) or given)
    with pytest.warns(UserWarning, match=rf"must return a bool tensor.*{named}.*lengths\[:, None\]"):
        masks.see(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.see(2)
    assert asked == [1]
    assert masks.of("layer", torch.zeros(3, 5, 12)) is None


def test_an_error_of_the_function_is_told_once():
    def mask(batch):
        raise KeyError("attention_mask")

    masks = BatchMasks(mask)
    with pytest.warns(UserWarning, match=r"`mask` failed.*KeyError\('attention_mask'\)"):
        masks.see({})
    assert masks.of("layer", torch.zeros(3, 5, 12)) is None


def test_an_interrupt_in_the_function_is_one():
    def mask(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BatchMasks(mask).see({})


# --- moments ----------------------------------------------------------------------------------------------------------


def selected(x, mask):
    values = rows(x)
    every = mask.expand(x.shape[0], *x.shape[2:]).reshape(-1).numpy()
    return values[every]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 40), (6, 5, 9, 8), (64, 3, 512), (3, 2, 4, 5, 6)])
@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("padding", [0.0, -1e6, float("nan"), float("inf")])
def test_moments_are_those_of_the_values_that_count_whatever_the_others_are(shape, far, padding):
    torch.manual_seed(0)
    x = torch.randn(shape) + far
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    x = torch.where(mask[:, None], x, padding)
    count, mean, var = masked_moments_of(x, mask)
    values = selected(x, mask)
    expected, unbiased = two_pass(values)
    expected_var = unbiased * (len(values) - 1) / len(values)
    assert count == len(values)
    assert (count.dtype, mean.dtype, var.dtype) == (torch.float64,) * 3
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-6 * np.sqrt(expected_var).max() + 1e-9 * far)
    np.testing.assert_allclose(var.numpy(), expected_var, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_in_any_precision_and_layout(dtype, layout):
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 8, 8) * 3 + 20).to(dtype).contiguous(memory_format=layout)
    mask = (torch.arange(8) < torch.tensor([8, 3, 1, 5])[:, None])[:, None]  # alike in one dimension
    count, mean, var = masked_moments_of(x, mask)
    values = selected(x, mask)
    assert count == len(values) == 17 * 8
    np.testing.assert_allclose(mean.numpy(), values.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(var.numpy(), values.var(axis=0), rtol=1e-6)


def test_where_nothing_counts_moments_are_zero():
    count, mean, var = masked_moments_of(torch.full((2, 3, 4), float("nan")), torch.zeros(2, 4, dtype=torch.bool))
    assert (count.item(), mean.tolist(), var.tolist()) == (0, [0] * 3, [0] * 3)


def test_inputs_stay_as_they_are():
    x = torch.randn(3, 5, 12, requires_grad=True)
    before = x.detach().clone()
    masked_moments_of(x, MASK)
    assert torch.equal(x, before)
    assert x.grad_fn is None
