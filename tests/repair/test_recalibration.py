"""Recalibration: what is written is the exact statistics of the data, and nothing else changes, whatever happens."""

from __future__ import annotations

import copy
import datetime
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, BatchNormTracker, Recalibration, Report, recalibrate

C = 3
SIZES = (8, 5, 13, 2, 30, 7, 9, 8, 4, 6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


# ------------------------------------------------------------------------------------------ the independent expectation


def moments(received: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of all values of ``(N, C, *)`` batches, in two float64 passes."""
    arrays = [np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1) for x in received]
    values = np.concatenate(arrays, axis=1)
    mean = values.mean(axis=1)
    return mean, np.square(values - mean[:, None]).sum(axis=1) / (values.shape[1] - 1)


def error_in_eval(layer: nn.Module, received: list[Tensor]) -> float:
    """RMS over all values, in float64, of what the layer's buffers make of them against what the population does."""
    x = np.concatenate([np.moveaxis(r.detach().double().numpy(), 1, 0).reshape(r.shape[1], -1) for r in received], 1)
    (mean, var), eps = moments(received), layer.eps
    running_mean, running_var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    apart = (x.T - running_mean) / np.sqrt(running_var + eps) - (x.T - mean) / np.sqrt(var + eps)
    return float(np.sqrt(np.square(apart).mean()))


def assert_written(layer: nn.Module, received: list[Tensor], rtol: float = 1e-5, rounding: float = 1e-7) -> None:
    """The buffers hold the population of what was received, up to their own rounding."""
    mean, var = moments(received)
    apart = np.abs(layer.running_mean.double().numpy() - mean)
    assert np.all(apart <= rounding * np.abs(mean) + 1e-6 * np.sqrt(var))
    np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=rtol)


class Recorder:
    """Everything that each BatchNorm layer of a model receives, by name, in each of its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.received: dict[str, list[Tensor]] = {}
        self.training: dict[str, list[bool]] = {}
        for name, layer in layers_of(model).items():
            layer.register_forward_pre_hook(lambda _, args, name=name: self.keep(name, _, args[0]))

    def keep(self, name: str, layer: nn.Module, x: Tensor) -> None:
        self.received.setdefault(name, []).append(x.detach().clone())
        self.training.setdefault(name, []).append(layer.training)

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.received[name]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def buffers_of(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


def all_else_of(model: nn.Module) -> dict[str, Any]:
    """All there is about a model but the values of running statistics; and all random states."""
    modules = dict(model.named_modules())
    return {
        "parameters": {name: bits(p) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else bits(p.grad) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identities": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "dtypes": {name: buffer.dtype for name, buffer in model.named_buffers()},
        "tracked": {n: v for n, v in buffers_of(model).items() if not n.endswith(("running_mean", "running_var"))},
        "modes": {name: module.training for name, module in modules.items()},
        "vars": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: list(m._forward_hooks) + list(m._forward_pre_hooks) for name, m in modules.items()},
        "momentum": {name: layer.momentum for name, layer in layers_of(model).items()},
        "tracks": {name: layer.track_running_stats for name, layer in layers_of(model).items()},
        "random": (bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state())),
    }


class Unchanged:
    """Around a call: nothing changes but running statistics; if ``entirely``, nor do they."""

    def __init__(self, model: nn.Module, entirely: bool = False) -> None:
        self.model, self.entirely = model, entirely

    def __enter__(self) -> Unchanged:
        self.before, self.buffers = all_else_of(self.model), buffers_of(self.model)
        self.grad_enabled = torch.is_grad_enabled()
        return self

    def __exit__(self, *exc: object) -> None:
        after = all_else_of(self.model)
        for key, value in self.before.items():
            assert after[key] == value, key
        assert torch.is_grad_enabled() == self.grad_enabled
        if self.entirely:
            assert buffers_of(self.model) == self.buffers


def data(
    sizes: tuple[int, ...] = SIZES, shape: tuple[int, ...] = (C,), mean: float = 3.0, std: float = 2.0
) -> list[Tensor]:
    """Batches whose means and variances differ from each other, and from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return [
        (torch.randn(n, *shape, generator=generator) * std * (1 + t % 3) + mean + std * (t % 4)) * scale
        for t, n in enumerate(sizes)
    ]


class Net(nn.Module):
    """Three layers, one behind the other, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.drop = nn.BatchNorm1d(C), nn.Linear(C, 4), nn.Dropout(0.5)
        self.b, self.two, self.c = nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.two(self.drop(torch.relu(self.b(self.one(self.a(x)))))))


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    for _ in range(steps):
        model(torch.randn(16, C))
    return model


def single(**kwargs: Any) -> nn.Sequential:
    return trained(nn.Sequential(nn.BatchNorm1d(C, **kwargs), nn.Linear(C, 2)))


# -------------------------------------------------------------------------------------------------- what is written


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


def test_a_layer_whose_inputs_cannot_be_told_apart_by_channel_is_not_passed_over_in_silence() -> None:
    model, batches = nn.Sequential(ChannelsAtTheEnd(C), nn.Linear(C, 2)), [torch.randn(8, 5, C)]
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


# ------------------------------------------------------------------------------------------- which layers, and modes


def test_whatever_the_modes_were_they_are_exactly_that_afterwards() -> None:
    model = trained(Net())
    for eval_modules in ([], ["drop"], ["a", "one"], ["a", "b", "c"], [""], ["", "drop", "a", "b", "c"]):
        for name, module in model.named_modules():
            module.training = name not in eval_modules
        with Unchanged(model):
            recalibrate(model, data())


def test_a_module_whose_train_method_does_something_else_is_not_asked() -> None:
    class Stays(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("nobody should call this")

    model, batches = Stays(nn.BatchNorm1d(C), nn.Dropout(0.5), nn.BatchNorm1d(C)), data()
    recorder = Recorder(model)
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)
    assert_written(model[2], recorder["2"])


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_layers_are_left_alone_and_in_eval_unless_asked(frozen: bool) -> None:
    model, batches = trained(Net()), data()
    model.b.eval()
    model.c.momentum = 0.0
    recorder, before = Recorder(model), buffers_of(model)
    with Unchanged(model):
        result = recalibrate(model, batches, frozen=frozen)
    assert recorder.training == {"a": [True] * 10, "b": [frozen] * 10, "c": [frozen] * 10}
    assert result.left_alone == ({} if frozen else {"b": "frozen", "c": "frozen"})
    assert_written(model.a, recorder["a"])
    for name in ("b", "c"):
        if frozen:
            assert_written(layers_of(model)[name], recorder[name])
        else:
            assert {k: v for k, v in buffers_of(model).items() if k[0] == name} == {
                k: v for k, v in before.items() if k[0] == name
            }
    assert ("Left alone: b (frozen), c (frozen)." in str(result)) != frozen


def test_in_a_model_in_eval_mode_all_layers_are_recalibrated() -> None:
    model = trained(Net()).eval()
    recorder = Recorder(model)
    with Unchanged(model):
        assert recalibrate(model, data()).left_alone == {}
    for name, layer in layers_of(model).items():
        assert_written(layer, recorder[name])


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_momentum_plays_no_part(momentum: float | None) -> None:
    model, batches = single(momentum=momentum), data()
    with Unchanged(model):
        recalibrate(model, batches)
    assert_written(model[0], batches)
    assert model[0].num_batches_tracked == 5


def test_a_layer_without_running_statistics_is_left_alone_and_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False), nn.BatchNorm1d(C))
    recorder = Recorder(model)
    result = recalibrate(model, data())
    assert result.left_alone == {"0": "no running statistics"}
    assert_written(model[1], recorder["1"])
    result = recalibrate(model, data(), frozen=True)
    assert result.left_alone == {"0": "no running statistics"}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_with_buffers_that_it_does_not_track_is_frozen(frozen: bool) -> None:
    model, batches = single(), data()
    model[0].track_running_stats = False
    with Unchanged(model, entirely=not frozen):
        result = recalibrate(model, batches, frozen=frozen)
    assert result.left_alone == ({} if frozen else {"0": "frozen"})
    if frozen:
        assert_written(model[0], batches)


def test_a_layer_that_the_pass_does_not_use_is_left_alone_and_named() -> None:
    model, batches = trained(Net()), data()
    before = buffers_of(model)
    result = recalibrate(model, batches, forward=lambda model, batch: model.a(batch))
    assert result.left_alone == {"b": "unused", "c": "unused"}
    assert "Left alone: b (unused), c (unused)." in str(result)
    assert_written(model.a, batches)
    for name, value in buffers_of(model).items():
        assert (value == before[name]) == (name not in ("a.running_mean", "a.running_var"))
    after = buffers_of(model)
    with torch.no_grad():
        model.b.running_mean.fill_(5)
    result.restore()
    assert model.b.running_mean.tolist() == [5] * 4  # what was not written is not put back
    assert {k: v for k, v in buffers_of(model).items() if k != "b.running_mean"} == {
        k: v for k, v in before.items() if k != "b.running_mean"
    }
    assert after != before


def test_include_and_exclude_choose_layers_and_the_others_stay_in_eval() -> None:
    for choice in ({"include": ["a"]}, {"exclude": ("b", "c")}, {"include": "[a-b]", "exclude": "b"}):
        model = trained(Net())
        recorder, before = Recorder(model), buffers_of(model)
        with Unchanged(model):
            result = recalibrate(model, data(), **choice)
        assert list(result.after) == ["a"]
        assert recorder.training == {"a": [True] * 10, "b": [False] * 10, "c": [False] * 10}
        changed = [name for name, value in buffers_of(model).items() if value != before[name]]
        assert changed == ["a.running_mean", "a.running_var"]
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="matches no BatchNorm layer"):
        recalibrate(model, data(), include="nothing")
    with Unchanged(model, entirely=True), pytest.raises(TypeError, match="`exclude`"):
        recalibrate(model, data(), exclude=3)


def test_parameters_that_need_no_gradient_and_gradients_that_are_there_stay() -> None:
    model, batches = trained(Net()), data()
    model.a.weight.requires_grad_(False)
    model(batches[0]).sum().backward()
    with Unchanged(model):
        recalibrate(model, batches)


# ------------------------------------------------------------------------------------------------- what batches may be


class Anything:
    """A batch that is an object."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor | Anything, scale: float = 1.0) -> Tensor:
        return self.norm((x.x if isinstance(x, Anything) else x) * scale)


@pytest.mark.parametrize(
    ("wrap", "forward", "scale"),
    [
        (lambda x: x, None, 1),
        (lambda x: (x, torch.zeros(len(x))), None, 1),
        (lambda x: [x, "label"], None, 1),
        (lambda x: {"x": x, "scale": 2.0}, None, 2),
        (lambda x: {"scale": 3.0, "x": x}, None, 3),
        (Anything, None, 1),
        (lambda x: {"image": Anything(x)}, lambda model, batch: model(batch["image"], scale=4), 4),
        (lambda x: ("label", x), lambda model, batch: model(x=batch[1]), 1),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict in another order", "object", "dict, forward", "tuple, forward"],
)
def test_batches_of_any_kind(wrap: Callable[[Tensor], Any], forward: Any, scale: float) -> None:
    model, batches = TakesNames(), data()
    recalibrate(model, [wrap(x) for x in batches], forward)
    assert_written(model.norm, [x * scale for x in batches])


@pytest.mark.parametrize("num_batches", [1, 4, 10, None])
def test_a_generator_is_asked_for_no_more_than_is_needed(num_batches: int | None) -> None:
    model, batches, given_out = single(), data(), []

    def generate() -> Iterator[Tensor]:
        for x in batches:
            given_out.append(x)
            yield x

    generator = generate()
    result = recalibrate(model, generator, num_batches=num_batches)
    used = num_batches or len(batches)
    assert len(given_out) == result.num_batches == used
    assert_written(model[0], batches[:used])
    assert len(list(generator)) == len(batches) - used


def test_a_loader_with_workers() -> None:
    model, x = single(), torch.cat(data())
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=16, shuffle=True, num_workers=2)
    with Unchanged(model):
        result = recalibrate(model, loader)
    assert result.num_batches == len(loader)
    assert_written(model[0], [x])


def test_random_states_are_as_before_whatever_data_and_model_draw() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + torch.rand(()) + random.random() + np.random.rand())

    def generate(fails: bool) -> Iterator[Tensor]:
        for _ in range(10):
            yield torch.randn(4 + random.randrange(3), C) * np.random.rand()
        if fails:
            raise OSError("gone")

    model = Draws()
    with Unchanged(model):
        recalibrate(model, generate(False))
    with Unchanged(model, entirely=True), pytest.raises(OSError, match="gone"):
        recalibrate(model, generate(True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whether_gradients_are_enabled_plays_no_part(context: Callable[[], Any]) -> None:
    model, batches = trained(Net()), data()
    recorder = Recorder(model)
    with context(), Unchanged(model):
        result = recalibrate(model, batches)
    for name, layer in layers_of(model).items():
        assert_written(layer, recorder[name])
        assert not layer.running_mean.is_inference()
    model(batches[0]).sum().backward()
    result.restore()


def test_a_model_made_in_inference_mode_is_recalibrated_and_restored_anywhere() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm1d(C))
    batches, before = data(), buffers_of(model)
    result = recalibrate(model, batches)
    assert_written(model[0], batches)
    result.restore()
    assert buffers_of(model) == before


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("num_batches", [0, -1, True, False, 2.0, "3", float("nan")])
def test_a_bad_number_of_batches_is_refused(num_batches: Any) -> None:
    model, pulled = single(), iter(data())
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="`num_batches` must be"):
        recalibrate(model, pulled, num_batches=num_batches)
    assert len(list(pulled)) == len(SIZES)


def test_no_batch_at_all_is_an_error() -> None:
    for model in (single(), trained(Net()).eval()):
        with Unchanged(model, entirely=True), pytest.raises(ValueError, match="gave no batch"):
            recalibrate(model, [])
        with Unchanged(model, entirely=True), pytest.raises(ValueError, match="gave no batch"):
            recalibrate(model, iter(()), num_batches=3)


def test_fewer_batches_than_asked_for_are_used_with_a_warning_that_says_how_many() -> None:
    model, batches = single(), data()
    with Unchanged(model), pytest.warns(UserWarning, match="gave 10 batches, not the 11") as caught:
        recalibrate(model, iter(batches), num_batches=11)
    assert caught[0].filename == __file__
    assert_written(model[0], batches)


def test_that_warning_as_an_error_leaves_the_model_as_it_was() -> None:
    model = single()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Unchanged(model, entirely=True), pytest.raises(UserWarning, match="gave 10"):
            recalibrate(model, data(), num_batches=11)


def test_a_model_without_batchnorm_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(C, 2), nn.LayerNorm(2))
    with Unchanged(model, entirely=True), pytest.warns(UserWarning, match="No BatchNorm layer.*1 LayerNorm"):
        result = recalibrate(model, data())
    assert len(result.before) == len(result.after) == result.num_batches == 0
    assert "0 BatchNorm layers recalibrated" in str(result)
    result.restore()


@pytest.mark.parametrize("good", [0, 4])
@pytest.mark.parametrize("bad", [torch.randn(4, C + 1), torch.randn(1, C), "text", None, 3, {"y": 1}, ()])
def test_a_batch_that_the_model_cannot_take_is_an_error_that_tells_which(bad: Any, good: int) -> None:
    model = trained(Net())
    with (
        Unchanged(model, entirely=True),
        pytest.raises(RuntimeError, match=rf"batch {good} .*a {type(bad).__name__}") as e,
    ):
        recalibrate(model, [*data()[:good], bad])
    assert e.value.__cause__ is not None
    assert "forward" in str(e.value)


def test_an_empty_batch_has_no_part_in_it() -> None:
    model, batches = single(), data()
    with Unchanged(model):
        recalibrate(model, [*batches[:3], torch.zeros(0, C), *batches[3:]])
    assert_written(model[0], batches)


def test_what_cannot_be_iterated_is_an_error() -> None:
    model = single()
    with Unchanged(model, entirely=True), pytest.raises(TypeError, match="not iterable"):
        recalibrate(model, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StopIteration, MemoryError])
@pytest.mark.parametrize("place", ["forward", "iterable", "iterable's beginning", "layer"])
@pytest.mark.parametrize("tracked", [False, True])
def test_whatever_is_raised_in_the_pass_the_model_is_as_it_was(
    error: type[BaseException], place: str, tracked: bool
) -> None:
    model, batches = trained(Net()), data()
    model.b.eval()

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            if place == "iterable's beginning":
                raise error("on purpose")
            self.batches = iter(batches)
            return self

        def __next__(self) -> Tensor:
            if place == "iterable" and error is not StopIteration and len(seen) == 4:
                raise error("on purpose")
            return next(self.batches)

    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(len(batch))
        model(batch)
        if place == "forward" and len(seen) == 4:
            raise error("on purpose")

    def fails(*_: Any) -> None:
        if place == "layer" and len(seen) == 4:
            raise error("on purpose")

    model.c.register_forward_hook(fails)
    tracker = BatchNormTracker(model)
    if tracked:
        tracker.attach()
        model(batches[0])
    if (place, error) == ("iterable", StopIteration):
        return
    wrapped = issubclass(error, Exception) and place in ("forward", "layer")
    with Unchanged(model, entirely=True), pytest.raises(RuntimeError if wrapped else error) as raised:
        recalibrate(model, Batches(), forward)
    assert isinstance(raised.value.__cause__ if wrapped else raised.value, error)
    if tracked:
        seen.clear()
        model(batches[1])
        assert [tracker.report()[name].num_batches for name in "abc"] == [2, 2, 2]
        tracker.detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_an_error_that_names_layer_call_and_channel(value: float) -> None:
    model, batches = trained(Net()), data()
    batches[6][3, 1] = value
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"layer 'a' .* call 7, channel 1\b"):
        recalibrate(model, batches)


def test_it_names_the_layer_that_was_called_first_not_the_one_that_is_defined_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(C), nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).flip(1))

    model, batches = Backwards(), data()
    batches[2][0, 0] = torch.nan
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"layer 'first' .* call 3, channel 0\b"):
        recalibrate(model, batches)


def test_a_variance_beyond_the_buffers_precision_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C)).half()
    batches = [x.half() for x in data(mean=0.0, std=100.0)]
    batches[3][:, 2] *= 20
    assert all(torch.isfinite(x).all() for x in batches)
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match=r"`running_var` of layer '0'.*torch.float16"):
        recalibrate(model, batches)


def test_a_single_value_has_no_variance() -> None:
    class TakesOne(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model, batches = TakesOne(C), list(torch.randn(2, 1, C))
    with Unchanged(model, entirely=True), pytest.raises(ValueError, match="one value has no variance"):
        recalibrate(model, batches[:1])
    recalibrate(model, batches)
    assert_written(model, batches)


def test_a_channel_that_is_constant_gets_variance_0() -> None:
    model, batches = single(), data()
    for x in batches:
        x[:, 1] = 7
    result = recalibrate(model, batches)
    assert model[0].running_mean[1] == 7
    assert model[0].running_var[1] == 0
    assert result.after["0"].summary()["eval_error"] <= 1e-5


def test_a_lazy_layer_that_was_not_initialised_is_an_error_and_stays_lazy() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.LazyBatchNorm1d())
    before = bits(model[0].running_mean)
    with pytest.raises(ValueError, match="Layer '1' has not been initialised"):
        recalibrate(model, data())
    assert bits(model[0].running_mean) == before
    assert isinstance(model[1].running_mean, nn.UninitializedBuffer)
    model(data()[0])
    recalibrate(model, data())
    assert_written(model[0], data())


# -------------------------------------------------------------------------------------------------------- the way back


def test_restore_brings_every_bit_back_also_after_further_training() -> None:
    model, batches = trained(Net()), data()
    with torch.no_grad():
        model.a.running_mean.copy_(torch.tensor([torch.nan, -0.0, 1e-45]))
    before = buffers_of(model)
    result = recalibrate(model, batches)
    assert buffers_of(model) != before
    result.restore()
    assert buffers_of(model) == before
    trained(model)
    assert model.a.num_batches_tracked == 10
    result.restore()
    assert buffers_of(model) == before
    result.restore()
    assert buffers_of(model) == before


def test_restore_goes_with_a_model_that_was_converted_since() -> None:
    model = trained(Net())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = recalibrate(model, data())
    model.double()
    result.restore()
    for name, buffer in model.named_buffers():
        assert buffer.is_floating_point() == before[name].is_floating_point()
        assert torch.equal(buffer, before[name].to(buffer.dtype))
    assert model.a.running_mean.dtype == torch.float64


def test_restored_in_part_only_what_was_written() -> None:
    model = trained(Net())
    before = buffers_of(model)
    result = recalibrate(model, data(), include="b")
    trained(model)
    moved = buffers_of(model)
    result.restore()
    for name, value in buffers_of(model).items():
        assert value == (before if name.startswith("b.") else moved)[name]


def test_the_second_undo_goes_back_to_the_first_state() -> None:
    model = trained(Net())
    before = buffers_of(model)
    first = recalibrate(model, data())
    between = buffers_of(model)
    second = recalibrate(model, data(mean=-2.0))
    second.restore()
    assert buffers_of(model) == between
    first.restore()
    assert buffers_of(model) == before


def test_twice_the_same_data_write_the_same_bits() -> None:
    model = trained(Net())
    recalibrate(model, data())
    once = buffers_of(model)
    recalibrate(model, data())
    assert buffers_of(model) == once


def test_reports_can_be_copied_and_pickled() -> None:
    result = recalibrate(trained(Net()), data())
    for report in (result.before, result.after):
        for twin in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
            assert isinstance(twin, Report)
            assert str(twin) == str(report)
            assert twin.to_dict() == report.to_dict()


def test_printed_it_is_a_table_of_before_and_after() -> None:
    model = trained(Net())
    model.c.eval()
    result = recalibrate(model, data())
    text = str(result)
    assert text.startswith("2 BatchNorm layers recalibrated on 10 batches.")
    assert text.endswith("Left alone: c (frozen).")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:2] in ("a ", "b ")}
    for name in "ab":
        assert float(rows[name][2]) == pytest.approx(result.before[name].summary()["eval_error"], abs=1e-4)
        assert rows[name][3] == "0.0000"
        assert rows[name][-1] == str(sum(SIZES))
    assert "1 BatchNorm layer recalibrated on 1 batch." in str(recalibrate(single(), data()[:1]))


def test_a_model_is_not_kept_from_being_copied_by_its_recalibration() -> None:
    model = trained(Net())
    recalibrate(model, data())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert buffers_of(twin) == buffers_of(model)


# ------------------------------------------------------------------------------------------------- attached monitors


def feed(model: nn.Module, num_batches: int = 12, mean: float = 3.0) -> list[Tensor]:
    batches = [torch.randn(32, C) * 2 + mean for _ in range(num_batches)]
    for x in batches:
        model(x)
    return batches


def assert_population(report: Report, name: str, received: list[Tensor]) -> None:
    assert report[name].num_batches == len(received)
    mean, var = moments(received)
    np.testing.assert_allclose(report[name].population_mean.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(report[name].population_var.numpy(), var, rtol=1e-4)


def resumed(tracker: BatchNormTracker, model: nn.Module) -> BatchNormTracker:
    """Another tracker in the place of this one, by way of a checkpoint."""
    state = pickle.loads(pickle.dumps(tracker.state_dict()))
    tracker.detach()
    twin = BatchNormTracker(model)
    twin.load_state_dict(state)
    return twin.attach()


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_in_the_middle_of_an_open_window(through_a_checkpoint: bool, momentum: float | None) -> None:
    model = single(momentum=momentum)
    tracker = BatchNormTracker(model).attach()
    feed(model)
    tracker.reset()
    first = feed(model)
    recalibrate(model, [torch.randn(64, C) * 2 + 3 for _ in range(50)])
    if through_a_checkpoint:
        tracker = resumed(tracker, model)
    received = first + feed(model)
    report = tracker.report()
    assert_population(report, "0", received)
    assert report["0"].verdict == "healthy"
    assert report["0"].flags == ()
    assert report["0"].evidence["updates_per_call"] == 1
    tracker.reset()
    second = feed(model)
    report = tracker.report()
    assert_population(report, "0", second)
    assert (report["0"].verdict, report["0"].flags) == ("healthy", ())
    tracker.detach()


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["closed", "reset"])
def test_between_two_windows(through_a_checkpoint: bool, kind: str) -> None:
    model = single()
    tracker = BatchNormTracker(model).attach()
    feed(model)
    tracker.close()
    if kind == "reset":
        tracker.reset()
    recalibrate(model, [torch.randn(64, C) * 2 + 3 for _ in range(50)])
    if through_a_checkpoint:
        tracker = resumed(tracker, model)
    if kind == "closed":
        tracker.reset()
    received = feed(model)
    report = tracker.report()
    assert_population(report, "0", received)
    assert (report["0"].verdict, report["0"].flags) == ("healthy", ())
    tracker.detach()


def test_a_stale_layer_is_healthy_in_the_next_window_after_it() -> None:
    def window(repaired: bool) -> bool:
        torch.manual_seed(0)
        model = trained(nn.Sequential(nn.BatchNorm1d(C, momentum=0.01)))
        with BatchNormTracker(model) as tracker:
            feed(model, mean=30.0)
            tracker.close()
            if repaired:
                recalibrate(model, [torch.randn(64, C) * 2 + 30 for _ in range(50)])
            tracker.reset()
            feed(model, mean=30.0)
            return tracker.report()["0"].verdict == "healthy"

    assert not window(repaired=False)
    assert window(repaired=True)


def test_calibration_is_not_counted_wherever_the_tracker_hangs() -> None:
    model = nn.Sequential(trained(Net()), nn.Identity())
    whole, part = BatchNormTracker(model).attach(), BatchNormTracker(model[0].a).attach()
    feed(model, 3)
    recalibrate(model[0], data())
    feed(model, 2)
    assert [layer.num_batches for layer in whole.report().values()] == [5, 5, 5]
    assert [layer.num_batches for layer in part.report().values()] == [5]
    assert whole.report()["0.a"].flags == ()
    whole.detach()
    part.detach()


@pytest.mark.parametrize("closed", [False, True])
def test_restored_it_is_not_taken_for_a_write_from_outside(closed: bool) -> None:
    model = single()
    with BatchNormTracker(model) as tracker:
        feed(model)
        tracker.close()
        if not closed:
            tracker.reset()
        recalibrate(model, data()).restore()
        if closed:
            tracker.reset()
        feed(model, 50)
        assert tracker.report()["0"].flags == ()
        assert tracker.report()["0"].verdict == "healthy"


def test_what_is_written_from_outside_after_it_is_told() -> None:
    model = single()
    with BatchNormTracker(model) as tracker:
        feed(model)
        tracker.close()
        recalibrate(model, data())
        with torch.no_grad():
            model[0].running_mean.add_(1)
        tracker.reset()
        feed(model)
        assert "written-outside" in tracker.report()["0"].flags


def test_a_pass_that_failed_leaves_the_window_as_it_was() -> None:
    reports = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = single()
        with BatchNormTracker(model) as tracker:
            feed(model)
            if fails:
                with pytest.raises(RuntimeError, match="batch 10"):
                    recalibrate(model, [*data(), None])
            feed(model)
            reports.append(tracker.report().to_dict())
    assert reports[0] == reports[1]


class LitNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(C), nn.Linear(C, 1)
        self.received: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.received.append(batch[0].clone())
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recalibrates(Callback):
    """In the middle of each epoch, and at its end."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 10:
            recalibrate(pl_module, self.batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recalibrate(pl_module, self.batches)


@pytest.mark.parametrize("monitor_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_in_a_training_with_the_monitor(monitor_first: bool, tmp_path: Path) -> None:
    x = torch.randn(20 * 32, C) * 2 + 3
    model, monitor, reports = LitNet(), BatchNormMonitor(on_unhealthy="ignore"), []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch:
                reports.append((monitor.report(), pl_module.received))
                pl_module.received = []

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            reports.append((monitor.report(), pl_module.received))

    callbacks = [monitor, Recalibrates(list(x.split(64)))]
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*(callbacks if monitor_first else callbacks[::-1]), Look()],
    )
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=32, shuffle=True))
    assert len(reports) == 3
    for report, received in reports:
        assert len(received) == 20
        assert_population(report, "norm", received)
        assert (report["norm"].verdict, report["norm"].flags) == ("healthy", ())
    assert_written(model.norm, [x])


# --------------------------------------------------------------------------------------------------- compiled models


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(16, C)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def by_wrapping(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def its_parts(model: nn.Module, backend: str) -> nn.Module:
    model.one, model.b = (torch.compile(part, backend=backend) for part in (model.one, model.b))
    return model


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++)")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("how", [by_wrapping, in_place, its_parts])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_model_gets_what_an_eager_one_gets_and_is_not_compiled_again(
    backend: str, how: Callable[[nn.Module, str], nn.Module], tracked: bool
) -> None:
    if backend == "inductor" and (tracked or how is not by_wrapping):
        return  # one is enough
    eager, batches = trained(Net()), data()
    eager.drop.p = 0.0
    model = how(copy.deepcopy(eager), backend)
    inner = getattr(model, "_orig_mod", model)
    tracker = BatchNormTracker(model)
    if tracked:
        tracker.attach()
    train(model)
    inner.eval()
    model(batches[0])
    inner.train()
    with torch.no_grad():
        for mine, its in zip(everything(eager), everything(inner), strict=True):
            mine.copy_(its)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    with Unchanged(model):
        result = recalibrate(model, batches)
    expected = recalibrate(eager, batches)
    assert [bits(tensor) for tensor in everything(inner)] == [bits(tensor) for tensor in everything(eager)]
    assert list(result.after) == list(expected.after)
    train(model)
    inner.eval()
    model(batches[0])
    inner.train()
    train(model)
    assert counters["stats"]["unique_graphs"] == compiled
    if tracked:
        assert [layer.num_batches for layer in tracker.report().values()] == [6, 6, 6]
        assert [layer.flags for layer in tracker.report().values()] == [(), (), ()]
        tracker.detach()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_is_compiled_but_was_never_run_is_not_compiled_by_it() -> None:
    model, batches = torch.compile(nn.BatchNorm1d(C), backend="aot_eager"), data()
    recalibrate(model, batches)
    assert not counters["stats"]["unique_graphs"]
    assert_written(model._orig_mod, batches)


# ------------------------------------------------------------------------------------------------------ several ranks


def share(rank: int, sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(n, C, generator=generator) * (1 + rank) + 5 * rank + t for t, n in enumerate(sizes)]


# The batch sizes that each rank has.
UNEVEN = {
    "uneven": [[8, 5, 13, 4], [2, 7]],
    "nothing on rank 1": [[8, 5, 13], []],
    "nothing on rank 0": [[], [8, 5, 13]],
    "wrapped, uneven": [[8, 5, 13, 4], [2, 7]],
    "wrapped, nothing on rank 0": [[], [8, 5, 13]],
}
FAILURES = {
    "nothing at all": [[], []],
    "forward fails on rank 0": [[8, 8], [8, 8]],
    "forward fails on rank 1": [[8, 8], [8, 8]],
    "data fail on rank 0": [[8, 8], [8, 8, 8]],
    "data fail on rank 1": [[8, 8], []],
    "nan on rank 1": [[8, 8], [8, 8, 8]],
    "no layer is called, nothing on rank 1": [[8], []],
}
WRAPPED = [name for name in UNEVEN if name.startswith("wrapped")]


def ranked(rank: int) -> nn.Sequential:
    """Other buffers on each rank; only the first layer is called with just data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2))
    with torch.no_grad():
        model[0].running_mean.fill_(rank)
        model[0].running_var.fill_(rank + 1)
    return model


def calibrated(scenario: str, rank: int, sizes: list[int]) -> dict[str, Any]:
    model, batches = ranked(rank), share(rank, sizes)
    here = scenario.endswith(f"on rank {rank}")

    def generate() -> Iterator[Tensor]:
        yield from batches
        if scenario.startswith("data fail") and here:
            raise OSError("the disk is gone")

    def forward(model: nn.Module, batch: Tensor) -> None:
        if scenario.startswith("no layer"):
            return
        model(batch)
        if scenario.startswith("forward fails") and here:
            raise ArithmeticError("on purpose")

    if scenario.startswith("nan") and here:
        batches[1][2, 1] = torch.nan
    root = DistributedDataParallel(model) if scenario in WRAPPED else model
    before, modes = buffers_of(model), all_else_of(model)["modes"]
    outcome: dict[str, Any] = {"before": before, "error": None}
    try:
        result = recalibrate(root, generate(), forward, all_ranks=scenario != "alone")
        outcome |= {"text": str(result), "count": result.num_batches, "left_alone": result.left_alone}
        outcome |= {"after": result.after.to_dict(), "num_samples": [x.num_samples for x in result.after.values()]}
        outcome["layer"] = copy.deepcopy(model[0])
        outcome["written"] = buffers_of(model)
        result.restore()
    except BaseException as error:
        outcome["error"] = repr(error)
    outcome["buffers"] = buffers_of(model)
    assert all_else_of(model)["modes"] == modes
    if scenario in WRAPPED:  # it sends buffers in each training step, as before
        assert root.require_forward_param_sync
    return outcome


def synchronised(rank: int) -> dict[str, Any]:
    """SyncBatchNorm on the CPU, which it does not take."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ranked(rank))
    before = buffers_of(model)
    with pytest.raises(RuntimeError) as caught:
        recalibrate(model, share(rank, [8, 8]))
    return {"error": str(caught.value), "unchanged": buffers_of(model) == before}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    shares = {**UNEVEN, **FAILURES, "alone": [[8, 5], [9]]}
    results = {scenario: calibrated(scenario, rank, sizes[rank]) for scenario, sizes in shares.items()}
    results["synchronised"] = synchronised(rank)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("scenario", UNEVEN)
def test_ranks_end_with_the_same_buffers_those_of_the_union_of_their_data(
    both_ranks: list[dict[str, Any]], scenario: str
) -> None:
    union = [x for rank in range(2) for x in share(rank, UNEVEN[scenario][rank])]
    alone = ranked(0)
    recalibrate(alone, union)
    for rank, result in enumerate(both_ranks):
        outcome = result[scenario]
        assert outcome["error"] is None
        assert outcome["left_alone"] == {}
        assert outcome["count"] == len(UNEVEN[scenario][rank])
        assert outcome["num_samples"] == [sum(map(len, union))]
        assert_written(outcome["layer"], union)
        torch.testing.assert_close(outcome["layer"].running_var, alone[0].running_var, rtol=2e-7, atol=0)
        assert outcome["buffers"] == outcome["before"]  # restored, each rank its own
    one, other = (result[scenario] for result in both_ranks)
    assert one["written"] == other["written"]
    assert one["after"] == other["after"]


def test_each_rank_alone_if_asked(both_ranks: list[dict[str, Any]]) -> None:
    for rank, sizes in enumerate([[8, 5], [9]]):
        assert both_ranks[rank]["alone"]["error"] is None
        assert_written(both_ranks[rank]["alone"]["layer"], share(rank, sizes))


@pytest.mark.parametrize("scenario", FAILURES)
def test_if_one_rank_fails_all_raise_and_each_has_its_own_buffers_as_before(
    both_ranks: list[dict[str, Any]], scenario: str
) -> None:
    told = {"forward fails": "ArithmeticError", "data fail": "the disk is gone", "nan": "call 2, channel 1"}
    for rank, result in enumerate(both_ranks):
        outcome = result[scenario]
        assert outcome["buffers"] == outcome["before"]
        if scenario.startswith("no layer"):
            assert outcome["error"] is None or "gave no batch" in outcome["error"]
        elif scenario == "nothing at all":
            assert "gave no batch" in outcome["error"]
        elif scenario.startswith("nan") or scenario.endswith(f"on rank {rank}"):
            assert next(text for start, text in told.items() if scenario.startswith(start)) in outcome["error"]
        else:
            assert "Another rank could not run its batches" in outcome["error"]


def test_synchronised_batchnorm_that_needs_a_gpu_fails_with_its_own_error(both_ranks: list[dict[str, Any]]) -> None:
    for result in both_ranks:
        assert "SyncBatchNorm expected input tensor to be on GPU" in result["synchronised"]["error"]
        assert result["synchronised"]["unchanged"]


def test_the_result_is_of_the_published_type() -> None:
    assert isinstance(recalibrate(single(), data()), Recalibration)
