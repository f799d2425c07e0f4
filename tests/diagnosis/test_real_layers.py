"""Verdicts on real layers in every condition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.diagnosis.monitored_layers import WIDTH, frozen, moved, norm, pretrained, samples, unmoved
from tests.diagnosis.symptoms import NAN, words_are_sound

REAL = {
    "healthy": ("healthy", lambda: norm(), lambda: samples(100, 64)),
    "healthy, on images": (
        "healthy",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 4, positions=(5, 5), offset=2.0),
    ),
    "healthy, of a cumulative average": ("healthy", lambda: norm(momentum=None), lambda: samples(100, 16, offset=2.0)),
    "healthy, pretrained": ("healthy", lambda: pretrained(0.0, momentum=0.01), lambda: samples(40, 64)),
    "unused": ("unused", lambda: norm(), lambda: []),
    "no-running-stats": (
        "no-running-stats",
        lambda: norm(track_running_stats=False),
        lambda: samples(40, 16, offset=2.0),
    ),
    "stale, right": ("stale", lambda: unmoved(norm()), lambda: samples(40, 64)),
    "stale, wrong": ("stale", lambda: unmoved(norm()), lambda: samples(40, 64, offset=2.0)),
    "stale by momentum, wrong": ("stale", lambda: norm(momentum=0.0), lambda: samples(40, 64, offset=2.0)),
    "stale by momentum, right": ("stale", lambda: norm(momentum=0.0), lambda: samples(40, 64)),
    "stale by one batch, wrong": ("stale", lambda: unmoved(norm()), lambda: samples(1, 64, offset=2.0)),
    "frozen, right": ("frozen", lambda: frozen(norm()), lambda: samples(40, 64)),
    "frozen, wrong": ("frozen", lambda: frozen(norm()), lambda: samples(40, 64, offset=2.0)),
    "insufficient-data, 1": ("insufficient-data", lambda: norm(), lambda: samples(1, 64)),
    "insufficient-data, 2": ("insufficient-data", lambda: norm(), lambda: samples(2, 64)),
    "insufficient-data, 7": ("insufficient-data", lambda: norm(), lambda: samples(7, 64)),
    "warming-up at once, 1": ("warming-up", lambda: norm(), lambda: samples(1, 64, offset=2.0)),
    "warming-up at once, 2": ("warming-up", lambda: norm(), lambda: samples(2, 64, offset=2.0)),
    "warming-up at once, 7": ("warming-up", lambda: norm(), lambda: samples(7, 64, offset=2.0)),
    "far at once, 1": ("lagging", lambda: pretrained(2.0), lambda: samples(1, 64)),
    "far at once, 7": ("lagging", lambda: pretrained(2.0, momentum=0.01), lambda: samples(7, 64)),
    "enough data": ("warming-up", lambda: norm(), lambda: samples(8, 64, offset=2.0)),
    "tiny-batch, 2": ("tiny-batch", lambda: norm(), lambda: samples(100, 2)),
    "tiny-batch, 4": ("tiny-batch", lambda: norm(), lambda: samples(100, 4)),
    "not tiny-batch, 5": ("noisy", lambda: norm(), lambda: samples(100, 5)),
    "not tiny-batch, of positions": (
        "healthy",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 2, positions=(8, 8)),
    ),
    "ordered-batches": ("ordered-batches", lambda: norm(), lambda: samples(100, 32, classes=(0.0, 2.0, -1.0, 1.0))),
    "ordered-batches, on images": (
        "ordered-batches",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(60, 8, positions=(3, 3), classes=(1.0, -1.0, 1.0)),
    ),
    "grouped-batches": ("grouped-batches", lambda: norm(), lambda: samples(100, 32, shared=0.5)),
    "grouped-batches, on images": (
        "grouped-batches",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 16, positions=(3, 3), shared=0.6),
    ),
    "warming-up": ("warming-up", lambda: norm(momentum=0.001), lambda: samples(100, 64, offset=2.0)),
    "lagging, pretrained": ("lagging", lambda: pretrained(2.0, momentum=0.01), lambda: samples(100, 64)),
    "lagging, cumulative": ("lagging", lambda: pretrained(1.0, momentum=None), lambda: samples(100, 64)),
    "lagging behind weights": (
        "lagging",
        lambda: moved(pretrained(0.0, momentum=0.02), 0.01),
        lambda: samples(200, 64),
    ),
    "ordered, a drift": ("ordered-batches", lambda: norm(momentum=0.02), lambda: samples(200, 64, drift=0.01)),
    "noisy": ("noisy", lambda: norm(momentum=0.5), lambda: samples(100, 16)),
    "noisy at momentum 1": ("noisy", lambda: norm(momentum=1.0), lambda: samples(100, 32)),
    "drifting": ("drifting", lambda: moved(norm(momentum=0.5), 0.01), lambda: samples(100, 256)),
}


@pytest.mark.parametrize("case", REAL)
def test_the_verdict_on_a_real_layer(case, monitored):
    verdict, make, batches = REAL[case]
    data = batches()
    report = monitored(make()).window(data)
    assert report.verdict == verdict, report.evidence
    assert report.flags == (("not-updating",) if verdict == "stale" else ())
    assert report.needs_attention == (
        "wrong" in case
        or verdict in ("tiny-batch", "ordered-batches", "grouped-batches", "warming-up", "lagging", "noisy")
    )
    assert report.explanation.startswith(f"0: {verdict}. ")
    words_are_sound(report.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)
    if data:
        assert report.evidence.get("eval_error", NAN) == pytest.approx(report.summary()["eval_error"], nan_ok=True)
        assert (report.num_batches, report.num_samples) == (len(data), sum(x.numel() // WIDTH for x in data))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("momentum", "batch_size"), [(0.1, 64), (0.01, 32), (None, 16)])
def test_a_stationary_layer_is_healthy_in_every_window(monitored, seed, momentum, batch_size):
    layer = monitored(pretrained(0.0, momentum=momentum))
    for window in range(3):
        report = layer.window(samples(24, batch_size, seed=100 * seed + window))
        assert report.verdict == "healthy", report.evidence
        assert report.flags == ()


def test_evidence_is_that_of_the_data(monitored):
    data = [*samples(20, 24, positions=(2,)), *samples(1, 8, positions=(2,))]
    report = monitored(norm(momentum=0.2)).window(data)
    evidence = report.evidence
    assert evidence["batches"] == evidence["calls_saved"] == 21
    assert evidence["samples_per_batch"] == pytest.approx((20 * 48 + 16) / 21)
    assert evidence["batch_size"] == pytest.approx((20 * 24 + 8) / 21)
    assert (evidence["momentum"], evidence["effective_momentum"]) == (0.2, 0.2)
    assert evidence["initial_weight"] == pytest.approx(0.8**21)
    weights = 0.2 * 0.8 ** np.arange(20, -1, -1)
    noise = (weights**2 / [*[48] * 20, 16]).sum()
    assert evidence["noise_error"] == pytest.approx(math.sqrt(1.5 * noise), rel=0.2)  # 1, and half for the variance
    assert evidence["jitter"] == pytest.approx(math.sqrt(1.5 / evidence["samples_per_batch"]), rel=0.2)
    assert evidence["severity"] == pytest.approx((evidence["eval_error"] / evidence["jitter"]) ** 2)


def test_a_drift_is_measured_in_what_it_moves_per_batch(monitored):
    evidence = monitored(norm(momentum=0.5)).window(samples(100, 256, drift=0.01)).evidence
    std = math.sqrt(1 + 100**2 * 0.01**2 / 12)  # over the whole window
    assert evidence["drift_per_batch"] == pytest.approx(0.01 / std, rel=0.05)
    assert evidence["drift_error"] == pytest.approx(0.5 / std, rel=0.1)


# Without running statistics of its own


def swapped(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Calls of the layer with buffers that are swapped in."""
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    return lambda x: torch.func.functional_call(layer, state, (x,))


def test_a_layer_called_with_other_buffers_is_stale_and_not_updating(monitored):
    layer = norm()
    one = monitored(layer)
    report = one.window(samples(40, 32, offset=2.0), swapped(layer))
    assert (report.verdict, report.flags, report.needs_attention) == ("stale", ("not-updating",), True)
    assert report.evidence["calls_not_updating"] == 40
    assert report.evidence["updates_per_call"] == 0
    assert layer.num_batches_tracked == 0
    words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, offset=2.0, seed=1))
    assert (report.verdict, report.flags) == ("healthy", ())


def test_a_layer_that_is_called_with_other_buffers_now_and_then_claims_nothing_of_weights(monitored):
    layer = norm()
    call, turn = swapped(layer), iter(range(40))
    report = monitored(layer).window(samples(40, 32), lambda x: call(x) if next(turn) % 4 == 0 else layer(x))
    assert (report.verdict, report.flags) == ("insufficient-data", ("not-updating",))
    assert report.evidence["calls_not_updating"] == 10
    words_are_sound(report.diagnosis)
    assert not report.z_mean.any()
    assert not report.z_var.any()


def test_a_layer_that_is_frozen_during_the_window_is_judged_by_what_it_learned(monitored):
    layer = norm()
    data = samples(60, 32)
    turn = iter(range(60))
    report = monitored(layer).window(data, lambda x: layer.train(next(turn) < 40)(x))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["batches"] == 40
    assert report.num_batches == 60


def test_remedies_of_a_layer_that_learns_no_statistics(monitored):
    one = monitored(unmoved(norm()))
    assert one.window(samples(40, 32, offset=2.0)).needs_attention
    one.layer.track_running_stats = True
    one.layer.momentum = 0.2
    assert one.window(samples(40, 32, offset=2.0)).verdict == "healthy"
    one = monitored(frozen(norm()))
    assert one.window(samples(40, 32, offset=2.0)).needs_attention
    one.layer.train()
    one.layer.momentum = 0.2
    assert one.window(samples(40, 32, offset=2.0)).verdict == "healthy"
