"""Recalibration: what is written is the exact statistics of the data."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import Recalibration, recalibrate
from tests.repair.exact_population import SIZES, C, Recorder, assert_written, data, error_in_eval, layers_of, moments
from tests.repair.small_models import Net, single, trained
from tests.repair.unchanged import Unchanged, buffers_of


def test_what_is_written_is_the_population_variance_and_not_the_mean_of_batch_variances() -> None:
    model = nn.BatchNorm1d(1)
    recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [10.0], [13.0]])])
    # By hand: mean 35 / 5, squares 49 + 25 + 9 + 9 + 36 over 4; the batches' own variances are 2 and 3.
    assert model.running_mean.item() == 7
    assert model.running_var.item() == 32


def test_a_network_gets_for_each_layer_the_statistics_of_what_it_received_in_the_pass() -> None:
    model, batches = trained(Net()), data()
    recorder = Recorder(model)
    with Unchanged(model):
        result = recalibrate(model, batches)
    for name, layer in layers_of(model).items():
        assert len(recorder[name]) == len(SIZES)  # one pass, all layers at once
        assert all(recorder.training[name])
        assert_written(layer, recorder[name])
        mean, var = moments(recorder[name])
        np.testing.assert_allclose(result.before[name].population_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(result.after[name].population_var.numpy(), var, rtol=1e-5)
        assert result.after[name].num_samples == sum(SIZES)
    assert result.left_alone == {}
    assert result.num_batches == len(SIZES)


def test_batchnorm_normalises_by_the_batch_and_dropout_is_off_in_the_pass() -> None:
    model, batches = trained(Net()), data()
    recorder = Recorder(model)
    recalibrate(model, batches)
    state, expected = {name: p.detach().double() for name, p in model.named_parameters()}, []

    def normalised(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(0)
        return centred / torch.sqrt(centred.square().mean(0) + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    for x in batches:
        y = normalised(normalised(x.double(), "a") @ state["one.weight"].T + state["one.bias"], "b").relu()
        expected.append(y @ state["two.weight"].T + state["two.bias"])
    for received, computed in zip(recorder["c"], expected, strict=True):
        torch.testing.assert_close(received.double(), computed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(C,), (C, 5), (C, 4, 3), (C, 2, 3, 2)], ids=["NC", "NCL", "NCHW", "NCDHW"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_dimension_and_layout(shape: tuple[int, ...], channels_last: bool) -> None:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    model, batches = kind(C), data(shape=shape)
    if channels_last:
        formats = {3: torch.channels_last, 4: torch.channels_last_3d}
        if len(shape) not in formats:
            batches = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in batches]
        else:
            batches = [x.contiguous(memory_format=formats[len(shape)]) for x in batches]
    result = recalibrate(model, batches)
    assert_written(model, batches)
    assert error_in_eval(model, batches) <= 1e-5
    assert result.after["(root)"].summary()["eval_error"] <= 1e-5


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4])
def test_eval_then_explains_the_data_up_to_the_rounding_of_the_buffers(ratio: float) -> None:
    model, batches = nn.BatchNorm1d(C), data(mean=ratio, std=1.0)
    result = recalibrate(model, batches)
    bound = max(1e-5, 3 * 6e-8 * ratio)
    assert error_in_eval(model, batches) <= bound
    assert result.after["(root)"].summary()["eval_error"] <= bound
    mean, var = moments(batches)
    assert np.all(np.abs(result.after["(root)"].population_mean.numpy() - mean) <= 1e-7 * np.sqrt(var))


def test_the_reports_tell_the_errors_of_before_and_after() -> None:
    model, batches = single(), [torch.randn(32, C) * 2 + 3 for _ in range(50)]
    expected = error_in_eval(model[0], batches)
    result = recalibrate(model, batches)
    # The report weighs variances by n - 1, the sum over values by n.
    assert result.before["0"].summary()["act_rmse"] == pytest.approx(expected, rel=0.02)
    assert result.after["0"].summary()["eval_error"] <= 1e-5
    assert result.after["0"].verdict == "healthy"
    assert list(result.before) == list(result.after) == ["0"]
    torch.testing.assert_close(result.after["0"].running_mean.float(), model[0].running_mean, rtol=0, atol=0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_the_first_layer_gets_the_same_however_the_data_are_split(
    sizes: list[int], order: random.Random, mean: float
) -> None:
    x = data((sum(sizes),), mean=mean)[0]
    x[: len(x) // 2] += 5
    batches = list(x.split(sizes))
    order.shuffle(batches)
    split, whole = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
    recalibrate(split, batches)
    recalibrate(whole, [x])
    torch.testing.assert_close(split.running_mean, whole.running_mean, rtol=1.2e-7, atol=1e-6)
    torch.testing.assert_close(split.running_var, whole.running_var, rtol=1e-5, atol=0)
    assert_written(split, [x])


def test_a_shared_layer_gets_the_statistics_of_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.same = (layer := nn.BatchNorm1d(C)), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.same(x[: len(x) // 2 + 1] * 3 + 1).sum() + self.norm(x - 7)

    model, batches = Shared(), data()
    recorder = Recorder(model)
    result = recalibrate(model, batches)
    assert list(result.after) == ["norm"]
    assert len(recorder["norm"]) == 3 * len(SIZES)
    assert_written(model.norm, recorder["norm"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_any_precision_get_buffers_of_theirs(dtype: torch.dtype) -> None:
    model, batches = single().to(dtype), [x.to(dtype) for x in data()]
    with Unchanged(model):
        recalibrate(model, batches)
    mean, var = moments(batches)
    bound = max(torch.finfo(dtype).eps, 2e-7)
    np.testing.assert_allclose(model[0].running_mean.double().numpy(), mean, rtol=bound)
    np.testing.assert_allclose(model[0].running_var.double().numpy(), var, rtol=max(bound, 1e-5 if bound > 1e-6 else 0))


@pytest.mark.parametrize("around", ["in forward", "around the call"])
def test_mixed_precision_gets_the_statistics_of_what_the_layers_received(around: str) -> None:
    model, batches = nn.Sequential(nn.Linear(C, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)), data()
    recorder = Recorder(model)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    if around == "in forward":
        recalibrate(model, batches, forward)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            recalibrate(model, batches)
    for name, layer in layers_of(model).items():
        assert {x.dtype for x in recorder[name]} == {torch.bfloat16}
        assert layer.running_var.dtype == torch.float32
        assert_written(layer, recorder[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_plays_no_part(dtype: torch.dtype) -> None:
    model, batches, default = single(), data(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        recalibrate(model, batches)
    finally:
        torch.set_default_dtype(default)
    assert_written(model[0], batches)
    assert model[0].running_mean.dtype == torch.float32


class Activated(nn.BatchNorm1d):
    """With an activation in its forward, and children."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Stubborn(nn.BatchNorm1d):
    """Updates its running statistics in training whatever anybody says."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)


@pytest.mark.parametrize("kind", [Activated, Stubborn])
def test_subclasses_get_the_statistics_of_their_inputs(kind: type[nn.BatchNorm1d]) -> None:
    model, batches = trained(nn.Sequential(kind(C), nn.Linear(C, 2))), data()
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)


def test_a_subclass_that_updates_against_the_rules_has_its_buffers_back_after_an_error() -> None:
    model, bad = trained(nn.Sequential(Stubborn(C), nn.Linear(C, 2))), torch.randn(4, C + 1)
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError, match="batch 10"):
        recalibrate(model, [*data(), bad])


class ChannelsAtTheEnd(nn.BatchNorm1d):
    """Takes ``(N, L, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_layer_with_its_channels_at_the_end_gets_the_statistics_of_what_its_kernel_receives() -> None:
    model, batches = nn.Sequential(ChannelsAtTheEnd(C), nn.Linear(C, 2)), [torch.randn(8, n, C) for n in SIZES]
    recalibrate(model, batches)
    values = torch.cat([batch.flatten(0, 1) for batch in batches]).double().numpy()
    np.testing.assert_allclose(model[0].running_mean.numpy(), values.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[0].running_var.numpy(), values.var(axis=0, ddof=1), rtol=1e-5)


class WithoutKernel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 1))) / x.std((0, 1))


def test_a_layer_whose_inputs_cannot_be_told_apart_by_channel_is_not_passed_over_in_silence() -> None:
    model, batches = nn.Sequential(WithoutKernel(C), nn.Linear(C, 2)), [torch.randn(8, 5, C)]
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError, match=r"layer '0'.*`exclude`"):
        recalibrate(model, batches)


def test_the_batchnorm_of_a_fused_convolution_in_quantisation_aware_training() -> None:
    model = nn.Sequential(qat.ConvBn2d(2, C, 3, qconfig=get_default_qat_qconfig("fbgemm"))).train()
    model.apply(torch.ao.quantization.disable_observer)
    model.apply(torch.ao.quantization.disable_fake_quant)
    model(torch.randn(8, 2, 6, 6))
    recorder, batches = Recorder(model), [torch.randn(n, 2, 6, 6) * n for n in SIZES]
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0].bn, recorder["0.bn"])


def test_observers_of_quantisation_aware_training_do_not_see_the_pass() -> None:
    model = nn.Sequential(qat.ConvBn2d(2, C, 3, qconfig=get_default_qat_qconfig("fbgemm"))).train()
    model(torch.randn(8, 2, 6, 6))
    before = {name: value for name, value in buffers_of(model).items() if "running" not in name}
    recalibrate(model, [torch.randn(n, 2, 6, 6) * n for n in SIZES])
    assert {name: value for name, value in buffers_of(model).items() if "running" not in name} == before


def test_a_synchronised_batchnorm_in_one_process_is_an_ordinary_one() -> None:
    model, batches = nn.SyncBatchNorm.convert_sync_batchnorm(single()), data()
    assert isinstance(model[0], nn.SyncBatchNorm)
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_activation_checkpointing_inside_counts_each_call_once(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.norm, x, use_reentrant=use_reentrant)

    model, batches = Checkpointed(), data()
    result = recalibrate(model, batches)
    assert result.after["norm"].num_batches == len(SIZES)
    assert_written(model.norm, batches)


def test_the_result_is_of_the_published_type() -> None:
    assert isinstance(recalibrate(single(), data()), Recalibration)
