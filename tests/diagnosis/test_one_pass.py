"""What is said of one pass of data at fixed weights: which verdicts and flags there are, and in which words."""

from __future__ import annotations

import re

import pytest

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import EVIDENCE
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.diagnosis.symptoms import (
    ABOVE,
    NAN,
    SYMPTOMS,
    beside,
    diagnosed,
    numbers,
    printed,
    telling_evidence,
    words_are_sound,
)

ONE_PASS = {
    "one_pass": 1.0,
    "updates_per_call": NAN,
    "now_error": 0.01,
    "drift_error": 0.0,
    "walk_error": 0.0,
    "warmup_error": 0.0,
    "num_tracked": 40,
}
OFF = {"eval_error": 0.3, "least_error": 0.3, "reference_error": 0.01}


def passed(*symptoms: dict) -> Diagnosis:
    return diagnosed(*symptoms, ONE_PASS)


@pytest.mark.parametrize(
    "verdict", ["non-finite", "unused", "no-running-stats", "own-forward", "insufficient-data", "tiny-batch"]
)
def test_verdicts_that_one_pass_tells_as_training_does(verdict: str) -> None:
    assert passed(SYMPTOMS[verdict]).verdict == verdict


@pytest.mark.parametrize("training_calls", [0, 100])
def test_what_updates_nothing_is_told_as_it_is_set_up(training_calls: int) -> None:
    diagnosis = passed({"updates_nothing": True, "training_calls": training_calls, **OFF})
    assert diagnosis.verdict == ("stale" if training_calls else "frozen")
    assert diagnosis.needs_attention
    assert "frozen=True" in diagnosis.remedy
    assert diagnosis.flags == ()
    words_are_sound(diagnosis)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("scores", [{}, {"order_score": 0.5, "group_score": 0.5}])
def test_where_no_weights_move_what_differs_between_parts_is_the_order_of_the_data(smooth: float, scores: dict) -> None:
    diagnosis = passed({"ordering_ratio": 3.0, "ordering_share": 0.3, "smooth_share": smooth, **scores})
    assert diagnosis.verdict == "ordered-batches"
    assert "while the weights stay" in diagnosis.explanation


def test_groups_are_told_by_what_the_model_is_given_where_that_is_known() -> None:
    symptoms = {"grouping_ratio": 2.0, "grouping_share": 0.1, "order_score": 0.5}
    assert passed({**symptoms, "group_score": 5.0}).verdict == "grouped-batches"
    alike = passed({**symptoms, "group_score": 0.5})
    assert alike.verdict == "healthy"
    assert "with the weights" not in alike.explanation  # which stay


@pytest.mark.parametrize(
    ("symptoms", "verdict"),
    [
        ({"warmup_error": 0.5, "lag_error": 0.1, "initial_weight": 0.4}, "warming-up"),
        ({"warmup_error": 0.1, "lag_error": 0.5}, "misfit"),
        ({"noise_error": 0.29}, "noisy"),
        ({"noise_error": 0.02}, "misfit"),  # for a reason that is not seen
    ],
)
def test_running_statistics_that_are_off_have_one_of_these(symptoms: dict, verdict: str) -> None:
    diagnosis = passed({**OFF, **symptoms})
    assert diagnosis.verdict == verdict
    assert diagnosis.needs_attention
    assert "`lightning_bnmonitor.recalibrate(model, loader)`" in diagnosis.remedy
    assert not re.search(r"train on|window|at its end", diagnosis.explanation + diagnosis.remedy, re.IGNORECASE)
    words_are_sound(diagnosis)


@pytest.mark.parametrize(
    ("error", "now", "is_off"),
    [(0.1, 0.0, False), (beside(0.1, ABOVE), 0.0, True), (0.14, 0.1, False), (0.31, 0.1, True)],
)
def test_off_is_an_error_above_a_tenth_beyond_chance_in_the_data(error: float, now: float, is_off: bool) -> None:
    told = passed({"eval_error": error, "now_error": now, "noise_error": 0.0})
    assert (told.verdict, told.needs_attention) == (("misfit", True) if is_off else ("healthy", False))


def test_noise_that_is_to_be_expected_and_did_not_happen_is_no_verdict() -> None:
    assert passed({"noise_error": 0.3, "eval_error": 0.02}).verdict == "healthy"
    assert diagnosed({"noise_error": 0.3, "eval_error": 0.02}).verdict == "noisy"  # in training it will


def test_statistics_that_were_never_updated_are_flagged_where_they_do_not_fit() -> None:
    fresh = {"has_initial_stats": True, "initial_weight": 1.0, "warmup_error": 0.3, "num_tracked": 0}
    told = passed({**OFF, **fresh})
    assert (told.verdict, told.flags) == ("warming-up", ("never-updated",))
    assert "momentum" not in told.remedy
    words_are_sound(told)
    assert passed({**fresh, "eval_error": 0.05}).flags == ()
    assert passed({**OFF, **fresh, "own_forward": True}).flags == ()
    assert passed({**OFF, **fresh, "updates_nothing": True}).flags == ()
    assert "never-updated" not in diagnosed({**OFF, **fresh}).flags


def test_a_small_last_batch_needs_attention_only_where_the_statistics_are_off() -> None:
    small = {"last_batch_samples": 2.0, "last_batch_share": 0.9, "noise_without_last_batch": 0.05}
    fits = passed({**small, "noise_error": 0.25, "eval_error": 0.03})
    assert (fits.verdict, fits.flags, fits.needs_attention) == ("healthy", ("small-last-batch",), False)
    off = passed({**small, **OFF, "noise_error": 0.29})
    assert (off.verdict, off.flags, off.needs_attention) == ("noisy", ("small-last-batch",), True)
    assert "recommended" not in off.remedy
    assert "momentum=" not in off.remedy
    words_are_sound(off)
    assert diagnosed({**small, "noise_error": 0.25, "eval_error": 0.03}).needs_attention  # in training the next is so


def test_calls_are_not_told_to_have_updated_nothing() -> None:
    assert passed({"batches": 60.0}).flags == ()
    assert passed({"batches": 160.0, "updates_nothing": True}).flags == ()


@pytest.mark.parametrize("flags", [(), tuple(name for name in FLAGS if name != "rank-0-only")])
@pytest.mark.parametrize("verdict", [n for n in VERDICTS if n not in ("trained-in-eval", "lagging", "drifting")])
def test_words_are_sound_for_every_verdict_that_one_pass_can_have(verdict: str, flags: tuple[str, ...]) -> None:
    names = [name for name in EVIDENCE if name not in telling_evidence() and not name.startswith("bad_windows")]
    evidence = telling_evidence() | {name: 2.01 + 0.01 * index for index, name in enumerate(names)}
    for name in ("calls_per_step", "call_shift_index", "windows"):
        evidence[name] = 1.0
    diagnosis = Diagnosis(verdict, flags, True, evidence)
    words_are_sound(diagnosis)
    if not flags:
        assert "window" not in diagnosis.explanation + diagnosis.remedy


def test_the_numbers_that_explain_a_layer_that_warms_up() -> None:
    evidence = telling_evidence() | {"one_pass": 1.0, "num_updates": 1.93}
    told = Diagnosis("warming-up", (), True, evidence)
    names = ["num_updates", "momentum", "initial_weight", "eval_error", "noise_error"]
    assert numbers(told.explanation) == [printed(evidence[name]) for name in names]
    assert numbers(told.remedy) == [printed(evidence["recommended_momentum"])]
    assert {"one_pass", "num_updates"} <= EVIDENCE.keys()


def test_weights_that_do_not_train_are_told_by_whether_their_statistics_fit() -> None:
    frozen = {"has_frozen_weights": True}
    fits, off = passed(frozen), passed({**frozen, **OFF})
    assert (fits.verdict, off.verdict) == ("healthy", "misfit")
    assert fits.flags == off.flags == ("half-frozen",)
    assert "where the model is trained on like this" in fits.explanation
    assert "if the model was trained on other data like this" in off.explanation
    assert "To keep what is recomputed" in off.remedy
    for told in (fits, off):
        assert "call `layer.eval()` after every `model.train()`" in told.remedy
        words_are_sound(told)


@pytest.mark.parametrize(("unseen", "is_known"), [(0.29, True), (0.15, False)])
def test_a_misfit_that_comes_of_calls_that_differ_is_told_to(unseen: float, is_known: bool) -> None:
    apart = {"call_shift": 0.4, "call_shift_index": 0.0, "calls_per_step": 2.0, "unseen_error": unseen}
    told = passed({**OFF, **apart, "training_calls": 100})
    assert (told.verdict, told.flags) == ("misfit", ("calls-differ",))
    assert ("without what lies between them" in told.explanation) == is_known
    assert ("one pass does not tell" in told.explanation) != is_known
    assert "`lightning_bnmonitor.recalibrate(model, loader)`" in told.remedy
    words_are_sound(told)


def test_noise_is_not_promised_to_be_all_that_is_left_with_a_smaller_momentum() -> None:
    told = passed({**OFF, "noise_error": 0.29, "num_tracked": 400})
    assert "which one pass does not show" in told.remedy
    assert "predicted" not in told.remedy


def test_a_mask_is_to_be_given_to_the_examination() -> None:
    told = passed({"constant_ends": 0.3, "samples_per_batch": 640.0, "batch_size": 32.0, "training_calls": 100})
    assert told.flags == ("maybe-padded",)
    assert "`examine(model, loader, mask=fn)`" in told.remedy
    assert "BatchNormMonitor" not in told.remedy


@pytest.mark.parametrize("updates_nothing", [False, True])
def test_what_evaluation_data_are_recalibrated_by_includes_a_layer_that_updates_nothing(updates_nothing: bool) -> None:
    evidence = telling_evidence() | {"one_pass": 1.0, "updates_per_call": 0.0 if updates_nothing else 1.0}
    evidence |= {"calls_pass": 40.0, "val_spoiled_before": 0.0, "val_shifted_before": 0.0}
    told = Diagnosis("healthy", ("domain-shift",), True, evidence)
    call = "`lightning_bnmonitor.recalibrate(model, evaluation_loader" + ", frozen=True" * updates_nothing + ")`"
    assert call in told.remedy
