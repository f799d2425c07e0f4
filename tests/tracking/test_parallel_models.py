"""SyncBatchNorm and sharded models on two gloo processes are monitored as others are."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.compat import HAS_UNPACK_HOOKS
from tests import processes
from tests.tracking.batches_of_ranks import data, feed, model, two_pass

pytestmark = pytest.mark.slow

# SyncBatchNorm: its own autograd function and communication, with CPU stand-ins for its three CUDA kernels


def batch_norm_stats(x, eps):
    var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    weight = (counts / counts.sum()).double()[:, None]
    centre = (weight * mean).sum(dim=0)
    var = (weight * (invstd.double() ** -2 - eps + (mean - centre) ** 2)).sum(dim=0)
    n = counts.sum().double()
    running_mean.lerp_(centre.float(), momentum)
    running_var.lerp_((var * n / (n - 1)).float(), momentum)
    return centre.float(), (var + eps).rsqrt().float()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    shape = [1, -1] + [1] * (x.ndim - 2)
    return (x - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)


def synchronised_batches(rank, layer, is_uneven):
    sizes = [6 + 3 * rank * is_uneven + t % 3 * is_uneven for t in range(40)]
    return data(rank, layer, sizes, mean=1.0 * rank)


def run_synchronised(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    torch.batch_norm_stats = batch_norm_stats
    torch.batch_norm_gather_stats_with_counts = batch_norm_gather_stats_with_counts
    torch.batch_norm_elemt = batch_norm_elemt
    torch._C._get_privateuse1_backend_name = lambda: "cpu"
    results = {}
    for is_uneven in (False, True):
        layers = nn.SyncBatchNorm.convert_sync_batchnorm(model())
        with BatchNormTracker(layers) as tracker:
            feed(layers, {name: synchronised_batches(rank, name, is_uneven) for name in "abc"})
            results[is_uneven] = tracker.report(), tracker.close(all_ranks=True)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def synchronised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synchronised")
    processes.start(run_synchronised, str(folder), world_size=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("is_uneven", [False, True])
def test_global_batches_of_sync_batch_norm_are_not_merged_again(synchronised, is_uneven):
    for alone, together in (result[is_uneven] for result in synchronised):
        for name, layer in together.items():
            received = [x for rank in range(2) for x in synchronised_batches(rank, name, is_uneven)]
            count, mean, var = two_pass(received)
            assert (layer.type, layer.num_samples) == ("SyncBatchNorm", count)
            assert layer.evidence["calls_saved"] == layer.num_batches == 40
            assert (np.abs(layer.population_mean.numpy() - mean) < 1e-6 * np.sqrt(var)).all()
            np.testing.assert_allclose(layer.population_var.numpy(), var, rtol=1e-5)
            # What each rank sees alone are the same global batches, weighted by its own share of each.
            assert (alone[name].population_mean - layer.population_mean).abs().max() < (0.05 if is_uneven else 1e-12)
            assert layer.evidence["samples_per_batch"] * 40 == pytest.approx(count, rel=0.5 if is_uneven else 1e-12)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_ranks_of_other_data_are_one_population_under_sync_batch_norm(synchronised, is_uneven):
    first, second = (result[is_uneven][1] for result in synchronised)
    assert first.to_dict() == second.to_dict()
    for layer in first.values():
        assert layer.flags == ()
        assert layer.evidence["rank_error"] == 0
        assert layer.evidence["z_mean"] < 2
    assert first["b"].verdict == "healthy"  # with 192 or more values in a global batch


def run_sharded(rank, folder, flavour):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/sharded", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    )
    received = {"1": [], "3.1": []}
    for name, calls in received.items():
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append(args[0].detach())
        )
    if flavour == "fully_shard":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(network[3], mesh=mesh)
        fully_shard(network, mesh=mesh)
    else:
        network[3] = FullyShardedDataParallel(network[3], device_id=torch.device("cpu"))
        network = FullyShardedDataParallel(network, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    with BatchNormTracker(network) as tracker:
        for step in range(20):
            torch.manual_seed(100 * rank + step)
            network(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = tracker.close(all_ranks=True)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps((report, received)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("flavour", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_models_are_monitored_as_others_are(tmp_path, flavour):
    processes.start(run_sharded, str(tmp_path), flavour, world_size=2)
    results = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    assert results[0][0].to_dict() == results[1][0].to_dict()
    for name, layer in results[0][0].items():
        count, mean, var = two_pass([x for _, received in results for x in received[name]])
        assert layer.num_samples == count
        assert layer.num_batches == 20
        assert layer.evidence["calls_saved" if HAS_UNPACK_HOOKS else "calls_pass"] == 20  # FSDP has pre-hooks
        assert (np.abs(layer.population_mean.numpy() - mean) < 1e-6 * np.sqrt(var)).all()
        np.testing.assert_allclose(layer.population_var.numpy(), var, rtol=1e-5)
        assert layer.evidence["updates_per_call"] == 1
    assert list(results[0][0]) == ["1", "3.1"]
