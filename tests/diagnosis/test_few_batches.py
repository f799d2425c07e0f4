"""What is said of a layer in few batches: at each threshold, in words, and how often it is wrong."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker
from lightning_bnmonitor.statistics import divergence
from tests.diagnosis.symptoms import ABOVE, BELOW, NAN, beside, diagnosed, words_are_sound

FEW = {"batches": 5.0, "degrees_of_freedom": 2.0, "initial_weight": 0.0, "reference_error": 0.05, "noise_error": 0.01}
# What is left of the initial values: 0.5 of a distance, less a chance that 0.5 of it makes, is 0.1 in the first.
INITIAL = FEW | {"initial_weight": 0.5, "initial_distance": 1.0, "least_error": 0.3}
FAR = FEW | {"least_error": 0.5, "eval_error": 0.55}


@pytest.mark.parametrize(
    ("name", "threshold", "given"),
    [
        ("initial_distance", math.sqrt((0.1 / 0.5) ** 2 + 0.05**2), {}),
        ("initial_distance", math.sqrt(4 + 1) * 0.3, {"reference_error": 0.3}),
        ("least_error", 0.1, {}),
    ],
)
def test_what_is_left_of_the_initial_values_is_said_from_a_threshold_on(name, threshold, given):
    assert diagnosed({name: threshold * 0.999}, given, INITIAL | {"least_error": 0.15}).verdict == "insufficient-data"
    diagnosis = diagnosed({name: threshold * 1.001}, given, INITIAL | {"least_error": 0.15})
    assert (diagnosis.verdict, diagnosis.needs_attention) == ("warming-up", True)
    words_are_sound(diagnosis)


@pytest.mark.parametrize(
    ("threshold", "given"),
    [
        (0.2, {}),
        (3 * math.hypot(0.1, 0.01), {"reference_error": 0.1}),
        (3 * math.hypot(0.05, 0.2), {"noise_error": 0.2}),
        (3 * 0.08, {"noise_error": None, "reference_error": 0.08}),
    ],
)
def test_what_is_far_is_said_from_a_threshold_on(threshold, given):
    assert diagnosed({"least_error": beside(threshold, BELOW)}, given, FAR).verdict == "insufficient-data"
    diagnosis = diagnosed({"least_error": beside(threshold, ABOVE)}, given, FAR)
    assert (diagnosis.verdict, diagnosis.needs_attention) == ("lagging", True)
    words_are_sound(diagnosis)


def test_what_is_far_is_so_with_many_batches_too():
    many = {"reference_error": 0.02, "noise_error": 0.05}
    assert diagnosed({"least_error": 0.19}, many).verdict == "healthy"
    assert diagnosed({"least_error": 0.21}, many).verdict == "lagging"


@pytest.mark.parametrize("symptoms", [INITIAL, FAR])
def test_nothing_is_certain_while_the_weights_of_the_batches_are_not_known(symptoms):
    assert diagnosed({"updates_per_call": 2.0}, symptoms).verdict == "insufficient-data"


@pytest.mark.parametrize("verdict", ["ordered", "grouped"])
def test_over_several_windows_nothing_is_said_of_an_order(verdict):
    ratio = "ordering" if verdict == "ordered" else "grouping"
    sick = {f"{ratio}_ratio": 9.0, f"{ratio}_share": 0.3, "smooth_share": 0.1, "batches": 10.0}
    assert diagnosed(sick).verdict == f"{verdict}-batches"
    assert diagnosed(sick, {"windows": 2.0}).verdict == "healthy"
    assert diagnosed(FAR, sick).verdict == "lagging"


@pytest.mark.parametrize("symptoms", [{"warmup_error": 0.3}, {"lag_error": 0.3}, {"drift_error": 0.3}])
def test_over_several_windows_it_is_the_smaller_error_that_has_to_be_worth_a_warning(symptoms):
    error = {"eval_error": 0.3, "least_error": 0.09, "reference_error": 0.05}
    several = diagnosed(symptoms, error, {"windows": 2.0})
    assert not several.needs_attention
    assert diagnosed(symptoms, error).needs_attention


def test_how_many_windows_it_rests_on_comes_first():
    for symptoms in ({}, INITIAL, FAR, FEW, {"noise_error": 0.2}):
        one, three = diagnosed(symptoms), diagnosed(symptoms, {"windows": 3.0})
        assert one.verdict == three.verdict
        lower = one.explanation[0].lower() + one.explanation[1:]
        assert three.explanation == f"Over the last 3 windows: {lower}"
        words_are_sound(three)


def test_without_any_noise_known_the_error_is_still_told():
    unknown = {"noise_error": None, "jitter": None, "lag_error": None, "effective_momentum": 0.1}
    for symptoms in (INITIAL, FAR):
        diagnosis = diagnosed(unknown, {"eval_error": 0.55}, symptoms)
        assert "0.55" in diagnosis.explanation
        assert "momentum=" not in diagnosis.remedy
        assert "recalibrate(model, loader)" in diagnosis.remedy
        words_are_sound(diagnosis)
    assert diagnosed(FEW, {"least_error": NAN}).verdict == "insufficient-data"


def draw(generator: torch.Generator, kind: dict, num: int, step: int) -> torch.Tensor:
    """Normal, rectified or log-normal values, those of a sample alike where it has several positions."""
    width, positions = kind["width"], kind["positions"]
    own = torch.randn(num, width, positions, 1, generator=generator)
    x = own if positions == 1 else 0.8 * own + 0.6 * torch.randn(num, width, 1, 1, generator=generator)
    x = {"normal": x, "rectified": x.relu(), "log-normal": (0.7 * x).exp()}[kind["law"]]
    return (x + kind["offset"] + kind["drift"] * step) * kind["scale"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_few_batches_make_few_mistakes(seed):
    """150 layers of six windows of 1 to 7 batches; the truth is that of 2000 samples where a window ends."""
    generator, counts = torch.Generator().manual_seed(1000 + seed), Counter()

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    for _ in range(150):
        width = one_of(1, 4, 16, 64)
        kind = {
            **{"width": width, "positions": one_of(1, 1, 4, 9), "law": one_of("normal", "rectified", "log-normal")},
            "offset": torch.randn(width, 1, 1, generator=generator) * one_of(0.0, 0.3, 1.0, 3.0),
            **{
                "drift": one_of(0.0, 0.0, 0.02, 0.1),
                "scale": torch.randn(width, 1, 1, generator=generator).mul(0.5).exp(),
            },
        }
        layer, length, batch = (
            nn.BatchNorm2d(width, momentum=one_of(0.01, 0.05, 0.1, 0.3)),
            one_of(*range(1, 8)),
            one_of(8, 16, 32, 64),
        )
        if one_of(True, True, True, False, False) is False:
            values = draw(generator, kind, 2000, 0).transpose(0, 1).flatten(1)
            layer.running_mean.copy_(values.mean(dim=1)), layer.running_var.copy_(values.var(dim=1))
            layer.num_batches_tracked += 1000
        model, step, is_sick, is_found = nn.Sequential(layer), 0, True, False
        with BatchNormTracker(model) as tracker:
            for _ in range(6):
                tracker.reset()
                for _ in range(length):
                    model(draw(generator, kind, batch, step))
                    step += 1
                report = tracker.close()["0"]
                values = draw(generator, kind, 2000, step - 1).transpose(0, 1).flatten(1).double()
                truth = values.mean(dim=1), values.var(dim=1)
                error = divergence.act_rmse(*truth, report.running_mean, report.running_var, layer.eps)
                error, says = error.square().mean().sqrt().item(), report.verdict in ("warming-up", "lagging")
                for most in (0.05, 0.1):
                    counts["well", most] += error <= most
                    counts["false", most] += error <= most and says
                is_sick, is_found = is_sick and error > 0.2, is_found or says
                if step - length < 8 <= step and is_sick:
                    counts["sick"] += 1
                    counts["found"] += is_found
    print(f"\n{counts} (true error at most 0.05, or 0.1; sick: above 0.2 from the start, found by 8 batches)")
    assert min(counts["well", 0.05], counts["sick"]) > 50
    assert counts["false", 0.05] <= 0.02 * counts["well", 0.05]
    assert counts["false", 0.1] <= 0.03 * counts["well", 0.1]
    assert counts["found"] >= 0.92 * counts["sick"]
