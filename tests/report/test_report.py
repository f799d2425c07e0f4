"""The report of a model: a mapping of layers in their order, its summary, and what `to_dict` gives back."""

import json
import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, Report
from tests.report.made_reports import (
    INF,
    NAN,
    PER_CHANNEL,
    branches_report,
    decoded,
    layer,
    stateless,
    unused,
    with_error,
)

MOMENTS = ("population_mean", "population_var", "running_mean", "running_var", "now_mean", "now_var")


# ------------------------------------------------------------------------------------------------------ as a collection


def test_layers_come_in_the_order_of_their_first_call_and_then_those_never_called():
    assert list(branches_report()) == ["early", "late", "nothing_kept", "never"]


def test_layers_that_are_first_called_later_come_later_whatever_order_each_batch_has():
    model = nn.ModuleDict({name: nn.BatchNorm1d(2) for name in "abcd"})
    with BatchNormTracker(model) as tracker:
        for order in ("c", "ac", "dca"):
            for name in order:
                model[name](torch.randn(4, 2))
        assert list(tracker.report()) == ["c", "a", "d", "b"]
        tracker.reset()
        model["b"](torch.randn(4, 2))
        assert list(tracker.report()) == ["c", "a", "d", "b"]


def test_a_shared_layer_is_reported_once_under_its_first_name_with_all_its_calls():
    report = branches_report()
    assert "again" not in report
    assert report["early"].num_batches == 8
    assert report["late"].num_batches == 4


def test_a_report_is_a_mapping_of_names_to_layer_reports():
    first, second = layer("first"), layer("second")
    report = Report([first, second])
    assert isinstance(report, Mapping)
    assert len(report) == 2
    assert list(report) == list(report.keys()) == ["first", "second"]
    assert list(report.values()) == [first, second]
    assert dict(report) == {"first": first, "second": second}
    assert report["second"] is second
    assert "first" in report
    assert "third" not in report
    assert report.get("third") is None


def test_a_name_that_is_not_in_the_report_is_refused_with_those_that_are():
    with pytest.raises(KeyError, match=r"'layer3'.*layer1\.bn, layer2\.bn"):
        Report([layer("layer1.bn"), layer("layer2.bn")])["layer3"]


def test_worst_gives_layers_in_need_of_attention_first_and_each_by_eval_error_those_without_one_last():
    layers = [
        unused("unused"),
        with_error("small", 0.1),
        stateless("stateless"),
        layer("broken", running_mean=[NAN], verdict="non-finite"),
        with_error("moved", 0.7),
        with_error("noisy", 0.2, verdict="noisy"),
        with_error("medium", -0.4),
        with_error("lagging", -0.3, verdict="lagging"),
        layer("input", mean=[NAN], var=[NAN], verdict="non-finite"),
    ]
    report = Report(layers)
    sick = ["broken", "lagging", "noisy", "input"]
    ranking = [*sick, "moved", "medium", "small", "unused", "stateless"]
    assert [one.name for one in report.worst()] == ranking
    for n in (0, 1, 3, 6, 99):
        assert [one.name for one in report.worst(n)] == ranking[:n]
    assert [one.name for one in report.unhealthy] == sick
    assert list(report) == [one.name for one in layers]


def test_worst_asks_whether_a_layer_needs_attention_and_not_for_its_verdict():
    right, wrong = with_error("right", 0.5, verdict="stale"), with_error("wrong", 0.2, verdict="stale")
    report = Report([right, with_error("wrong", 0.2, verdict="stale", needs_attention=True)])
    assert [one.name for one in report.worst()] == ["wrong", "right"]
    assert [one.name for one in report.unhealthy] == ["wrong"]
    assert Report([right, wrong]).unhealthy == []


@pytest.mark.parametrize("take", [Report.worst, Report.brief])
def test_a_negative_number_of_layers_is_refused(take):
    with pytest.raises(ValueError, match=r"`n`.*-1"):
        take(Report([layer()]), -1)


def test_worst_keeps_the_order_of_the_report_among_equals():
    names = [f"layer{index}" for index in range(20)]
    assert [one.name for one in Report(with_error(name, 0.5) for name in names).worst()] == names


# ---------------------------------------------------------------------------------------------------------- the summary


def test_the_summary_has_six_numbers_computed_by_hand():
    layers = [
        layer("first", mean=[0.0, 0.0], var=[1.0, 1.0], running_mean=[0.3, -0.4], running_var=[1.0, 1.0]),
        # Half a deviation off; error 1 in scale and 1 in place; right about the present ones.
        layer("second", var=[4.0], running_mean=[-1.0], now_mean=[-1.0], now_var=[1.0]),
        with_error("third", 0.1, verdict="noisy"),
    ]
    first, second = math.sqrt(0.125), math.sqrt(2)
    assert Report(layers).summary() == pytest.approx(
        {
            "eval_error_max": first,
            "eval_error_p90": first,
            "eval_error_median": 0.1,
            "act_rmse_max": second,
            "mean_shift_max": 0.5,
            "unhealthy_layers": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("num_layers", "p90"), [(1, 1), (2, 2), (9, 9), (10, 9), (11, 10), (20, 18), (21, 19), (30, 27)]
)
def test_p90_is_the_smallest_eval_error_that_90_percent_of_the_layers_do_not_exceed(num_layers, p90):
    errors = [float(rank) for rank in range(1, num_layers + 1)]
    random.Random(0).shuffle(errors)
    report = Report(with_error(f"layer{index}", error) for index, error in enumerate(errors))
    assert report.summary()["eval_error_p90"] == pytest.approx(p90)


@pytest.mark.parametrize(("errors", "median"), [([3.0], 3.0), ([1.0, 4.0], 2.5), ([9.0, 1.0, 2.0], 2.0)])
def test_the_median_of_an_even_number_of_layers_is_the_mean_of_the_two_in_the_middle(errors, median):
    report = Report(with_error(f"layer{index}", error) for index, error in enumerate(errors))
    assert report.summary()["eval_error_median"] == pytest.approx(median)


def test_layers_without_running_statistics_and_unused_ones_enter_no_summary():
    layers = [with_error("one", 0.2), with_error("other", 0.4)]
    assert Report([unused("unused"), *layers, stateless("stateless")]).summary() == Report(layers).summary()
    assert Report([unused("unused"), stateless("stateless")]).summary() == {"unhealthy_layers": 0.0}


def test_unhealthy_layers_are_counted_with_and_without_an_eval_error():
    sick = [with_error("one", 0.2, verdict="lagging"), layer("nan", mean=[NAN], var=[NAN], verdict="non-finite")]
    assert Report([unused("unused"), *sick, layer("fine")]).summary()["unhealthy_layers"] == 2


@pytest.mark.parametrize(
    ("num_broken", "expected"),
    [(1, {"max": INF, "p90": 0.5, "median": 0.5}), (2, {"max": INF, "p90": INF, "median": 0.5})],
)
def test_an_infinite_eval_error_is_the_maximum_and_counts_as_large_in_quantiles(num_broken, expected):
    broken = [layer(f"broken{index}", running_var=[NAN]) for index in range(num_broken)]
    report = Report([*broken, *(with_error(f"layer{index}", 0.5) for index in range(10))])
    summary = report.summary()
    assert {key: summary[f"eval_error_{key}"] for key in expected} == expected
    assert summary["act_rmse_max"] == summary["mean_shift_max"] == 0.5


def test_all_eval_errors_infinite_leave_no_other_number_and_no_nan():
    report = Report(layer(f"layer{index}", running_mean=[INF], running_var=[NAN]) for index in range(4))
    numbers = {"eval_error_max": INF, "eval_error_p90": INF, "eval_error_median": INF}
    assert report.summary() == numbers | {"unhealthy_layers": 0.0}


def test_layer_summaries_can_be_changed_without_changing_the_report():
    report = Report([with_error("layer", 0.5)])
    report.layer_summaries()["layer"]["eval_error"] = 7.0
    assert report.layer_summaries()["layer"]["eval_error"] == 0.5
    assert report.summary()["eval_error_max"] == 0.5


def test_to_dict_is_strict_json_that_gives_every_number_back_to_the_last_bit():
    rng = np.random.default_rng(1)
    mean, running_mean = rng.normal(size=(2, 6))
    var, running_var = rng.lognormal(size=(2, 6))
    running_mean[1], running_mean[2], running_var[3], mean[4] = NAN, -INF, INF, NAN
    one = layer(
        "one",
        mean=mean,
        var=var,
        running_mean=running_mean,
        running_var=running_var,
        now_mean=mean + rng.normal(size=6),
        now_var=var * rng.lognormal(size=6),
        z_mean=[*rng.normal(size=4), NAN, INF],
        z_var=rng.normal(size=6),
        eps=1e-5,
        verdict="non-finite",
        flags=("dead-channels", "written-outside"),
        evidence={"eval_error": INF, "first_bad_batch": 3.0, "first_bad_channel": 1.0, "dead_channels": 2.0},
    )
    report = Report([one, stateless("two"), unused("three")])
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))

    assert list(read["layers"]) == ["one", "two", "three"]
    fields = (*MOMENTS, *PER_CHANNEL, "z_mean", "z_var")
    for name, values in read["layers"].items():
        original = report[name]
        for field in fields:
            np.testing.assert_array_equal(decoded(values[field]), getattr(original, field), err_msg=field)
        assert (values["name"], values["type"], values["num_features"]) == (name, "BatchNorm1d", original.num_features)
        assert (values["num_batches"], values["num_samples"]) == (original.num_batches, original.num_samples)
        assert (values["eps"], values["momentum"]) == (original.eps, 0.1)
        assert {key: decoded(value) for key, value in values["evidence"].items()} == original.evidence
        for field in ("verdict", "needs_attention", "explanation", "remedy", "has_running_stats"):
            assert values[field] == getattr(original, field), field
        assert values["flags"] == list(original.flags)
        for metric, value in original.summary().items():
            assert decoded(values["summary"][metric]) == pytest.approx(value, rel=0, abs=0, nan_ok=True)
    assert {name: decoded(value) for name, value in read["summary"].items()} == report.summary()
    assert read["layers"]["one"]["running_mean"][1:3] == ["NaN", "-Infinity"]
    assert read["layers"]["one"]["running_var"][3] == "Infinity"
    assert read["layers"]["one"]["z_mean"][4:] == ["NaN", "Infinity"]
    assert read["layers"]["one"]["evidence"]["eval_error"] == "Infinity"
    assert read["layers"]["one"]["needs_attention"] is True
    assert read["layers"]["one"]["flags"] == ["dead-channels", "written-outside"]
    assert read["summary"]["eval_error_max"] == "Infinity"
    assert read["summary"]["unhealthy_layers"] == 1
