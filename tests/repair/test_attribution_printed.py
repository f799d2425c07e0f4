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
        assert "Exact running statistics lower the loss by 0.001 ± 0.01." in said[case]
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
    assert sentence.startswith("Nothing to explain: exact running statistics lower the loss by 0.001 ± 0.01.")
    assert sentence.endswith("eval mode is 0.375 worse than training mode, which may be chance.")
    for stderr, is_cause in ((0.124, True), (0.126, False)):  # two standard errors
        found = attribution(stderr=stderr, eval_loss=1.5, gap=0.001, gap_stderr=0.01, **NOTHING)
        assert assert_printed(found).startswith("Normalising by the batch") == is_cause


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
