"""Guard and averaged weights on two gloo processes, started for real: the report tells of all, and is the same."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bnmonitor import BatchNormTracker
from tests import processes

pytestmark = pytest.mark.slow
BAD = {0: [5], 1: [11, 12]}  # batches by rank


def batches(rank: int) -> list[torch.Tensor]:
    data = list(torch.randn(30, 16, 3, generator=torch.Generator().manual_seed(rank)))
    for index in BAD[rank]:
        data[index][2, 1] = math.inf
    return data


def is_bad(index: int) -> bool:
    return any(index in bad for bad in BAD.values())


def steps(network: nn.Module, rank: int, tracker: BatchNormTracker | None) -> None:
    """Those that a scaler skips on both ranks, as the gradients of one are not finite."""
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    for index, x in enumerate(batches(rank)):
        if tracker is None and is_bad(index):
            continue
        optimizer.zero_grad()
        scaler.scale(network(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update(65536.0)


def validated_with_averaged_weights(model: nn.Module, rank: int, tracker: BatchNormTracker) -> dict:
    """Rank 1 has no batch of validation."""
    tracker.before_averaged()
    own = model[0].running_mean.clone()
    model[0].running_mean += 2
    model.eval()
    if rank == 0:
        tracker.start_validation()
        for x in torch.randn(20, 16, 3, generator=torch.Generator().manual_seed(3)):
            model(x)
    report = tracker.validation_report(all_ranks=True, num_loaders=1)
    model[0].running_mean.copy_(own)
    return report.to_dict()


def run(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    torch.manual_seed(0)
    alone = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    with BatchNormTracker(model, guard=True) as tracker:
        steps(DistributedDataParallel(model), rank, tracker)
        report = tracker.close(all_ranks=True)["0"]
        averaged = validated_with_averaged_weights(model, rank, tracker)
    steps(DistributedDataParallel(alone), rank, None)
    torch.save(
        {
            "report": report.to_dict(),
            "averaged": averaged,
            "weights": model.state_dict(),
            "expected": alone.state_dict(),
        },
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def test_batches_of_either_rank(tmp_path):
    processes.start(run, tmp_path, world_size=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    report = results[0]["report"]
    assert results[1]["report"] == report
    assert results[1]["averaged"] == results[0]["averaged"]
    averaged = results[0]["averaged"]["layers"]
    assert list(averaged) == ["0", "0 (averaged)"]
    assert averaged["0"] == report
    assert averaged["0 (averaged)"]["flags"] == ["other-weights"]
    assert averaged["0 (averaged)"]["evidence"]["val_error"] == pytest.approx(2, rel=0.1)
    assert report["flags"] == ["guarded"]
    assert report["evidence"]["guarded_calls"] == 3
    assert report["evidence"]["first_bad_batch"] == 6
    assert report["evidence"]["first_bad_channel"] == 1
    received = [x for rank in range(2) for index, x in enumerate(batches(rank)) if index not in BAD[rank]]
    values = torch.cat(received).double().numpy()
    assert report["num_samples"] == len(values)
    np.testing.assert_allclose(report["population_mean"], values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(report["population_var"], values.var(axis=0, ddof=1), rtol=1e-5)
    for result in results:
        assert all(value.isfinite().all() for value in result["weights"].values())
    # Rank 0 has seen batches 11 and 12, which were finite there.
    tracked = [result["weights"]["0.num_batches_tracked"] for result in results]
    assert tracked[0] == 29
    assert results[0]["expected"]["0.num_batches_tracked"] == 27
    torch.testing.assert_close(results[0]["weights"]["1.weight"], results[0]["expected"]["1.weight"], rtol=0, atol=0)
