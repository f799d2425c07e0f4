"""Reports: what they say of a window, by hand and from real layers, and every form they can be given."""

import html.parser
import json
import math
import random
import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report
from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis

NAN, INF = math.nan, math.inf
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
PER_CHANNEL = ("mean_shift", "log_var_ratio", "act_rmse", "kl", "eval_error")
MOMENTS = ("population_mean", "population_var", "running_mean", "running_var", "now_mean", "now_var")
MARKDOWN_COLUMNS = ["layer", "verdict", "eval_error", "noise"]
COLUMNS = ["layer", "verdict", "eval_error", "noise", *METRICS[1:], "channels", "batches", "samples"]
NOT_SICK = ("unused", "no-running-stats", "stale", "frozen", "insufficient-data", "drifting", "healthy")


def layer(
    name="layer",
    mean=(0.0,),
    var=(1.0,),
    running_mean=(0.0,),
    running_var=(1.0,),
    verdict="healthy",
    flags=(),
    **fields,
) -> LayerReport:
    """A layer's report with the given statistics; those at the end of the window are the population's if not given.

    Its diagnosis is the given one, whatever the numbers are; ``evidence`` is added to a floor of 0.05.
    """
    zeros = [0.0] * len(mean)
    now = {"now_mean": mean, "now_var": var, "z_mean": zeros, "z_var": zeros}
    now |= {"running_mean_stderr": zeros, "running_var_stderr": zeros}
    tensors = {
        **{"population_mean": mean, "population_var": var, "running_mean": running_mean, "running_var": running_var},
        **{field: fields.pop(field, values) for field, values in now.items()},
    }
    evidence = {"noise_error": 0.05, "num_features": float(len(mean)), **fields.pop("evidence", {})}
    attention = fields.pop("needs_attention", verdict not in NOT_SICK)
    defaults = {
        "name": name,
        "type": "BatchNorm1d",
        "eps": 0.0,
        "momentum": 0.1,
        "num_batches": 10,
        "num_samples": 80,
        "has_running_stats": True,
        "diagnosis": Diagnosis(verdict, flags, attention, evidence),
    }
    order = [f"{of}_{moment}" for of in ("population", "running", "now", "z") for moment in ("mean", "var")]
    order += ["running_mean_stderr", "running_var_stderr"]
    numbers = torch.tensor([list(tensors[name]) for name in order], dtype=torch.float64)
    return LayerReport(**(defaults | {"numbers": numbers} | fields))


def with_error(name: str, error: float, **fields) -> LayerReport:
    """One channel of variance 1 whose running mean is off by so much: so are eval_error, act_rmse and mean_shift."""
    return layer(name, running_mean=[error], **fields)


def unused(name: str) -> LayerReport:
    return layer(name, mean=[NAN], var=[NAN], num_batches=0, num_samples=0, verdict="unused")


def stateless(name: str) -> LayerReport:
    return layer(name, running_mean=[NAN], running_var=[NAN], has_running_stats=False, verdict="no-running-stats")


class Branches(nn.Module):
    """Layers called in another order than that of the modules, one of them twice, one under two names, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.BatchNorm1d(2)
        self.late = nn.BatchNorm1d(3)
        self.early = nn.BatchNorm1d(3)
        self.again = self.early
        self.nothing_kept = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return self.again(self.nothing_kept(self.late(self.early(x))))


def tracked(model: nn.Module, batches) -> Report:
    with BatchNormTracker(model) as tracker:
        for x in batches:
            model(x)
    return tracker.report()


def branches_report() -> Report:
    torch.manual_seed(0)
    return tracked(Branches(), [torch.randn(8, 3) for _ in range(4)])


# ------------------------------------------------------------------------------------------------ the fields of a layer


def test_derived_fields_are_their_definitions_in_float64():
    rng = np.random.default_rng(0)
    mean, running_mean = rng.normal(size=(2, 50))
    var, running_var = rng.lognormal(sigma=1.5, size=(2, 50))
    now_mean, now_var = mean + rng.normal(size=50), var * rng.lognormal(size=50)
    eps = 1e-2
    running = {"running_mean": running_mean, "running_var": running_var}
    report = layer(mean=mean, var=var, now_mean=now_mean, now_var=now_var, eps=eps, **running)
    std, running_std = np.sqrt(var + eps), np.sqrt(running_var + eps)

    def error(mean, var):
        """Of the normalised activation, which is linear in the input: an error of its size, and one of its place."""
        gain_error = (1 / running_std - 1 / np.sqrt(var + eps)) * np.sqrt(var)
        return np.hypot(gain_error, (mean - running_mean) / running_std)

    # The Kullback-Leibler divergence of two normal distributions, as in any textbook.
    kl = np.log(running_std / std) + (std**2 + (mean - running_mean) ** 2) / (2 * running_std**2) - 0.5
    expected = {
        "mean_shift": (running_mean - mean) / std,
        "log_var_ratio": 2 * np.log(running_std / std),
        "act_rmse": error(mean, var),
        "kl": kl,
        "eval_error": error(now_mean, now_var),
    }
    for field, values in expected.items():
        derived = getattr(report, field)
        assert (derived.dtype, derived.shape, derived.device.type) == (torch.float64, (50,), "cpu")
        np.testing.assert_allclose(derived, values, rtol=1e-10, atol=1e-12, err_msg=field)


def test_derived_fields_of_one_channel_are_those_computed_by_hand():
    report = layer(mean=[1.0], var=[4.0], running_mean=[3.0], running_var=[1.0])
    assert report.mean_shift.tolist() == [1.0]  # 2 over a standard deviation of 2
    assert report.log_var_ratio.tolist() == pytest.approx([-math.log(4)])
    assert report.act_rmse.tolist() == pytest.approx([math.sqrt(5)])  # twice the size, and 2 off
    assert report.kl.tolist() == pytest.approx([(4 - 1 - math.log(4) + 4) / 2])


def test_eval_error_is_that_of_the_present_statistics_and_act_rmse_that_of_the_population():
    report = layer(mean=[0.0], var=[1.0], now_mean=[3.0], now_var=[4.0], running_mean=[1.0], running_var=[1.0])
    assert report.act_rmse.tolist() == pytest.approx([1.0])
    assert report.eval_error.tolist() == pytest.approx([math.hypot(2, 1)])  # two off, and twice the size
    assert report.mean_shift.tolist() == pytest.approx([1.0])
    assert report.summary() == pytest.approx(
        {"eval_error": math.sqrt(5), "act_rmse": 1.0, "mean_shift": 1.0, "log_var_ratio": 0.0}
    )


def test_eval_error_is_act_rmse_where_the_running_statistics_are_finite_and_infinite_where_not():
    report = layer(
        mean=[0.0] * 5,
        var=[1.0] * 5,
        running_mean=[0.5, NAN, 0.0, -INF, 0.0],
        running_var=[1.0, 1.0, NAN, 1.0, INF],
    )
    assert report.act_rmse[0] == report.eval_error[0] == 0.5
    assert report.eval_error[1:].tolist() == [INF] * 4
    assert report.act_rmse[1:].isnan().all()
    assert report.summary()["eval_error"] == INF
    assert report.summary()["act_rmse"] == 0.5


def test_a_channel_that_received_what_is_not_finite_has_no_eval_error_as_long_as_its_buffers_are_finite():
    report = layer(mean=[NAN, 0.0], var=[NAN, 1.0], running_mean=[0.0, 0.3], running_var=[1.0, 1.0])
    assert report.eval_error[0].isnan()
    assert report.summary()["eval_error"] == pytest.approx(0.3)


def test_every_derived_field_is_nan_without_running_statistics():
    report = stateless("layer")
    assert all(getattr(report, field).isnan().all() for field in PER_CHANNEL)
    assert all(math.isnan(value) for value in report.summary().values())


def test_every_derived_field_is_nan_in_a_layer_that_was_not_called():
    report = unused("layer")
    assert all(getattr(report, field).isnan().all() for field in PER_CHANNEL)
    assert all(math.isnan(value) for value in report.summary().values())


def test_a_layer_that_was_not_called_has_no_eval_error_whatever_its_buffers_are():
    report = layer(mean=[NAN], var=[NAN], running_mean=[NAN], num_batches=0, num_samples=0)
    assert math.isnan(report.summary()["eval_error"])
    assert Report([report]).summary() == {"unhealthy_layers": 0.0}


def test_a_layers_summary_is_the_rms_over_channels_and_the_mean_magnitude_of_log_var_ratio():
    report = layer(
        mean=[0.0, 0.0, 0.0],
        var=[1.0, 1.0, 1.0],
        running_mean=[0.3, -0.4, 0.0],
        running_var=[1.0, 1.0, 1.0],
    )
    rms = math.sqrt((0.09 + 0.16) / 3)
    assert report.summary() == pytest.approx(
        {"eval_error": rms, "act_rmse": rms, "mean_shift": rms, "log_var_ratio": 0.0}
    )
    variances = layer(mean=[0.0, 0.0], var=[1.0, 1.0], running_mean=[0.0, 0.0], running_var=[math.e, math.exp(-2)])
    assert variances.summary()["log_var_ratio"] == pytest.approx(1.5)


def test_channels_that_are_nan_are_left_out_of_a_layers_summary():
    report = layer(
        mean=[0.0, NAN, 0.0],
        var=[1.0, NAN, 1.0],
        running_mean=[0.3, 0.0, 0.5],
        running_var=[1.0, 1.0, 1.0],
    )
    rms = math.sqrt((0.09 + 0.25) / 2)
    assert report.summary() == pytest.approx(
        {"eval_error": rms, "act_rmse": rms, "mean_shift": rms, "log_var_ratio": 0.0}
    )


def test_a_dead_channel_counts_in_act_rmse_but_not_in_ratios_of_variances():
    report = layer(mean=[0.0, 0.0], var=[0.0, 1.0], running_mean=[0.0, 0.0], running_var=[1.0, 4.0], eps=1e-3)
    assert report.act_rmse[0] == 0.0
    assert report.log_var_ratio[0].isnan()
    assert report.kl[0].isnan()
    assert report.summary()["log_var_ratio"] == pytest.approx(math.log(4.001 / 1.001))
    assert report.summary()["act_rmse"] == pytest.approx(report.act_rmse[1].item() / math.sqrt(2))


def test_a_layers_words_are_those_of_its_diagnosis_and_its_explanation_begins_with_its_name():
    evidence = {"samples_per_batch": 16.0, "noise_error": 0.2, "recommended_batch_size": 256.0, "dead_channels": 1.0}
    evidence |= {"momentum": 0.5, "effective_momentum": 0.5, "recommended_momentum": 0.04, "recommended_error": 0.05}
    report = layer("net.bn", verdict="noisy", flags=("dead-channels",), evidence=evidence)
    assert report.diagnosis == Diagnosis("noisy", ("dead-channels",), True, evidence | {"num_features": 1.0})
    assert (report.verdict, report.flags, report.needs_attention) == ("noisy", ("dead-channels",), True)
    assert report.explanation == f"net.bn: noisy. {report.diagnosis.explanation}"
    assert report.remedy == report.diagnosis.remedy
    assert "0.04" in report.remedy


def test_evidence_can_be_changed_without_changing_the_report():
    report = layer(evidence={"noise_error": 0.25})
    report.evidence["noise_error"] = 7.0
    assert report.evidence["noise_error"] == 0.25


def test_there_is_nothing_to_do_about_a_healthy_layer():
    assert layer().remedy == ""
    assert not layer().needs_attention


def test_a_layer_report_can_be_read_but_not_written():
    with pytest.raises(AttributeError):
        layer().num_batches = 3


def test_the_repr_of_a_layer_report_names_it_and_is_one_line():
    text = repr(layer("encoder.norm", verdict="noisy"))
    assert "'encoder.norm'" in text
    assert "noisy" in text
    assert "\n" not in text


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


def test_summaries_that_are_known_already_are_not_computed_again():
    layers = [with_error("one", 0.5), with_error("two", 0.1, verdict="noisy"), stateless("three")]
    known = [dict.fromkeys(METRICS, value) for value in (0.25, 0.75, NAN)]
    report = Report(iter(layers), known)
    assert list(report) == ["one", "two", "three"]
    assert report.layer_summaries() == dict(zip(("one", "two", "three"), known, strict=True))
    assert report.summary()["eval_error_max"] == 0.75
    assert "0.7500" in str(report)
    known[0]["eval_error"] = 9.0
    assert report.summary()["eval_error_max"] == 0.75


@pytest.mark.parametrize("num_summaries", [1, 3])
def test_a_summary_for_each_layer_is_needed_if_any_is_given(num_summaries):
    with pytest.raises(ValueError, match="zip"):
        Report([layer("one"), layer("two")], [layer().summary()] * num_summaries)


def test_layer_summaries_can_be_changed_without_changing_the_report():
    report = Report([with_error("layer", 0.5)])
    report.layer_summaries()["layer"]["eval_error"] = 7.0
    assert report.layer_summaries()["layer"]["eval_error"] == 0.5
    assert report.summary()["eval_error_max"] == 0.5


# ------------------------------------------------------------------------------------------------------------ as values


def decoded(value):
    """What a reader of the JSON makes of it."""
    if isinstance(value, list):
        return [decoded(element) for element in value]
    return float(value) if isinstance(value, str) else value


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


def test_to_dict_of_tracked_layers_is_strict_json():
    read = json.loads(json.dumps(branches_report().to_dict(), allow_nan=False))
    assert list(read["layers"]) == ["early", "late", "nothing_kept", "never"]
    assert read["layers"]["early"]["evidence"]["calls_saved"] == 8


def test_a_cumulative_average_is_reported_as_momentum_none():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None))
    report = tracked(model, torch.randn(4, 8, 3))
    assert report["0"].momentum is None
    assert report.to_dict()["layers"]["0"]["momentum"] is None
    assert report["0"].num_batches == 4
    # A cumulative average of equal batches is the exact mean: nothing is wrong but the buffers' own rounding.
    assert report["0"].summary()["mean_shift"] < 1e-6


# ------------------------------------------------------------------------------------------------------------ as tables


class Cells(html.parser.HTMLParser):
    """The text of every body cell of an HTML table, row by row, of every paragraph and item, all badges and tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.badges: list[str] = []
        self.inside: list[str] | None = None  # what the text belongs to: the last entry of this
        self.outside: list[str] | None = None  # the same, while in a badge
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "code":
            self.handle_data("`")
        elif tag == "span":
            self.inside, self.outside = self.badges, self.inside
            self.inside.append("")
        elif tag != "strong":
            self.inside = {"td": self.rows[-1] if self.rows else None, "p": self.texts, "li": self.texts}.get(tag)
            if self.inside is not None:
                self.inside.append("")

    def handle_endtag(self, tag):
        if tag == "code":
            self.handle_data("`")
        elif tag == "span":
            self.inside = self.outside
        elif tag != "strong":
            self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.inside[-1] += data


def as_shown(source: str) -> str:
    """Markdown as a reader sees it: escapes by backslash and by entity undone."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", source))


def markdown_rows(source: str) -> list[list[str]]:
    """The cells of a GitHub table as a reader sees them."""
    lines = [line.strip() for line in source.splitlines() if line.startswith("|")]
    return [[as_shown(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def text_rows(source: str) -> list[list[str]]:
    """The cells of the second paragraph of a printed report, below the rule."""
    lines = source.split("\n\n")[1].splitlines()
    ends = [match.span() for match in re.finditer("-+", lines[1])]
    return [[line[start:end].strip() for start, end in ends] for line in lines[2:]]


def sample_report() -> Report:
    return Report(
        [
            with_error("encoder.0", 0.25, verdict="drifting", flags=("dead-channels", "missed-calls")),
            stateless("encoder.1"),
            layer("10", running_mean=[NAN], verdict="non-finite", evidence={"non_finite_running_stats": 1.0}),
            unused("head"),
            with_error("tail", 0.125, verdict="lagging", evidence={"noise_error": NAN}),
        ]
    )


FORMS = {
    "str": str,
    "markdown": lambda report: as_shown(report.to_markdown()),
    "html": Report._repr_html_,
    "repr": repr,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_every_layer(form):
    text = FORMS[form](sample_report())
    assert all(name in text for name in sample_report())


def test_tables_have_a_row_for_each_layer_with_the_worst_first():
    order = ["10", "tail", "encoder.0", "encoder.1", "head"]
    report = sample_report()
    assert [row[0] for row in text_rows(str(report))] == order
    assert [row[0] for row in markdown_rows(report.to_markdown())[2:]] == order
    assert [row[0].strip() for row in Cells(report._repr_html_()).rows if row] == order


def test_tables_show_verdict_flags_counts_and_the_numbers_of_the_summary():
    report = sample_report()
    rows = {row[0]: row for row in text_rows(str(report))}
    assert str(report).split("\n\n")[1].splitlines()[0].split() == COLUMNS
    counts = ["1", "10", "80"]
    errors = ["0.2500", "0.0500", "0.2500", "0.2500", "0.0000"]
    assert rows["encoder.0"] == ["encoder.0", "drifting, dead-channels, missed-calls", *errors, *counts]
    assert rows["10"] == ["10", "non-finite", "inf", "0.0500", "-", "-", "0.0000", *counts]
    assert rows["tail"] == ["tail", "lagging", "0.1250", "-", "0.1250", "0.1250", "0.0000", *counts]
    assert rows["head"] == ["head", "unused", "-", "0.0500", "-", "-", "-", "1", "0", "0"]
    in_html = [[cell.strip() for cell in row] for row in Cells(report._repr_html_()).rows if row]
    assert in_html == [rows[name] for name in ("10", "tail", "encoder.0", "encoder.1", "head")]
    in_markdown = markdown_rows(report.to_markdown())
    assert in_markdown[0] == MARKDOWN_COLUMNS
    assert in_markdown[2:] == [[row[COLUMNS.index(name)] for name in MARKDOWN_COLUMNS] for row in in_html]


def test_the_column_noise_is_the_floor_of_the_evidence():
    report = Report([layer("known", evidence={"noise_error": 0.0625}), layer("unknown", evidence={"noise_error": NAN})])
    del report["unknown"].diagnosis.evidence["noise_error"]
    assert {row[0]: row[3] for row in text_rows(str(report))} == {"known": "0.0625", "unknown": "-"}


@pytest.mark.parametrize(
    ("layers", "headline"),
    [
        ([layer("a")], "None of 1 BatchNorm layer needs attention."),
        ([layer("a"), unused("b")], "None of 2 BatchNorm layers needs attention."),
        ([layer("a", verdict="noisy")], "1 of 1 BatchNorm layer needs attention: 1 noisy."),
        ([layer("a", verdict="noisy"), layer("b")], "1 of 2 BatchNorm layers needs attention: 1 noisy."),
        (
            [
                layer("a", verdict="noisy"),
                layer("b"),
                with_error("c", 0.5, verdict="lagging"),
                layer("d", verdict="noisy"),
            ],
            "3 of 4 BatchNorm layers need attention: 1 lagging, 2 noisy.",
        ),
        ([], "No BatchNorm layer was monitored."),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else "",
)
def test_every_form_begins_with_one_sentence_on_the_model(layers, headline):
    report = Report(layers)
    assert str(report).split("\n")[0] == headline
    assert report.to_markdown().split("\n")[0] == f"**{headline}**"
    assert Cells(report._repr_html_()).texts[0] == headline
    assert report.brief(0) == headline


def sick_report() -> Report:
    """Six layers, five of which need attention; in the order of their errors a, b, c, d, e."""
    sick = [
        with_error(name, 0.9 - index / 10, verdict="lagging", evidence={"eval_error": 0.9 - index / 10})
        for index, name in enumerate("abcde")
    ]
    return Report([with_error("fine", 2.0, evidence={"eval_error": 2.0, "now_error": 0.1}), *sick[::-1]])


def test_a_printed_report_is_a_headline_a_table_and_the_three_worst_layers_explained():
    report = sick_report()
    headline, _, *texts = str(report).split("\n\n")
    assert headline == "5 of 6 BatchNorm layers need attention: 5 lagging."
    assert [row[0] for row in text_rows(str(report))] == ["a", "b", "c", "d", "e", "fine"]
    assert [" ".join(text.split()) for text in texts] == [
        f"{report[name].explanation} {report[name].remedy}" for name in "abc"
    ]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 120


def test_a_report_without_sick_layers_explains_none():
    report = Report([with_error("one", 0.5), unused("two")])
    assert len(str(report).split("\n\n")) == 2
    assert report.to_markdown().count("\n\n") == 1
    assert "li" not in Cells(report._repr_html_()).tags


@pytest.mark.parametrize("n", [0, 1, 2, 4, 6, 9])
def test_a_brief_report_has_the_n_worst_layers(n):
    report = sick_report()
    headline, *parts = report.brief(n).split("\n\n")
    assert headline == "5 of 6 BatchNorm layers need attention: 5 lagging."
    assert len(parts) == (1 + min(n, 3) if n else 0)
    if n:
        assert [row[0] for row in text_rows(report.brief(n))] == ["a", "b", "c", "d", "e", "fine"][:n]
        assert [text.split(":")[0] for text in parts[1:]] == ["a", "b", "c"][:n]


def test_a_brief_report_has_ten_layers_if_not_told_otherwise():
    report = Report(layer(f"layer{index}") for index in range(12))
    assert len(text_rows(report.brief())) == 10
    assert len(text_rows(str(report))) == 12
    assert report.brief(None) == str(report)


def test_markdown_and_html_explain_the_three_worst_layers():
    report = sick_report()
    items = [line for line in report.to_markdown().splitlines() if line.startswith("- ")]
    assert [as_shown(item) for item in items] == [
        f"- **{name}**: lagging. {report[name].diagnosis.explanation} {report[name].remedy}" for name in "abc"
    ]
    html_report = Cells(report._repr_html_())
    assert html_report.texts[1:] == [f"{report[name].explanation} {report[name].remedy}" for name in "abc"]


ODD_NAMES = [
    "a|b",
    "<b>bold</b>",
    "x & y",
    "layer_1_norm",
    "1e5",
    "007",
    "nan",
    "back\\slash",
    "**x**",
    "[a](b)",
    "{x}",
]
ODD_NAMES += ["`c`", "'q\"", "-"]


def odd_report() -> Report:
    """Layers of odd names, all noisy."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.BatchNorm1d(2, momentum=0.9) for name in ODD_NAMES})
    with BatchNormTracker(model) as tracker:
        for _ in range(20):
            for module in model.values():
                module(torch.randn(8, 2))
    return tracker.report()


def test_html_shows_odd_layer_names_as_they_are_and_lets_none_become_a_tag():
    cells = Cells(odd_report()._repr_html_())
    assert {row[0].strip() for row in cells.rows if row} == set(ODD_NAMES)
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(cells.tags) == table | {"p", "ul", "li", "strong", "code", "span"}
    assert cells.badges == ["N"] * len(ODD_NAMES)


def test_plain_text_shows_odd_layer_names_as_they_are():
    assert {row[0] for row in text_rows(str(odd_report()))} == set(ODD_NAMES)


@pytest.mark.parametrize("name", [*ODD_NAMES, "&lt;i&gt;", "new\nline"])
def test_html_keeps_a_layer_name_in_its_cell_and_item_and_lets_none_become_a_tag(name):
    report = Report([with_error(name, 0.5, verdict="lagging")])
    cells = Cells(report._repr_html_())
    assert [row[0].strip() for row in cells.rows if row] == [name]
    assert cells.texts[1] == f"{report[name].explanation} {report[name].remedy}"
    assert {"b", "i"}.isdisjoint(cells.tags)


@pytest.mark.parametrize(
    "name",
    [
        *ODD_NAMES,
        "&lt;i&gt;",
        "new\nline",
    ],
)
def test_markdown_keeps_a_layer_name_in_its_cell_and_item_and_lets_none_become_a_tag(name):
    report = Report([with_error(name, 0.5, verdict="lagging")])
    source = report.to_markdown()
    rows = markdown_rows(source)
    assert len(rows) == 3
    assert [len(row) for row in rows] == [len(MARKDOWN_COLUMNS)] * 3
    item = as_shown(source.split("\n\n")[-1])
    shown = " ".join(name.split("\n"))
    assert rows[-1][0] == shown
    assert item == f"- **{shown}**: lagging. {report[name].diagnosis.explanation} {report[name].remedy}"
    assert not re.search(r"(?<!\\)<[bi]>", source)
    emphasis = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", source.split("\n\n")[-1]))  # what is not escaped nor code
    assert emphasis.count("**") == 2


def test_markdown_lists_what_has_changed_since_an_earlier_window_before_the_table():
    report = sick_report()
    before = {"fine": "healthy", "a": "noisy", "b": "lagging", "d": "healthy", "gone": "noisy"}
    headline, introduction, changes, table, _ = report.to_markdown(since=before).split("\n\n")
    assert headline == "**5 of 6 BatchNorm layers need attention: 5 lagging.**"
    assert introduction == "Changed since the last window:"
    assert changes.splitlines() == ["- a: noisy → lagging", "- d: healthy → lagging"]
    assert table.startswith("| layer")


def test_markdown_lists_ten_changes_and_counts_the_others():
    report = Report(layer(f"a_{index}") for index in range(13))
    changes = report.to_markdown(since=dict.fromkeys(report, "noisy")).split("\n\n")[2].splitlines()
    assert changes == [rf"- a\_{index}: noisy → healthy" for index in range(10)] + ["- and 3 more"]


@pytest.mark.parametrize("since", [None, {}, {"a": "lagging", "fine": "healthy"}])
def test_markdown_lists_no_changes_if_there_are_none(since):
    assert sick_report().to_markdown(since=since) == sick_report().to_markdown()


@pytest.mark.parametrize("n", [0, 1, 4, 9])
def test_markdown_has_the_n_worst_layers(n):
    source = sick_report().to_markdown(n)
    assert [row[0] for row in markdown_rows(source)[2:]] == ["a", "b", "c", "d", "e", "fine"][:n]
    assert sum(line.startswith("- **") for line in source.splitlines()) == min(n, 3)


def test_an_empty_report_has_every_form():
    report = Report([])
    assert len(report) == 0
    assert report.summary() == {}
    assert report.worst() == report.worst(3) == report.unhealthy == []
    assert report.layer_summaries() == {}
    assert report.to_dict() == {"rank": None, "summary": {}, "layers": {}}
    assert str(report) == report.brief() == "No BatchNorm layer was monitored."
    assert report.to_markdown() == "**No BatchNorm layer was monitored.**"
    assert Cells(report._repr_html_()).tags == ["p", "strong"]
    assert repr(report) == "Report([])"
    with pytest.raises(KeyError, match="'any'"):
        report["any"]


# ----------------------------------------------------------------------------------------------------- from real layers


@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5), (4, 3, 5, 2), (2, 3, 4, 2, 2)])
def test_a_tracked_layers_report_is_that_of_all_its_values(shape):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, eps=1e-3, momentum=0.2))
    batches = [torch.randn(shape) * 3 + 1 + 0.1 * step for step in range(5)]
    report = tracked(model, batches)["0"]

    x = np.concatenate([np.moveaxis(batch.double().numpy(), 1, 0).reshape(3, -1) for batch in batches], axis=1)
    running_mean, running_var = (b.double().numpy() for b in (model[0].running_mean, model[0].running_var))
    assert (report.name, report.type, report.num_features) == ("0", kind.__name__, 3)
    assert (report.eps, report.momentum, report.num_batches, report.num_samples) == (1e-3, 0.2, 5, x.shape[1])
    np.testing.assert_allclose(report.population_mean, x.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(report.population_var, x.var(axis=1, ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(report.running_mean, running_mean)
    np.testing.assert_array_equal(report.running_var, running_var)
    std = np.sqrt(x.var(axis=1, ddof=1) + 1e-3)
    error = (x.T - running_mean) / np.sqrt(running_var + 1e-3) - (x.T - x.mean(axis=1)) / std
    rmse = np.sqrt(error.var(axis=0, ddof=1) + error.mean(axis=0) ** 2)
    np.testing.assert_allclose(report.act_rmse, rmse, rtol=1e-5)
    now_mean, now_var = report.now_mean.numpy(), report.now_var.numpy()
    gain_error = np.sqrt(now_var) * (1 / np.sqrt(running_var + 1e-3) - 1 / np.sqrt(now_var + 1e-3))
    offset = (now_mean - running_mean) / np.sqrt(running_var + 1e-3)
    np.testing.assert_allclose(report.eval_error, np.hypot(gain_error, offset), rtol=1e-5)
    np.testing.assert_allclose(report.mean_shift, (running_mean - x.mean(axis=1)) / std, rtol=1e-5, atol=1e-6)
    expected = {
        "calls_saved": 5.0,
        "calls_traced": 0.0,
        "calls_pass": 0.0,
        "calls_skipped": 0.0,
        "updates_per_call": 1.0,
        "dead_channels": 0.0,
        "non_finite_channels": 0.0,
        "non_finite_running_stats": 0.0,
        "num_features": 3.0,
        "momentum": 0.2,
        "effective_momentum": 0.2,
        "batches": 5.0,
        "batch_size": shape[0],
        "samples_per_batch": x.shape[1] / 5,
    }
    assert {key: report.evidence[key] for key in expected} == expected
    assert report.verdict == "insufficient-data"


def test_the_present_statistics_of_a_single_batch_are_the_populations():
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(64, 3)])["0"]
    np.testing.assert_array_equal(report.now_mean, report.population_mean)
    np.testing.assert_array_equal(report.now_var, report.population_var)


def test_the_present_statistics_are_those_at_the_end_of_the_window_and_not_of_all_of_it():
    torch.manual_seed(0)
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(256, 3) + 0.1 * step for step in range(40)])["0"]
    np.testing.assert_allclose(report.now_mean, 3.95, atol=0.2)  # half a batch after the last one
    np.testing.assert_allclose(report.now_var, 1, atol=0.2)
    np.testing.assert_allclose(report.population_mean, 1.95, atol=0.1)
    np.testing.assert_allclose(report.population_var, 1 + 0.1**2 * 1600 / 12, atol=0.1)


def test_z_says_how_far_running_statistics_are_off_by_more_than_chance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(200))
    report = tracked(model, torch.randn(64, 16, 200))["0"]
    for z in (report.z_mean, report.z_var):
        assert z.square().mean().sqrt() == pytest.approx(1, abs=0.15)
    assert report.evidence["z_mean"] == pytest.approx(report.z_mean.square().mean().sqrt().item(), rel=1e-9)
    assert report.evidence["z_var"] == pytest.approx(report.z_var.square().mean().sqrt().item(), rel=1e-9)


def test_a_report_before_any_batch_is_one_of_an_empty_window():
    model = Branches()
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert list(report) == ["never", "late", "early", "nothing_kept"]
    assert report.summary() == {"unhealthy_layers": 0.0}
    for name, one in report.items():
        assert one.verdict == "unused"
        assert (one.num_batches, one.num_samples) == (0, 0)
        assert one.population_mean.isnan().all()
        assert one.population_mean.shape == (getattr(model, name).num_features,)
        assert "updates_per_call" not in one.evidence
    assert all(name in form(report) for name in report for form in FORMS.values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_report_of_a_tracker_that_was_never_attached_is_empty():
    assert len(BatchNormTracker(Branches()).report()) == 0


def test_a_lazy_layer_that_was_not_called_is_reported_without_channels():
    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm1d()})
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert report["lazy"].num_features == 0
    assert all(math.isnan(value) for value in report["lazy"].summary().values())
    assert report.summary() == {"unhealthy_layers": 0.0}
    assert all("lazy" in form(report) for form in FORMS.values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_that_is_itself_a_layer_is_named_root():
    assert list(tracked(nn.BatchNorm1d(3), [torch.randn(8, 3)])) == ["(root)"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_report_does_not_change_when_training_goes_on(dtype):
    model = nn.Sequential(nn.BatchNorm1d(3, dtype=dtype))
    with BatchNormTracker(model) as tracker:
        model(torch.randn(8, 3, dtype=dtype))
        report = tracker.report()
        before = report.to_dict()
        model(torch.randn(8, 3, dtype=dtype) + 5)
        tracker.reset()
        model[0].reset_running_stats()
        assert report.to_dict() == before
        assert tracker.report().to_dict() != before


def test_a_value_that_is_not_finite_costs_only_its_own_channel():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3) for _ in range(4)]
    batches[2][5, 1] = NAN
    model = nn.Sequential(nn.BatchNorm1d(3))
    report = tracked(model, batches)["0"]
    assert report.population_mean.isnan().tolist() == [False, True, False]
    x = torch.cat(batches).double()[:, [0, 2]]
    np.testing.assert_allclose(report.population_mean[[0, 2]], x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(report.population_var[[0, 2]], x.var(0), rtol=1e-5)
    assert report.eval_error[1] == INF  # the value is in the running statistics, too
    assert report.evidence["non_finite_channels"] == 1


def test_a_constant_channel_is_counted_as_dead():
    torch.manual_seed(0)
    batches = [torch.randn(8, 3) * torch.tensor([1.0, 0.0, 1.0]) + 2 for _ in range(4)]
    report = tracked(nn.Sequential(nn.BatchNorm1d(3)), batches)["0"]
    assert report.evidence["dead_channels"] == 1
    assert report.log_var_ratio.isnan().tolist() == [False, True, False]
    assert report.eval_error.isfinite().all()


class Zoo(nn.Module):
    """Layers of unequal widths in every condition, each fed its own values."""

    WIDTHS: ClassVar[dict[str, int]] = {
        **{"plain": 7, "single": 1, "wide": 33, "frozen": 5, "no_stats": 4, "never": 6, "never_broken": 3},
        **{"broken": 9, "bad_input": 8, "both": 5, "dead": 12, "cumulative": 2, "still": 3, "trained": 11},
    }

    def __init__(self) -> None:
        super().__init__()
        for name, width in self.WIDTHS.items():
            self.add_module(name, nn.BatchNorm1d(width, track_running_stats=name != "no_stats", eps=1e-3))
        self.wide.momentum, self.cumulative.momentum, self.still.momentum = 0.5, None, 0.0
        for frozen in (self.frozen, self.trained):
            frozen.running_mean += 0.3
        self.frozen.eval()
        self.trained.num_batches_tracked += 1000
        self.broken.running_mean[[2, 7]] = NAN
        self.broken.running_var[[2, 5]] = torch.tensor([INF, NAN])
        self.never_broken.running_var[1] = INF
        self.both.running_mean[1] = -INF

    def forward(self, batches: Mapping[str, torch.Tensor]) -> None:
        for name, x in batches.items():
            getattr(self, name)(x)


def zoo_data(num_batches: int) -> dict[str, np.ndarray]:
    """What each layer of the zoo receives, ``(batches, 16, C)``, with values that are not finite and dead channels."""
    rng = np.random.default_rng(0)
    data = {}
    for name, width in Zoo.WIDTHS.items():
        if not name.startswith("never"):
            scale = np.array([2e-3, 5e-4, 0, 1])[:width] if name == "dead" else rng.uniform(0.5, 2, width)
            scale = np.resize(scale, width)
            shift = rng.normal(size=width) + 0.01 * np.arange(num_batches)[:, None, None] * (name == "plain")
            data[name] = (rng.normal(size=(num_batches, 16, width)) * scale + shift).astype(np.float32)
    data["bad_input"][3, 2, 6], data["bad_input"][1, 5, [0, 6]] = NAN, INF
    data["both"][num_batches - 1, 0, [1, 3]] = [1, -INF]
    return data


@pytest.mark.parametrize("num_batches", [4, 40])
def test_what_the_tracker_computes_for_all_layers_at_once_is_what_each_layers_tensors_say(num_batches):
    model, data = Zoo(), zoo_data(num_batches)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(num_batches)])
    assert set(report) == set(Zoo.WIDTHS)
    for name, summary in report.layer_summaries().items():
        one, evidence = report[name], report[name].evidence
        for metric, value in one.summary().items():
            assert summary[metric] == pytest.approx(value, rel=1e-9, abs=1e-15, nan_ok=True), (name, metric)
            assert evidence.get(metric, NAN) == pytest.approx(value, rel=1e-9, abs=1e-15, nan_ok=True), (name, metric)
            assert (metric in evidence) == (not math.isnan(value)), (name, metric)
    infinite = {name for name, summary in report.layer_summaries().items() if summary["eval_error"] == INF}
    assert infinite == {"broken", "bad_input", "both"}
    without = {name for name, summary in report.layer_summaries().items() if math.isnan(summary["eval_error"])}
    assert without == {"no_stats", "never", "never_broken"}


def test_layers_that_are_not_called_in_a_later_window_are_summarised_as_their_tensors_say():
    model, data = Zoo(), zoo_data(20)
    with BatchNormTracker(model) as tracker:
        for name, x in data.items():
            model({name: torch.from_numpy(x[0])})
        tracker.reset()
        for t in range(20):
            model({"plain": torch.from_numpy(data["plain"][t])})
        report = tracker.report()
    assert {name for name, one in report.items() if one.num_batches} == {"plain"}
    for name, summary in report.layer_summaries().items():
        assert summary == pytest.approx(report[name].summary(), rel=1e-9, abs=1e-15, nan_ok=True), name
        assert math.isnan(summary["eval_error"]) == (name != "plain")
    broken = {"broken", "both", "never_broken"}
    assert {name for name, one in report.items() if one.verdict == "non-finite"} == broken


@pytest.mark.parametrize("num_batches", [4, 40])
def test_dead_and_non_finite_channels_are_counted_as_a_look_at_all_values_counts_them(num_batches):
    model, data = Zoo(), zoo_data(num_batches)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(num_batches)])
    for name, width in Zoo.WIDTHS.items():
        x = data[name].reshape(-1, width).astype(float) if name in data else None
        bad_input = np.zeros(width, bool) if x is None else ~np.isfinite(x).all(axis=0)
        bad_stats = np.zeros(width, bool)
        if name != "no_stats":
            module = getattr(model, name)
            bad_stats = ~(np.isfinite(module.running_mean.numpy()) & np.isfinite(module.running_var.numpy()))
        dead = 0
        if x is not None:
            with np.errstate(invalid="ignore"):
                dead = int((x.var(axis=0, ddof=1) <= 1e-6).sum())
        evidence = report[name].evidence
        found = [evidence[key] for key in ("dead_channels", "non_finite_channels", "non_finite_running_stats")]
        assert found == [dead, (bad_input | bad_stats).sum(), bad_stats.sum()], name
        assert (report[name].verdict == "non-finite") == (bad_input | bad_stats).any(), name
        assert ("dead-channels" in report[name].flags) == bool(dead), name
        assert evidence["num_features"] == report[name].num_features == width
    assert report["dead"].evidence["dead_channels"] == 6
    assert report["bad_input"].evidence["non_finite_channels"] == 2
    assert report["bad_input"].evidence["first_bad_batch"] == 2
    assert report["bad_input"].evidence["first_bad_channel"] == 0
    assert report["both"].evidence["first_bad_batch"] == num_batches
    assert report["both"].evidence["first_bad_channel"] == 3
    assert "first_bad_batch" not in report["broken"].evidence


def test_the_variance_of_a_single_value_is_not_counted_as_non_finite():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].eval()
    report = tracked(model, [torch.randn(1, 3)])["0"]
    assert report.population_var.isnan().all()
    assert report.evidence["non_finite_channels"] == 0
    assert report.verdict == "frozen"


def test_every_form_of_a_zoo_is_strict_json_or_text():
    model, data = Zoo(), zoo_data(20)
    report = tracked(model, [{name: torch.from_numpy(x[t]) for name, x in data.items()} for t in range(20)])
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(read["layers"]) == list(report)
    for name, values in read["layers"].items():
        np.testing.assert_array_equal(decoded(values["now_var"]), report[name].now_var, err_msg=name)
        assert {key: decoded(value) for key, value in values["evidence"].items()} == report[name].evidence
    assert len(text_rows(str(report))) == len(Zoo.WIDTHS)
    assert all(name in form(report) for name in report for form in FORMS.values())
