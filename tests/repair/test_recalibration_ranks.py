"""Recalibration on several ranks: the statistics of the union of their data, or the same state as before on all."""

from __future__ import annotations

import copy
import datetime
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bnmonitor import recalibrate
from tests import processes
from tests.repair.exact_population import C, assert_written, error_in_eval
from tests.repair.unchanged import Everything, buffers_of

pytestmark = pytest.mark.slow


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


LEFT_ALONE = {scenario: UNEVEN[scenario] for scenario in ("uneven", "nothing on rank 1", "nothing on rank 0")}


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
    before, modes = buffers_of(model), Everything(model).state()["modes"]
    outcome: dict[str, Any] = {"before": before, "error": None}
    try:
        result = recalibrate(root, generate(), forward, all_ranks=scenario != "alone")
        outcome |= {"text": str(result), "count": result.num_batches, "left_alone": result.left_alone}
        outcome |= {"after": result.after.to_dict(), "num_samples": [x.num_samples for x in result.after.values()]}
        outcome |= {"flags": [x.flags for x in result.after.values()]}
        outcome["layer"] = copy.deepcopy(model[0])
        outcome["written"] = buffers_of(model)
        result.restore()
    except BaseException as error:
        outcome["error"] = repr(error)
    outcome["buffers"] = buffers_of(model)
    assert Everything(model).state()["modes"] == modes
    if scenario in WRAPPED:  # it sends buffers in each training step, as before
        assert root.require_forward_param_sync
    return outcome


def equal_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, C, generator=generator) for _ in range(64)]


def noise_of(model: nn.Sequential, batches: list[Tensor]) -> dict[str, Any]:
    after = recalibrate(model, batches).after["0"]
    words = {"verdict": after.verdict, "flags": after.flags}
    return {"noise": after.evidence["noise_error"], "stderr": after.running_mean_stderr, **words}


def synchronised(rank: int) -> dict[str, Any]:
    """SyncBatchNorm on the CPU, which it does not take."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ranked(rank))
    before = buffers_of(model)
    with pytest.raises(RuntimeError) as caught:
        recalibrate(model, share(rank, [8, 8]))
    return {"error": str(caught.value), "unchanged": buffers_of(model) == before}


def left_alone(rank: int, sizes: list[int]) -> dict[str, Any]:
    """A stale layer, what is said of it, and by whom."""
    model = ranked(0)
    model[0].momentum = 0.0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = recalibrate(model, share(rank, sizes))
    return {"misfits": result.misfits, "warnings": len(warned)}


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
    results["noise"] = noise_of(ranked(0), equal_batches()[rank::2])
    results["left alone"] = {scenario: left_alone(rank, sizes[rank]) for scenario, sizes in LEFT_ALONE.items()}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(run_rank, str(folder), world_size=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_the_noise_is_that_of_all_ranks_data_not_of_one_ranks(both_ranks: list[dict[str, Any]]) -> None:
    alone = noise_of(ranked(0), equal_batches())
    for rank in both_ranks:
        assert rank["noise"]["noise"] == pytest.approx(alone["noise"], rel=0.15)
        np.testing.assert_allclose(rank["noise"]["stderr"].mean(), alone["stderr"].mean(), rtol=0.15)
        assert rank["noise"]["verdict"] == alone["verdict"] == "healthy"
        assert rank["noise"]["flags"] == alone["flags"] == ()
    # Of 1024 independent standard normal values, the mean is off by 1/32, half the log of the variance by 1/sqrt(2048).
    assert alone["noise"] == pytest.approx(math.hypot(1 / 32, 1 / math.sqrt(2048)), rel=0.25)


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
        assert outcome["flags"] == [()]  # also where this rank had no batch
        assert_written(outcome["layer"], union)
        torch.testing.assert_close(outcome["layer"].running_var, alone[0].running_var, rtol=2e-7, atol=0)
        assert outcome["buffers"] == outcome["before"]  # restored, each rank its own
    one, other = (result[scenario] for result in both_ranks)
    assert one["written"] == other["written"]
    assert one["after"] == other["after"]


@pytest.mark.parametrize("scenario", LEFT_ALONE)
def test_what_is_left_alone_is_compared_with_the_data_of_all_ranks_and_rank_0_warns(
    both_ranks: list[dict[str, Any]], scenario: str
) -> None:
    union = [x for rank in range(2) for x in share(rank, LEFT_ALONE[scenario][rank])]
    expected = {"0": error_in_eval(ranked(0)[0], union)}
    for rank, result in enumerate(both_ranks):
        assert result["left alone"][scenario]["misfits"] == pytest.approx(expected, rel=0.02)
        assert result["left alone"][scenario]["warnings"] == (rank == 0)


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
