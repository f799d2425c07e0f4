"""Where the moments come from on CUDA: its kernels' saved statistics, and our own pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from tests.gpu.training import (
    DEVICE,
    ON_CUDA,
    Checkpointed,
    Received,
    assert_exact,
    moments,
    needs_cuda,
    network,
    paths,
    train,
)

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_kernels_save_is_exact(cudnn, layout):
    with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
        model = network().to(memory_format=layout)
        received = Received(model)
        with BatchNormTracker(model) as tracker:
            train(model, memory_format=layout)
    assert_exact(tracker.report(), received.batches, "saved" if ON_CUDA else None)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_autocast_they_save_float32(dtype, layout):
    model = network().to(memory_format=layout)
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        train(model, autocast=dtype, memory_format=layout)
    assert_exact(tracker.report(), received.batches, "saved" if ON_CUDA else None, mean_bound=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_in_half_precision_saves_float32(dtype, layout):
    model = network().to(dtype=dtype, memory_format=layout)
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        train(model, dtype=dtype, memory_format=layout)
    assert_exact(tracker.report(), received.batches, "saved" if ON_CUDA else None, mean_bound=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (64, 5)),
        (nn.BatchNorm1d(5), (16, 5, 9)),
        (nn.BatchNorm3d(5), (8, 5, 3, 4, 2)),
        (nn.BatchNorm2d(5), (512, 5, 56, 56)),
        (nn.BatchNorm1d(700), (3, 700)),
    ],
    ids=str,
)
def test_all_kinds_of_inputs(layer, shape):
    model = nn.Sequential(layer).to(DEVICE)
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        for seed in range(4):
            model(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.5)
    assert_exact(tracker.report(), received.batches, "saved")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_activation_checkpointing_counts_a_call_once(reentrant, autocast):
    model = Checkpointed(reentrant)
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        train(model, autocast=autocast)
    assert_exact(tracker.report(), received.batches, mean_bound=1e-6 if autocast is None else 1e-5)


class BatchNormAct(nn.BatchNorm2d):
    """As in timm: the activation is inside."""

    def forward(self, x):
        return nn.functional.silu(super().forward(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_with_an_activation_inside(layout):
    model = network(norm=BatchNormAct).to(memory_format=layout)
    received = Received(model)
    with BatchNormTracker(model) as tracker:
        train(model, autocast=torch.bfloat16, memory_format=layout)
    assert_exact(tracker.report(), received.batches, "saved" if ON_CUDA else None, mean_bound=1e-5)


# ------------------------------------------------------------------------------------------------------------- the pass


INPUTS = {
    "contiguous": (nn.BatchNorm2d, (16, 32, 14, 14), torch.float32, torch.contiguous_format),
    "channels-last": (nn.BatchNorm2d, (16, 32, 14, 14), torch.float32, torch.channels_last),
    "(N, C)": (nn.BatchNorm1d, (256, 32), torch.float32, torch.contiguous_format),
    "(N, C, L)": (nn.BatchNorm1d, (64, 32, 40), torch.float32, torch.contiguous_format),
    "float64": (nn.BatchNorm2d, (16, 32, 14, 14), torch.float64, torch.contiguous_format),
    "bfloat16": (nn.BatchNorm2d, (16, 32, 14, 14), torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels-last": (nn.BatchNorm2d, (16, 32, 14, 14), torch.bfloat16, torch.channels_last),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_the_pass_is_exact_however_large_the_mean(kind, ratio):
    of, shape, dtype, layout = INPUTS[kind]
    if dtype is torch.bfloat16:
        ratio = min(ratio, 64.0)  # beyond which its 8 bits leave no standard deviation to speak of
    centre = torch.linspace(-ratio, ratio, shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) + centre)
        .to(dtype)
        .contiguous(memory_format=layout)
        for _ in range(5)
    ]
    model = nn.Sequential(of(shape[1]).to(DEVICE, dtype))
    with BatchNormTracker(model, capture="pass") as tracker:
        for x in batches:
            model(x.to(DEVICE))
    report = tracker.report()
    mean, var, num_samples = moments(batches)
    assert paths(report, "0") == {"pass": 5}
    assert report["0"].num_samples == num_samples
    mean_error = np.abs(report["0"].population_mean.numpy() - mean) / np.sqrt(var)
    var_error = np.abs(report["0"].population_var.numpy() / var - 1)
    assert mean_error.max() <= 1e-6
    assert var_error.max() <= 2e-6


@pytest.mark.parametrize("kind", INPUTS)
def test_a_pass_over_a_channel_that_is_constant(kind):
    of, shape, dtype, layout = INPUTS[kind]
    x = torch.randn(shape, dtype=dtype)
    x[:, 0], x[:, 1] = 0, 3
    x = x.contiguous(memory_format=layout).to(DEVICE)
    model = nn.Sequential(of(shape[1]).to(DEVICE, dtype))
    with BatchNormTracker(model, capture="pass") as tracker:
        for _ in range(2):
            model(x)
    layer = tracker.report()["0"]
    assert layer.population_mean[:2].tolist() == pytest.approx([0, 3], abs=1e-6)
    assert layer.population_var[:2].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert torch.isfinite(layer.population_var).all()


# --------------------------------------------------------------------------------------------------- several processes


@needs_cuda
def test_synchronised_layers_in_a_process_group_of_one(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        received = Received(model)
        with BatchNormTracker(model) as tracker:
            train(model)
            report = tracker.close(all_ranks=True)
    finally:
        dist.destroy_process_group()
    assert_exact(report, received.batches, "saved")
