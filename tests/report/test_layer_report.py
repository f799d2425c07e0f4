"""The report of one layer: its derived fields against their definitions, its summary, its words."""

import math

import numpy as np
import pytest
import torch

from lightning_bnmonitor import Report
from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from tests.report.made_reports import INF, NAN, PER_CHANNEL, layer, stateless, unused

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
    assert report.diagnosis == Diagnosis("noisy", ("dead-channels",), True, report.evidence)
    assert report.evidence.items() >= evidence.items()
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
