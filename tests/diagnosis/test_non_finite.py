"""Values that are not finite: named with their place, and a matter of their channels alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from tests.diagnosis.monitored_layers import WIDTH, frozen, norm, samples
from tests.diagnosis.symptoms import INF, NAN, words_are_sound

BAD = {
    # value and place (batch, sample, channel) each
    "NaN": [(NAN, 3, 5, 4)],
    "inf": [(INF, 3, 5, 4)],
    "-inf": [(-INF, 0, 0, 15)],
    "last batch": [(NAN, 39, 7, 1)],
    "first channel": [(NAN, 2, 0, 0)],
    "several": [(INF, 30, 1, 0), (NAN, 12, 3, 9), (NAN, 12, 4, 7), (-INF, 20, 4, 7), (NAN, 13, 0, 2)],
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("positions", [(), (3, 3)])
def test_a_value_that_is_not_finite_is_named_and_costs_its_channels_alone(case, positions):
    model = nn.ModuleDict({name: (nn.BatchNorm2d if positions else norm)(WIDTH) for name in ("hit", "other")})
    twin = nn.ModuleDict({name: (nn.BatchNorm2d if positions else norm)(WIDTH) for name in ("hit", "other")})
    data, others = (samples(40, 16, positions=positions, offset=1.0, seed=seed) for seed in (0, 1))
    dirty = [x.clone() for x in data]
    for value, batch, sample, channel in BAD[case]:
        dirty[batch][(sample, channel, *[1] * len(positions))] = value
    with BatchNormTracker(model) as tracker, BatchNormTracker(twin) as clean:
        for x, y, z in zip(dirty, data, others, strict=True):
            model["hit"](x), model["other"](z), twin["hit"](y), twin["other"](z)
    report, expected = tracker.report(), clean.report()
    hit, reference = report["hit"], expected["hit"]
    assert (hit.verdict, hit.needs_attention, hit.flags) == ("non-finite", True, ())
    _, batch, _, channel = min(BAD[case], key=lambda bad: (bad[1], bad[3]))
    assert hit.evidence["first_bad_batch"] == batch + 1
    assert hit.evidence["first_bad_channel"] == channel
    assert f"first in batch {batch + 1} of this window, channel {channel}" in hit.explanation
    channels = sorted({bad[3] for bad in BAD[case]})
    assert hit.evidence["non_finite_channels"] == hit.evidence["non_finite_running_stats"] == len(channels)
    assert f"{len(channels)} of {WIDTH} channels are not finite" in hit.explanation
    assert hit.evidence["eval_error"] == hit.summary()["eval_error"] == INF
    assert report.summary()["eval_error_max"] == INF
    words_are_sound(hit.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)

    spared = [channel for channel in range(WIDTH) if channel not in channels]
    for field in ("population_mean", "population_var", "running_mean", "running_var", "act_rmse", "z_mean", "z_var"):
        assert torch.equal(getattr(hit, field)[spared], getattr(reference, field)[spared]), field
        if not field.startswith(("running", "z")):
            assert getattr(hit, field)[channels].isnan().all(), field
    assert hit.eval_error[channels].isposinf().all()
    assert hit.eval_error[spared].isfinite().all()
    assert report["other"].to_dict() == expected["other"].to_dict()
    assert report["other"].verdict == "healthy"


def test_what_is_now_is_that_of_the_layer_without_its_bad_channel():
    keep = [channel for channel in range(WIDTH) if channel != 4]
    data = samples(40, 16, drift=0.05)
    dirty = [x.clone() for x in data]
    dirty[3][5, 4] = NAN
    model, twin = nn.ModuleDict({"bn": norm()}), nn.ModuleDict({"bn": norm(WIDTH - 1)})
    with BatchNormTracker(model, capture="pass") as tracker, BatchNormTracker(twin, capture="pass") as clean:
        for x, y in zip(dirty, data, strict=True):
            model["bn"](x), twin["bn"](y[:, keep])
    hit, reference = tracker.report()["bn"], clean.report()["bn"]
    np.testing.assert_allclose(hit.now_mean[keep], reference.now_mean, rtol=1e-5)
    np.testing.assert_allclose(hit.now_var[keep], reference.now_var, rtol=1e-5)
    for name in ("noise_error", "lag_error", "drift_error", "jitter", "ordering_ratio", "grouping_ratio", "z_mean"):
        assert hit.evidence[name] == pytest.approx(reference.evidence[name], rel=1e-4, abs=1e-7), name


def test_not_finite_is_the_verdict_until_the_buffers_are_repaired(monitored):
    one = monitored(norm())
    data = samples(40, 16, offset=1.0)
    data[7][3, 11] = NAN
    assert one.window(data).verdict == "non-finite"
    for seed in (1, 2):
        data = samples(40, 16, offset=1.0, seed=seed)
        report = one.window(data)
        assert (report.verdict, report.needs_attention) == ("non-finite", True)
        assert report.evidence["eval_error"] == INF
        assert report.evidence["non_finite_running_stats"] == 1
        assert (report.evidence["first_bad_batch"], report.evidence["bad_windows_ago"]) == (8, seed)
        assert "Call `layer.reset_running_stats()` and recompute" in report.remedy
        words_are_sound(report.diagnosis)
        x = torch.cat(data).double()
        np.testing.assert_allclose(report.population_mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(report.population_var, x.var(0), rtol=1e-6)
        assert report.now_mean.isfinite().all()
    one.layer.reset_running_stats()
    report = one.window(samples(80, 16, offset=1.0, seed=3))
    assert (report.verdict, report.flags) == ("healthy", ("written-outside",))
    assert report.evidence["eval_error"] < 0.2
    assert report.evidence["non_finite_channels"] == 0
    assert one.window(samples(40, 16, offset=1.0, seed=4)).flags == ()


def test_a_frozen_layer_that_received_nan_has_buffers_that_are_fine(monitored):
    one = monitored(frozen(norm()))
    data = samples(10, 16)
    data[4][3, 2] = INF
    report = one.window(data)
    assert report.verdict == "non-finite"
    assert (report.evidence["non_finite_channels"], report.evidence["non_finite_running_stats"]) == (1, 0)
    assert math.isfinite(report.evidence["eval_error"])
    assert "reset_running_stats" not in report.remedy
    words_are_sound(report.diagnosis)
    assert one.window(samples(10, 16)).verdict == "frozen"


def test_a_layer_without_running_statistics_recovers_by_itself(monitored):
    one = monitored(norm(track_running_stats=False))
    data = samples(10, 16)
    data[4][3, 2] = NAN
    assert one.window(data).verdict == "non-finite"
    assert one.window(samples(10, 16)).verdict == "no-running-stats"


def test_buffers_that_are_broken_before_the_first_call_are_reported(monitored):
    layer = norm()
    layer.running_var[3] = NAN
    one = monitored(layer)
    report = one.closed()
    assert (report.verdict, report.num_batches) == ("non-finite", 0)
    assert report.evidence["non_finite_running_stats"] == 1
    assert math.isnan(report.summary()["eval_error"])


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_first_bad_batch_is_known_until_what_it_has_left_is_repaired(is_resumed):
    model = nn.ModuleDict({"hit": norm(WIDTH)})
    tracker = BatchNormTracker(model).attach()
    told = []
    for window in range(6):
        tracker.reset()
        batches = samples(20, 16, seed=window)
        if window in (1, 2):
            batches[4 if window == 1 else 2][3, 7] = NAN
        if window == 4:
            model["hit"].reset_running_stats()
            tracker.reset()
        for number, x in enumerate(batches):
            if is_resumed and number == 10:
                state = tracker.state_dict()
                tracker.detach()
                tracker = BatchNormTracker(model).attach()
                tracker.load_state_dict(state)
            model["hit"](x)
        layer = tracker.close()["hit"]
        names = ("first_bad_batch", "first_bad_channel", "bad_windows_ago")
        told.append([layer.evidence.get(name) for name in names])
        words_are_sound(layer.diagnosis)
        assert (layer.verdict == "non-finite") == (window in (1, 2, 3))
        if window == 2:
            assert "1 window ago: first in batch 5 of that, channel 7." in layer.explanation
        if window == 3:
            assert "2 windows ago: first in batch 5 of that, channel 7." in layer.explanation
            assert "Find what made the values" in layer.remedy
    nothing = [None] * 3
    assert told == [nothing, [5, 7, None], [5, 7, 1], [5, 7, 2], nothing, nothing]
    tracker.detach()
