"""Reports: what they say of a window, by hand and from real layers, and every form they can be given."""

import html.parser
import json
import math
import random
import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import BatchNormTracker, LayerReport, Report

NAN, INF = math.nan, math.inf
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
PER_CHANNEL = ("mean_shift", "log_var_ratio", "act_rmse", "kl", "eval_error")


def layer(name="layer", mean=(0.0,), var=(1.0,), running_mean=(0.0,), running_var=(1.0,), **fields) -> LayerReport:
    """A layer's report with the given statistics."""
    mean, var, running_mean, running_var = (
        torch.tensor(values, dtype=torch.float64) for values in (mean, var, running_mean, running_var)
    )
    defaults = {
        "name": name,
        "type": "BatchNorm1d",
        "num_features": len(mean),
        "eps": 0.0,
        "momentum": 0.1,
        "num_batches": 10,
        "num_samples": 80,
        "has_running_stats": True,
        "counters": {"calls_saved": 10.0},
    }
    return LayerReport(
        population_mean=mean,
        population_var=var,
        running_mean=running_mean,
        running_var=running_var,
        **(defaults | fields),
    )


def with_error(name: str, error: float) -> LayerReport:
    """One channel of variance 1 whose running mean is off by so much: so are eval_error, act_rmse and mean_shift."""
    return layer(name, running_mean=[error])


def unused(name: str) -> LayerReport:
    return layer(name, mean=[NAN], var=[NAN], num_batches=0, num_samples=0)


def stateless(name: str) -> LayerReport:
    return layer(name, running_mean=[NAN], running_var=[NAN], has_running_stats=False)


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
    eps = 1e-2
    report = layer(mean=mean, var=var, running_mean=running_mean, running_var=running_var, eps=eps)
    std, running_std = np.sqrt(var + eps), np.sqrt(running_var + eps)
    gain_error = (1 / running_std - 1 / std) * np.sqrt(
        var
    )  # of the normalised activation, which is linear in the input
    offset = (mean - running_mean) / running_std
    # The Kullback-Leibler divergence of two normal distributions, as in any textbook.
    kl = np.log(running_std / std) + (std**2 + (mean - running_mean) ** 2) / (2 * running_std**2) - 0.5
    expected = {
        "mean_shift": (running_mean - mean) / std,
        "log_var_ratio": 2 * np.log(running_std / std),
        "act_rmse": np.hypot(gain_error, offset),
        "kl": kl,
        "eval_error": np.hypot(gain_error, offset),
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
    assert Report([report]).summary() == {}


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


def test_evidence_counts_dead_and_non_finite_channels_beside_what_the_tracker_counted():
    report = layer(
        mean=[0.0, 0.0, 0.0, NAN, 0.0, 0.0, 0.0],
        var=[0.0, 1e-6, 1.1e-6, NAN, 1.0, 1.0, 1.0],
        running_mean=[0.0, 0.0, 0.0, 0.0, INF, NAN, 0.0],
        running_var=[1.0, 1.0, 1.0, 1.0, 1.0, NAN, 1.0],
        eps=1e-3,
    )
    expected = {"calls_saved": 10.0, "dead_channels": 2.0, "non_finite_channels": 3.0}
    assert {key: report.evidence[key] for key in expected} == expected


@pytest.mark.parametrize("report", [unused("layer"), stateless("layer")], ids=["unused", "stateless"])
def test_what_a_layer_does_not_have_is_not_counted_as_non_finite(report):
    assert report.evidence["non_finite_channels"] == 0
    assert report.evidence["dead_channels"] == 0


def test_the_variance_of_a_single_value_is_not_counted_as_non_finite():
    assert layer(mean=[1.0], var=[NAN], num_batches=1, num_samples=1).evidence["non_finite_channels"] == 0


def test_a_layer_report_can_be_read_but_not_written():
    with pytest.raises(AttributeError):
        layer().num_batches = 3


def test_the_repr_of_a_layer_report_names_it_and_is_one_line():
    text = repr(layer("encoder.norm"))
    assert "'encoder.norm'" in text
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


def test_worst_gives_the_largest_eval_error_first_and_layers_without_one_last():
    layers = [
        unused("unused"),
        with_error("small", 0.1),
        stateless("stateless"),
        layer("broken", running_mean=[NAN]),
        with_error("large", 0.7),
        with_error("medium", -0.4),
    ]
    report = Report(layers)
    ranking = ["broken", "large", "medium", "small", "unused", "stateless"]
    assert [one.name for one in report.worst()] == ranking
    for n in (0, 1, 3, 6, 99):
        assert [one.name for one in report.worst(n)] == ranking[:n]
    assert list(report) == [one.name for one in layers]


def test_worst_keeps_the_order_of_the_report_among_equals():
    names = [f"layer{index}" for index in range(20)]
    assert [one.name for one in Report(with_error(name, 0.5) for name in names).worst()] == names


# ---------------------------------------------------------------------------------------------------------- the summary


def test_the_summary_has_five_numbers_computed_by_hand():
    layers = [
        layer("first", mean=[0.0, 0.0], var=[1.0, 1.0], running_mean=[0.3, -0.4], running_var=[1.0, 1.0]),
        layer("second", var=[4.0], running_mean=[-1.0]),  # half a deviation off; error 1 in scale and 1 in place
        with_error("third", 0.0),
    ]
    first, second = math.sqrt(0.125), math.sqrt(2)
    assert Report(layers).summary() == pytest.approx(
        {
            "eval_error_max": second,
            "eval_error_p90": second,
            "eval_error_median": first,
            "act_rmse_max": second,
            "mean_shift_max": 0.5,
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
    assert Report([unused("unused"), stateless("stateless")]).summary() == {}


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
    assert report.summary() == {"eval_error_max": INF, "eval_error_p90": INF, "eval_error_median": INF}


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
    one = layer("one", mean=mean, var=var, running_mean=running_mean, running_var=running_var, eps=1e-5)
    report = Report([one, stateless("two"), unused("three")])
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))

    assert list(read["layers"]) == ["one", "two", "three"]
    fields = ("population_mean", "population_var", "running_mean", "running_var", *PER_CHANNEL)
    for name, values in read["layers"].items():
        original = report[name]
        for field in fields:
            np.testing.assert_array_equal(decoded(values[field]), getattr(original, field), err_msg=field)
        assert (values["name"], values["type"], values["num_features"]) == (name, "BatchNorm1d", original.num_features)
        assert (values["num_batches"], values["num_samples"]) == (original.num_batches, original.num_samples)
        assert (values["eps"], values["momentum"]) == (original.eps, 0.1)
        assert values["evidence"] == original.evidence
        for metric, value in original.summary().items():
            assert decoded(values["summary"][metric]) == pytest.approx(value, rel=0, abs=0, nan_ok=True)
    assert {name: decoded(value) for name, value in read["summary"].items()} == report.summary()
    assert read["layers"]["one"]["running_mean"][1:3] == ["NaN", "-Infinity"]
    assert read["layers"]["one"]["running_var"][3] == "Infinity"
    assert read["summary"]["eval_error_max"] == "Infinity"


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
    """The text of every body cell of an HTML table, row by row; any tag within a cell is an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag == "td":
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def markdown_rows(source: str) -> list[list[str]]:
    """The cells of a GitHub table as a reader sees them: escapes by backslash and by entity undone."""
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in source.splitlines()]
    return [[html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell.strip())) for cell in row] for row in cells]


def sample_report() -> Report:
    return Report(
        [with_error("encoder.0", 0.25), stateless("encoder.1"), layer("10", running_mean=[NAN]), unused("head")]
    )


FORMS = {"str": str, "markdown": Report.to_markdown, "html": Report._repr_html_, "repr": repr}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_every_layer(form):
    text = FORMS[form](sample_report())
    assert all(name in text for name in sample_report())


def test_tables_have_a_row_for_each_layer_with_the_worst_first():
    order = ["10", "encoder.0", "encoder.1", "head"]
    report = sample_report()
    assert [line.split()[0] for line in str(report).splitlines()[2:]] == order
    assert [row[0] for row in markdown_rows(report.to_markdown())[2:]] == order
    assert [row[0].strip() for row in Cells(report._repr_html_()).rows if row] == order


def test_tables_show_counts_and_the_numbers_of_the_summary():
    report = sample_report()
    rows = {row[0]: row for row in markdown_rows(report.to_markdown())}
    assert rows["layer"] == ["layer", "channels", "batches", "samples", *METRICS]
    assert rows["encoder.0"] == ["encoder.0", "1", "10", "80", "0.2500", "0.2500", "0.2500", "0.0000"]
    assert rows["10"] == ["10", "1", "10", "80", "inf", "-", "-", "0.0000"]
    assert rows["head"] == ["head", "1", "0", "0", "-", "-", "-", "-"]
    in_html = [[cell.strip() for cell in row] for row in Cells(report._repr_html_()).rows if row]
    assert in_html == [rows[name] for name in ("10", "encoder.0", "encoder.1", "head")]
    in_text = [line.split() for line in str(report).splitlines()[2:]]
    assert in_text == in_html


ODD_NAMES = ["a|b", "<b>bold</b>", "x & y", "layer_1_norm", "1e5", "007", "nan", "back\\slash"]


def model_of_odd_names() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.BatchNorm1d(2) for name in ODD_NAMES})


def odd_report() -> Report:
    model = model_of_odd_names()
    with BatchNormTracker(model) as tracker:
        for module in model.values():
            module(torch.randn(4, 2))
    return tracker.report()


def test_html_shows_odd_layer_names_as_they_are_and_lets_none_become_a_tag():
    cells = Cells(odd_report()._repr_html_())
    assert {row[0].strip() for row in cells.rows if row} == set(ODD_NAMES)
    assert set(cells.tags) == {"table", "thead", "tbody", "tr", "th", "td"}


def test_plain_text_shows_odd_layer_names_as_they_are():
    lines = str(odd_report()).splitlines()[2:]
    assert {re.split(r"\s{2,}", line)[0] for line in lines} == set(ODD_NAMES)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_markdown_keeps_a_layer_name_in_its_cell_and_lets_none_become_a_tag(name):
    source = Report([with_error(name, 0.5)]).to_markdown()
    row = markdown_rows(source)[-1]
    assert len(row) == 4 + len(METRICS)
    assert row[0] == name
    assert not re.search(r"(?<!\\)<b>", source)


def test_an_empty_report_has_every_form():
    report = Report([])
    assert len(report) == 0
    assert report.summary() == {}
    assert report.worst() == report.worst(3) == []
    assert report.layer_summaries() == {}
    assert report.to_dict() == {"summary": {}, "layers": {}}
    assert "No BatchNorm layer" in str(report)
    assert markdown_rows(report.to_markdown())[0] == ["layer", "channels", "batches", "samples", *METRICS]
    assert len(report.to_markdown().splitlines()) == 2
    assert "table" in Cells(report._repr_html_()).tags
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
    np.testing.assert_allclose(report.eval_error, rmse, rtol=1e-5)
    np.testing.assert_allclose(report.mean_shift, (running_mean - x.mean(axis=1)) / std, rtol=1e-5, atol=1e-6)
    expected = {
        "calls_saved": 5.0,
        "calls_traced": 0.0,
        "calls_pass": 0.0,
        "calls_skipped": 0.0,
        "updates_per_call": 1.0,
        "dead_channels": 0.0,
        "non_finite_channels": 0.0,
    }
    assert {key: report.evidence[key] for key in expected} == expected


def test_a_report_before_any_batch_is_one_of_an_empty_window():
    model = Branches()
    with BatchNormTracker(model) as tracker:
        report = tracker.report()
    assert list(report) == ["never", "late", "early", "nothing_kept"]
    assert report.summary() == {}
    for name, one in report.items():
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
    assert report.summary() == {}
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
