"""What an attribution says: progress, the sentence, the table."""

import math

import pytest
import torch
from torch import nn

from lightning_bnmonitor import attribute_eval_gap
from lightning_bnmonitor.repair.eval_gap import Contribution
from tests.repair.gap_results import CASES, NOTHING, assert_printed, attribution
from tests.repair.spoiled_models import INF, NAN, assert_plain, attribute, per_sample, spoil_nan
from tests.repair.unchanged import Everything


def test_the_progress_bar_goes_to_stderr_and_says_which_pass_it_is(spoiled, capsys):
    model, batches = spoiled
    found = attribute_eval_gap(model, batches, per_sample)
    out, err = capsys.readouterr()
    assert out == ""
    for label in ("eval mode", "training mode", "exact statistics", f"exact in {found.contributions[0].name}"):
        assert label in err
    assert err.count("0/4") >= 4
    attribute_eval_gap(model, batches, per_sample, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_the_fields(case):
    assert_printed(CASES[case])


def test_the_sentence_says_what_was_found():
    said = {case: assert_printed(found) for case, found in CASES.items()}
    assert said["usual"].startswith(
        "Running statistics cost 1 ± 0.1 of the loss, 75% of that by a.norm. Repair: `light"
    )
    assert (
        "0.375 more than in training mode remain, which no running statistics explain: normalising by the batch "
        "(0.25), dropout, other modules in training mode (0.125)."
    ) in said["usual"]
    assert said["infinite"].startswith("Running statistics make the loss nan: first those of x.")
    assert said["two infinite"].startswith("Running statistics make the loss inf: first those of x.")
    assert "not finite, and not with exact running statistics either" in said["neither is finite"]
    assert said["neither is finite"] == said["nothing is"]
    assert said["only as it is"].startswith("Nothing to explain: the loss is finite, but not with exact")
    for case, sentence in said.items():
        remains = "which no running statistics explain" in sentence
        assert ("as good as training mode" in sentence) == (case == "better than in training"), case
        assert remains == (case in ("usual", "opposite", "negative", "infinite", "two infinite", "dropout")), case


def test_the_sentence_opens_with_the_largest_part_and_its_remedy():
    said = {case: assert_printed(found) for case, found in CASES.items()}
    for case in ("by the batch", "nothing"):
        assert said[case].startswith("Normalising by the batch, which eval mode does not do, is worth ")
        assert "`layer.eval()`" in said[case]
        assert said[case].endswith("Exact running statistics lower the loss by 0.001 ± 0.01, which may be chance.")
    assert "is worth 1 ± 0.01 of the loss" in said["by the batch"]
    assert "Exact running statistics raise the loss by 0.2 ± 0.01." in said["worse"]
    assert said["modules"].startswith("Dropout or other modules, which act otherwise in training mode, are worth 0.9 ")
    assert "Besides: normalising by the batch (0.1)." in said["modules"]
    assert "0.1 ± 0.01: `lightning_bnmonitor.recalibrate(model, loader)`." in said["modules"]
    assert said["other statistics"].startswith("The evaluation data have other statistics than the training data: that")
    assert "costs 0.8 ± 0.01 of the loss" in said["other statistics"]
    assert "`lightning_bnmonitor.recalibrate(model, evaluation_loader)`" in said["other statistics"]
    assert said["other data"].startswith(
        "With statistics of their own, too, the evaluation data have a loss that is 1.25"
    )
    assert "no matter of BatchNorm" in said["other data"]


def test_parts_of_opposite_sign_have_no_percentages_and_are_said():
    sentence = assert_printed(CASES["opposite"])
    assert sentence.startswith("Running statistics cost 0.1 ± 0.01 of the loss, first those of a.norm (0.4); some ")
    assert "%" not in str(CASES["opposite"])
    assert (
        "The other way round: dropout, other modules in training mode (-0.13), normalising by the batch (-0.12); so "
        "the losses in eval mode and in training mode differ by 0.75."
    ) in assert_printed(CASES["better than in training"])


def test_parts_of_opposite_sign_are_said_from_a_tenth_of_the_largest_on():
    for batch_loss, is_said in ((1.59, False), (1.61, True)):
        found = attribution(batch_loss=batch_loss, train_loss=batch_loss)
        assert ("The other way round: normalising by the batch" in assert_printed(found)) == is_said


def test_dropout_that_explains_the_running_statistics_is_said():
    assert "With dropout on, eval mode has a loss of 1.75: the running" in assert_printed(CASES["dropout"])
    for loss, is_said in ((1.9, True), (2.1, False)):
        assert ("under dropout" in assert_printed(attribution(dropout_loss=loss))) == is_said


def test_what_may_be_chance_is_no_cause():
    sentence = assert_printed(CASES["maybe chance"])
    assert sentence == (
        "Nothing to explain: eval mode is 0.375 worse than training mode, but no part of that is both more than chance "
        "and more than 2 % of the loss. Exact running statistics lower the loss by 0.001 ± 0.01, which may be chance."
    )
    for stderr, is_cause in ((0.124, True), (0.126, False)):  # two standard errors
        found = attribution(stderr=stderr, eval_loss=1.5, gap=0.001, gap_stderr=0.01, **NOTHING)
        assert assert_printed(found).startswith("Normalising by the batch") == is_cause


def healthy_one(gap, gap_stderr=0.01, **losses):
    """Losses of about 100, alike in both modes."""
    known = {"exact_loss": 100.0, "batch_loss": 100.1, "train_loss": 100.2, **losses}
    return attribution(eval_loss=known["exact_loss"] + gap, gap=gap, gap_stderr=gap_stderr, **known, **NOTHING)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (healthy_one(0.3, 0.25), "Exact running statistics lower the loss by 0.3 ± 0.25, which may be chance."),
        (healthy_one(1.9), "Exact running statistics lower the loss by 1.9 ± 0.01, less than 2 % of it."),
        (healthy_one(-0.3, 0.25), "Exact running statistics raise the loss by 0.3 ± 0.25, which may be chance."),
        (healthy_one(-0.3), "Exact running statistics raise the loss by 0.3 ± 0.01."),
        (healthy_one(0.0), "Exact running statistics change nothing."),
        (
            healthy_one(0.3, batch_loss=99.3, train_loss=99.5),  # 0.7 of other things, and more than chance
            "Exact running statistics lower the loss by 0.3 ± 0.01, less than 2 % of it.",
        ),
    ],
)
def test_a_sound_model_is_said_to_be_as_good_in_eval_mode_with_the_number(found, said):
    assert assert_printed(found) == f"Nothing to explain: eval mode is as good as training mode. {said}"
    assert (found.largest, found.is_significant) == (None, False)


def test_a_difference_of_small_losses_is_no_cause_beside_a_large_one_of_training():
    """Dropout makes that large: all else is of no interest, but for running statistics."""
    small = {"has_evaluation": True, "exact_loss": 1.0, "own_loss": 1.0, "exact_train_loss": 0.9}
    levels = {**small, "batch_loss": 0.9, "train_loss": 70.0}
    found = attribution(0.001, eval_loss=1.0, **levels, gap=0.0, gap_stderr=0.0, **NOTHING)
    said = "Nothing to explain: eval mode is as good as training mode. Exact running statistics change nothing."
    assert assert_printed(found) == said
    found = attribution(0.001, eval_loss=1.5, **levels, gap=0.5, gap_stderr=0.01)
    assert assert_printed(found).startswith("Running statistics cost 0.5 ± 0.01 of the loss")
    assert "With exact ones, eval mode is as good as training mode." in assert_printed(found)


def test_losses_that_are_not_finite_in_training_mode_alone_are_not_compared():
    found = healthy_one(0.0, batch_loss=NAN, train_loss=NAN)
    said = "Nothing to explain: eval mode has a loss of 100, training mode of nan. "
    assert assert_printed(found) == f"{said}Exact running statistics change nothing."


@pytest.mark.parametrize(("share", "is_cause"), [(0.019, False), (0.021, True)])
def test_a_part_is_a_cause_from_a_fiftieth_of_the_loss_that_it_is_a_part_of_on(share, is_cause):
    alike = {"eval_loss": 2.0, "exact_loss": 2.0, "batch_loss": 2.0, "train_loss": 2.0}
    of_eval_loss = attribution(**alike, gap=2.0 * share, gap_stderr=0.001)
    assert (of_eval_loss.largest is not None) == of_eval_loss.is_significant == is_cause
    assert assert_printed(of_eval_loss).startswith("Running statistics cost") == is_cause
    left = 1.5 * (1 - share)
    of_exact_loss = attribution(0.001, batch_loss=left, train_loss=left)
    assert ("no running statistics explain: normalising by the batch" in assert_printed(of_exact_loss)) == is_cause
    assert ("eval mode is as good as training mode" in assert_printed(of_exact_loss)) != is_cause


def test_what_attribute_eval_gap_returns_is_printed_as_its_fields(spoiled):
    model, batches = spoiled
    sentence = assert_printed(attribute(model, batches))
    assert "blocks.0.norm" in sentence
    with torch.no_grad():
        spoil_nan(model.head)
    found = attribute(model, batches)
    assert "head" in assert_printed(found)
    assert (found.gap, found.worst, found.is_significant) == (INF, "head", True)
    assert math.isnan(found.gap_stderr)
    assert math.isfinite(found.exact_loss)
    assert_plain(found)


def test_losses_that_are_finite_in_no_mode_have_nothing_to_explain(spoiled):
    model, batches = spoiled
    everything = Everything(model)
    found = attribute(model, batches, lambda output, batch: per_sample(output, batch) * NAN)
    everything.assert_same()
    assert math.isnan(found.gap)
    assert (found.contributions, found.rest, found.worst, found.is_significant) == ((), None, None, False)
    assert "not finite" in assert_printed(found)
    assert_plain(found)


def test_exact_statistics_that_make_the_loss_infinite_have_nothing_to_explain():
    model = nn.BatchNorm1d(6)
    with torch.no_grad():
        model.running_var.fill_(1e9)
    batches = [(torch.randn(32, 6), torch.zeros(32, 6)) for _ in range(2)]
    found = attribute(model, batches, lambda output, batch: (1000 * output).exp().mean(1))
    assert math.isfinite(found.eval_loss)
    assert found.exact_loss == INF
    assert found.gap == -INF
    assert not found.is_significant
    assert "as good as" not in assert_printed(found)


@pytest.mark.parametrize("name", ["encoder." * 30 + "norm", "nan", "5", "1e5", "a | b", "-", "漢字"])
def test_odd_names_are_printed(name):
    assert_printed(attribution(contributions=(Contribution(name, 0.5, 0.9, 0.01),)))
