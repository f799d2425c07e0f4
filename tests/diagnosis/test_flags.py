"""Flags and evidence by hand, and on layers whose updates or buffers are not what they should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_bnmonitor.diagnosis.diagnosis import diagnose
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.diagnosis.monitored_layers import WIDTH, checkpointed, norm, pretrained, samples
from tests.diagnosis.symptoms import (
    ABOVE,
    CALLED,
    INF,
    METRICS,
    NAN,
    OBSERVED,
    SYMPTOMS,
    beside,
    diagnosed,
    numbers,
    words_are_sound,
)

NOISY_AT_LAST = {
    "last_batch_samples": 16.0,
    "last_batch_share": beside(0.5, ABOVE),
    "noise_error": 0.09,
    "noise_without_last_batch": math.sqrt(0.09**2 - 0.081**2),
}


def test_a_layer_as_it_should_be_has_no_flag():
    assert diagnosed({}).flags == ()


@pytest.mark.parametrize(
    ("symptoms", "flags"),
    [
        ({"dead_channels": 1.0}, ("dead-channels",)),
        ({"updates_per_call": 2.0, "checkpointed": True}, ("double-update",)),
        ({"updates_per_call": 2.0, "checkpointed": True, "assumed_updates": 2}, ("double-update",)),
        ({"updates_per_call": 3.0, "checkpointed": True, "assumed_updates": 2}, ("double-update",)),
        ({"updates_per_call": 1.0, "checkpointed": True}, ()),
        ({"updates_per_call": 2.0}, ("missed-calls",)),
        ({"updates_per_call": 1.5, "checkpointed": True}, ("missed-calls",)),
        ({"updates_per_call": 1.5, "checkpointed": True, "assumed_updates": 2}, ("missed-calls",)),
        ({"updates_per_call": 1.0, "assumed_updates": 2}, ()),
        ({"rank_error": beside(0.1, ABOVE), "ranks": 2.0}, ("rank-0-only",)),
        ({"rank_error": 0.1, "ranks": 2.0}, ()),
        ({"padding_shift": beside(0.05, ABOVE)}, ("padded",)),
        ({"padding_shift": 0.05}, ()),
        ({"constant_ends": 0.3, "samples_per_batch": 320.0}, ("maybe-padded",)),
        ({"constant_ends": 0.3}, ()),  # one position a sample
        (SYMPTOMS["frozen"] | {"constant_ends": 0.3, "samples_per_batch": 320.0}, ()),
        (SYMPTOMS["frozen"] | {"padding_shift": 0.5}, ()),
        ({"updates_per_call": 1.001}, ("missed-calls",)),
        ({"updates_per_call": 0.5}, ("not-updating",)),
        ({"updates_per_call": 0.0}, ("not-updating",)),
        ({"batches": 60.0}, ("not-updating",)),
        ({"batches": 99.0}, ("not-updating",)),
        ({"updates_per_call": NAN}, ()),
        ({"has_frozen_weights": True}, ("half-frozen",)),
        (SYMPTOMS["frozen"] | {"has_frozen_weights": True}, ()),
        ({"last_batch_samples": 4.0}, ("small-last-batch",)),
        ({"last_batch_samples": 5.0}, ()),
        ({"last_batch_samples": 4.0, "samples_per_batch": 4.0}, ()),
        (NOISY_AT_LAST, ("small-last-batch",)),
        (NOISY_AT_LAST | {"last_batch_samples": beside(16.0, ABOVE)}, ()),
        (NOISY_AT_LAST | {"last_batch_share": 0.5}, ()),
        (NOISY_AT_LAST | {"noise_without_last_batch": math.sqrt(0.09**2 - 0.079**2)}, ()),
        ({"written_outside": True}, ("written-outside",)),
        ({"interrupted": True}, ("interrupted-batch",)),
        (
            {"written_outside": True, "updates_per_call": 2.0, "checkpointed": True, "dead_channels": 3.0},
            ("dead-channels", "double-update", "written-outside"),
        ),
        (
            {"written_outside": True, "updates_per_call": 2.0, "batches": 99.0, "interrupted": True},
            ("interrupted-batch", "missed-calls", "not-updating", "written-outside"),
        ),
        (SYMPTOMS["no-running-stats"], ()),
        (SYMPTOMS["frozen"], ()),
        (SYMPTOMS["stale"], ("not-updating",)),
    ],
)
def test_flags(symptoms, flags):
    assert diagnosed(symptoms).flags == flags


def test_padding_needs_attention_from_a_tenth_on_and_a_suspicion_none():
    assert not diagnosed({"padding_shift": 0.1}).needs_attention
    moved = diagnosed({"padding_shift": beside(0.1, ABOVE)})
    assert moved.needs_attention
    assert moved.cause == "padded"
    assert not diagnosed({"constant_ends": 0.3, "samples_per_batch": 320.0}).needs_attention


def test_a_last_batch_of_few_values_needs_attention_whatever_the_noise():
    assert diagnosed({"last_batch_samples": 4.0}).needs_attention
    assert not diagnosed(NOISY_AT_LAST).needs_attention


def test_noise_of_a_small_last_batch_is_no_matter_of_the_momentum():
    noisy = NOISY_AT_LAST | {"noise_error": 0.2, "noise_without_last_batch": 0.05}
    assert diagnosed(noisy).verdict == "noisy"
    assert "drop_last=True" in diagnosed(noisy).remedy
    assert "momentum" not in diagnosed(noisy).remedy
    assert "momentum" in diagnosed(noisy | {"noise_without_last_batch": 0.11}).remedy


@pytest.mark.parametrize("verdict", VERDICTS)
def test_flags_stand_beside_any_verdict(verdict):
    diagnosis = diagnosed({"written_outside": True, "dead_channels": 1.0}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert {"dead-channels", "written-outside"} <= set(diagnosis.flags)


@pytest.mark.parametrize(
    ("symptoms", "calls"),
    [
        ({"batches": 60.0}, 40),
        ({"updates_per_call": 0.0}, 100),
        ({"updates_per_call": 0.25}, 75),
        ({"updates_per_call": 0.5, "batches": 60.0}, 70),
        ({"updates_per_call": 1.0}, None),
        ({"updates_per_call": 2.0}, None),
    ],
)
def test_calls_that_updated_nothing_are_counted(symptoms, calls):
    assert diagnosed(symptoms).evidence.get("calls_not_updating") == calls


@pytest.mark.parametrize("updates", [-0.01, -1.0, -30.0])
def test_a_counter_that_was_set_back_is_something_that_wrote_from_outside(updates):
    diagnosis = diagnosed({"updates_per_call": updates})
    assert "written-outside" in diagnosis.flags
    assert diagnosis.verdict == "insufficient-data"
    assert "updates_per_call" not in diagnosis.evidence
    assert "-" not in "".join(numbers(diagnosis.explanation))
    assert diagnosis.evidence.get("calls_not_updating", 0) <= 100


@pytest.mark.parametrize("updates", [2, 3])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("assumed", [1, 2])
def test_the_compensated_momentum_makes_all_updates_of_a_call_weigh_what_was_asked_for(updates, momentum, assumed):
    symptoms = {"momentum": momentum, "updates_per_call": float(updates), "assumed_updates": assumed}
    diagnosis = diagnosed(symptoms, {"checkpointed": True})
    compensated = diagnosis.evidence["compensated_momentum"]
    assert 1 - (1 - compensated) ** updates == pytest.approx(momentum)
    if updates == 2:
        assert compensated == pytest.approx(1 - math.sqrt(1 - momentum))
    assert f"`momentum={compensated:.3g}`" in diagnosis.remedy


def test_a_momentum_above_1_is_compensated_as_if_it_were_1():
    diagnosis = diagnosed({"momentum": 1.5, "updates_per_call": 2.0, "checkpointed": True})
    assert diagnosis.evidence["compensated_momentum"] == 1


@pytest.mark.parametrize("symptoms", [{}, {"updates_per_call": 2.0}, {"checkpointed": True}])
def test_momentum_is_compensated_for_double_updates_alone(symptoms):
    assert "compensated_momentum" not in diagnosed(symptoms).evidence


# --------------------------------------------------------------------------------------------------------- the evidence


@pytest.mark.parametrize("verdict", VERDICTS)
def test_evidence_has_all_that_was_told_and_nothing_that_was_not(verdict):
    diagnosis = diagnosed(SYMPTOMS[verdict], {"eval_error": NAN, "updates_per_call": NAN})
    assert all(not math.isnan(value) for value in diagnosis.evidence.values())
    assert all(isinstance(value, float | int) for value in diagnosis.evidence.values())
    expected = OBSERVED | {"num_features": 64.0, "momentum": 0.1, "act_rmse": 0.08}
    changed = SYMPTOMS[verdict]
    for name, value in expected.items():
        assert diagnosis.evidence[name] == changed.get(name, value)
    calls = changed.get("calls", CALLED.calls)
    assert {path: diagnosis.evidence[f"calls_{path}"] for path in calls} == calls
    assert diagnosis.evidence.get("eval_error") == changed.get("eval_error")
    assert "updates_per_call" not in diagnosis.evidence
    assert ("effective_momentum" in diagnosis.evidence) == ("effective_momentum" not in changed)


def test_a_cumulative_average_has_no_momentum_in_evidence_but_an_effective_one():
    evidence = diagnosed({"momentum": None, "effective_momentum": 0.005}).evidence
    assert "momentum" not in evidence
    assert evidence["effective_momentum"] == 0.005


@pytest.mark.parametrize(
    ("error", "jitter", "severity"),
    [(0.3, 0.2, 2.25), (0.05, 0.5, 0.01), (INF, 0.2, None), (NAN, 0.2, None), (0.3, 0.0, None), (0.3, None, None)],
)
def test_severity_is_the_error_over_the_jitter_of_training_squared(error, jitter, severity):
    evidence = diagnosed({"eval_error": error, "jitter": jitter}).evidence
    assert evidence.get("severity") == (severity if severity is None else pytest.approx(severity))


def test_what_was_observed_is_not_changed():
    observed = dict(OBSERVED)
    diagnose(CALLED, observed, METRICS)
    assert observed == OBSERVED


# -------------------------------------------------------------------------------------------------- on real layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_flagged_and_accounted_for_from_the_second_window_on(monitored, reentrant):
    layer = norm(200, momentum=0.1)
    one = monitored(layer)
    report = one.window(samples(64, 64, 200), checkpointed(layer, reentrant))
    assert layer.num_batches_tracked == 128
    assert (report.verdict, report.flags) == ("insufficient-data", ("double-update",))
    assert not report.needs_attention
    assert not report.z_mean.any()
    assert not report.z_var.any()
    assert report.evidence["updates_per_call"] == 2
    assert report.evidence["assumed_updates_per_call"] == 1
    assert report.num_batches == 64
    for seed in (1, 2):
        report = one.window(samples(64, 64, 200, seed=seed), checkpointed(layer, reentrant))
        assert (report.verdict, report.flags, report.needs_attention) == ("healthy", ("double-update",), False)
        evidence = report.evidence
        assert evidence["effective_momentum"] == pytest.approx(0.19)
        assert evidence["compensated_momentum"] == pytest.approx(1 - math.sqrt(0.9))
        assert "assumed_updates_per_call" not in evidence
        assert evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * 0.19 / 1.81), rel=0.05)
        for z in (report.z_mean, report.z_var):
            assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
        assert numbers(report.remedy) == ["0.0513", "0.1"]
        assert numbers(report.diagnosis.explanation)[-2:] == ["2", "0.19"]
        words_are_sound(report.diagnosis)
    layer.momentum = evidence["compensated_momentum"]
    one.window(samples(64, 64, 200, seed=3), checkpointed(layer, reentrant))
    report = one.window(samples(64, 64, 200, seed=4), checkpointed(layer, reentrant))
    assert report.evidence["effective_momentum"] == pytest.approx(0.1)
    assert report.evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * 0.1 / 1.9), rel=0.05)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_of_calls_that_update_unequally_often_each_has_its_weight(monitored, momentum):
    layer = norm(200, momentum=momentum)
    one, repeated = monitored(layer), checkpointed(layer, False)

    def step(x):
        with torch.no_grad():
            layer(x[:32])
        repeated(x[32:])

    report = one.window(samples(40, 64, 200), step)
    assert report.verdict == "insufficient-data"  # what a call updates is known when the first window has ended
    report = one.window(samples(40, 64, 200, seed=1), step)
    assert layer.num_batches_tracked == 240
    assert (report.verdict, report.flags, report.num_batches) == ("healthy", ("double-update",), 80)
    assert report.evidence["updates_per_call"] == 1.5
    assert report.evidence["updates_of_repeated"] == 2
    assert "2 times, and others once" in report.explanation
    for z in (report.z_mean, report.z_var):  # which they are if all weights are right
        assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    if momentum is not None:
        weights = [0.1 * 0.9**k for k in range(400)]
        pairs = [(weights[3 * k] + weights[3 * k + 1], weights[3 * k + 2]) for k in range(130)]
        noise = sum(a**2 + b**2 for a, b in pairs) * 1.5 / 32
        assert report.evidence["noise_error"] == pytest.approx(math.sqrt(noise), rel=0.06)
    words_are_sound(report.diagnosis)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_left_of_the_initial_values_is_known_also_of_a_window_with_other_updates_than_assumed(
    monitored, reentrant
):
    layer = norm(64, momentum=0.004)
    one = monitored(layer)
    one.window(samples(40, 32, 64, offset=2.0), checkpointed(layer, reentrant))
    report = one.window(samples(40, 32, 64, seed=1, offset=2.0), checkpointed(layer, reentrant))
    assert (report.verdict, report.flags) == ("warming-up", ("double-update",))
    assert report.evidence["initial_weight"] == pytest.approx(0.996**160, rel=1e-6)
    words_are_sound(report.diagnosis)


def test_which_calls_are_made_again_need_not_be_known(monitored):
    layer = norm(200)
    one, repeated = monitored(layer), checkpointed(layer, True)  # whose calls record no graph, as the others

    def step(x):
        with torch.no_grad():
            layer(x[:32])
        repeated(x[32:])

    report = one.window(samples(40, 64, 200), step)
    assert (report.verdict, report.flags) == ("insufficient-data", ("double-update",))
    report = one.window(samples(40, 64, 200, seed=1), step)
    assert (report.verdict, report.flags, report.num_batches) == ("healthy", ("double-update",), 80)
    assert (report.evidence["updates_per_call"], report.evidence["updates_of_repeated"]) == (1.5, 2)
    for z in (report.z_mean, report.z_var):  # all have the mean weight, which is not that of each
        assert z.square().mean().sqrt().item() == pytest.approx(1.1, abs=0.15)
    words_are_sound(report.diagnosis)


class Ghost(nn.BatchNorm1d):
    """Normalises batches in parts of 16."""

    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.split(16)])


def test_a_forward_that_normalises_in_parts_is_judged_by_all_its_updates(monitored):
    layer = Ghost(200, momentum=0.05)
    one = monitored(layer)

    def step(x):
        layer(x.clone().requires_grad_()).sum().backward()

    report = one.window(samples(40, 32, 200), step)
    assert (report.verdict, report.flags) == ("insufficient-data", ("double-update",))
    report = one.window(samples(40, 32, 200, seed=1), step)
    assert (report.verdict, report.flags) == ("healthy", ("double-update",))
    assert "its own `forward` normalises the batch in parts" in report.explanation
    assert report.evidence["effective_momentum"] == pytest.approx(1 - 0.95**2)
    for z in (report.z_mean, report.z_var):
        assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    words_are_sound(report.diagnosis)


def test_checkpointing_that_ends_claims_nothing_of_weights_in_one_window(monitored):
    layer = norm()
    one = monitored(layer)
    for seed in (0, 1):
        one.window(samples(40, 32, seed=seed), checkpointed(layer, False))
    report = one.window(samples(40, 32, seed=2))
    assert (report.verdict, report.flags) == ("insufficient-data", ())
    assert report.evidence["assumed_updates_per_call"] == 2
    words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, seed=3))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["effective_momentum"] == 0.1


def test_calls_that_are_not_seen_are_flagged(monitored):
    layer = norm()
    one = monitored(layer)

    def call(x):
        layer(x)
        with one.tracker.paused():
            layer(x + 1)

    for seed in (0, 1):
        report = one.window(samples(40, 32, seed=seed), call)
        assert (report.verdict, report.flags) == ("insufficient-data", ("missed-calls",))
        assert report.evidence["updates_per_call"] == 2
        assert report.evidence["effective_momentum"] == 0.1
        assert "compensated_momentum" not in report.evidence
        assert not report.z_mean.any()
        assert not report.z_var.any()
        assert report.num_batches == 40
        words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, seed=2))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["initial_weight"] == 0  # nobody knows what the buffers were made of before


def test_calls_that_are_not_seen_are_no_excuse_for_tiny_batches(monitored):
    layer = norm()
    one = monitored(layer)

    def call(x):
        layer(x)
        with one.tracker.paused():
            layer(x)

    report = one.window(samples(40, 3), call)
    assert (report.verdict, report.flags) == ("tiny-batch", ("missed-calls",))
    report = one.window(samples(100, 32, shared=0.5), call)
    assert (report.verdict, report.flags) == ("grouped-batches", ("missed-calls",))
    words_are_sound(report.diagnosis)


def test_buffers_that_are_written_between_windows_are_flagged_and_their_history_restarts(monitored):
    one = monitored(norm(momentum=0.02))
    assert one.window(samples(150, 64)).flags == ()
    assert one.window(samples(40, 64, seed=1)).flags == ()
    with torch.no_grad():
        one.layer.running_mean += 2
    report = one.window(samples(40, 64, seed=2))
    assert (report.verdict, report.flags) == ("lagging", ("written-outside",))
    assert report.evidence["lag_error"] == pytest.approx(2 * 0.98**40, rel=0.1)
    assert report.evidence["warmup_error"] == 0
    words_are_sound(report.diagnosis)


def test_a_reset_between_windows_is_a_fresh_start(monitored):
    one = monitored(norm(momentum=0.02))
    one.window(samples(150, 64, offset=2.0))
    one.layer.reset_running_stats()
    report = one.window(samples(40, 64, offset=2.0, seed=1))
    assert (report.verdict, report.flags) == ("warming-up", ("written-outside",))
    assert report.evidence["initial_weight"] == pytest.approx(0.98**40)
    assert report.evidence["lag_error"] == 0


def test_recalibration_between_windows_is_flagged_and_repairs(monitored):
    one = monitored(pretrained(3.0, momentum=0.001))
    report = one.window(samples(40, 64))
    assert report.verdict == "lagging"
    assert "recalibrate(model, loader)" in report.remedy
    with one.tracker.paused():
        update_bn(samples(200, 64, seed=1), one.model)
    report = one.window(samples(40, 64, seed=2))
    assert (report.verdict, report.flags) == ("healthy", ("written-outside",))
    assert report.evidence["eval_error"] < 0.1
    assert one.window(samples(40, 64, seed=3)).flags == ()


@pytest.mark.parametrize("num_dead", [1, 5, WIDTH])
def test_dead_channels_are_flagged_beside_the_verdict(monitored, num_dead):
    data = samples(40, 64)
    for x in data:
        x[:, :num_dead] = 0
    one = monitored(norm(momentum=0.5))
    one.window(data)
    report = one.window(data)
    assert (report.verdict, report.flags) == ("healthy", ("dead-channels",))
    assert report.evidence["dead_channels"] == num_dead
    assert f"{num_dead} of {WIDTH} channels" in report.explanation
    words_are_sound(report.diagnosis)


def test_the_effective_momentum_is_that_of_both_updates_in_the_first_window_too(monitored):
    layer = norm()
    report = monitored(layer).window(samples(40, 16), checkpointed(layer, False))
    assert "acts as 0.1." not in report.explanation


def test_a_reset_within_a_window_is_not_said_to_be_calls_that_updated_nothing(monitored):
    one = monitored(norm())
    one.window(samples(40, 16))
    one.tracker.reset()
    for x in samples(40, 16, seed=1):
        one.layer(x)
    one.layer.reset_running_stats()
    report = one.closed()
    assert report.flags == ("written-outside",)
    assert "-1 times" not in report.explanation


def test_a_reset_at_the_end_of_a_window_is_a_fresh_start(monitored):
    one = monitored(norm(momentum=0.01))
    for x in samples(300, 64, offset=3.0):
        one.layer(x)
    one.layer.reset_running_stats()
    one.tracker.reset()
    for x in samples(40, 64, offset=3.0, seed=1):
        one.layer(x)
    assert one.closed().verdict == "warming-up"
