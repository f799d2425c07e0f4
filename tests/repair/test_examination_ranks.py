"""Examination on several ranks: one report of all their data, and no rank is left waiting."""

from __future__ import annotations

import datetime
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bnmonitor import examine, recalibrate
from tests import processes
from tests.repair.exact_population import C, assert_written, moments
from tests.repair.unchanged import Everything

pytestmark = pytest.mark.slow


def endless(rank: int, size: int = 64) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(20 + rank)
    while True:
        yield torch.randn(size, C, generator=generator) * (1 + rank) + rank


def share(rank: int, num: int) -> list[Tensor]:
    return list(itertools.islice(endless(rank), num))


# How many batches each rank has.
LENGTHS = {
    "auto, alike": (400, 400),
    "auto, one ends early": (5, 400),
    "auto, one ends between two looks": (400, 21),
    "auto, one has none": (0, 400),
    "auto, both end": (12, 30),
    "all, uneven": (7, 20),
    "evaluation": (20, 20),
    "evaluation, one has none": (20, 20),
    "wrapped": (400, 400),
}
FAILURES = {
    "forward fails on rank 0": 0,
    "forward fails on rank 1": 1,
    "data fail on rank 0": 0,
    "data fail on rank 1": 1,
    "evaluation fails on rank 0": 0,
    "evaluation fails on rank 1": 1,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 2), nn.BatchNorm1d(2))
    for x in share(0, 50):
        model(x)
    return model


def examined(scenario: str, rank: int, num: int) -> dict[str, Any]:
    model = network()
    root = DistributedDataParallel(model) if scenario == "wrapped" else model
    evaluation = None
    if scenario.startswith("evaluation"):
        evaluation = [] if "none" in scenario and rank else [x + 30 for x in share(rank, 9)]
    everything, taken = Everything(model), list[int]()

    def batches() -> Iterator[Tensor]:
        for x in share(rank, num):
            taken.append(len(x))
            yield x

    report = examine(root, batches(), evaluation, num_batches=None if scenario.startswith("all") else "auto")
    everything.assert_same()
    told = report.to_dict()
    first = next(iter(report.values()))
    return {"report": told, "first": told["layers"][first.name], "taken": len(taken), "means": first.population_mean}


def failing(scenario: str, rank: int) -> dict[str, Any]:
    model, here = network(), scenario.endswith(str(rank))
    everything, calls = Everything(model), list[int]()

    def batches() -> Iterator[Tensor]:
        yield from share(rank, 11)
        if scenario.startswith("data") and here:
            raise OSError("the disk is gone")
        yield from share(rank, 300)

    def forward(model: nn.Module, batch: Tensor) -> None:
        calls.append(1)
        model(batch)
        if scenario.startswith("forward") and here and len(calls) == 13:
            raise ArithmeticError("on purpose")
        if scenario.startswith("evaluation") and here and not model[0].training:
            raise ArithmeticError("on purpose")

    try:
        examine(model, batches(), share(rank, 3), forward)
    except RuntimeError as error:
        told = f"{error} {error.__cause__!r}"
    except OSError as error:
        told = str(error)
    everything.assert_same()
    return {"error": told, "here": here}


def reached_by_none(rank: int) -> str:
    """No layer is called, and one rank has no batch."""
    model = network()
    everything = Everything(model)
    with pytest.raises(ValueError, match="gave no batch that a BatchNorm layer received") as caught:
        examine(model, share(rank, 3 * rank), share(rank, 3), forward=lambda model, batch: None)
    everything.assert_same()
    return str(caught.value)


def recalibrated(rank: int) -> dict[str, Any]:
    model = network()
    result = recalibrate(model, share(rank, 400), num_batches="auto")
    return {"layer": model[0], "count": result.num_batches, "text": str(result)}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {name: examined(name, rank, num[rank]) for name, num in LENGTHS.items()}
    results |= {name: failing(name, rank) for name in FAILURES}
    results["reached by none"] = reached_by_none(rank)
    results["recalibrated"] = recalibrated(rank)
    results["alone"] = examine(network(), share(rank, 9), all_ranks=False)["0"].num_batches
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(run_rank, str(folder), world_size=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("scenario", LENGTHS)
def test_both_get_the_report_of_all_data(both_ranks: list[dict[str, Any]], scenario: str) -> None:
    one, other = (rank[scenario] for rank in both_ranks)
    for name, layer in one["report"]["layers"].items():
        theirs = other["report"]["layers"][name]
        # How many calls there were is each rank's own.
        assert {key: layer[key] for key in layer if key != "num_batches"} == {
            key: theirs[key] for key in theirs if key != "num_batches"
        }
    union = [x for rank in range(2) for x in share(rank, both_ranks[rank][scenario]["taken"])]
    mean, _ = moments(union)
    np.testing.assert_allclose(one["means"], mean, rtol=1e-6, atol=1e-6)
    assert one["first"]["num_samples"] == sum(map(len, union))
    assert one["report"]["rank"] is None


@pytest.mark.parametrize("scenario", [name for name in LENGTHS if name.startswith("auto") or name == "wrapped"])
def test_they_stop_together_as_soon_as_all_data_are_known_well_or_none_are_left(
    both_ranks: list[dict[str, Any]], scenario: str
) -> None:
    taken = [rank[scenario]["taken"] for rank in both_ranks]
    most = LENGTHS[scenario]
    ended = [num == length for num, length in zip(taken, most, strict=True)]
    if not any(ended):
        assert taken[0] == taken[1]
    for rank in both_ranks:
        remark, *_ = rank[scenario]["report"]["remarks"]
        assert f"{sum(taken)} batches with {64 * sum(taken)} samples" in remark
        assert ("the data ended" in remark) == all(ended) == (scenario == "auto, both end")
        noise = rank[scenario]["first"]["evidence"]["now_error"]
        assert (noise <= 0.011) == (scenario != "auto, both end")


def test_evaluation_is_that_of_all_ranks(both_ranks: list[dict[str, Any]]) -> None:
    for scenario, of_ranks in (("evaluation", (0, 1)), ("evaluation, one has none", (0,))):
        for rank in both_ranks:
            layer = rank[scenario]["first"]
            assert layer["evidence"]["val_batches"] == 9 * len(of_ranks)
            assert "domain-shift" in layer["flags"]


@pytest.mark.parametrize("scenario", FAILURES)
def test_if_one_fails_both_raise_and_both_models_are_as_they_were(
    both_ranks: list[dict[str, Any]], scenario: str
) -> None:
    for rank in both_ranks:
        told = rank[scenario]
        if told["here"]:
            assert "on purpose" in told["error"] or "the disk is gone" in told["error"]
        else:
            assert "Another rank could not run its batches" in told["error"]


def test_if_no_data_reach_a_layer_both_raise(both_ranks: list[dict[str, Any]]) -> None:
    assert both_ranks[0]["reached by none"] == both_ranks[1]["reached by none"]


def test_recalibrate_takes_as_many_on_both_and_writes_the_statistics_of_all(both_ranks: list[dict[str, Any]]) -> None:
    counts = [rank["recalibrated"]["count"] for rank in both_ranks]
    assert counts[0] == counts[1] < 400
    union = [x for rank in range(2) for x in share(rank, counts[rank])]
    for rank in both_ranks:
        assert_written(rank["recalibrated"]["layer"], union)
        assert f"{sum(counts)} batches with" in rank["recalibrated"]["text"]


def test_each_alone_if_asked(both_ranks: list[dict[str, Any]]) -> None:
    assert [rank["alone"] for rank in both_ranks] == [9, 9]
