"""Several gloo processes, started for real: one report of all ranks, the same on each, and no rank left waiting."""

from __future__ import annotations

import datetime
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_bnmonitor import BatchNormTracker, Report
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer
from tests import processes
from tests.tracking.batches_of_ranks import EPS, data, feed, model, two_pass

# What every rank gives to every layer, by scenario. The layers are called one after the other, batch by batch.
SIZES = {
    "equal": lambda rank, layer: [8] * 40,
    "uneven shards": lambda rank, layer: [3 + rank + t % 4 for t in range(30 + 9 * rank)],
    "unused on one rank": lambda rank, layer: [8] * (0 if layer == "b" and rank == 1 else 20),
    "unused on rank 0": lambda rank, layer: [8] * (0 if layer == "b" and rank == 0 else 20),
    "unused on all": lambda rank, layer: [8] * (0 if layer == "b" else 20),
    "one rank without batches": lambda rank, layer: [8] * (20 if rank == 0 else 0),
    "rank 0 without batches": lambda rank, layer: [8] * (20 if rank else 0),
    "no batches": lambda rank, layer: [],
    "a single value": lambda rank, layer: [1] if layer == "b" and rank == 1 else [],
    "only other ranks, other data": lambda rank, layer: [8] * (0 if layer == "b" and rank == 0 else 20),
    "other data": lambda rank, layer: [16] * 40,
    "a little other data": lambda rank, layer: [16] * 40,
    "far from zero": lambda rank, layer: [16] * 20,
    "nan": lambda rank, layer: [8] * 20,
}
MEANS = {"only other ranks, other data": 1.0, "other data": 1.0, "a little other data": 0.02, "far from zero": 1e4}


def batches(scenario, rank, layer):
    mean = 1e4 if scenario == "far from zero" else MEANS.get(scenario, 0.0) * rank
    received = data(rank, layer, SIZES[scenario](rank, layer), mean)
    if scenario == "nan" and layer == "a" and rank == 1:
        received[6][0, 3] = torch.nan
    return received


class Counted:
    """Every collective that is called in this process, by name."""

    def __init__(self):
        self.names = []
        self.originals = {name: getattr(dist, name) for name in ("gather", "broadcast", "all_gather", "all_reduce")}

    def __enter__(self):
        for name in self.originals:
            setattr(dist, name, self.wrapped(name))
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def wrapped(self, name):
        def collective(tensor, *args, **kwargs):
            self.names.append((name, tensor.numel()))
            return self.originals[name](tensor, *args, **kwargs)

        return collective


def window(scenario, rank, windows=1):
    """The reports of a rank's windows, what it communicated, and its report before each window's end."""
    layers, received = model(), {name: batches(scenario, rank, name) for name in "abc"}
    reports, alone, collectives = [], [], []
    with BatchNormTracker(layers, capture="pass") as tracker:
        for index in range(windows):
            if index:
                tracker.reset()
            feed(layers, received)
            with Counted() as counted:
                alone.append(tracker.report())
                tracker.state_dict()
            assert not counted.names
            with Counted() as counted:
                reports.append(tracker.close(all_ranks=True))
                assert tracker.close(all_ranks=True) is tracker.report() is reports[-1]
            collectives.append(counted.names)
    return {"reports": reports, "alone": alone, "collectives": collectives}


def rank_that_fails(rank):
    """Rank 0 fails between the two collectives."""
    layers = model()
    with BatchNormTracker(layers) as tracker:
        layers["a"](torch.randn(8, 5))
        if rank == 0:
            TrackedLayer.name = property(lambda self: 1 / 0, lambda self, value: None)
            from lightning_bnmonitor.tracking import assessment

            assessment.distances = None
        try:
            tracker.close(all_ranks=True)
        except BaseException as error:
            return repr(error)
        finally:
            if rank == 0:
                del TrackedLayer.name
    return "no error"


def rank_that_fails_after_validation(rank):
    """Rank 0 fails between the two collectives of a validation."""
    layers = model()
    with BatchNormTracker(layers) as tracker:
        layers["a"](torch.randn(8, 5))
        tracker.close(all_ranks=True)
        tracker.start_validation()
        layers.eval()
        layers["a"](torch.randn(8, 5))
        if rank == 0:
            from lightning_bnmonitor.tracking import validation

            validation.pool = None
        try:
            tracker.validation_report(all_ranks=True)
        except BaseException as error:
            return repr(error)
    return "no error"


def validated_in_mid_window(rank):
    """What validation is said to be off by while the window goes on, in which each rank has received other data."""
    layers = model()
    with BatchNormTracker(layers) as tracker:
        for _ in range(20):
            layers["a"](torch.randn(8, 5) + 3 * rank)
        layers.eval()
        tracker.start_validation()
        for _ in range(5):
            layers["a"](torch.randn(8, 5) + 1)
        report = tracker.validation_report(all_ranks=True)
    return {name: layer.evidence.get("val_shift") for name, layer in report.items()}


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {scenario: window(scenario, rank) for scenario in SIZES}
    results["several windows"] = window("uneven shards", rank, windows=3)
    results["in mid-window"] = validated_in_mid_window(rank)
    results["failure after validation"] = rank_that_fails_after_validation(rank)
    results["failure"] = rank_that_fails(rank)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.start(run_rank, request.param, str(folder), world_size=request.param)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(request.param)]


@pytest.mark.parametrize("scenario", SIZES)
def test_the_population_is_that_of_one_process_over_the_union_of_the_data(ranks, scenario):
    for name in "abc":
        shares = [batches(scenario, rank, name) for rank in range(len(ranks))]
        count, mean, var = two_pass([x for share in shares for x in share])
        for result in ranks:
            (report,) = result[scenario]["reports"]
            layer = report[name]
            assert layer.num_samples == count
            assert layer.num_batches == len(shares[0])
            if not count:
                assert layer.population_mean.isnan().all()
                assert layer.population_var.isnan().all()
                continue
            fine = np.isfinite(mean)
            assert (layer.population_mean.isnan().numpy() == ~fine).all()
            deviation = 1.0 if var is None else np.sqrt(var[fine])
            # Batch means come in float64, to float32's rounding of the differences from them.
            error = np.abs(layer.population_mean.numpy() - mean)[fine] / deviation
            assert (error < 1e-6).all()
            if var is not None:
                np.testing.assert_allclose(layer.population_var.numpy()[fine], var[fine], rtol=1e-5)


@pytest.mark.parametrize("scenario", SIZES)
def test_ranks_are_merged_as_if_their_moments_were_of_one_process(ranks, scenario):
    # Against the moments that the ranks found alone, merged by hand: nothing but float64 rounding lies between.
    for name in "abc":
        parts = [result[scenario]["alone"][0][name] for result in ranks]
        n = np.array([part.num_samples for part in parts], dtype=np.float64)[:, None]
        used = n[:, 0] > 0
        if not used.any():
            continue
        n, parts = n[used], [part for part, is_used in zip(parts, used, strict=True) if is_used]
        mean = np.stack([part.population_mean.numpy() for part in parts])
        var = np.nan_to_num(np.stack([part.population_var.numpy() for part in parts]))
        centre = (n * mean).sum(axis=0) / n.sum()
        merged = ((n - 1) * var + n * (mean - centre) ** 2).sum(axis=0) / max(n.sum() - 1, 1)
        layer = ranks[0][scenario]["reports"][0][name]
        np.testing.assert_allclose(layer.population_mean.numpy(), centre, rtol=1e-12, atol=1e-14)
        if n.sum() > 1 and np.isfinite(centre).all():
            np.testing.assert_allclose(
                layer.population_var.numpy(), merged, rtol=1e-12 if scenario != "far from zero" else 1e-7
            )


@pytest.mark.parametrize("scenario", [*SIZES, "several windows"])
def test_the_reports_of_all_ranks_are_identical(ranks, scenario):
    first, *others = [result[scenario]["reports"] for result in ranks]
    for reports in others:
        assert [report.to_dict() for report in reports] == [report.to_dict() for report in first]
        assert [str(report) for report in reports] == [str(report) for report in first]
        assert [list(report) for report in reports] == [list(report) for report in first]
    assert all(report.rank is None for report in first)


@pytest.mark.parametrize("scenario", [*SIZES, "several windows"])
def test_two_collectives_a_window_of_sizes_that_grow_with_channels_and_nothing_else(ranks, scenario):
    for result in ranks:
        for collectives in result[scenario]["collectives"]:
            assert [name for name, _ in collectives] == ["gather", "broadcast"]
            assert collectives[0][1] == 7 * 10 + 6 * 3 + 1  # channels and layers
            assert collectives[1][1] < 10 * 10 + 150 * 3


@pytest.mark.parametrize("scenario", SIZES)
def test_the_numbers_are_those_of_rank_0(ranks, scenario):
    (alone,) = ranks[0][scenario]["alone"]
    for layer in ranks[0][scenario]["reports"][0].values():
        own = alone[layer.name]
        for field in ("running_mean", "running_var", "z_mean", "z_var"):
            assert torch.equal(getattr(layer, field), getattr(own, field)) or layer.num_samples == 0
        if own.num_batches > 1:
            assert torch.equal(layer.now_mean, own.now_mean) or scenario == "nan"
        if own.num_batches:
            for number in ("batches", "noise_error", "calls_pass", "jitter"):
                assert layer.evidence.get(number) == own.evidence.get(number)
        assert layer.evidence["ranks"] == len(ranks)


def test_a_report_in_mid_window_tells_of_this_rank_and_says_so(ranks):
    for rank, result in enumerate(ranks):
        (alone,), (merged,) = result["equal"]["alone"], result["equal"]["reports"]
        assert alone.rank == rank
        assert alone.to_dict()["rank"] == rank
        assert f"(rank {rank} alone)" in str(alone).splitlines()[0]
        assert "rank" not in str(merged)
        assert alone["a"].num_samples == 8 * 40
        assert "ranks" not in alone["a"].evidence


def test_data_that_are_other_on_rank_0_are_flagged_with_how_far_off_they_are(ranks):
    (report,) = ranks[0]["other data"]["reports"]
    for layer in report.values():
        shares = [batches("other data", rank, layer.name) for rank in range(len(ranks))]
        _, mean, var = two_pass([x for share in shares for x in share])
        _, own_mean, _ = two_pass(shares[0])
        assert layer.flags == ("rank-0-only",)
        assert layer.needs_attention
        # The ranks' batch variances are alike, only their means are not.
        apart = np.sqrt(np.mean((own_mean - mean) ** 2 / (var + EPS)))
        assert layer.evidence["rank_error"] == pytest.approx(apart, rel=0.1)
        assert apart > 0.3
        assert "What rank 0 received is" in layer.explanation
        assert f"all {len(ranks)} ranks" in layer.explanation
        assert "DistributedSampler" in layer.remedy


@pytest.mark.parametrize("scenario", ["equal", "uneven shards", "a little other data", "far from zero"])
def test_ranks_that_differ_by_chance_or_by_little_are_not_flagged(ranks, scenario):
    for layer in ranks[0][scenario]["reports"][0].values():
        assert "rank-0-only" not in layer.flags
        assert layer.evidence["rank_error"] < 0.1


@pytest.mark.parametrize("scenario", ["unused on rank 0", "only other ranks, other data"])
def test_a_layer_that_only_other_ranks_call_is_measured_by_what_they_received(ranks, scenario):
    (report,) = ranks[0][scenario]["reports"]
    layer = report["b"]
    assert layer.verdict == "unused"
    assert layer.num_batches == 0
    assert layer.num_samples == 8 * 16 * 20 * (len(ranks) - 1)
    assert list(report)[-1] == "b"
    received = [x for rank in range(1, len(ranks)) for x in batches(scenario, rank, "b")]
    _, mean, var = two_pass(received)
    # Its statistics are the initial 0 and 1, which are right for standard normal data and for no other.
    exact = np.sqrt(np.mean((1 / np.sqrt(1 + EPS) - 1 / np.sqrt(var + EPS)) ** 2 * var + mean**2 / (1 + EPS)))
    assert layer.evidence["rank_error"] == layer.evidence["eval_error"] == pytest.approx(exact, rel=1e-3)
    is_wrong = scenario == "only other ranks, other data"
    assert (exact > 0.5) == is_wrong
    assert layer.flags == ("rank-0-only",) * is_wrong
    assert layer.needs_attention == is_wrong


def test_nan_on_another_rank_is_known_with_its_batch_and_channel(ranks):
    for result in ranks:
        layer = result["nan"]["reports"][0]["a"]
        assert layer.verdict == "non-finite"
        assert (layer.evidence["first_bad_batch"], layer.evidence["first_bad_channel"]) == (7, 3)
        assert layer.population_mean.isnan().tolist() == [False, False, False, True, False]


def test_windows_go_on_on_every_rank(ranks):
    for result in ranks:
        reports = result["several windows"]["reports"]
        assert [report["a"].num_batches for report in reports] == [30] * 3
        assert [report["a"].evidence["initial_weight"] for report in reports] == [
            pytest.approx(0.9 ** (30 * windows)) for windows in (1, 2, 3)
        ]
        assert len({report["a"].num_samples for report in reports}) == 1


def test_validation_in_mid_window_is_compared_with_what_rank_0_has_received(ranks):
    assert 0.5 < ranks[0]["in mid-window"]["a"] < 2  # the mean is off by 1; of what rank 1 has received by 2
    for result in ranks[1:]:
        assert result["in mid-window"] == ranks[0]["in mid-window"]


@pytest.mark.parametrize("failure", ["failure", "failure after validation"])
def test_if_rank_0_fails_all_do(ranks, failure):
    assert "TypeError" in ranks[0][failure]
    for result in ranks[1:]:
        assert "Rank 0 could not report" in result[failure]


def test_without_a_process_group_all_ranks_are_this_one():
    layers = model()
    with BatchNormTracker(layers) as tracker:
        layers["a"](torch.randn(8, 5))
    report = tracker.close(all_ranks=True)
    assert isinstance(report, Report)
    assert report.rank is None
    assert "ranks" not in report["a"].evidence


def run_until_one_dies(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/dead", rank=rank, world_size=2)
    layers = model()
    with BatchNormTracker(layers) as tracker:
        layers["a"](torch.randn(8, 5))
        tracker.close(all_ranks=True)
        tracker.reset()
        layers["a"](torch.randn(8, 5))
        if rank == 1:
            os._exit(3)
        try:
            tracker.close(all_ranks=True)
        except RuntimeError as error:
            # What was seen is not lost: this rank can still tell.
            report = tracker.report()
            Path(folder, "error").write_text(f"{type(error).__name__} {report.rank} {report['a'].num_samples}")
    os._exit(0)  # the process group can no longer be left in order


@pytest.mark.slow
def test_a_rank_that_dies_gives_the_others_an_error_and_loses_nothing(tmp_path):
    ranks = [processes.CONTEXT.Process(target=run_until_one_dies, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    hangs = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
    assert not any(hangs)
    assert (tmp_path / "error").read_text().split()[1:] == ["0", "8"]
