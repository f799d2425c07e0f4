"""The flag of calls that differ: its thresholds and its words."""

from __future__ import annotations

import math

import pytest

from lightning_bnmonitor.diagnosis.evidence import EVIDENCE
from tests.diagnosis.symptoms import ABOVE, BELOW, beside, diagnosed, numbers, words_are_sound

TWO = {"call_shift": 0.2, "call_shift_index": 1.0, "calls_per_step": 2.0}


@pytest.mark.parametrize(
    ("symptoms", "flags", "attention"),
    [
        ({"call_shift": 0.0}, (), False),
        ({"call_shift": beside(0.05, BELOW)}, (), False),
        ({"call_shift": 0.05}, ("calls-differ",), False),
        ({"call_shift": beside(0.1, BELOW)}, ("calls-differ",), False),
        ({"call_shift": 0.1}, ("calls-differ",), True),
        ({"calls_per_model_call": 1.25}, ("calls-differ",), True),
        ({"calls_per_model_call": beside(1.25, ABOVE)}, ("calls-differ",), False),
        ({"own_forward": True}, (), False),
    ],
    ids=str,
)
def test_it_stands_from_a_twentieth_on_and_needs_attention_from_a_tenth_on(symptoms, flags, attention):
    diagnosis = diagnosed(symptoms, TWO)
    assert diagnosis.flags == flags
    assert diagnosis.needs_attention is attention
    assert diagnosis.evidence.keys() <= set(EVIDENCE)


@pytest.mark.parametrize(
    "symptoms",
    [{"training_calls": 0, "batches": 0.0}, {"has_running_stats": False, "batches": 0.0}],
    ids=["frozen", "without running statistics"],
)
def test_it_does_not_stand_where_eval_mode_does_what_training_does(symptoms):
    assert "calls-differ" not in diagnosed(symptoms, TWO).flags


@pytest.mark.parametrize(
    ("symptoms", "words", "expected"),
    [
        ({}, "each is 0.2", ["2", "0.2"]),
        ({"calls_per_step": 2.5}, "the first is 0.2", ["2.5", "0.2"]),
        ({"calls_per_step": 3.0, "call_shift_index": 2.0}, "the second is 0.2", ["3", "0.2"]),
        ({"calls_per_step": 3.0, "call_shift_index": 3.0}, "the third is 0.2", ["3", "0.2"]),
        ({"calls_per_step": 8.0, "call_shift_index": 4.0}, "those from the fourth on are 0.2", ["8", "0.2"]),
        ({"call_shift_before": 0.15}, "In the window before it was 0.15.", ["2", "0.2", "0.15"]),
    ],
)
def test_it_says_which_call_differs_and_by_how_much(symptoms, words, expected):
    diagnosis = diagnosed(symptoms, TWO)
    assert diagnosis.explanation.startswith("The calls of a training step differ")
    said = diagnosis.explanation.partition("The running statistics fit")[0]
    assert words in said
    assert numbers(said) == expected
    words_are_sound(diagnosis)


def test_the_remedy_is_one_call_for_all_or_statistics_of_their_own():
    remedy = diagnosed(TWO).remedy
    assert "`model(torch.cat([a, b]))`" in remedy
    assert "BatchNorm layer of its own" in remedy
    assert "recalibrate(model, loader)" in remedy


def test_of_one_layer_at_several_places_that_is_said():
    diagnosis = diagnosed({"calls_per_model_call": 2.0}, TWO)
    words_are_sound(diagnosis)
    assert "at several places" in diagnosis.explanation
    assert "Give each place a BatchNorm layer of its own" in diagnosis.remedy
    assert "torch.cat" not in diagnosis.remedy


# Of two calls that are 0.5 off their mean, batches scatter by that: 0.6 in all leaves 0.33, which momentum 0.1 takes
# down from 0.2 to 0.11.
NOISY = TWO | {"call_shift": 0.5, "jitter": 0.6, "noise_error": 0.2}


@pytest.mark.parametrize(
    ("symptoms", "rest"),
    [
        ({}, 0.2 * math.sqrt(1 - 25 / 36)),
        ({"jitter": 0.55}, 0.2 * math.sqrt(1 - 0.25 / 0.3025)),
        ({"jitter": 0.45}, 0.0),
        ({"calls_per_step": 3.0}, 0.2 * math.sqrt(1 - 12.5 / 36)),
        ({"noise_error": 0.15}, 0.15 * math.sqrt(1 - 25 / 36)),
        ({"call_shift": 0.09, "jitter": 0.09}, 0.2),
    ],
    ids=str,
)
def test_what_is_no_more_than_their_difference_is_not_taken_for_sampling_noise(symptoms, rest):
    diagnosis = diagnosed(symptoms, NOISY)
    assert diagnosis.verdict == "noisy"
    is_of_calls = rest <= 0.1
    assert diagnosis.cause == ("calls-differ" if is_of_calls else "noisy")
    assert ("sampling noise alone" in diagnosis.explanation) is not is_of_calls
    assert ("recommended_momentum" in diagnosis.evidence) is not is_of_calls
    assert ("momentum=" in diagnosis.remedy) is not is_of_calls
    words_are_sound(diagnosis)


def test_what_no_running_average_sees_is_not_taken_for_a_lag_where_calls_differ():
    far = {"eval_error": 0.6, "act_rmse": 0.6, "least_error": 0.6, "reference_error": 0.05}
    assert diagnosed(far).verdict == "lagging"
    assert diagnosed(far, {"unseen_error": 0.58}).verdict == "lagging"
    seen = diagnosed(far, TWO, {"unseen_error": 0.58})
    assert (seen.verdict, seen.cause) == ("healthy", "calls-differ")
    assert "off by 0.6, and with any momentum by about 0.58" in seen.explanation
    words_are_sound(seen)
    assert diagnosed(far, TWO, {"unseen_error": 0.5}).verdict == "lagging"


@pytest.mark.parametrize(("unseen", "attention"), [(0.2, False), (beside(0.2, ABOVE), True)])
def test_one_layer_at_several_places_needs_attention_if_eval_mode_normalises_none_of_them(unseen, attention):
    assert diagnosed(TWO, {"calls_per_model_call": 3.0, "unseen_error": unseen}).needs_attention is attention


def test_of_steps_that_an_optimizer_divides_the_mean_number_of_calls_is_not_said():
    diagnosis = diagnosed({"calls_per_step": 1.5}, TWO)
    assert "of those between two optimizer steps, the first is 0.2" in diagnosis.explanation
    words_are_sound(diagnosis)
