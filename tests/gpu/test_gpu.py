"""What needs a CUDA device: the kernels, their saved results, synchronisation, CUDA graphs, NCCL, and the cost."""

import time
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_bnmonitor import BatchNormTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
    ).to(CUDA)


def recorded(model):
    """What every BatchNorm layer receives, by name."""
    received = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: received[name].append(args[0].detach().cpu()))
    return received


def images(step, size=32, **options):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 12, 12, generator=generator).to(CUDA, **options) + 1


def train(model, steps=30, autocast=False, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(images(step, **options)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_exact(report, received, path, bound):
    for name, batches in received.items():
        x = torch.cat([batch.double().movedim(1, -1).reshape(-1, batch.shape[1]) for batch in batches]).numpy()
        layer, deviation = report[name], x.std(axis=0)
        assert layer.num_samples == len(x)
        assert layer.evidence[f"calls_{path}"] == layer.num_batches == len(batches)
        ratio = 1 + np.abs(x.mean(axis=0)) / deviation
        assert (np.abs(layer.population_mean.numpy() - x.mean(axis=0)) < bound * ratio * deviation).all()
        np.testing.assert_allclose(layer.population_var.numpy(), x.var(axis=0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_the_kernels_save_is_exact(cudnn, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.backends.cudnn.flags(enabled=cudnn):
        model = network().to(memory_format=layout)
        received = recorded(model)
        with BatchNormTracker(model) as tracker:
            train(model, memory_format=layout)
    assert_exact(tracker.report(), received, "saved", 1e-6)


def test_autocast():
    model = network()
    received = recorded(model)
    with BatchNormTracker(model) as tracker:
        train(model, autocast=True)
    assert_exact(tracker.report(), received, "saved", 1e-5)


def test_a_module_in_half_precision_takes_the_pass():
    model = network().bfloat16()
    received = recorded(model)
    with BatchNormTracker(model) as tracker:
        train(model, dtype=torch.bfloat16)
    assert_exact(tracker.report(), received, "pass", 1e-5)


def test_training_steps_never_wait_for_the_device():
    model = network()
    batches = [images(step) for step in range(60)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with BatchNormTracker(model) as tracker:
        for step, x in enumerate(batches):
            torch.cuda.set_sync_debug_mode("default" if step < 10 else "error")
            try:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert tracker.report()["1"].num_batches == 60


def test_training_is_bit_identical_with_and_without():
    outcomes = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for monitored in (False, True):
            model = network()
            tracker = BatchNormTracker(model)
            if monitored:
                tracker.attach()
            train(model)
            tracker.detach()
            outcomes.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_and_cuda_graphs(mode):
    model = network()
    compiled = torch.compile(model, mode=mode)
    with BatchNormTracker(compiled) as tracker:
        train(compiled, steps=40)
    eager = network()
    received = recorded(eager)
    train(eager, steps=40)
    report = tracker.report()
    for name, batches in received.items():
        x = torch.cat([batch.double().movedim(1, -1).reshape(-1, batch.shape[1]) for batch in batches])
        assert report[name].num_batches == 40
        assert report[name].evidence["calls_traced"] == 40
        error = (report[name].population_mean - x.mean(dim=0)).abs() / x.std(dim=0)
        assert (error < 1e-2).all()  # two trainings, rounded in different ways


def test_nccl_world_of_one_with_sync_batch_norm(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        received = recorded(model)
        with BatchNormTracker(model) as tracker:
            train(model)
            report = tracker.close(all_ranks=True)
    finally:
        dist.destroy_process_group()
    assert_exact(report, received, "saved", 1e-6)


def test_overhead():
    """Not a test of a time: prints the ratio of a step's time with and without, interleaved in one run."""
    model = network(64)
    x = images(0, size=128)
    seconds = defaultdict(list)
    for _ in range(20):
        for monitored in (False, True):
            tracker = BatchNormTracker(model)
            if monitored:
                tracker.attach()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(24):
                model(x).square().mean().backward()
            torch.cuda.synchronize()
            seconds[monitored].append(time.perf_counter() - start)
            tracker.detach()
    ratio = np.median(np.array(seconds[True][2:]) / np.array(seconds[False][2:]))
    print(f"\nA step with the monitor takes {ratio:.3f} times as long as one without.")
    assert len(seconds[True]) == 20
