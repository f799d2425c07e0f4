"""Masks on two gloo processes: statistics without padding are those of what counted on both."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_bnmonitor import BatchNormTracker
from tests import processes
from tests.tracking.padded_models import Records, assert_unpadded, batches, lengths_to_mask, network
from tests.tracking.test_ranks import Counted

pytestmark = pytest.mark.slow
SCENARIOS = {
    "other data": lambda rank: batches(9 + 4 * rank, seed=rank, offset=1.0 + rank),
    "rank 0 without batches": lambda rank: batches(9 * rank, seed=rank),
    "rank 1 without masks": lambda rank: batches(9, seed=rank),
    "no batches": lambda rank: [],
}


def window(scenario, rank):
    model = network()
    records = Records(model)

    def mask(batch):
        return {} if scenario == "rank 1 without masks" and rank == 1 else lengths_to_mask(batch)

    with BatchNormTracker(model, mask=mask) as tracker:
        for batch in SCENARIOS[scenario](rank):
            tracker.see_inputs(batch)
            records.mask = lengths_to_mask(batch)
            model(batch[0])
            tracker.step()
        with Counted() as counted:
            report = tracker.close(all_ranks=True)
    return {"report": report, "values": (records.values, records.kept), "collectives": counted.names}


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    place = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **place)
    results = {scenario: window(scenario, rank) for scenario in SCENARIOS}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(run_rank, 2, str(folder), world_size=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_ranks_tell_the_same_in_three_collectives(ranks, scenario):
    one, other = (result[scenario] for result in ranks)
    assert one["report"].to_dict() == other["report"].to_dict()
    assert str(one["report"]) == str(other["report"])
    for result in (one, other):
        assert [name for name, _ in result["collectives"]] == ["gather", "gather", "broadcast"]
        assert result["collectives"][0][1] == 5 * 4 + 6 * (5 + 6 + 3 + 3)  # layers and channels


@pytest.mark.parametrize("scenario", ["other data", "rank 0 without batches", "rank 1 without masks"])
def test_without_padding_it_is_the_union_of_what_counted(ranks, scenario):
    report = ranks[0][scenario]["report"]
    together = Records(torch.nn.Sequential())
    for rank, result in enumerate(ranks):
        for into, values in zip((together.values, together.kept), result[scenario]["values"], strict=True):
            for name, its in values.items() if scenario != "rank 1 without masks" or rank == 0 else ():
                into.setdefault(name, []).extend(its)
    for name in ("1", "4", "7", "11"):
        assert_unpadded(report[name], together, name)
        assert report[name].evidence["padding_batches"] == len(together.values[name])


def test_where_there_were_no_batches_nothing_is_said(ranks):
    assert all(layer.unpadded is None for layer in ranks[1]["no batches"]["report"].values())
