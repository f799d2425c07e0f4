"""What validation adds to a diagnosis, at each threshold."""

from __future__ import annotations

import math

import pytest

from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.validation import Standing, Validated, diagnose_validation
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.diagnosis.symptoms import BELOW, SYMPTOMS, beside, diagnosed, words_are_sound

NOISE = {"val_error_noise": 0.01, "val_noise": 0.01, "val_batches": 5.0}
UNUSED = SYMPTOMS["unused"]


def total(net: float, noise: float = 0.01) -> float:
    """The number of which this is left when its noise is taken off."""
    return math.hypot(net, noise)


def layer(symptoms=None, standing=Standing.TRAINED, misfit=0.0, error=0.05, shift=0.05, **evidence):
    numbers = NOISE | {"val_error": error, "val_shift": shift} | evidence
    return Validated(diagnosed(symptoms or {"eval_error": 0.07}), numbers, standing, misfit)


def flags_of(*layers):
    return [tuple(sorted(set(its.flags) & {*VALIDATION, "errors-add-up"})) for its in diagnose_validation(layers)]


VALIDATION = ("never-updated", "other-weights", "domain-shift", "unexplained-error")


def test_what_is_small_has_no_flag_and_needs_no_attention():
    (diagnosis,) = diagnose_validation([layer()])
    assert (diagnosis.flags, diagnosis.needs_attention) == ((), False)
    assert diagnosis.evidence["val_error"] == 0.05


@pytest.mark.parametrize(
    ("standing", "flag", "attention"),
    [(Standing.INITIAL, "never-updated", 0.1), (Standing.OTHER, "other-weights", 0.15)],
)
@pytest.mark.parametrize("symptoms", [{}, UNUSED])
def test_statistics_that_training_has_not_left_are_named_beyond_a_tenth(standing, flag, attention, symptoms):
    def validated(net):
        (diagnosis,) = diagnose_validation([layer(symptoms, standing, error=total(net))])
        return diagnosis.flags, diagnosis.needs_attention

    assert validated(0.0999) == ((), False)
    assert validated(0.1001)[0] == (flag,)
    assert not validated(attention * 0.999)[1]
    assert validated(attention * 1.001) == ((flag,), True)


def test_what_was_not_called_in_training_is_judged_by_validation():
    nets = (0.09, 0.14, 0.16)
    small, said, bad = (diagnose_validation([layer(), layer(UNUSED, error=total(net))])[1] for net in nets)
    assert (small.flags, said.flags, bad.flags) == ((), ("other-weights",), ("other-weights",))
    assert (small.needs_attention, said.needs_attention, bad.needs_attention) == (False, False, True)
    assert "was not called in training" in bad.explanation
    assert "recalibrate(averaged, loader)" in bad.remedy


def test_without_any_training_data_and_weights_are_not_told_apart():
    right, said, initial = (
        diagnose_validation([layer(UNUSED, standing, error=total(net))])[0]
        for net, standing in ((0.149, Standing.TRAINED), (0.151, Standing.TRAINED), (0.151, Standing.INITIAL))
    )
    assert (right.flags, right.needs_attention) == ((), False)
    assert (said.flags, said.needs_attention, said.cause) == (("unexplained-error",), True, "unexplained-error")
    assert "trainer.validate(model, train_loader)" in said.remedy
    for diagnosis in (said, initial):
        words_are_sound(diagnosis)
        assert "training mode" not in diagnosis.explanation
        assert "averag" not in diagnosis.explanation + diagnosis.remedy
    assert initial.flags == ("never-updated",)


def test_with_other_weights_that_their_statistics_fit_training_says_nothing_of_validation():
    assert flags_of(layer({}, Standing.OTHER, error=0.05, shift=0.9)) == [()]
    assert flags_of(layer({}, Standing.TRAINED, error=0.05, shift=0.9)) == [("domain-shift",)]


APART = {"call_shift": 0.5, "call_shift_index": 1.0, "calls_per_step": 2.0, "eval_error": 0.0}


@pytest.mark.parametrize("cause", ["tiny-batch", "ordered-batches", "grouped-batches", "calls-differ"])
def test_behind_a_layer_that_training_normalises_otherwise_the_data_are_not_blamed(cause):
    spoiled = APART if cause == "calls-differ" else SYMPTOMS[cause] | {"eval_error": 0.0}
    earlier, behind = diagnose_validation([layer(spoiled), layer({"eval_error": 0.0}, error=0.5, shift=0.5)])
    assert earlier.cause == cause
    assert behind.flags == ("domain-shift",)
    assert "normalised by its batches in training" in behind.explanation
    assert behind.remedy.endswith("Begin with that layer.")
    assert "Prepare" not in behind.remedy
    words_are_sound(behind)
    *_, first = diagnose_validation([layer(spoiled, error=0.5, shift=0.5)])
    assert "the inputs differ" in first.explanation


def test_what_was_called_where_it_could_not_be_seen_was_called():
    unseen = {**UNUSED, "calls": {**UNUSED["calls"], "skipped": 5}}
    assert flags_of(layer(unseen, error=0.19)) == [()]
    assert flags_of(layer(unseen, error=0.4)) == [("unexplained-error",)]


@pytest.mark.parametrize("flag_of", ["error", "shift"])
def test_what_chance_explains_is_not_said(flag_of):
    noisy = {"error": {"val_error_noise": 0.2}, "shift": {"val_noise": 0.2}}[flag_of]
    standing = Standing.OTHER if flag_of == "error" else Standing.TRAINED
    assert flags_of(layer({}, standing, **{flag_of: beside(0.6, BELOW)}, **noisy)) == [()]
    expected = "other-weights" if flag_of == "error" else "domain-shift"
    assert flags_of(layer({}, standing, **{flag_of: 0.6000001}, **noisy)) == [(expected,)]


def test_data_that_differ_are_named_beyond_a_tenth_and_need_attention_if_the_error_is_beyond_a_fifth():
    right = {"eval_error": 0.0}
    assert flags_of(layer(right, shift=total(0.0999))) == [()]
    assert flags_of(layer(right, shift=total(0.1001))) == [("domain-shift",)]
    for net, needs_attention in ((0.199, False), (0.201, True)):
        (diagnosis,) = diagnose_validation([layer(right, shift=0.5, error=total(net))])
        assert (diagnosis.flags, diagnosis.needs_attention) == (("domain-shift",), needs_attention)


def test_what_running_statistics_are_off_by_themselves_reaches_later_layers_three_times_enlarged():
    wrong = {"eval_error": math.sqrt(0.2**2 + 0.05**2 + 0.06**2)}  # 0.2 beyond the noise of both
    for net, flags in ((0.599, ()), (0.601, ("domain-shift",))):
        first, second = flags_of(layer(wrong, error=0.05), layer({"eval_error": 0.0}, shift=total(net)))
        assert (first, second) == ((), flags)
    both = math.hypot(0.2, 0.2)
    for net, flags in ((3 * both - 0.001, ()), (3 * both + 0.001, ("domain-shift",))):
        *_, last = flags_of(layer(wrong), layer(wrong), layer({"eval_error": 0.0}, shift=total(net)))
        assert last == flags


def test_exact_statistics_that_were_written_since_are_off_by_the_data_alone():
    bad = SYMPTOMS["lagging"]
    assert flags_of(layer(bad, Standing.REPAIRED, error=0.05, shift=0.9)) == [()]
    assert flags_of(layer(bad, Standing.REPAIRED, error=0.5, shift=0.5)) == [("domain-shift",)]


@pytest.mark.parametrize(("misfit", "flag"), [(0.12, "domain-shift"), (0.13, "other-weights")])
def test_exact_statistics_of_other_data_than_training_are_named_where_validation_has_those_of_training(misfit, flag):
    written = layer({}, Standing.REPAIRED, misfit, error=0.6, shift=0.05)
    later = layer({}, Standing.REPAIRED, error=1.7, shift=1.7)  # what the first one makes of it
    assert flags_of(written, later) == [(flag,), (flag,) if flag == "domain-shift" else ()]
    assert flags_of(layer({}, Standing.REPAIRED, misfit, error=0.6, shift=0.6)) == [("domain-shift",)]


@pytest.mark.parametrize(("misfit", "flag"), [(0.12, "domain-shift"), (0.13, "other-weights"), (0.9, "other-weights")])
def test_others_with_the_weights_of_training_are_judged_by_how_they_fit_it(misfit, flag):
    # Beyond a noise of 0.05 and 0.06, a tenth is 0.127.
    assert flags_of(layer({}, Standing.REWRITTEN, misfit, error=0.6, shift=0.6)) == [(flag,)]


def test_only_the_first_layer_is_named_as_the_place():
    inputs, other, later = diagnose_validation([layer({"eval_error": 0.0}, error=0.5, shift=0.5) for _ in range(3)])
    assert "the inputs differ" in inputs.explanation
    assert "Prepare validation data" in inputs.remedy
    assert "as in a layer before it" in other.explanation
    assert "first layer that has this flag" in later.remedy
    _, behind = diagnose_validation([layer({"eval_error": 0.0}), layer({"eval_error": 0.0}, error=0.5, shift=0.5)])
    assert "dropout" in behind.explanation
    assert "Put dropout behind" in behind.remedy


def test_an_error_that_nothing_explains_needs_attention_and_is_said_to_be_unexplained():
    for net, flags in ((0.199, ()), (0.201, ("unexplained-error",))):
        (diagnosis,) = diagnose_validation([layer(SYMPTOMS["drifting"], error=total(net))])
        assert (diagnosis.flags, diagnosis.needs_attention) == (flags, bool(flags))
    assert "cause is not known" in diagnosis.explanation


@pytest.mark.parametrize("earlier", ["lagging", "noisy", "tiny-batch"])
def test_an_error_that_the_verdict_or_that_of_an_earlier_layer_explains_is_not_unexplained(earlier):
    assert flags_of(layer(SYMPTOMS[earlier], error=0.5)) == [()]
    assert flags_of(layer(SYMPTOMS[earlier]), layer(error=0.5)) == [(), ()]
    assert flags_of(layer(error=0.5), layer(SYMPTOMS[earlier])) == [("unexplained-error",), ()]


@pytest.mark.parametrize("verdict", ["stale", "frozen"])
def test_verdicts_that_say_why_statistics_are_initial_need_no_flag_for_it(verdict):
    assert flags_of(layer(SYMPTOMS[verdict], Standing.INITIAL, error=0.5)) == [()]


@pytest.mark.parametrize(
    ("standing", "net", "needs_attention"),
    [
        (Standing.TRAINED, 0.09, False),
        (Standing.TRAINED, 0.11, True),
        (Standing.INITIAL, 0.05, True),
        (Standing.INITIAL, 0.5, True),
    ],
)
def test_what_was_trained_in_eval_mode_is_harmless_if_validation_is_right_with_learnt_statistics(
    standing, net, needs_attention
):
    (diagnosis,) = diagnose_validation([layer(SYMPTOMS["trained-in-eval"], standing, error=total(net))])
    assert (diagnosis.flags, diagnosis.needs_attention) == ((), needs_attention)
    assert "of this window's calls 20 came with gradients" in diagnosis.explanation
    assert "with 10 optimizer steps" in diagnosis.explanation
    assert "model.train()" in diagnosis.remedy


def test_a_layer_that_was_not_called_in_validation_is_as_it_was():
    diagnosis = diagnosed({})
    assert diagnose_validation([Validated(diagnosis, {}, Standing.OTHER)]) == [diagnosis]


@pytest.mark.parametrize("symptoms", [{"calls_in_eval_mode": 1}, {"steps_in_eval_mode": 1}])
def test_calls_or_steps_alone_are_no_training_in_eval_mode(symptoms):
    assert diagnosed({**UNUSED, **symptoms}).verdict == "unused"
    assert diagnosed({"calls_in_eval_mode": 1, "steps_in_eval_mode": 1}).verdict == "healthy"


@pytest.mark.parametrize("verdict", ["trained-in-eval", "frozen"])
def test_statistics_that_are_still_initial_are_said_to_be(verdict):
    assert VERDICTS[verdict].name == verdict
    initial, learnt = (diagnosed(SYMPTOMS[verdict], {"has_initial_stats": flag}) for flag in (True, False))
    assert "still the initial zeros and ones" in initial.explanation
    assert "initial" not in learnt.explanation


@pytest.mark.parametrize("flag", VALIDATION)
@pytest.mark.parametrize("verdict", ["healthy", "unused"])
@pytest.mark.parametrize("position", [0, 2])
def test_words_are_sound(flag, verdict, position):
    standing = {"never-updated": Standing.INITIAL, "other-weights": Standing.OTHER}.get(flag, Standing.TRAINED)
    symptoms = SYMPTOMS[verdict] | {"eval_error": 0.0}
    if flag == "unexplained-error":
        symptoms = SYMPTOMS["drifting"]
    loader = {"val_loader": 1.0} if position else {}
    shift = 0.05 if flag == "unexplained-error" else 0.4
    others = [layer({"eval_error": 0.0})] * position
    if flag == "domain-shift" and verdict == "unused":
        standing = Standing.REPAIRED
        symptoms = SYMPTOMS["healthy"]
    *_, diagnosis = diagnose_validation([*others, layer(symptoms, standing, error=0.3, shift=shift, **loader)])
    assert diagnosis.flags == (flag,)
    words_are_sound(diagnosis)
    assert FLAGS[flag].attention(diagnosis.evidence)


def test_errors_of_running_statistics_that_add_up_are_not_blamed_on_the_data():
    off = {"eval_error": 0.09, "now_error": 0.0, "noise_error": 0.0}
    *_, last = described = diagnose_validation([layer(off), layer(off), layer(off, error=0.45, shift=0.45)])
    assert [its.flags for its in described] == [(), (), ("errors-add-up",)]
    assert (last.cause, last.needs_attention) == ("errors-add-up", True)
    assert last.evidence["added_error"] == pytest.approx(0.09 * math.sqrt(3))
    assert last.explanation.startswith("The running statistics of this layer and of those before it")
    words_are_sound(last)
    limit = 3 * 0.09 * math.sqrt(3)
    assert flags_of(layer(off), layer(off), layer(off, error=total(limit * 0.999))) == [(), (), ("errors-add-up",)]
    assert flags_of(layer(off), layer(off), layer(off, error=total(limit * 1.001))) == [(), (), ("unexplained-error",)]


def test_inputs_that_move_at_random_are_no_other_data():
    moving = {"eval_error": 0.05, "now_error": 0.0, "noise_error": 0.0, "drift_error": 0.12}
    assert flags_of(layer(moving, error=0.3, shift=0.3)) == [("domain-shift",)]
    assert flags_of(layer(moving | {"walk_error": 0.11}, error=0.3, shift=0.3)) == [("errors-add-up",)]


@pytest.mark.parametrize(("misfit", "flags"), [(0.7, ()), (0.705, ()), (0.75, ("other-weights",))])
def test_what_was_written_since_is_named_if_it_is_worse_than_what_training_has_left(misfit, flags):
    lagging = SYMPTOMS["lagging"] | {"eval_error": 0.7, "now_error": 0.0, "noise_error": 0.0}
    assert flags_of(layer(lagging, Standing.REWRITTEN, misfit, error=0.7)) == [flags]


NO_STATS = SYMPTOMS["no-running-stats"]


def test_batches_of_validation_that_scatter_more_than_those_of_training_are_told_where_eval_normalises_by_them():
    def validated(net, symptoms=NO_STATS):
        numbers = {"val_scatter": math.hypot(net, 0.1), "train_scatter": 0.1, "val_batches": 5.0}
        (diagnosis,) = diagnose_validation([Validated(diagnosed(symptoms), numbers, Standing.ABSENT, math.nan)])
        return diagnosis

    assert (validated(0.199).flags, validated(0.199).needs_attention) == ((), False)
    told = validated(0.201)
    assert (told.flags, told.cause, told.needs_attention) == (("evaluated-by-batch",), "evaluated-by-batch", True)
    assert "`track_running_stats=True`" in told.remedy
    words_are_sound(told)
    assert validated(0.9, {}).flags == ()


def test_running_statistics_that_are_not_finite_are_not_said_to_be_those_of_other_data():
    broken = {**UNUSED, "non_finite_channels": 3.0, "non_finite_running_stats": 3.0}
    assert flags_of(layer(broken, error=190.0)) == [()]
