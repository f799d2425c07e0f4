"""The momentum and the batch size that are recommended: by formula, by simulation, and applied."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from lightning_bnmonitor.statistics import divergence
from tests.diagnosis.monitored_layers import checkpointed, moved, norm, pretrained, samples
from tests.diagnosis.symptoms import OBSERVED, SYMPTOMS, diagnosed, squared_error, words_are_sound

# A momentum so small, and a window so long, that nothing but the drift decides.
LAGGING = {"lag_error": 0.2, "eval_error": 0.25, "momentum": 1e-4, "effective_momentum": 1e-4, "batches": 1e7}


@pytest.mark.parametrize("jitter", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("drift", [3e-4, 1e-3, 0.01, 0.1, 1.0])
def test_the_recommended_momentum_is_that_of_the_smallest_error(drift, jitter):
    evidence = diagnosed(LAGGING, {"drift_per_batch": drift, "jitter": jitter}).evidence
    momenta = np.geomspace(1e-4, 1, 200_001)
    errors = squared_error(momenta, drift, jitter)
    if math.sqrt(errors.min()) > 0.1:  # and no momentum is good enough
        assert "recommended_momentum" not in evidence
        return
    assert evidence["recommended_momentum"] == pytest.approx(momenta[errors.argmin()], rel=1e-3)
    assert evidence["recommended_error"] == pytest.approx(math.sqrt(errors.min()), rel=1e-6)


OUTRUN = {"drift_error": 0.3, "drift_per_batch": 0.01, "batches": 1e7, "degrees_of_freedom": 1e7 - 16}


@pytest.mark.parametrize("momentum", [0.02, 0.1])
@pytest.mark.parametrize("jitter", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("walk_error", [0.15, 0.2, 0.4])
def test_the_momentum_recommended_where_inputs_move_at_random_is_that_of_the_smallest_error(
    walk_error, jitter, momentum
):
    symptoms = {"walk_error": walk_error, "jitter": jitter, "momentum": momentum, "effective_momentum": momentum}
    evidence = diagnosed(symptoms, OUTRUN).evidence
    momenta = np.geomspace(1e-3, 1, 200_001)
    per_batch = walk_error / math.sqrt(squared_error(momentum, 0.0, 0.0, walk=1.0))
    errors = squared_error(momenta, 0.0, jitter, walk=per_batch)
    if math.sqrt(errors.min()) > 0.1:  # and only a new calibration helps
        assert "recommended_momentum" not in evidence
        return
    assert evidence["recommended_momentum"] == pytest.approx(momenta[errors.argmin()], rel=1e-3)
    assert evidence["recommended_error"] == pytest.approx(math.sqrt(errors.min()), rel=1e-6)


@pytest.mark.parametrize("ratio", [1e-3, 3e-3])
def test_for_a_slow_drift_it_is_about_the_cube_root_of_four_times_the_squared_ratio(ratio):
    symptoms = {"drift_per_batch": ratio / 5, "jitter": 0.2, "momentum": 1e-6, "effective_momentum": 1e-6}
    evidence = diagnosed(symptoms, LAGGING).evidence
    assert evidence["recommended_momentum"] == pytest.approx((4 * ratio**2) ** (1 / 3), rel=0.03)


def test_without_jitter_the_last_batch_is_best():
    evidence = diagnosed(LAGGING, {"drift_per_batch": 0.01, "jitter": 0.0}).evidence
    assert evidence["recommended_momentum"] == 1
    assert evidence["recommended_error"] == 0


@pytest.mark.parametrize("momentum", [0.01, 0.05])
def test_a_lag_from_before_the_window_counts_as_the_drift_that_makes_it(momentum):
    symptoms = {"lag_error": 0.5, "momentum": momentum, "effective_momentum": momentum, "jitter": 0.15}
    evidence = diagnosed(symptoms, LAGGING).evidence  # no drift in the window
    drift = 0.5 * momentum / (1 - momentum)
    momenta = np.geomspace(1e-4, 1, 200_001)
    best = momenta[squared_error(momenta, drift, 0.15).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)
    assert evidence["recommended_momentum"] > momentum


@pytest.mark.parametrize("batches", [10, 100, 1000])
def test_a_lag_is_worked_off_within_a_window(batches):
    symptoms = {"momentum": None, "effective_momentum": 1e-6, "batches": float(batches), "jitter": 0.1}
    recommended = diagnosed(symptoms, LAGGING).evidence["recommended_momentum"]
    assert (1 - recommended) ** batches == pytest.approx(0.05)


@pytest.mark.parametrize("verdict", ["warming-up", "lagging"])
def test_no_momentum_is_recommended_where_the_present_one_is_larger(verdict):
    symptoms = {"momentum": 0.9, "effective_momentum": 0.9, "initial_weight": 1e-9}
    diagnosis = diagnosed(symptoms, {"jitter": 10.0}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert not [name for name in diagnosis.evidence if name.startswith("recommended")]
    assert "momentum=0" not in diagnosis.remedy
    words_are_sound(diagnosis)


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.11, 0.4])
def test_what_is_recommended_to_a_noisy_layer_halves_what_is_tolerable(momentum, noise):
    symptoms = {"noise_error": noise, "momentum": momentum, "effective_momentum": momentum, "batches": 1e7}
    evidence = diagnosed(symptoms).evidence
    recommended = evidence["recommended_momentum"]
    variance = (recommended / (2 - recommended)) / (momentum / (2 - momentum))
    assert noise * math.sqrt(variance) == pytest.approx(0.05)


@pytest.mark.parametrize("windows", [{}, {"windows": 3.0, "batches_before": 60.0}])
@pytest.mark.parametrize("batches", [100.0, 1e4])
@pytest.mark.parametrize("noise", [0.11, 0.15, 0.19, 0.3, 0.4])
def test_the_batch_size_recommended_to_a_noisy_layer_is_one_that_the_data_give(noise, batches, windows):
    evidence = diagnosed({"noise_error": noise, "batches": batches, "jitter": 0.3}, windows).evidence
    needed, wanted = 32 * (noise / 0.08) ** 2, math.ceil(32 * (noise / 0.05) ** 2)
    given = min((batches - windows.get("batches_before", 0)) * 32 // 8, 16 * 32)
    expected = min(wanted, given) if needed <= given else None
    assert evidence.get("recommended_batch_size") == expected


def test_no_larger_batches_are_recommended_where_noise_is_tolerable():
    for noise, is_recommended in ((0.0801, True), (0.08, False), (0.054, False)):
        diagnosis = diagnosed({"noise_error": noise, "eval_error": 0.3, "batches": 1000.0})
        assert diagnosis.verdict == "noisy"
        assert ("recommended_batch_size" in diagnosis.evidence) == is_recommended


def test_what_no_data_give_is_not_recommended():
    diagnosis = diagnosed({"noise_error": 0.5, "batches": 8.0, "jitter": 1.0})
    assert diagnosis.verdict == "noisy"
    assert not [name for name in diagnosis.evidence if name.startswith("recommended")]
    assert diagnosis.remedy.startswith("Recompute its running statistics")
    words_are_sound(diagnosis)


NOISY = {"noise_error": 0.2, "momentum": 0.5, "effective_momentum": 0.5, "initial_distance": 2.0}


@pytest.mark.parametrize(
    ("batches", "jitter"), [(10.0, 0.12), (20.0, 0.2), (100.0, 0.35), (8.0, 0.35), (10.0, 0.35), (30.0, 0.6)]
)
@pytest.mark.parametrize("windows_before", [0, 5, 50])
def test_the_momentum_recommended_to_a_noisy_layer_does_in_as_many_batches_as_there_were(
    batches, jitter, windows_before
):
    in_all = batches * (1 + windows_before)
    noise = jitter * math.sqrt(0.5 / 1.5)
    symptoms = NOISY | {"batches": batches, "jitter": jitter, "noise_error": noise, "num_tracked": int(in_all)}
    evidence = diagnosed(symptoms).evidence
    recommended = evidence.get("recommended_momentum")
    momenta = np.geomspace(1e-4, 0.5, 20_001)
    good = (jitter * np.sqrt(momenta / (2 - momenta)) <= 0.0999) & (2.0 * (1 - momenta) ** in_all <= 0.05)
    if recommended is None:
        assert noise <= 0.1 or not good.any()
        return
    assert jitter * math.sqrt(recommended / (2 - recommended)) <= 0.1
    assert 2.0 * (1 - recommended) ** in_all <= 0.05 * (1 + 1e-9)
    within = 1 - 0.05 ** (1 / batches)  # whose memory is the window
    if jitter * math.sqrt(within / (2 - within)) <= 0.08:
        assert recommended >= within * (1 - 1e-9)


def test_a_noisy_layer_that_moves_is_not_made_to_lag():
    symptoms = {"noise_error": 0.2, "momentum": 0.5, "effective_momentum": 0.5, "drift_per_batch": 0.02}
    evidence = diagnosed(symptoms).evidence
    momenta = np.geomspace(1e-4, 1, 200_001)
    best = momenta[squared_error(momenta, 0.02, OBSERVED["jitter"]).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)
    symptoms["drift_per_batch"] = 1.0  # moves so fast that nothing but a larger batch (or a new calibration) helps
    diagnosis = diagnosed(symptoms)
    assert diagnosis.verdict == "noisy"
    assert "recommended_momentum" not in diagnosis.evidence
    assert "momentum=" not in diagnosis.remedy
    words_are_sound(diagnosis)


@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1])
def test_training_on_for_batches_to_go_leaves_half_of_what_is_tolerable(momentum):
    symptoms = {"warmup_error": 0.8, "momentum": momentum, "effective_momentum": momentum}
    batches = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence["batches_to_go"]
    assert batches == int(batches)
    assert 0.8 * (1 - momentum) ** batches <= 0.05 < 0.8 * (1 - momentum) ** (batches - 1)


def test_a_fresh_layer_of_the_recommended_momentum_would_not_be_warming_up():
    symptoms = {"warmup_error": 2.4, "initial_weight": 0.8, "momentum": 0.001, "effective_momentum": 0.001}
    recommended = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence["recommended_momentum"]
    assert (1 - recommended) ** 100 * (2.4 / 0.8) == pytest.approx(0.05)  # an initial weight of 1 would make 3


@pytest.mark.parametrize(("drift", "jitter"), [(0.0, 0.1), (0.001, 0.1), (0.0, 0.0)])
def test_a_layer_that_warms_up_is_recommended_no_more_than_it_needs(drift, jitter):
    symptoms = {"momentum": 0.001, "effective_momentum": 0.001, "drift_per_batch": drift, "jitter": jitter}
    evidence = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence
    needed = 1 - (0.3 / 10) ** (1 / 100)  # 0.3 left of 1 was 0.5 off: ten times what is aimed at
    assert evidence["recommended_momentum"] == pytest.approx(needed)
    assert evidence["recommended_error"] == pytest.approx(math.sqrt(squared_error(needed, drift, jitter)))


def test_a_layer_that_warms_up_and_drifts_fast_is_recommended_the_best_for_the_drift():
    symptoms = {"momentum": 0.001, "effective_momentum": 0.001, "drift_per_batch": 0.02}
    evidence = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence
    momenta = np.geomspace(1e-3, 1, 200_001)
    best = momenta[squared_error(momenta, 0.02, OBSERVED["jitter"]).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("verdict", ["warming-up", "lagging", "noisy"])
def test_under_two_updates_a_call_the_recommended_momentum_is_that_of_one_of_them(verdict):
    symptoms = SYMPTOMS[verdict] | {"effective_momentum": 0.9 if verdict == "noisy" else 0.01}
    once = diagnosed(symptoms).evidence
    twice = diagnosed(symptoms, {"updates_per_call": 2.0, "assumed_updates": 2, "checkpointed": True}).evidence
    assert 1 - (1 - twice["recommended_momentum"]) ** 2 == pytest.approx(once["recommended_momentum"])
    assert twice["recommended_error"] == pytest.approx(once["recommended_error"])


@pytest.mark.parametrize("verdict", [v for v in VERDICTS if v not in ("warming-up", "lagging", "noisy")])
def test_nothing_is_recommended_in_numbers_for_other_verdicts(verdict):
    evidence = diagnosed(SYMPTOMS[verdict]).evidence
    assert not [name for name in evidence if name.startswith(("recommended", "compensated", "batches_to"))]


@pytest.mark.parametrize(("drift", "jitter"), [(0.01, 0.15), (0.002, 0.3), (0.02, 0.2)])
def test_the_predicted_error_is_that_of_a_simulation(drift, jitter):
    evidence = diagnosed(LAGGING, {"drift_per_batch": drift, "jitter": jitter}).evidence
    momentum, rng = evidence["recommended_momentum"], np.random.default_rng(0)
    running, squares = np.zeros(400), []
    for t in range(1000):
        running += momentum * (drift * t + jitter * rng.normal(size=400) - running)
        if t > 10 / momentum:
            squares.append((running - drift * t) ** 2)
    assert len(squares) > 100
    assert np.sqrt(np.mean(squares)) == pytest.approx(evidence["recommended_error"], rel=0.05)


# Remedies that are applied


def outrun(momentum, seed, num_batches=128):
    """A layer whose inputs, by a random walk, outrun its running statistics; and where the walk is after each call."""
    walk = 0.08 * torch.randn(num_batches, 64, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    calls = iter(walk)
    layer = norm(64, momentum=momentum)
    layer.register_forward_pre_hook(lambda _, args: (args[0] + next(calls),))
    return layer, walk


def true_error(layer, walk):
    """Of the normalised activation, for values of variance 1 about where the walk ended."""
    end = walk[-1].double(), torch.ones(64, dtype=torch.float64)
    errors = divergence.act_rmse(*end, layer.running_mean.double(), layer.running_var.double(), layer.eps)
    return float(errors.square().mean().sqrt())


def test_the_momentum_recommended_to_a_layer_that_is_outrun_keeps_up(monitored):
    before, after, told, predicted = [], [], [], []
    for seed in range(4):
        layer, walk = outrun(0.1, seed)
        report = monitored(layer).window(samples(128, 256, 64, seed + 100))
        assert report.verdict == "lagging"
        assert report.evidence["eval_error"] < 0.1
        before.append(true_error(layer, walk))
        told.append(report.evidence["walk_error"])
        predicted.append(report.evidence["recommended_error"])
        cured, walk = outrun(report.evidence["recommended_momentum"], seed + 10)
        monitored(cured).window(samples(128, 256, 64, seed + 100))
        after.append(true_error(cured, walk))
    assert np.mean(before) == pytest.approx(np.mean(told), rel=0.2)
    assert np.mean(after) == pytest.approx(np.mean(predicted), rel=0.3)
    assert max(predicted) < 0.1 < min(told)


def test_the_momentum_recommended_to_a_noisy_layer_makes_it_healthy(monitored):
    report = monitored(norm(64, momentum=0.5)).window(samples(128, 16, 64))
    assert report.verdict == "noisy"
    recommended = report.evidence["recommended_momentum"]
    assert report.evidence["recommended_error"] == pytest.approx(0.05, rel=0.01)
    cured = monitored(norm(64, momentum=recommended)).window(samples(200, 16, 64, seed=1))
    assert cured.verdict == "healthy"
    assert cured.evidence["noise_error"] == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize(("positions", "batch_size", "momentum"), [((), 16, 0.5), ((2, 2), 8, 0.9)])
def test_the_batch_size_recommended_to_a_noisy_layer_makes_it_healthy(monitored, positions, batch_size, momentum):
    def make():
        return monitored((nn.BatchNorm2d if positions else nn.BatchNorm1d)(64, momentum=momentum))

    report = make().window(samples(128, batch_size, 64, positions=positions))
    assert report.verdict == "noisy"
    recommended = report.evidence["recommended_batch_size"]
    cured = make().window(samples(40, int(recommended), 64, seed=1, positions=positions))
    assert cured.verdict == "healthy"
    assert cured.evidence["noise_error"] == pytest.approx(0.05, rel=0.1)


def test_the_momentum_recommended_under_checkpointing_is_to_be_set_as_it_is(monitored):
    layer = norm(64, momentum=0.5)
    one = monitored(layer)
    one.window(samples(10, 16, 64), checkpointed(layer, False))
    report = one.window(samples(128, 16, 64, seed=1), checkpointed(layer, False))
    assert (report.verdict, report.flags) == ("noisy", ("double-update",))
    assert report.evidence["effective_momentum"] == 0.75
    assert len(re.findall("`momentum=", report.remedy)) == 1
    layer.momentum = report.evidence["recommended_momentum"]
    report = one.window(samples(200, 16, 64, seed=2), checkpointed(layer, False))
    assert (report.verdict, report.flags) == ("healthy", ("double-update",))
    assert report.evidence["noise_error"] == pytest.approx(0.05, rel=0.1)


def test_training_on_ends_the_warming_up(monitored):
    one = monitored(norm(momentum=0.02))
    report = one.window(samples(40, 64, offset=2.0))
    assert report.verdict == "warming-up"
    assert report.evidence["warmup_error"] == pytest.approx(2 * 0.98**40, rel=0.2)
    half = int(report.evidence["batches_to_go"] / 2)
    still = one.window(samples(half, 64, offset=2.0, seed=1))
    assert still.verdict == "warming-up"
    rest = int(still.evidence["batches_to_go"])
    assert rest + half == pytest.approx(report.evidence["batches_to_go"], rel=0.05)
    report = one.window(samples(rest, 64, offset=2.0, seed=2))
    assert report.verdict == "healthy"
    assert report.evidence["warmup_error"] == pytest.approx(0.05, rel=0.1)


def test_the_momentum_recommended_to_a_layer_that_warms_up_would_not_have_been_too_small(monitored):
    report = monitored(norm(momentum=0.001)).window(samples(100, 64, offset=2.0))
    assert report.verdict == "warming-up"
    layer = norm(momentum=report.evidence["recommended_momentum"])
    cured = monitored(layer).window(samples(100, 64, offset=2.0, seed=1))
    assert cured.verdict == "healthy"
    assert cured.evidence["warmup_error"] == pytest.approx(0.05, rel=0.1)
    assert cured.evidence["noise_error"] == pytest.approx(report.evidence["recommended_error"], rel=0.1)
    cumulative = monitored(norm(momentum=None)).window(samples(100, 64, offset=2.0, seed=1))
    assert cumulative.verdict == "healthy"
    assert cumulative.evidence["warmup_error"] == 0


@pytest.mark.parametrize("momentum", [0.01, None])
def test_the_momentum_recommended_to_a_layer_that_lags_for_another_past_makes_it_follow(monitored, momentum):
    one = monitored(pretrained(1.0, momentum=momentum))
    report = one.window(samples(60, 64))
    assert report.verdict == "lagging"
    one.layer.momentum = report.evidence["recommended_momentum"]
    report = one.window(samples(60, 64, seed=1))
    assert report.verdict == "healthy"


def test_the_momentum_recommended_behind_a_drift_has_the_predicted_error(monitored):
    """The truth at the end is known here: the mean of the last batch, a variance of 1."""
    width, num_batches, drift = 128, 100, 0.01
    layer = moved(pretrained(0.0, width=width, momentum=0.01), drift)
    report = monitored(layer).window(samples(num_batches, 64, width))
    assert report.verdict == "lagging"
    evidence = report.evidence
    momenta = np.geomspace(0.01, 1, 100_001)
    jitter = math.sqrt(1.5 / 64)
    best = momenta[squared_error(momenta, drift, jitter).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=0.05)
    layer = moved(norm(width, momentum=evidence["recommended_momentum"]), drift)
    cured = monitored(layer).window(samples(num_batches, 64, width, seed=1))
    truth = torch.full((width,), drift * (num_batches - 1), dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    error = divergence.act_rmse(*truth, cured.running_mean, cured.running_var, 1e-5).square().mean().sqrt().item()
    assert error == pytest.approx(evidence["recommended_error"], rel=0.2)
    assert cured.verdict in ("healthy", "drifting")


def test_no_error_is_predicted_where_there_is_no_noise(monitored):
    report = monitored(norm(momentum=0.01)).window(samples(1, 64, offset=1.0) * 64)
    assert report.verdict == "warming-up"
    assert report.evidence["recommended_error"] == 0
    assert "predicted error 0)" in report.remedy


def test_shuffling_is_the_remedy_of_ordered_and_of_grouped_batches(monitored):
    generator = torch.Generator().manual_seed(1)
    for sick, options in (
        ("ordered-batches", {"classes": (0.0, 2.0, -1.0, 1.0)}),
        ("grouped-batches", {"shared": 0.5}),
    ):
        data = samples(100, 64, **options)
        assert monitored(norm()).window(data).verdict == sick
        everything = torch.cat(data)
        shuffled = everything[torch.randperm(len(everything), generator=generator)].split(64)
        assert monitored(norm()).window(shuffled).verdict == "healthy"


@pytest.mark.parametrize("verdict", ["warming-up", "lagging", "noisy"])
@pytest.mark.parametrize("momentum", [0.0, 1e-6, 1.0])
def test_no_momentum_is_too_odd_for_advice(verdict, momentum):
    diagnosis = diagnosed({"momentum": momentum, "effective_momentum": momentum}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert all(math.isfinite(value) for value in diagnosis.evidence.values())
    words_are_sound(diagnosis)


def test_a_cumulative_average_at_its_beginning_is_not_said_to_stay_noisy(monitored):
    report = monitored(norm(momentum=None)).window(samples(10, 6))
    assert report.verdict == "noisy"
    assert "however long" not in report.explanation
    assert "momentum=" not in report.remedy
    assert "recommended_momentum" not in report.evidence
    assert report.remedy.startswith("Train on, or recompute its running statistics")  # ten batches are no larger ones
    words_are_sound(report.diagnosis)
