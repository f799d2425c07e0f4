"""Odd input, odd precision and a momentum that changes: the report stays sensible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.diagnosis.monitored_layers import WIDTH, frozen, norm, samples
from tests.diagnosis.symptoms import words_are_sound


def test_batch_norms_own_error_comes_through_unchanged(monitored):
    def error_of(call) -> BaseException:
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            call(torch.randn(1, WIDTH))
        return caught.value

    plain = error_of(norm())
    one = monitored(norm())
    one.window(samples(10, 32))
    one.tracker.reset()
    for call in (one.model, one.layer):
        error = error_of(call)
        assert (type(error), error.args) == (type(plain), plain.args)
    report = one.tracker.report()["0"]
    assert report.num_batches == 0
    json.dumps(report.to_dict(), allow_nan=False)


def changing(layer: nn.BatchNorm1d, momenta: Iterable[float | None]) -> Callable[[Tensor], Tensor]:
    """Calls of a layer with one momentum after another."""
    left = iter(momenta)

    def call(x):
        layer.momentum = next(left)
        return layer(x)

    return call


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, WIDTH, 6, 6, generator=generator) for size in sizes]


ONE = [torch.zeros(2, WIDTH)]
ODD: dict[str, tuple[Callable[[], nn.Module], list[Tensor], set[str]]] = {
    "no batch": (norm, [], {"unused"}),
    "one batch": (norm, samples(1, 8), {"insufficient-data"}),
    "two batches": (norm, samples(2, 8), {"insufficient-data"}),
    "one batch of two zeros": (norm, ONE, {"insufficient-data"}),
    "three batches of momentum 1": (lambda: norm(momentum=1.0), samples(3, 8), {"insufficient-data"}),
    "constant": (norm, [torch.full((8, WIDTH), 3.0)] * 60, {"warming-up", "healthy"}),
    "constant, later": (lambda: norm(momentum=0.5), [torch.full((8, WIDTH), 3.0)] * 60, {"healthy"}),
    "zeros": (lambda: norm(momentum=0.5), [torch.zeros(8, WIDTH)] * 60, {"healthy"}),
    "the same batch again and again": (lambda: norm(momentum=0.5), samples(1, 64) * 60, {"healthy"}),
    "one dead channel": (norm, [x * (torch.arange(WIDTH) > 0) for x in samples(80, 64)], {"healthy"}),
    "one channel": (lambda: norm(1), samples(60, 64, 1), {"healthy"}),
    "one channel, two batches": (lambda: norm(1), samples(2, 64, 1), {"insufficient-data"}),
    "one channel of images": (lambda: nn.BatchNorm2d(1), samples(60, 4, 1, positions=(6, 6)), {"healthy"}),
    "one dead channel alone": (lambda: norm(1, momentum=0.5), [torch.zeros(8, 1)] * 60, {"healthy"}),
    "momentum 0": (lambda: norm(momentum=0.0), samples(60, 64), {"stale"}),
    "momentum 1": (lambda: norm(momentum=1.0), samples(60, 256), {"healthy"}),
    "momentum 1, small batches": (lambda: norm(momentum=1.0), samples(60, 16), {"noisy"}),
    "momentum None": (lambda: norm(momentum=None), samples(60, 64), {"healthy"}),
    "momentum None, two batches": (lambda: norm(momentum=None), samples(2, 64), {"insufficient-data"}),
    "one image among many": (lambda: nn.BatchNorm2d(WIDTH), images(*[16] * 50, 1, *[16] * 9), {"healthy"}),
    "one image at the end": (lambda: nn.BatchNorm2d(WIDTH), images(*[16] * 59, 1), {"healthy"}),
    "single images": (lambda: nn.BatchNorm2d(WIDTH), images(*[1] * 100), {"healthy"}),
    "sizes of all kinds": (lambda: nn.BatchNorm2d(WIDTH), images(*range(1, 61)), {"healthy"}),
    "volumes": (lambda: nn.BatchNorm3d(WIDTH), samples(60, 2, positions=(3, 4, 5)), {"healthy"}),
    "bfloat16": (lambda: norm(dtype=torch.bfloat16), [x.bfloat16() for x in samples(100, 64)], {"healthy"}),
    "float16": (lambda: norm(dtype=torch.float16), [x.half() for x in samples(100, 64)], {"healthy"}),
    "float64": (lambda: norm(dtype=torch.float64), [x.double() for x in samples(100, 64)], {"healthy"}),
    "large mean": (lambda: norm(momentum=0.2), samples(100, 64, offset=1e4), {"healthy"}),
    "large values": (lambda: norm(momentum=0.2), [1e15 * x for x in samples(150, 64)], {"healthy"}),
    "small values": (lambda: norm(momentum=0.2), [1e-4 * x for x in samples(100, 64)], {"healthy"}),
    "not affine": (lambda: norm(affine=False), samples(100, 64), {"healthy"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_input_gives_a_sensible_report(monitored, case):
    make, batches, verdicts = ODD[case]
    one = monitored(make())
    report = one.window(batches)
    again = one.window(batches)
    assert report.verdict in verdicts, report.evidence
    for part in (report, again):
        words_are_sound(part.diagnosis)
        json.dumps(one.tracker.report().to_dict(), allow_nan=False)
        json.dumps(part.to_dict(), allow_nan=False)
        assert part.num_batches == len(batches)
        assert all(math.isfinite(value) for value in part.evidence.values())
        if batches:
            for field in ("population_mean", "population_var", "now_mean", "now_var", "z_mean", "z_var", "eval_error"):
                assert getattr(part, field).isfinite().all(), field
            assert (part.now_var >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reports_of_all_precisions_agree(monitored, dtype):
    data = [x.to(dtype) for x in samples(100, 64, offset=0.5)]
    report = monitored(norm(dtype=dtype)).window(data)
    exact = monitored(norm(dtype=torch.float64)).window([x.double() for x in data])
    assert report.verdict == exact.verdict == "healthy"
    x = torch.cat([x.double() for x in data])
    np.testing.assert_allclose(report.population_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report.population_var, x.var(0), rtol=1e-5)
    for name in ("noise_error", "jitter", "now_error", "grouping_ratio", "ordering_ratio"):
        assert report.evidence[name] == pytest.approx(exact.evidence[name], rel=1e-3), name


MOMENTA = {
    "a step": [0.1] * 30 + [0.01] * 30,
    "a decay": [0.5 * 0.95**t for t in range(60)],
    "every second 0": [0.1, 0.0] * 30,
    "1 in between": [0.1] * 30 + [1.0] + [0.1] * 29,
    "None in between": [0.1] * 30 + [None] * 10 + [0.1] * 20,
    "up": [0.001] * 30 + [0.3] * 30,
}


@pytest.mark.parametrize("case", MOMENTA)
def test_momentum_that_changes_in_the_window_is_followed(monitored, case):
    layer = norm(200)
    report = monitored(layer).window(samples(60, 64, 200), changing(layer, MOMENTA[case]))
    momenta = [1 / (t + 1) if m is None else m for t, m in enumerate(MOMENTA[case])]
    weights = np.array(momenta) * np.append(np.cumprod(1 - np.array(momenta)[::-1])[::-1][1:], 1)
    assert report.evidence["initial_weight"] == pytest.approx(np.prod(1 - np.array(momenta)), abs=1e-12)
    assert report.evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * (weights**2).sum()), rel=0.05)
    assert report.evidence["batches"] == sum(m != 0 for m in momenta)
    assert report.flags == (("not-updating",) if 0.0 in MOMENTA[case] else ())
    for z in (report.z_mean, report.z_var):
        assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    words_are_sound(report.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)


def test_momentum_1_can_lag(monitored):
    data = samples(100, 1000)
    data[-1] += 1  # the last batch is all that is in the buffers
    report = monitored(norm(momentum=1.0)).window(data)
    assert report.verdict == "lagging"
    words_are_sound(report.diagnosis)


def test_a_momentum_that_is_next_to_nothing_warms_up(monitored):
    report = monitored(norm(momentum=1e-17)).window(samples(20, 16, offset=3.0))
    assert report.verdict == "warming-up"


@pytest.mark.parametrize(
    "make",
    [lambda: norm(momentum=0.0), lambda: frozen(norm()), lambda: norm(track_running_stats=False)],
    ids=["stale", "frozen", "no-running-stats"],
)
def test_what_could_not_be_told_is_absent_from_evidence(monitored, make):
    evidence = monitored(make()).window(samples(40, 16)).evidence
    assert not {"warmup_error", "lag_error", "drift_error", "drift_per_batch"} & evidence.keys()


def test_a_lag_of_half_a_deviation_behind_a_fast_drift_needs_attention(monitored):
    report = monitored(norm(momentum=0.1)).window(samples(400, 256, drift=0.05))
    assert report.evidence["eval_error"] > 0.4  # 0.05 * 0.9 / 0.1 deviations of what a batch receives
    assert report.needs_attention


def test_constants_that_move_are_not_said_to_be_followed(monitored):
    report = monitored(norm(momentum=0.5)).window([torch.full((8, WIDTH), float(t)) for t in range(60)])
    assert report.evidence["eval_error"] > 100
    assert report.needs_attention


def test_repeated_batches_can_be_ordered(monitored):
    one, other = samples(1, 64)[0], samples(1, 64, seed=1, offset=2.0)[0]
    report = monitored(norm(momentum=0.1)).window([*[one] * 32, *[other] * 32, *[one] * 32])
    assert report.verdict == "ordered-batches"
