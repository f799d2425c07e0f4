"""Groups of batches on several gloo processes: merged by name, whichever of them a rank has seen."""

from __future__ import annotations

import datetime
import itertools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_bnmonitor import BatchNormTracker
from tests import processes
from tests.tracking.batches_of_ranks import EPS, data, feed, model, two_pass
from tests.tracking.test_ranks import Counted

STEPS = 40
# Of each rank, the group of each of its batches; None: it tells of none.
GROUPS = {
    "the same": lambda rank: itertools.cycle("ab"),
    "some": lambda rank: itertools.cycle("ab" if rank == 0 else "bcd"),
    "a group a rank": lambda rank: itertools.repeat(f"rank {rank}"),
    "none on rank 0": lambda rank: itertools.cycle([None] if rank == 0 else "ab"),
    "none on rank 1": lambda rank: itertools.cycle("ab" if rank == 0 else [None]),
    "no batches on rank 1": lambda rank: itertools.cycle("ab"),
    "too many": lambda rank: itertools.cycle([f"{rank}.{index}" for index in range(6)]),
    "in order": lambda rank: itertools.chain("a" * (STEPS // 2), "b" * (STEPS // 2)),
    "none": lambda rank: itertools.repeat(None),
}
OFFSET = {"b": 1.0, "rank 1": 1.0}


def given(scenario, rank):
    """The group of each batch, and what each layer receives."""
    num = 0 if scenario == "no batches on rank 1" and rank == 1 else STEPS
    groups = list(itertools.islice(GROUPS[scenario](rank), num))
    received = {name: data(rank, name, [8] * num) for name in "abc"}
    for batches in received.values():
        for group, batch in zip(groups, batches, strict=True):
            batch += OFFSET.get(group, 0.0)
    return groups, received


def named(scenario, group):
    """A group, as it is told of: from the ninth on they are others."""
    return "other" if scenario == "too many" and group in ("1.2", "1.3", "1.4", "1.5") else group


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for scenario in GROUPS:
        layers, (groups, received) = model(), given(scenario, rank)
        with BatchNormTracker(layers, capture="pass") as tracker:
            for step, group in enumerate(groups):
                tracker.see_inputs((), group=group)
                feed(layers, {name: batches[step : step + 1] for name, batches in received.items()})
                tracker.step()
            with Counted() as counted:
                report = tracker.close(all_ranks=True)
        results[scenario] = report, counted.names
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(run_rank, 2, str(folder), world_size=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", GROUPS)
def test_groups_are_those_of_one_process_over_the_union_of_the_data(ranks, scenario):
    shares = [given(scenario, rank) for rank in range(2)]
    for layer in "abc":
        every = [
            (named(scenario, group), batch)
            for groups, received in shares
            for group, batch in zip(groups, received[layer], strict=True)
        ]
        _, of_all, var = two_pass([batch for _, batch in every])
        for report, _ in (result[scenario] for result in ranks):
            assert set(report[layer].groups) == {group for group, _ in every} - {None}
            for name, group in report[layer].groups.items():
                count, mean, own_var = two_pass([batch for its, batch in every if its == name])
                assert group.num_samples == count
                assert group.num_batches == sum(its == name for its, _ in every)
                np.testing.assert_allclose(group.mean.numpy(), mean, atol=1e-6)
                np.testing.assert_allclose(group.var.numpy(), own_var, rtol=1e-5)
                gain = np.sqrt(own_var + EPS) / np.sqrt(var + EPS) - 1
                shift = np.sqrt((gain**2 + (mean - of_all) ** 2 / (var + EPS)).mean())
                assert group.shift == pytest.approx(shift, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", GROUPS)
def test_the_reports_of_all_ranks_are_identical(ranks, scenario):
    (one, _), (other, _) = (result[scenario] for result in ranks)
    assert one.to_dict() == other.to_dict()
    assert str(one) == str(other)


@pytest.mark.slow
def test_the_group_that_differs_is_named(ranks):
    for scenario, name in [("the same", "b"), ("some", "b"), ("a group a rank", "rank 1"), ("none on rank 0", "b")]:
        layer = ranks[1][scenario][0]["a"]
        assert layer.verdict == "grouped-batches"
        assert re.search(rf"By group: .*'{name}' (is )?{layer.groups[name].shift:.3g} ", layer.explanation)


@pytest.mark.slow
def test_a_group_that_is_one_rank_s_own_is_mixed_with_the_others_and_one_after_another_is_not(ranks):
    apart, in_order = (ranks[0][scenario][0]["a"].groups for scenario in ("a group a rank", "in order"))
    assert all(group.noise < 0.2 for group in apart.values())
    assert all(math.isnan(group.noise) for group in in_order.values())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", GROUPS)
def test_two_more_collectives_with_groups_and_none_without(ranks, scenario):
    sizes = [[size for _, size in result[scenario][1]] for result in ranks]
    names = [[name for name, _ in result[scenario][1]] for result in ranks]
    assert names[0] == names[1] == ["gather", "broadcast"] * (1 if scenario == "none" else 2)
    assert sizes[0] == sizes[1]
    if scenario != "none":
        assert sizes[0][2] <= 9 * 4 * 10 + 9 * 2 * 3 + 200  # channels and layers
        assert sizes[0][3] <= sizes[0][1] + 9 * 2 * 10 + 9 * 4 * 3 + 200
