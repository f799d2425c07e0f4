"""What an attribution says: progress, the sentence, the table."""

import math

import pytest
import torch
from torch import nn

from lightning_bnmonitor import attribute_eval_gap
from lightning_bnmonitor.repair.attribution import Contribution
from tests.repair.gap_results import CASES, assert_printed, attribution
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
    assert "cost 1 ± 0.1 of the loss, 75% of that by a.norm" in said["usual"]
    assert "0.375 more than in training mode remain" in said["usual"]
    assert said["nothing"].startswith("Nothing to explain: exact running statistics lower the loss by 0.001 ± 0.01.")
    assert said["worse"].startswith("Nothing to explain: exact running statistics raise the loss by 0.2 ± 0.01.")
    assert said["infinite"].startswith("Running statistics make the loss nan: first those of x.")
    assert said["two infinite"].startswith("Running statistics make the loss inf: first those of x.")
    assert "not finite, and not with exact running statistics either" in said["neither is finite"]
    assert said["neither is finite"] == said["nothing is"]
    assert said["only as it is"].startswith("Nothing to explain: the loss is finite, but not with exact")
    assert "as good as training mode" in said["better than in training"]
    for case, sentence in said.items():
        good = case == "better than in training"
        assert ("as good as training mode" in sentence) == good, case
        assert ("which no running statistics explain" in sentence) == (
            case in ("usual", "nothing", "worse", "negative", "infinite", "two infinite")
        ), case


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
