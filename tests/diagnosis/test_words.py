"""What is said of a layer: every number in it is in the evidence, and sentences are sentences."""

from __future__ import annotations

import re

import pytest

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import EVIDENCE
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.diagnosis.monitored_layers import checkpointed, frozen, norm, samples
from tests.diagnosis.symptoms import (
    CALLED,
    INF,
    NEVER_CALLED,
    SYMPTOMS,
    diagnosed,
    numbers,
    printed,
    telling_evidence,
    words_are_sound,
)

# The numbers of each explanation in the order in which they come.
NUMBERS_OF_VERDICTS = {
    "unused": [],
    "no-running-stats": [],
    "stale": ["eval_error"],
    "frozen": ["eval_error"],
    "insufficient-data": ["batches", "act_rmse"],
    "tiny-batch": ["samples_per_batch", "batch_jitter", "noise_error"],
    "ordered-batches": ["ordering_ratio", "ordering_limit", "ordering_share", "smooth_share"],
    "grouped-batches": ["grouping_ratio", "batch_size", "grouping_limit", "grouping_share"],
    "warming-up": ["initial_weight", "eval_error", "noise_error"],
    "lagging": ["eval_error", "noise_error"],
    "noisy": ["effective_momentum", "samples_per_batch", "noise_error"],
    "drifting": ["drift_error", "eval_error"],
    "healthy": ["act_rmse", "noise_error", "eval_error", "now_error"],
}
NUMBERS_OF_FLAGS = {
    "dead-channels": ["dead_channels", "num_features"],
    "double-update": ["updates_per_call", "effective_momentum"],
    "half-frozen": [],
    "interrupted-batch": [],
    "maybe-padded": ["constant_ends"],
    "missed-calls": ["updates_per_call"],
    "not-updating": ["calls_not_updating"],
    "padded": ["padding_share", "padding_scatter", "padding_shift", "padding_noise", "padding_offset"],
    "written-outside": [],
}
NUMBERS_OF_REMEDIES = {
    "warming-up": ["recommended_momentum", "recommended_error", "batches_to_go"],
    "lagging": ["recommended_momentum", "recommended_error"],
    "noisy": ["recommended_momentum", "recommended_error", "recommended_batch_size"],
    "double-update": ["compensated_momentum", "momentum"],
}


@pytest.mark.parametrize("verdict", NUMBERS_OF_VERDICTS)
def test_an_explanation_has_the_numbers_that_it_speaks_of(verdict):
    evidence = telling_evidence()
    diagnosis = Diagnosis(verdict, (), True, evidence)
    assert numbers(diagnosis.explanation) == [printed(evidence[name]) for name in NUMBERS_OF_VERDICTS[verdict]]
    assert numbers(diagnosis.remedy) == [printed(evidence[name]) for name in NUMBERS_OF_REMEDIES.get(verdict, [])]
    words_are_sound(diagnosis)


@pytest.mark.parametrize("flag", NUMBERS_OF_FLAGS)
def test_a_flag_adds_a_sentence_with_its_numbers(flag):
    evidence = telling_evidence()
    plain, flagged = Diagnosis("healthy", (), False, evidence), Diagnosis("healthy", (flag,), False, evidence)
    assert flagged.explanation.startswith(plain.explanation)
    added = flagged.explanation.removeprefix(plain.explanation)
    assert re.match(r" [A-Z0-9].*\.$", added)
    assert numbers(added) == [printed(evidence[name]) for name in NUMBERS_OF_FLAGS[flag]]
    words_are_sound(flagged)


@pytest.mark.parametrize("flag", ["small-last-batch", "domain-shift", "updated-in-validation", "rank-0-only"])
def test_the_cause_comes_first_also_if_it_is_a_flag(flag):
    evidence = telling_evidence() | {"last_batch_samples": 2.0, "samples_per_batch": 64.0}
    evidence |= {"val_error": 0.5, "val_error_noise": 0.01}
    diagnosis = Diagnosis("healthy", ("not-updating", flag), True, evidence)
    assert diagnosis.cause == flag
    assert diagnosis.explanation.startswith(FLAGS[flag].explain(evidence))
    assert Diagnosis("healthy", (), False, evidence).explanation in diagnosis.explanation
    both = Diagnosis("noisy", ("half-frozen", flag), True, evidence)
    assert both.explanation.startswith(VERDICTS["noisy"].explain(evidence))
    assert both.remedy.startswith(VERDICTS["noisy"].prescribe(evidence))


def test_a_layer_that_is_outrun_is_told_how_far_it_is_behind_and_why_that_is_not_seen():
    diagnosis = diagnosed({"drift_error": 0.3, "walk_error": 0.345, "effective_momentum": 0.123, "noise_error": 0.06})
    assert diagnosis.verdict == "lagging"
    assert numbers(diagnosis.explanation) == ["0.123", "0.345", "0.06", "0.07"]
    assert "move at random" in diagnosis.explanation
    words_are_sound(diagnosis)
    seen = diagnosed({"drift_error": 0.3, "walk_error": 0.345, "eval_error": 0.4})
    assert "move at random" not in seen.explanation
    words_are_sound(seen)


def test_double_updates_are_compensated_once():
    evidence = telling_evidence()
    diagnosis = Diagnosis("noisy", ("double-update",), True, evidence)
    assert printed(evidence["compensated_momentum"]) not in numbers(diagnosis.remedy)
    words_are_sound(diagnosis)  # the momentum that is recommended against the noise is that of one update already
    del evidence["recommended_momentum"]
    for verdict in ("healthy", "noisy", "tiny-batch"):
        remedy = Diagnosis(verdict, ("double-update",), True, evidence).remedy
        expected = [printed(evidence[name]) for name in NUMBERS_OF_REMEDIES["double-update"]]
        assert numbers(remedy)[-2:] == expected


def test_all_flags_together_are_all_their_sentences():
    evidence = telling_evidence()
    one_by_one = [Diagnosis("unused", (flag,), False, evidence).explanation for flag in NUMBERS_OF_FLAGS]
    plain = Diagnosis("unused", (), False, evidence).explanation
    together = Diagnosis("unused", tuple(NUMBERS_OF_FLAGS), False, evidence).explanation
    assert together == plain + "".join(text.removeprefix(plain) for text in one_by_one)


def test_unknown_weights_are_explained_with_what_was_assumed():
    diagnosis = diagnosed({"updates_per_call": 2.5, "assumed_updates": 2, "eval_error": 0.123})
    assert diagnosis.verdict == "insufficient-data"
    assert numbers(diagnosis.explanation)[:3] == ["2.5", "2", "0.123"]
    words_are_sound(diagnosis)


def test_a_reset_within_the_window_is_explained_by_what_is_known_of_it():
    diagnosis = diagnosed({"updates_per_call": -0.5, "eval_error": 0.123})
    assert numbers(diagnosis.explanation) == ["0.123"]
    assert "reset within this window" in diagnosis.explanation
    words_are_sound(diagnosis)


@pytest.mark.parametrize("verdict", ["healthy", "noisy", "unused"])
def test_calls_that_could_not_be_looked_at_are_mentioned(verdict):
    calls = diagnosed(SYMPTOMS[verdict]).evidence
    calls = {path: int(calls[f"calls_{path}"]) for path in CALLED.calls} | {"skipped": 17}
    diagnosis = diagnosed({"calls": calls}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert "17" in numbers(diagnosis.explanation)
    assert len(diagnosis.explanation) > len(diagnosed(SYMPTOMS[verdict]).explanation)
    words_are_sound(diagnosis)


@pytest.mark.parametrize(
    ("symptoms", "expected"),
    [
        ({"first_bad_batch": 7.0, "first_bad_channel": 0.0}, ["7", "0"]),
        ({"non_finite_running_stats": 5.0}, ["5", "64"]),
        ({"first_bad_batch": 7.0, "first_bad_channel": 3.0, "non_finite_running_stats": 5.0}, ["7", "3", "5", "64"]),
    ],
)
def test_what_is_not_finite_is_said_with_its_place(symptoms, expected):
    diagnosis = diagnosed({"non_finite_channels": 6.0}, symptoms)
    assert diagnosis.verdict == "non-finite"
    assert numbers(diagnosis.explanation) == expected
    assert numbers(diagnosis.remedy) == []
    assert ("reset_running_stats" in diagnosis.remedy) == ("non_finite_running_stats" in symptoms)
    assert ("detect_anomaly" in diagnosis.remedy) == ("first_bad_batch" in symptoms)


@pytest.mark.parametrize("flags", [{}, {"written_outside": True, "dead_channels": 3.0}, {"batches": 90.0}])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_words_are_sound_for_every_verdict(verdict, flags):
    diagnosis = diagnosed(SYMPTOMS[verdict], flags)
    words_are_sound(diagnosis)
    # What is sent to other ranks is all of it.
    assert diagnosis.evidence.keys() <= set(EVIDENCE)
    assert set(diagnosis.flags) <= set(FLAGS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (12.0, "12"),
        (999.4, "999"),
        (999.6, "1000"),
        (1234567.0, "1234567"),
        (INF, "inf"),
        (1.2e-7, "1.2e-07"),
    ],
)
def test_numbers_are_printed_with_three_digits_and_counts_in_full(value, text):
    assert f"an error of {text}." in Diagnosis("stale", (), True, {"eval_error": value}).explanation


def test_a_layer_whose_calls_could_not_be_looked_at_is_not_said_not_to_have_been_called():
    calls = {"calls": NEVER_CALLED | {"skipped": 5}}
    explanation = diagnosed(calls, SYMPTOMS["unused"]).explanation
    assert explanation.startswith("No call of it was counted in this window. 5 calls could not be looked at")


def test_double_updates_of_a_cumulative_average_need_no_remedy(monitored):
    layer = norm(momentum=None)
    words_are_sound(monitored(layer).window(samples(40, 16), checkpointed(layer, False)).diagnosis)


def test_tiny_batches_are_explained_without_weights(monitored):
    layer = norm()
    words_are_sound(monitored(layer).window(samples(40, 3), checkpointed(layer, False)).diagnosis)


def test_a_layer_that_received_a_single_value_has_an_explanation_in_words(monitored):
    words_are_sound(monitored(frozen(norm())).window(samples(1, 1)).diagnosis)


@pytest.mark.parametrize("name", ["samples_per_batch", "batch_size", "ordering_ratio"])
def test_large_numbers_are_readable(name):
    evidence = telling_evidence() | {name: 12544.5}
    text = "".join(Diagnosis(v, (), True, evidence).explanation for v in ("tiny-batch", "ordered-batches", "noisy"))
    assert "e+" not in text + Diagnosis("grouped-batches", (), True, evidence).explanation


def test_huge_errors_are_readable():
    assert max(map(len, numbers(Diagnosis("stale", (), True, {"eval_error": 7.684269647594e19}).explanation))) < 10


@pytest.mark.parametrize(
    "diagnosis",
    [
        diagnosed({"batches": 1.0}),
        diagnosed({"batches": 99.0}),
        diagnosed({"dead_channels": 1.0}),
        diagnosed({"dead_channels": 1.0, "num_features": 1}),
        diagnosed({"updates_per_call": 1.0, "assumed_updates": 2}),
        diagnosed({"updates_per_call": -1.0}),
        diagnosed({"momentum": 0.001, "effective_momentum": 0.9, "warmup_error": 0.11}, SYMPTOMS["warming-up"]),
    ],
    ids=["batch", "call", "dead", "dead of 1", "updates", "negative updates", "batches to go"],
)
def test_one_is_singular(diagnosis):
    text = f"{diagnosis.explanation} {diagnosis.remedy}"
    assert not re.search(r"-?\b1 (batches|calls|times|channels)\b|\b1 of \d+ channels are", text), text


@pytest.mark.parametrize(("momentum", "is_said"), [(0.89, False), (0.9, True), (0.99, True), (0.1, False)])
def test_a_large_momentum_may_be_meant_as_keras_means_it(momentum, is_said):
    diagnosis = diagnosed({"noise_error": 0.3, "momentum": momentum, "effective_momentum": momentum})
    assert diagnosis.verdict == "noisy"
    assert ("Keras" in diagnosis.explanation) == is_said
    if is_said:
        assert printed(1 - momentum) in numbers(diagnosis.explanation)
    words_are_sound(diagnosis)


def test_nothing_to_do_is_not_said_beside_what_is_to_be_done():
    known = {"drift_error": 0.3, "eval_error": 0.05, "val_error": 0.5, "val_error_noise": 0.01, "calls_saved": 9.0}
    assert Diagnosis("drifting", (), False, known).remedy.startswith("Nothing to do")
    flagged = Diagnosis("drifting", ("other-weights",), True, known).remedy
    assert "Nothing to do" not in flagged
    assert "PreciseBatchNorm" in flagged
    assert Diagnosis("drifting", ("half-frozen",), False, known).remedy.startswith("Nothing to do")


@pytest.mark.parametrize("flag", sorted(FLAGS))
@pytest.mark.parametrize("none", [{}, {"batches": 0.0}, {"updates_per_call": 0.0}])
def test_what_updates_nothing_is_recalibrated_as_frozen(none, flag):
    known = telling_evidence() | {"call_shift": 0.3, "call_shift_index": 1.0, "calls_per_step": 2.0} | none
    call = r"recalibrate\(model, (?:evaluation_)?loader" + (r", frozen=True\)" if none else r"\)")
    for verdict in ("stale", "healthy", "lagging", "non-finite"):
        diagnosis = Diagnosis(verdict, (flag,), True, known)
        for text in (diagnosis.remedy, diagnosis.notes):
            assert text.count("recalibrate(model") == len(re.findall(call, text))


def test_a_layer_that_has_never_learned_anything_is_not_told_to_be_recomputed():
    frozen = diagnosed(SYMPTOMS["frozen"])
    assert "recalibrate(model, loader, frozen=True)" in frozen.remedy
    initial = diagnosed(SYMPTOMS["frozen"] | {"has_initial_stats": True})
    assert "recalibrate(model" not in initial.remedy
    assert "`layer.train()` and train anew" in initial.remedy
    assert "copy the buffers with the weights" in initial.remedy


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_norm_that_is_recommended_takes_what_the_layer_takes(dimensions):
    one_sample = {"batch_size": 1.0, "samples_per_batch": 400.0, "independent_values": 2.0, "dimensions": dimensions}
    assert f"`nn.InstanceNorm{dimensions}d(channels, affine=True)`" in diagnosed(one_sample).remedy


@pytest.mark.parametrize(("group_score", "verdict"), [(7.0, "grouped-batches"), (1.0, "ordered-batches")])
def test_of_batches_that_differ_where_parts_do_not_what_is_said_is_beyond_chance(group_score, verdict):
    batches_differ = {"grouping_ratio": 7.2, "grouping_share": 0.4, "ordering_ratio": 2.35, "ordering_limit": 3.0}
    diagnosis = diagnosed(batches_differ | {"order_score": 2.4, "group_score": group_score})
    assert diagnosis.verdict == verdict
    assert "7.2 times" in diagnosis.explanation
    assert "2.35" not in diagnosis.explanation
