"""Verdicts, flags, explanations and remedies: by hand at every threshold, and on real layers in every condition."""

from __future__ import annotations

import json
import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from lightning_bnmonitor import BatchNormTracker, LayerReport
from lightning_bnmonitor.diagnosis.diagnosis import (
    EVIDENCE,
    FLAGS,
    VERDICTS,
    Circumstances,
    Diagnosis,
    diagnose,
)
from lightning_bnmonitor.statistics import divergence

NAN, INF = math.nan, math.inf
BELOW, ABOVE = -INF, INF  # neighbours of a threshold, towards these

CALLED = Circumstances(
    num_features=64,
    momentum=0.1,
    effective_momentum=0.1,
    has_running_stats=True,
    calls={"saved": 100, "traced": 0, "pass": 0, "skipped": 0},
    training_calls=100,
    updates_per_call=1.0,
    assumed_updates=1,
    checkpointed=False,
    written_outside=False,
    interrupted=False,
)
NEVER_CALLED = {"saved": 0, "traced": 0, "pass": 0, "skipped": 0}
OBSERVED = {
    "batches": 100.0,
    "samples_per_batch": 32.0,
    "batch_size": 32.0,
    "degrees_of_freedom": 87.0,
    "initial_weight": 0.01,
    "noise_error": 0.05,
    "now_error": 0.06,
    "warmup_error": 0.01,
    "lag_error": 0.0,
    "drift_error": 0.0,
    "z_mean": 1.0,
    "z_var": 1.1,
    "max_score": 2.5,
    "drift_per_batch": 0.0,
    "jitter": 0.2,
    "ordering_ratio": 1.1,
    "ordering_limit": 2.5,
    "ordering_share": 0.001,
    "trend_share": 0.3,
    "grouping_ratio": 1.05,
    "grouping_limit": 1.6,
    "grouping_share": 0.002,
    "dead_channels": 0.0,
    "non_finite_channels": 0.0,
    "non_finite_running_stats": 0.0,
}
METRICS = {"eval_error": 0.07, "act_rmse": 0.08, "mean_shift": 0.03, "log_var_ratio": 0.09}

# What makes a verdict: circumstances, observations and metrics that differ from those of a healthy layer.
SYMPTOMS: dict[str, dict] = {
    "non-finite": {"non_finite_channels": 2.0, "first_bad_batch": 7.0, "first_bad_channel": 3.0},
    "unused": {"calls": NEVER_CALLED, "training_calls": 0, "batches": 0.0, "effective_momentum": None},
    "no-running-stats": {"has_running_stats": False, "batches": 0.0, "effective_momentum": None},
    "stale": {"batches": 0.0, "effective_momentum": None, "eval_error": 0.5},
    "frozen": {"batches": 0.0, "effective_momentum": None, "training_calls": 0, "eval_error": 0.5},
    "insufficient-data": {"batches": 7.0, "degrees_of_freedom": 3.0},
    "tiny-batch": {"samples_per_batch": 3.0},
    "ordered-batches": {"ordering_ratio": 3.0, "ordering_share": 0.3, "trend_share": 0.2},
    "grouped-batches": {"grouping_ratio": 2.0, "grouping_share": 0.1},
    "warming-up": {"warmup_error": 0.5, "initial_weight": 0.3, "eval_error": 0.45},
    "lagging": {"lag_error": 0.4, "eval_error": 0.35},
    "noisy": {"noise_error": 0.2},
    "drifting": {"drift_error": 0.3},
    "healthy": {},
}


def diagnosed(*symptoms: dict) -> Diagnosis:
    """The diagnosis of a healthy layer with these symptoms; what the first of them say holds."""
    changed = ChainMap(*symptoms)
    layer = CALLED._replace(**{field: changed[field] for field in CALLED._fields if field in changed})
    metrics = {metric: changed.get(metric, value) for metric, value in METRICS.items()}
    known = {*CALLED._fields, *METRICS}
    observed = OBSERVED | {name: value for name, value in changed.items() if name not in known}
    return diagnose(layer, {name: value for name, value in observed.items() if value is not None}, metrics)


# ---------------------------------------------------------------------------------------------------- the verdict table


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_has_its_symptoms(verdict):
    assert diagnosed(SYMPTOMS[verdict]).verdict == verdict


def test_the_verdicts_come_in_the_order_in_which_they_are_tried():
    assert list(VERDICTS) == list(SYMPTOMS)


COMPATIBLE = [
    pair
    for pair in combinations(VERDICTS, 2)
    # A layer either was in training mode or was not, and the buffers' initial values or other batches explain more.
    if pair not in {("stale", "frozen"), ("warming-up", "lagging")}
]


@pytest.mark.parametrize(("earlier", "later"), COMPATIBLE)
def test_of_two_verdicts_that_hold_the_earlier_one_wins(earlier, later):
    assert diagnosed(SYMPTOMS[earlier], SYMPTOMS[later]).verdict == earlier


def test_precedence_is_tested_for_every_neighbouring_pair():
    exclusive = {("stale", "frozen"), ("warming-up", "lagging")}
    assert set(pairwise(VERDICTS)) - set(COMPATIBLE) == exclusive


@pytest.mark.parametrize(
    ("earlier", "later", "both"),
    [
        # Those whose symptoms above exclude each other can still be made to hold at the same time.
        ("non-finite", "unused", SYMPTOMS["unused"] | {"non_finite_running_stats": 1.0, "non_finite_channels": 1.0}),
        ("unused", "no-running-stats", SYMPTOMS["unused"] | {"has_running_stats": False}),
        ("no-running-stats", "stale", SYMPTOMS["stale"] | {"has_running_stats": False}),
        ("no-running-stats", "frozen", SYMPTOMS["frozen"] | {"has_running_stats": False}),
        ("stale", "frozen", SYMPTOMS["frozen"] | {"training_calls": 1}),
        ("stale", "insufficient-data", SYMPTOMS["stale"] | {"degrees_of_freedom": 0.0}),
        ("frozen", "tiny-batch", SYMPTOMS["frozen"] | {"samples_per_batch": 2.0}),
        ("insufficient-data", "tiny-batch", {"batches": 7.0, "samples_per_batch": 2.0}),
        ("warming-up", "lagging", {"warmup_error": 0.5, "lag_error": 0.4, "eval_error": 0.4}),
        ("lagging", "warming-up", {"warmup_error": 0.4, "lag_error": 0.5, "eval_error": 0.4}),
        ("warming-up", "noisy", {"warmup_error": 0.5, "noise_error": 0.4, "eval_error": 0.4}),
        ("lagging", "noisy", {"lag_error": 0.5, "noise_error": 0.4, "eval_error": 0.4}),
        ("noisy", "lagging", {"lag_error": 0.4, "noise_error": 0.5, "eval_error": 0.4}),
        ("noisy", "warming-up", {"warmup_error": 0.4, "noise_error": 0.5, "eval_error": 0.4}),
        ("noisy", "drifting", {"noise_error": 0.11, "drift_error": 5.0}),
    ],
)
def test_the_verdict_is_the_first_that_holds(earlier, later, both):
    assert earlier != later
    assert diagnosed(both).verdict == earlier


def beside(threshold: float, towards: float) -> float:
    return math.nextafter(threshold, towards)


THRESHOLDS = [
    # what decides, the threshold, the verdict below it, at it, and above it, and what else holds
    ("non_finite_channels", 0.0, None, "healthy", "non-finite", {}),
    ("batches", 8.0, "insufficient-data", "healthy", "healthy", {}),
    ("degrees_of_freedom", 4.0, "insufficient-data", "healthy", "healthy", {}),
    ("samples_per_batch", 4.0, "tiny-batch", "tiny-batch", "healthy", {}),
    ("ordering_ratio", 2.5, "healthy", "healthy", "ordered-batches", {"ordering_share": 0.3}),
    ("ordering_share", 0.02, "healthy", "healthy", "ordered-batches", {"ordering_ratio": 3.0}),
    ("trend_share", 0.5, "ordered-batches", "healthy", "healthy", {"ordering_ratio": 3.0, "ordering_share": 0.3}),
    ("grouping_ratio", 1.6, "healthy", "healthy", "grouped-batches", {"grouping_share": 0.1}),
    ("grouping_share", 0.02, "healthy", "healthy", "grouped-batches", {"grouping_ratio": 2.0}),
    ("warmup_error", 0.1, "healthy", "healthy", "warming-up", {"eval_error": 0.3}),
    ("warmup_error", 0.3, "noisy", "noisy", "warming-up", {"noise_error": 0.3, "eval_error": 0.3}),
    ("warmup_error", 0.3, "lagging", "lagging", "warming-up", {"lag_error": 0.3, "eval_error": 0.3}),
    ("eval_error", 0.1, "healthy", "healthy", "warming-up", {"warmup_error": 0.3}),
    ("eval_error", 0.1, "noisy", "noisy", "warming-up", {"warmup_error": 0.3, "noise_error": 0.2}),
    ("lag_error", 0.1, "healthy", "healthy", "lagging", {"eval_error": 0.3}),
    ("lag_error", 0.3, "noisy", "noisy", "lagging", {"noise_error": 0.3, "eval_error": 0.3}),
    ("eval_error", 0.1, "healthy", "healthy", "lagging", {"lag_error": 0.3}),
    ("eval_error", 0.1, "drifting", "drifting", "lagging", {"lag_error": 0.3, "drift_error": 0.3}),
    ("noise_error", 0.1, "healthy", "healthy", "noisy", {}),
    ("drift_error", 0.1, "healthy", "healthy", "drifting", {}),
    ("eval_error", math.hypot(0.1, math.hypot(0.05, 0.06)), "drifting", "drifting", "lagging", {"drift_error": 0.3}),
]


@pytest.mark.parametrize(("name", "threshold", "below", "at", "above", "given"), THRESHOLDS)
def test_a_verdict_changes_exactly_at_its_threshold(name, threshold, below, at, above, given):
    if below is not None:
        assert diagnosed({name: beside(threshold, BELOW)}, given).verdict == below
    assert diagnosed({name: threshold}, given).verdict == at
    assert diagnosed({name: beside(threshold, ABOVE)}, given).verdict == above


@pytest.mark.parametrize(
    ("path", "verdict"), [("saved", "healthy"), ("traced", "healthy"), ("pass", "healthy"), ("skipped", "unused")]
)
def test_a_layer_is_used_if_a_single_call_was_seen(path, verdict):
    assert diagnosed({"calls": NEVER_CALLED | {path: 1}}).verdict == verdict


@pytest.mark.parametrize(("training_calls", "verdict"), [(0, "frozen"), (1, "stale"), (100, "stale")])
def test_a_layer_that_updates_nothing_is_stale_if_it_ever_normalised_by_the_batch(training_calls, verdict):
    assert diagnosed({"batches": 0.0, "training_calls": training_calls}).verdict == verdict


@pytest.mark.parametrize(("updates", "verdict"), [(0.0, "stale"), (1.0, "healthy"), (NAN, "healthy")])
def test_a_layer_whose_calls_moved_no_buffer_of_the_module_is_stale(updates, verdict):
    assert diagnosed({"updates_per_call": updates}).verdict == verdict


@pytest.mark.parametrize("verdict", ["warming-up", "lagging"])
def test_an_error_that_cannot_be_told_does_not_acquit(verdict):
    assert diagnosed({"eval_error": NAN}, SYMPTOMS[verdict]).verdict == verdict


def test_what_could_not_be_told_is_no_reason_for_a_verdict():
    untold = ("ordering_ratio", "grouping_ratio", "noise_error", "warmup_error", "lag_error", "drift_error")
    assert diagnosed(dict.fromkeys(untold)).verdict == "healthy"
    without_shares = ("ordering_ratio", "ordering_share", "trend_share", "grouping_ratio", "grouping_share")
    assert diagnosed(dict.fromkeys(without_shares)).verdict == "healthy"


OF_WEIGHTS = ("warming-up", "lagging", "noisy", "drifting", "healthy")


@pytest.mark.parametrize("updates", [2.0, 1.5, 0.5, -3.0])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_nothing_that_depends_on_weights_is_claimed_while_they_are_not_known(verdict, updates):
    symptoms = SYMPTOMS[verdict] | {"updates_per_call": updates}
    diagnosis = diagnosed(symptoms)
    assert diagnosis.verdict == ("insufficient-data" if verdict in OF_WEIGHTS else verdict)
    assert diagnosis.evidence["assumed_updates_per_call"] == 1
    assert not [name for name in diagnosis.evidence if name.startswith("recommended") or name == "batches_to_go"]


@pytest.mark.parametrize("verdict", OF_WEIGHTS)
def test_updates_as_often_as_assumed_are_known_weights(verdict):
    doubled = SYMPTOMS[verdict] | {"updates_per_call": 2.0, "assumed_updates": 2, "checkpointed": True}
    assert diagnosed(doubled).verdict == verdict
    assert "assumed_updates_per_call" not in diagnosed(doubled).evidence
    assert diagnosed(SYMPTOMS[verdict] | {"updates_per_call": NAN, "assumed_updates": 2}).verdict == verdict
    assert diagnosed(SYMPTOMS[verdict] | {"updates_per_call": 1.0, "assumed_updates": 2}).verdict == "insufficient-data"


RULES: list[tuple[str, Callable[[Circumstances, dict], bool]]] = [
    ("non-finite", lambda c, o: o["non_finite_channels"] > 0),
    ("unused", lambda c, o: c.calls["saved"] + c.calls["traced"] + c.calls["pass"] == 0),
    ("no-running-stats", lambda c, o: not c.has_running_stats),
    ("stale", lambda c, o: (o["batches"] == 0 or c.updates_per_call == 0) and c.training_calls > 0),
    ("frozen", lambda c, o: o["batches"] == 0 or c.updates_per_call == 0),
    ("insufficient-data", lambda c, o: o["batches"] < 8 or o["degrees_of_freedom"] < 4),
    ("tiny-batch", lambda c, o: o["samples_per_batch"] <= 4),
    (
        "ordered-batches",
        lambda c, o: (
            o["ordering_ratio"] > o["ordering_limit"] and o["ordering_share"] > 0.02 and o["trend_share"] < 0.5
        ),
    ),
    ("grouped-batches", lambda c, o: o["grouping_ratio"] > o["grouping_limit"] and o["grouping_share"] > 0.02),
    (
        "insufficient-data",
        lambda c, o: not (math.isnan(c.updates_per_call) or c.updates_per_call == c.assumed_updates),
    ),
    (
        "warming-up",
        lambda c, o: (
            o["eval_error"] > 0.1
            and o["warmup_error"] > max(0.1, o["noise_error"])
            and o["warmup_error"] > o["lag_error"]
        ),
    ),
    (
        "lagging",
        lambda c, o: (
            o["eval_error"] > 0.1
            and o["lag_error"] > max(0.1, o["noise_error"])
            and o["lag_error"] >= o["warmup_error"]
        ),
    ),
    ("noisy", lambda c, o: o["noise_error"] > 0.1),
    (
        "lagging",
        lambda c, o: (
            o["drift_error"] > 0.1 and o["eval_error"] > math.hypot(0.1, o["noise_error"], o.get("now_error", 0.0))
        ),
    ),
    ("drifting", lambda c, o: o["drift_error"] > 0.1),
    ("healthy", lambda c, o: True),
]
ERRORS = st.sampled_from([0.0, 0.05, 0.1, beside(0.1, ABOVE), 0.2, 0.3])


def rarely(usual, *others):
    return st.sampled_from([usual] * 6 + [*others])


@settings(derandomize=True, deadline=None, max_examples=600)
@given(
    circumstances=st.fixed_dictionaries(
        {
            "calls": rarely(CALLED.calls, NEVER_CALLED, NEVER_CALLED | {"skipped": 5}, NEVER_CALLED | {"pass": 5}),
            "has_running_stats": rarely(True, False),
            "training_calls": rarely(100, 0, 1),
            "updates_per_call": rarely(1.0, 0.0, 2.0, 1.5, NAN, -1.0),
            "assumed_updates": rarely(1, 2),
            "checkpointed": st.booleans(),
            "interrupted": st.booleans(),
            "written_outside": st.booleans(),
        }
    ),
    observed=st.fixed_dictionaries(
        {
            "non_finite_channels": rarely(0.0, 1.0),
            "batches": rarely(100.0, 0.0, 7.0, 8.0),
            "degrees_of_freedom": rarely(80.0, 3.0, 4.0),
            "samples_per_batch": rarely(32.0, 2.0, 4.0, beside(4, ABOVE)),
            "ordering_ratio": rarely(1.0, 2.5, 3.0),
            "ordering_share": rarely(0.3, 0.02, 0.0),
            "trend_share": st.sampled_from([0.2, 0.5, 0.9]),
            "grouping_ratio": rarely(1.0, 1.6, 2.0),
            "grouping_share": rarely(0.3, 0.02, 0.0),
            **dict.fromkeys(("warmup_error", "lag_error", "noise_error", "drift_error"), ERRORS),
        }
    ),
    error=st.sampled_from([0.0, 0.1, beside(0.1, ABOVE), 3.0, INF]),
)
def test_the_verdict_is_that_of_the_table_whatever_comes_together(circumstances, observed, error):
    layer = CALLED._replace(**circumstances)
    told = OBSERVED | observed | {"eval_error": error}
    expected = next(verdict for verdict, holds in RULES if holds(layer, told))
    diagnosis = diagnosed(circumstances, observed, {"eval_error": error})
    assert diagnosis.verdict == expected
    sick = set(VERDICTS) - {"unused", "no-running-stats", "stale", "frozen", "insufficient-data", "drifting", "healthy"}
    assert diagnosis.needs_attention == (expected in sick or (expected in ("stale", "frozen") and error > 0.1))
    assert list(diagnosis.flags) == sorted(set(diagnosis.flags))
    assert isinstance(diagnosis.explanation + diagnosis.remedy, str)


# -------------------------------------------------------------------------------------------------------- the attention


@pytest.mark.parametrize(
    ("verdict", "attention"),
    [
        ("non-finite", True),
        ("unused", False),
        ("no-running-stats", False),
        ("insufficient-data", False),
        ("tiny-batch", True),
        ("ordered-batches", True),
        ("grouped-batches", True),
        ("warming-up", True),
        ("lagging", True),
        ("noisy", True),
        ("drifting", False),
        ("healthy", False),
    ],
)
@pytest.mark.parametrize("error", [0.0, 5.0, INF, NAN])
def test_who_needs_attention_whatever_the_eval_error_is(verdict, attention, error):
    diagnosis = diagnosed({"eval_error": error}, SYMPTOMS[verdict])
    if verdict in ("warming-up", "lagging") and error == 0:
        assert diagnosis.verdict == "healthy"
    elif verdict == "drifting" and error > 1:
        assert (diagnosis.verdict, diagnosis.needs_attention) == ("lagging", True)
    else:
        assert diagnosis.verdict == verdict
        assert diagnosis.needs_attention is attention


@pytest.mark.parametrize("verdict", ["stale", "frozen"])
@pytest.mark.parametrize(
    ("error", "attention"),
    [(0.0, False), (0.1, False), (beside(0.1, ABOVE), True), (3.0, True), (INF, True), (NAN, False)],
)
def test_a_layer_that_learns_no_statistics_needs_attention_if_they_are_wrong(verdict, error, attention):
    diagnosis = diagnosed({"eval_error": error}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert diagnosis.needs_attention is attention
    assert bool(diagnosis.remedy) is attention


@pytest.mark.parametrize("verdict", VERDICTS)
def test_who_needs_attention_is_told_what_to_do(verdict):
    diagnosis = diagnosed(SYMPTOMS[verdict])
    if diagnosis.needs_attention:
        assert diagnosis.remedy
    assert (diagnosis.remedy == "") == (verdict in ("healthy", "unused"))  # some of the others may want to know, too


# ------------------------------------------------------------------------------------------------------------ the flags


def test_a_layer_as_it_should_be_has_no_flag():
    assert diagnosed({}).flags == ()


@pytest.mark.parametrize(
    ("symptoms", "flags"),
    [
        ({"dead_channels": 1.0}, ("dead-channels",)),
        ({"updates_per_call": 2.0, "checkpointed": True}, ("double-update",)),
        ({"updates_per_call": 2.0, "checkpointed": True, "assumed_updates": 2}, ("double-update",)),
        ({"updates_per_call": 3.0, "checkpointed": True, "assumed_updates": 2}, ("double-update",)),
        ({"updates_per_call": 1.0, "checkpointed": True}, ()),
        ({"updates_per_call": 2.0}, ("missed-calls",)),
        ({"updates_per_call": 1.5, "checkpointed": True}, ("missed-calls",)),
        ({"updates_per_call": 1.5, "checkpointed": True, "assumed_updates": 2}, ("missed-calls",)),
        ({"updates_per_call": 1.0, "assumed_updates": 2}, ()),
        ({"rank_error": beside(0.1, ABOVE), "ranks": 2.0}, ("rank-0-only",)),
        ({"rank_error": 0.1, "ranks": 2.0}, ()),
        ({"updates_per_call": beside(1, ABOVE)}, ("missed-calls",)),
        ({"updates_per_call": 0.5}, ("not-updating",)),
        ({"updates_per_call": 0.0}, ("not-updating",)),
        ({"batches": 60.0}, ("not-updating",)),
        ({"batches": 99.0}, ("not-updating",)),
        ({"updates_per_call": NAN}, ()),
        ({"written_outside": True}, ("written-outside",)),
        ({"interrupted": True}, ("interrupted-batch",)),
        (
            {"written_outside": True, "updates_per_call": 2.0, "checkpointed": True, "dead_channels": 3.0},
            ("dead-channels", "double-update", "written-outside"),
        ),
        (
            {"written_outside": True, "updates_per_call": 2.0, "batches": 99.0, "interrupted": True},
            ("interrupted-batch", "missed-calls", "not-updating", "written-outside"),
        ),
        (SYMPTOMS["no-running-stats"], ()),
        (SYMPTOMS["frozen"], ()),
        (SYMPTOMS["stale"], ("not-updating",)),
    ],
)
def test_flags(symptoms, flags):
    assert diagnosed(symptoms).flags == flags


@pytest.mark.parametrize("verdict", VERDICTS)
def test_flags_stand_beside_any_verdict(verdict):
    diagnosis = diagnosed({"written_outside": True, "dead_channels": 1.0}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert {"dead-channels", "written-outside"} <= set(diagnosis.flags)


@pytest.mark.parametrize(
    ("symptoms", "calls"),
    [
        ({"batches": 60.0}, 40),
        ({"updates_per_call": 0.0}, 100),
        ({"updates_per_call": 0.25}, 75),
        ({"updates_per_call": 0.5, "batches": 60.0}, 70),
        ({"updates_per_call": 1.0}, None),
        ({"updates_per_call": 2.0}, None),
    ],
)
def test_calls_that_updated_nothing_are_counted(symptoms, calls):
    assert diagnosed(symptoms).evidence.get("calls_not_updating") == calls


@pytest.mark.parametrize("updates", [-0.01, -1.0, -30.0])
def test_a_counter_that_was_set_back_is_something_that_wrote_from_outside(updates):
    diagnosis = diagnosed({"updates_per_call": updates})
    assert "written-outside" in diagnosis.flags
    assert diagnosis.verdict == "insufficient-data"
    assert "updates_per_call" not in diagnosis.evidence
    assert "-" not in "".join(numbers(diagnosis.explanation))
    assert diagnosis.evidence.get("calls_not_updating", 0) <= 100


@pytest.mark.parametrize("updates", [2, 3])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("assumed", [1, 2])
def test_the_compensated_momentum_makes_all_updates_of_a_call_weigh_what_was_asked_for(updates, momentum, assumed):
    symptoms = {"momentum": momentum, "updates_per_call": float(updates), "assumed_updates": assumed}
    diagnosis = diagnosed(symptoms, {"checkpointed": True})
    compensated = diagnosis.evidence["compensated_momentum"]
    assert 1 - (1 - compensated) ** updates == pytest.approx(momentum)
    if updates == 2:
        assert compensated == pytest.approx(1 - math.sqrt(1 - momentum))
    assert f"`momentum={compensated:.3g}`" in diagnosis.remedy


def test_a_momentum_above_1_is_compensated_as_if_it_were_1():
    diagnosis = diagnosed({"momentum": 1.5, "updates_per_call": 2.0, "checkpointed": True})
    assert diagnosis.evidence["compensated_momentum"] == 1


@pytest.mark.parametrize("symptoms", [{}, {"updates_per_call": 2.0}, {"checkpointed": True}])
def test_momentum_is_compensated_for_double_updates_alone(symptoms):
    assert "compensated_momentum" not in diagnosed(symptoms).evidence


# --------------------------------------------------------------------------------------------------------- the evidence


@pytest.mark.parametrize("verdict", VERDICTS)
def test_evidence_has_all_that_was_told_and_nothing_that_was_not(verdict):
    diagnosis = diagnosed(SYMPTOMS[verdict], {"eval_error": NAN, "updates_per_call": NAN})
    assert all(not math.isnan(value) for value in diagnosis.evidence.values())
    assert all(isinstance(value, float | int) for value in diagnosis.evidence.values())
    expected = OBSERVED | {"num_features": 64.0, "momentum": 0.1, "act_rmse": 0.08}
    changed = SYMPTOMS[verdict]
    for name, value in expected.items():
        assert diagnosis.evidence[name] == changed.get(name, value)
    calls = changed.get("calls", CALLED.calls)
    assert {path: diagnosis.evidence[f"calls_{path}"] for path in calls} == calls
    assert diagnosis.evidence.get("eval_error") == changed.get("eval_error")
    assert "updates_per_call" not in diagnosis.evidence
    assert ("effective_momentum" in diagnosis.evidence) == ("effective_momentum" not in changed)


def test_a_cumulative_average_has_no_momentum_in_evidence_but_an_effective_one():
    evidence = diagnosed({"momentum": None, "effective_momentum": 0.005}).evidence
    assert "momentum" not in evidence
    assert evidence["effective_momentum"] == 0.005


@pytest.mark.parametrize(
    ("error", "jitter", "severity"),
    [(0.3, 0.2, 2.25), (0.05, 0.5, 0.01), (INF, 0.2, None), (NAN, 0.2, None), (0.3, 0.0, None), (0.3, None, None)],
)
def test_severity_is_the_error_over_the_jitter_of_training_squared(error, jitter, severity):
    evidence = diagnosed({"eval_error": error, "jitter": jitter}).evidence
    assert evidence.get("severity") == (severity if severity is None else pytest.approx(severity))


def test_what_was_observed_is_not_changed():
    observed = dict(OBSERVED)
    diagnose(CALLED, observed, METRICS)
    assert observed == OBSERVED


# ------------------------------------------------------------------------------------------------------------ the words

NUMBER = re.compile(r"(?<![\w^.])-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan)(?![\w])")
FORMULAS = ("(1-m)^batches", "m^3 = d^2/V (1-m) (2-m)^2", "m/(2-m)", "(1 - (1 - m)^(1/updates))")


def numbers(text: str) -> list[str]:
    """The numbers in a text, as they are printed."""
    for formula in FORMULAS:
        text = text.replace(formula, "")
    return NUMBER.findall(text)


def printed(value: float) -> str:
    """A count in full, anything else with three digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.3g}"


def words_are_sound(diagnosis: Diagnosis) -> None:
    """Every number is in the evidence, nothing is left to fill in, and sentences are sentences."""
    known = {printed(value) for value in diagnosis.evidence.values()}
    assert diagnosis.explanation
    for text in (diagnosis.explanation, diagnosis.remedy):
        assert set(numbers(text)) <= known, (text, diagnosis.evidence)
        assert not re.search(r"\(unknown\)|[{}]|\bnan\b|None(?!`)|  ", text), text
        for sentence in filter(None, re.split(r"(?<=[.:;])\s", text)[:1]):
            assert sentence[0].isupper(), text
        assert not text or text.endswith("."), text


# The numbers of each explanation in the order in which they come.
NUMBERS_OF_VERDICTS = {
    "unused": [],
    "no-running-stats": [],
    "stale": ["eval_error"],
    "frozen": ["eval_error"],
    "insufficient-data": ["batches", "act_rmse"],
    "tiny-batch": ["samples_per_batch", "jitter", "noise_error"],
    "ordered-batches": ["ordering_ratio", "ordering_limit", "ordering_share", "trend_share"],
    "grouped-batches": ["grouping_ratio", "batch_size", "grouping_limit", "grouping_share"],
    "warming-up": ["initial_weight", "eval_error", "noise_error"],
    "lagging": ["eval_error", "noise_error"],
    "noisy": ["effective_momentum", "samples_per_batch", "noise_error"],
    "drifting": ["drift_error", "eval_error"],
    "healthy": ["eval_error", "noise_error", "now_error"],
}
NUMBERS_OF_FLAGS = {
    "dead-channels": ["dead_channels", "num_features"],
    "double-update": ["updates_per_call", "effective_momentum"],
    "interrupted-batch": [],
    "missed-calls": ["updates_per_call"],
    "not-updating": ["calls_not_updating"],
    "written-outside": [],
}
NUMBERS_OF_REMEDIES = {
    "warming-up": ["recommended_momentum", "recommended_error", "batches_to_go"],
    "lagging": ["recommended_momentum", "recommended_error"],
    "noisy": ["recommended_momentum", "recommended_error", "recommended_batch_size"],
    "double-update": ["compensated_momentum", "momentum"],
}


def telling_evidence() -> dict[str, float]:
    """Evidence in which no two numbers are printed alike."""
    names = [*OBSERVED, *METRICS, "num_features", "momentum", "effective_momentum", "updates_per_call"]
    names += ["severity", "calls_saved", "calls_not_updating", "compensated_momentum", "recommended_momentum"]
    names += ["recommended_error", "recommended_batch_size", "batches_to_go"]
    return {name: 1.01 + 0.01 * index for index, name in enumerate(names)}


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


# --------------------------------------------------------------------------------------------------- the recommendation


def squared_error(momentum, drift: float, jitter: float):
    """Of a running average with this momentum behind a drifting mean, in the mean over time."""
    return (drift * (1 - momentum) / momentum) ** 2 + jitter**2 * momentum / (2 - momentum)


# A momentum so small, and a window so long, that nothing but the drift decides.
LAGGING = {"lag_error": 0.2, "eval_error": 0.25, "momentum": 1e-4, "effective_momentum": 1e-4, "batches": 1e7}


@pytest.mark.parametrize("jitter", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("drift", [3e-4, 1e-3, 0.01, 0.1, 1.0])
def test_the_recommended_momentum_is_that_of_the_smallest_error(drift, jitter):
    evidence = diagnosed(LAGGING, {"drift_per_batch": drift, "jitter": jitter}).evidence
    momenta = np.geomspace(1e-4, 1, 200_001)
    errors = squared_error(momenta, drift, jitter)
    assert evidence["recommended_momentum"] == pytest.approx(momenta[errors.argmin()], rel=1e-3)
    assert evidence["recommended_error"] == pytest.approx(math.sqrt(errors.min()), rel=1e-6)


@pytest.mark.parametrize("ratio", [1e-3, 3e-3])
def test_for_a_slow_drift_it_is_about_the_cube_root_of_four_times_the_squared_ratio(ratio):
    symptoms = {"drift_per_batch": ratio, "jitter": 1.0, "momentum": 1e-6, "effective_momentum": 1e-6}
    evidence = diagnosed(symptoms, LAGGING).evidence
    assert evidence["recommended_momentum"] == pytest.approx((4 * ratio**2) ** (1 / 3), rel=0.03)


def test_without_jitter_the_last_batch_is_best():
    evidence = diagnosed(LAGGING, {"drift_per_batch": 0.01, "jitter": 0.0}).evidence
    assert evidence["recommended_momentum"] == 1
    assert evidence["recommended_error"] == 0


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_a_lag_from_before_the_window_counts_as_the_drift_that_makes_it(momentum):
    symptoms = {"lag_error": 0.5, "momentum": momentum, "effective_momentum": momentum}
    evidence = diagnosed(symptoms, LAGGING).evidence  # no drift in the window
    drift = 0.5 * momentum / (1 - momentum)
    momenta = np.geomspace(1e-4, 1, 200_001)
    best = momenta[squared_error(momenta, drift, OBSERVED["jitter"]).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)
    assert evidence["recommended_momentum"] > momentum


@pytest.mark.parametrize("batches", [10, 100, 1000])
def test_a_lag_is_worked_off_within_a_window(batches):
    symptoms = {"momentum": None, "effective_momentum": 1e-6, "batches": float(batches)}
    recommended = diagnosed(symptoms, LAGGING).evidence["recommended_momentum"]
    assert (1 - recommended) ** batches == pytest.approx(0.05)


@pytest.mark.parametrize("verdict", ["warming-up", "lagging"])
def test_no_momentum_is_recommended_where_the_present_one_is_larger(verdict):
    symptoms = {"momentum": 0.9, "effective_momentum": 0.9, "initial_weight": 1e-9}
    diagnosis = diagnosed(symptoms, {"jitter": 10.0}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert not [name for name in diagnosis.evidence if name.startswith("recommended")]
    assert "momentum=0" not in diagnosis.remedy
    words_are_sound(diagnosis)


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.11, 0.4])
def test_what_is_recommended_to_a_noisy_layer_halves_what_is_tolerable(momentum, noise):
    symptoms = {"noise_error": noise, "momentum": momentum, "effective_momentum": momentum, "batches": 1e7}
    evidence = diagnosed(symptoms).evidence
    recommended = evidence["recommended_momentum"]
    variance = (recommended / (2 - recommended)) / (momentum / (2 - momentum))
    assert noise * math.sqrt(variance) == pytest.approx(0.05)
    assert evidence["recommended_batch_size"] == math.ceil(32 * (noise / 0.05) ** 2)


def test_a_noisy_layer_that_moves_is_not_made_to_lag():
    symptoms = {"noise_error": 0.2, "momentum": 0.5, "effective_momentum": 0.5, "drift_per_batch": 0.05}
    evidence = diagnosed(symptoms).evidence
    momenta = np.geomspace(1e-4, 1, 200_001)
    best = momenta[squared_error(momenta, 0.05, OBSERVED["jitter"]).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)
    symptoms["drift_per_batch"] = 1.0  # moves so fast that nothing but a larger batch (or a new calibration) helps
    diagnosis = diagnosed(symptoms)
    assert diagnosis.verdict == "noisy"
    assert "recommended_momentum" not in diagnosis.evidence
    assert "momentum=" not in diagnosis.remedy
    words_are_sound(diagnosis)


@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1])
def test_training_on_for_batches_to_go_leaves_half_of_what_is_tolerable(momentum):
    symptoms = {"warmup_error": 0.8, "momentum": momentum, "effective_momentum": momentum}
    batches = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence["batches_to_go"]
    assert batches == int(batches)
    assert 0.8 * (1 - momentum) ** batches <= 0.05 < 0.8 * (1 - momentum) ** (batches - 1)


def test_a_fresh_layer_of_the_recommended_momentum_would_not_be_warming_up():
    symptoms = {"warmup_error": 2.4, "initial_weight": 0.8, "momentum": 0.001, "effective_momentum": 0.001}
    recommended = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence["recommended_momentum"]
    assert (1 - recommended) ** 100 * (2.4 / 0.8) == pytest.approx(0.05)  # an initial weight of 1 would make 3


@pytest.mark.parametrize(("drift", "jitter"), [(0.0, 0.1), (0.001, 0.1), (0.0, 0.0)])
def test_a_layer_that_warms_up_is_recommended_no_more_than_it_needs(drift, jitter):
    symptoms = {"momentum": 0.001, "effective_momentum": 0.001, "drift_per_batch": drift, "jitter": jitter}
    evidence = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence
    needed = 1 - (0.3 / 10) ** (1 / 100)  # 0.3 left of 1 was 0.5 off: ten times what is aimed at
    assert evidence["recommended_momentum"] == pytest.approx(needed)
    assert evidence["recommended_error"] == pytest.approx(math.sqrt(squared_error(needed, drift, jitter)))


def test_a_layer_that_warms_up_and_drifts_fast_is_recommended_the_best_for_the_drift():
    symptoms = {"momentum": 0.001, "effective_momentum": 0.001, "drift_per_batch": 0.05}
    evidence = diagnosed(symptoms, SYMPTOMS["warming-up"]).evidence
    momenta = np.geomspace(1e-3, 1, 200_001)
    best = momenta[squared_error(momenta, 0.05, OBSERVED["jitter"]).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("verdict", ["warming-up", "lagging", "noisy"])
def test_under_two_updates_a_call_the_recommended_momentum_is_that_of_one_of_them(verdict):
    symptoms = SYMPTOMS[verdict] | {"effective_momentum": 0.9 if verdict == "noisy" else 0.01}
    once = diagnosed(symptoms).evidence
    twice = diagnosed(symptoms, {"updates_per_call": 2.0, "assumed_updates": 2, "checkpointed": True}).evidence
    assert 1 - (1 - twice["recommended_momentum"]) ** 2 == pytest.approx(once["recommended_momentum"])
    assert twice["recommended_error"] == pytest.approx(once["recommended_error"])


@pytest.mark.parametrize("verdict", [v for v in VERDICTS if v not in ("warming-up", "lagging", "noisy")])
def test_nothing_is_recommended_in_numbers_for_other_verdicts(verdict):
    evidence = diagnosed(SYMPTOMS[verdict]).evidence
    assert not [name for name in evidence if name.startswith(("recommended", "compensated", "batches_to"))]


@pytest.mark.parametrize(("drift", "jitter"), [(0.01, 0.15), (0.002, 0.3), (0.1, 0.2)])
def test_the_predicted_error_is_that_of_a_simulation(drift, jitter):
    evidence = diagnosed(LAGGING, {"drift_per_batch": drift, "jitter": jitter}).evidence
    momentum, rng = evidence["recommended_momentum"], np.random.default_rng(0)
    running, squares = np.zeros(400), []
    for t in range(1000):
        running += momentum * (drift * t + jitter * rng.normal(size=400) - running)
        if t > 10 / momentum:
            squares.append((running - drift * t) ** 2)
    assert len(squares) > 100
    assert np.sqrt(np.mean(squares)) == pytest.approx(evidence["recommended_error"], rel=0.05)


# ---------------------------------------------------------------------------------------------------- on real layers


class Monitored:
    """A single layer under a tracker, window after window."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.model = layer, nn.Sequential(layer)
        self.tracker = BatchNormTracker(self.model).attach()
        self.in_window = True

    def window(self, batches: Iterable[Tensor], call: Callable[[Tensor], object] | None = None) -> LayerReport:
        """Feed it a window of batches and close that: what happens until the next one happens between windows."""
        if not self.in_window:
            self.tracker.reset()
        for x in batches:
            (call or self.model)(x)
        self.in_window = False
        return self.closed()

    def closed(self) -> LayerReport:
        return self.tracker.close()["0"]


@pytest.fixture
def monitored() -> Iterator[Callable[[nn.Module], Monitored]]:
    """Makes monitored layers, and ends the monitoring of all of them."""
    made: list[Monitored] = []

    def make(layer: nn.Module) -> Monitored:
        made.append(Monitored(layer))
        return made[-1]

    yield make
    for one in made:
        one.tracker.detach()


WIDTH = 16


def samples(
    num_batches: int,
    batch_size: int,
    width: int = WIDTH,
    seed: int = 0,
    *,
    positions: tuple[int, ...] = (),
    offset: float = 0.0,
    drift: float = 0.0,
    shared: float = 0.0,
    classes: tuple[float, ...] = (0.0,),
) -> list[Tensor]:
    """Normal values of variance 1: ``drift`` moves their mean per batch, and each batch shares a random offset.

    The window's parts come from ``classes`` of different means, one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    place = (1, width, *[1] * len(positions))
    batches = []
    for t in range(num_batches):
        mean = offset + drift * t + classes[t * len(classes) // num_batches]
        together = shared * torch.randn(place, generator=generator)
        batches.append(torch.randn(batch_size, width, *positions, generator=generator) + mean + together)
    return batches


def norm(width: int = WIDTH, **options) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(width, **options)


def unmoved(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """A layer with buffers that it does not update."""
    layer.track_running_stats = False
    return layer


def frozen(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    return layer.eval()


def pretrained(offset: float, **options) -> nn.BatchNorm1d:
    """A layer whose running statistics have been trained to another mean."""
    layer = norm(**options)
    layer.running_mean += offset
    layer.num_batches_tracked += 1000
    return layer


REAL = {
    "healthy": ("healthy", lambda: norm(), lambda: samples(100, 64)),
    "healthy, on images": (
        "healthy",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 4, positions=(5, 5), offset=2.0),
    ),
    "healthy, of a cumulative average": ("healthy", lambda: norm(momentum=None), lambda: samples(100, 16, offset=2.0)),
    "healthy, pretrained": ("healthy", lambda: pretrained(0.0, momentum=0.01), lambda: samples(40, 64)),
    "unused": ("unused", lambda: norm(), lambda: []),
    "no-running-stats": (
        "no-running-stats",
        lambda: norm(track_running_stats=False),
        lambda: samples(40, 16, offset=2.0),
    ),
    "stale, right": ("stale", lambda: unmoved(norm()), lambda: samples(40, 64)),
    "stale, wrong": ("stale", lambda: unmoved(norm()), lambda: samples(40, 64, offset=2.0)),
    "stale by momentum, wrong": ("stale", lambda: norm(momentum=0.0), lambda: samples(40, 64, offset=2.0)),
    "stale by momentum, right": ("stale", lambda: norm(momentum=0.0), lambda: samples(40, 64)),
    "stale by one batch, wrong": ("stale", lambda: unmoved(norm()), lambda: samples(1, 64, offset=2.0)),
    "frozen, right": ("frozen", lambda: frozen(norm()), lambda: samples(40, 64)),
    "frozen, wrong": ("frozen", lambda: frozen(norm()), lambda: samples(40, 64, offset=2.0)),
    "insufficient-data, 1": ("insufficient-data", lambda: norm(), lambda: samples(1, 64, offset=2.0)),
    "insufficient-data, 2": ("insufficient-data", lambda: norm(), lambda: samples(2, 64, offset=2.0)),
    "insufficient-data, 7": ("insufficient-data", lambda: norm(), lambda: samples(7, 64, offset=2.0)),
    "enough data": ("warming-up", lambda: norm(), lambda: samples(8, 64, offset=2.0)),
    "tiny-batch, 2": ("tiny-batch", lambda: norm(), lambda: samples(100, 2)),
    "tiny-batch, 4": ("tiny-batch", lambda: norm(), lambda: samples(100, 4)),
    "not tiny-batch, 5": ("noisy", lambda: norm(), lambda: samples(100, 5)),
    "not tiny-batch, of positions": (
        "healthy",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 2, positions=(8, 8)),
    ),
    "ordered-batches": ("ordered-batches", lambda: norm(), lambda: samples(100, 32, classes=(0.0, 2.0, -1.0, 1.0))),
    "ordered-batches, on images": (
        "ordered-batches",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(60, 8, positions=(3, 3), classes=(1.0, -1.0, 1.0)),
    ),
    "grouped-batches": ("grouped-batches", lambda: norm(), lambda: samples(100, 32, shared=0.5)),
    "grouped-batches, on images": (
        "grouped-batches",
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: samples(100, 16, positions=(3, 3), shared=0.6),
    ),
    "warming-up": ("warming-up", lambda: norm(momentum=0.001), lambda: samples(100, 64, offset=2.0)),
    "lagging, pretrained": ("lagging", lambda: pretrained(2.0, momentum=0.01), lambda: samples(100, 64)),
    "lagging, cumulative": ("lagging", lambda: pretrained(1.0, momentum=None), lambda: samples(100, 64)),
    "lagging behind a drift": ("lagging", lambda: pretrained(0.0, momentum=0.02), lambda: samples(200, 64, drift=0.01)),
    "noisy": ("noisy", lambda: norm(momentum=0.5), lambda: samples(100, 16)),
    "noisy at momentum 1": ("noisy", lambda: norm(momentum=1.0), lambda: samples(100, 32)),
    "drifting": ("drifting", lambda: norm(momentum=0.5), lambda: samples(100, 256, drift=0.01)),
}


@pytest.mark.parametrize("case", REAL)
def test_the_verdict_on_a_real_layer(case, monitored):
    verdict, make, batches = REAL[case]
    data = batches()
    report = monitored(make()).window(data)
    assert report.verdict == verdict, report.evidence
    assert report.flags == (("not-updating",) if verdict == "stale" else ())
    assert report.needs_attention == (
        "wrong" in case
        or verdict in ("tiny-batch", "ordered-batches", "grouped-batches", "warming-up", "lagging", "noisy")
    )
    assert report.explanation.startswith(f"0: {verdict}. ")
    words_are_sound(report.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)
    if data:
        assert report.evidence.get("eval_error", NAN) == pytest.approx(report.summary()["eval_error"], nan_ok=True)
        assert (report.num_batches, report.num_samples) == (len(data), sum(x.numel() // WIDTH for x in data))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("momentum", "batch_size"), [(0.1, 64), (0.01, 32), (None, 16)])
def test_a_stationary_layer_is_healthy_in_every_window(monitored, seed, momentum, batch_size):
    layer = monitored(pretrained(0.0, momentum=momentum))
    for window in range(3):
        report = layer.window(samples(24, batch_size, seed=100 * seed + window))
        assert report.verdict == "healthy", report.evidence
        assert report.flags == ()


def test_evidence_is_that_of_the_data(monitored):
    data = [*samples(20, 24, positions=(2,)), *samples(1, 8, positions=(2,))]
    report = monitored(norm(momentum=0.2)).window(data)
    evidence = report.evidence
    assert evidence["batches"] == evidence["calls_saved"] == 21
    assert evidence["samples_per_batch"] == pytest.approx((20 * 48 + 16) / 21)
    assert evidence["batch_size"] == pytest.approx((20 * 24 + 8) / 21)
    assert (evidence["momentum"], evidence["effective_momentum"]) == (0.2, 0.2)
    assert evidence["initial_weight"] == pytest.approx(0.8**21)
    weights = 0.2 * 0.8 ** np.arange(20, -1, -1)
    noise = (weights**2 / [*[48] * 20, 16]).sum()
    assert evidence["noise_error"] == pytest.approx(math.sqrt(1.5 * noise), rel=0.2)  # 1, and half for the variance
    assert evidence["jitter"] == pytest.approx(math.sqrt(1.5 / evidence["samples_per_batch"]), rel=0.2)
    assert evidence["severity"] == pytest.approx((evidence["eval_error"] / evidence["jitter"]) ** 2)


def test_a_drift_is_measured_in_what_it_moves_per_batch(monitored):
    evidence = monitored(norm(momentum=0.5)).window(samples(100, 256, drift=0.01)).evidence
    std = math.sqrt(1 + 100**2 * 0.01**2 / 12)  # over the whole window
    assert evidence["drift_per_batch"] == pytest.approx(0.01 / std, rel=0.05)
    assert evidence["drift_error"] == pytest.approx(0.5 / std, rel=0.1)


# Without running statistics of its own


def swapped(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Calls of the layer with buffers that are swapped in."""
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    return lambda x: torch.func.functional_call(layer, state, (x,))


def test_a_layer_called_with_other_buffers_is_stale_and_not_updating(monitored):
    layer = norm()
    one = monitored(layer)
    report = one.window(samples(40, 32, offset=2.0), swapped(layer))
    assert (report.verdict, report.flags, report.needs_attention) == ("stale", ("not-updating",), True)
    assert report.evidence["calls_not_updating"] == 40
    assert report.evidence["updates_per_call"] == 0
    assert layer.num_batches_tracked == 0
    words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, offset=2.0, seed=1))
    assert (report.verdict, report.flags) == ("healthy", ())


def test_a_layer_that_is_called_with_other_buffers_now_and_then_claims_nothing_of_weights(monitored):
    layer = norm()
    call, turn = swapped(layer), iter(range(40))
    report = monitored(layer).window(samples(40, 32), lambda x: call(x) if next(turn) % 4 == 0 else layer(x))
    assert (report.verdict, report.flags) == ("insufficient-data", ("not-updating",))
    assert report.evidence["calls_not_updating"] == 10
    words_are_sound(report.diagnosis)
    assert not report.z_mean.any()
    assert not report.z_var.any()


def test_a_layer_that_is_frozen_during_the_window_is_judged_by_what_it_learned(monitored):
    layer = norm()
    data = samples(60, 32)
    turn = iter(range(60))
    report = monitored(layer).window(data, lambda x: layer.train(next(turn) < 40)(x))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["batches"] == 40
    assert report.num_batches == 60


def test_remedies_of_a_layer_that_learns_no_statistics(monitored):
    one = monitored(unmoved(norm()))
    assert one.window(samples(40, 32, offset=2.0)).needs_attention
    one.layer.track_running_stats = True
    one.layer.momentum = 0.2
    assert one.window(samples(40, 32, offset=2.0)).verdict == "healthy"
    one = monitored(frozen(norm()))
    assert one.window(samples(40, 32, offset=2.0)).needs_attention
    one.layer.train()
    one.layer.momentum = 0.2
    assert one.window(samples(40, 32, offset=2.0)).verdict == "healthy"


# What is not finite


BAD = {
    # value and place (batch, sample, channel) each
    "NaN": [(NAN, 3, 5, 4)],
    "inf": [(INF, 3, 5, 4)],
    "-inf": [(-INF, 0, 0, 15)],
    "last batch": [(NAN, 39, 7, 1)],
    "first channel": [(NAN, 2, 0, 0)],
    "several": [(INF, 30, 1, 0), (NAN, 12, 3, 9), (NAN, 12, 4, 7), (-INF, 20, 4, 7), (NAN, 13, 0, 2)],
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("positions", [(), (3, 3)])
def test_a_value_that_is_not_finite_is_named_and_costs_its_channels_alone(case, positions):
    model = nn.ModuleDict({name: (nn.BatchNorm2d if positions else norm)(WIDTH) for name in ("hit", "other")})
    twin = nn.ModuleDict({name: (nn.BatchNorm2d if positions else norm)(WIDTH) for name in ("hit", "other")})
    data, others = (samples(40, 16, positions=positions, offset=1.0, seed=seed) for seed in (0, 1))
    dirty = [x.clone() for x in data]
    for value, batch, sample, channel in BAD[case]:
        dirty[batch][(sample, channel, *[1] * len(positions))] = value
    with BatchNormTracker(model) as tracker, BatchNormTracker(twin) as clean:
        for x, y, z in zip(dirty, data, others, strict=True):
            model["hit"](x), model["other"](z), twin["hit"](y), twin["other"](z)
    report, expected = tracker.report(), clean.report()
    hit, reference = report["hit"], expected["hit"]
    assert (hit.verdict, hit.needs_attention, hit.flags) == ("non-finite", True, ())
    _, batch, _, channel = min(BAD[case], key=lambda bad: (bad[1], bad[3]))
    assert hit.evidence["first_bad_batch"] == batch + 1
    assert hit.evidence["first_bad_channel"] == channel
    assert f"first in batch {batch + 1} of this window, channel {channel}" in hit.explanation
    channels = sorted({bad[3] for bad in BAD[case]})
    assert hit.evidence["non_finite_channels"] == hit.evidence["non_finite_running_stats"] == len(channels)
    assert f"{len(channels)} of {WIDTH} channels are not finite" in hit.explanation
    assert hit.evidence["eval_error"] == hit.summary()["eval_error"] == INF
    assert report.summary()["eval_error_max"] == INF
    words_are_sound(hit.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)

    spared = [channel for channel in range(WIDTH) if channel not in channels]
    for field in ("population_mean", "population_var", "running_mean", "running_var", "act_rmse", "z_mean", "z_var"):
        assert torch.equal(getattr(hit, field)[spared], getattr(reference, field)[spared]), field
        if not field.startswith(("running", "z")):
            assert getattr(hit, field)[channels].isnan().all(), field
    assert hit.eval_error[channels].isposinf().all()
    assert hit.eval_error[spared].isfinite().all()
    assert report["other"].to_dict() == expected["other"].to_dict()
    assert report["other"].verdict == "healthy"


def test_what_is_now_is_that_of_the_layer_without_its_bad_channel():
    keep = [channel for channel in range(WIDTH) if channel != 4]
    data = samples(40, 16, drift=0.05)
    dirty = [x.clone() for x in data]
    dirty[3][5, 4] = NAN
    model, twin = nn.ModuleDict({"bn": norm()}), nn.ModuleDict({"bn": norm(WIDTH - 1)})
    with BatchNormTracker(model, capture="pass") as tracker, BatchNormTracker(twin, capture="pass") as clean:
        for x, y in zip(dirty, data, strict=True):
            model["bn"](x), twin["bn"](y[:, keep])
    hit, reference = tracker.report()["bn"], clean.report()["bn"]
    np.testing.assert_allclose(hit.now_mean[keep], reference.now_mean, rtol=1e-5)
    np.testing.assert_allclose(hit.now_var[keep], reference.now_var, rtol=1e-5)
    for name in ("noise_error", "lag_error", "drift_error", "jitter", "ordering_ratio", "grouping_ratio", "z_mean"):
        assert hit.evidence[name] == pytest.approx(reference.evidence[name], rel=1e-4, abs=1e-7), name


def test_not_finite_is_the_verdict_until_the_buffers_are_repaired(monitored):
    one = monitored(norm())
    data = samples(40, 16, offset=1.0)
    data[7][3, 11] = NAN
    assert one.window(data).verdict == "non-finite"
    for seed in (1, 2):
        data = samples(40, 16, offset=1.0, seed=seed)
        report = one.window(data)
        assert (report.verdict, report.needs_attention) == ("non-finite", True)
        assert report.evidence["eval_error"] == INF
        assert report.evidence["non_finite_running_stats"] == 1
        assert "first_bad_batch" not in report.evidence
        assert report.remedy.startswith("Call `layer.reset_running_stats()` and recompute")
        words_are_sound(report.diagnosis)
        x = torch.cat(data).double()
        np.testing.assert_allclose(report.population_mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(report.population_var, x.var(0), rtol=1e-6)
        assert report.now_mean.isfinite().all()
    one.layer.reset_running_stats()
    report = one.window(samples(80, 16, offset=1.0, seed=3))
    assert (report.verdict, report.flags) == ("healthy", ("written-outside",))
    assert report.evidence["eval_error"] < 0.2
    assert report.evidence["non_finite_channels"] == 0
    assert one.window(samples(40, 16, offset=1.0, seed=4)).flags == ()


def test_a_frozen_layer_that_received_nan_has_buffers_that_are_fine(monitored):
    one = monitored(frozen(norm()))
    data = samples(10, 16)
    data[4][3, 2] = INF
    report = one.window(data)
    assert report.verdict == "non-finite"
    assert (report.evidence["non_finite_channels"], report.evidence["non_finite_running_stats"]) == (1, 0)
    assert math.isfinite(report.evidence["eval_error"])
    assert "reset_running_stats" not in report.remedy
    words_are_sound(report.diagnosis)
    assert one.window(samples(10, 16)).verdict == "frozen"


def test_a_layer_without_running_statistics_recovers_by_itself(monitored):
    one = monitored(norm(track_running_stats=False))
    data = samples(10, 16)
    data[4][3, 2] = NAN
    assert one.window(data).verdict == "non-finite"
    assert one.window(samples(10, 16)).verdict == "no-running-stats"


def test_buffers_that_are_broken_before_the_first_call_are_reported(monitored):
    layer = norm()
    layer.running_var[3] = NAN
    one = monitored(layer)
    report = one.closed()
    assert (report.verdict, report.num_batches) == ("non-finite", 0)
    assert report.evidence["non_finite_running_stats"] == 1
    assert math.isnan(report.summary()["eval_error"])


# Flags


def checkpointed(layer: nn.Module, reentrant: bool) -> Callable[[Tensor], None]:
    """A training step of the layer under activation checkpointing."""
    return lambda x: checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_flagged_and_accounted_for_from_the_second_window_on(monitored, reentrant):
    layer = norm(200, momentum=0.1)
    one = monitored(layer)
    report = one.window(samples(64, 64, 200), checkpointed(layer, reentrant))
    assert layer.num_batches_tracked == 128
    assert (report.verdict, report.flags) == ("insufficient-data", ("double-update",))
    assert not report.needs_attention
    assert not report.z_mean.any()
    assert not report.z_var.any()
    assert report.evidence["updates_per_call"] == 2
    assert report.evidence["assumed_updates_per_call"] == 1
    assert report.num_batches == 64
    for seed in (1, 2):
        report = one.window(samples(64, 64, 200, seed=seed), checkpointed(layer, reentrant))
        assert (report.verdict, report.flags, report.needs_attention) == ("healthy", ("double-update",), False)
        evidence = report.evidence
        assert evidence["effective_momentum"] == pytest.approx(0.19)
        assert evidence["compensated_momentum"] == pytest.approx(1 - math.sqrt(0.9))
        assert "assumed_updates_per_call" not in evidence
        assert evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * 0.19 / 1.81), rel=0.05)
        for z in (report.z_mean, report.z_var):
            assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
        assert numbers(report.remedy) == ["0.0513", "0.1"]
        assert numbers(report.diagnosis.explanation)[-2:] == ["2", "0.19"]
        words_are_sound(report.diagnosis)
    layer.momentum = evidence["compensated_momentum"]
    one.window(samples(64, 64, 200, seed=3), checkpointed(layer, reentrant))
    report = one.window(samples(64, 64, 200, seed=4), checkpointed(layer, reentrant))
    assert report.evidence["effective_momentum"] == pytest.approx(0.1)
    assert report.evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * 0.1 / 1.9), rel=0.05)


def test_checkpointing_that_ends_claims_nothing_of_weights_in_one_window(monitored):
    layer = norm()
    one = monitored(layer)
    for seed in (0, 1):
        one.window(samples(40, 32, seed=seed), checkpointed(layer, False))
    report = one.window(samples(40, 32, seed=2))
    assert (report.verdict, report.flags) == ("insufficient-data", ())
    assert report.evidence["assumed_updates_per_call"] == 2
    words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, seed=3))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["effective_momentum"] == 0.1


def test_calls_that_are_not_seen_are_flagged(monitored):
    layer = norm()
    one = monitored(layer)

    def call(x):
        layer(x)
        with one.tracker.paused():
            layer(x + 1)

    for seed in (0, 1):
        report = one.window(samples(40, 32, seed=seed), call)
        assert (report.verdict, report.flags) == ("insufficient-data", ("missed-calls",))
        assert report.evidence["updates_per_call"] == 2
        assert report.evidence["effective_momentum"] == 0.1
        assert "compensated_momentum" not in report.evidence
        assert not report.z_mean.any()
        assert not report.z_var.any()
        assert report.num_batches == 40
        words_are_sound(report.diagnosis)
    report = one.window(samples(40, 32, seed=2))
    assert (report.verdict, report.flags) == ("healthy", ())
    assert report.evidence["initial_weight"] == 0  # nobody knows what the buffers were made of before


def test_calls_that_are_not_seen_are_no_excuse_for_tiny_batches(monitored):
    layer = norm()
    one = monitored(layer)

    def call(x):
        layer(x)
        with one.tracker.paused():
            layer(x)

    report = one.window(samples(40, 3), call)
    assert (report.verdict, report.flags) == ("tiny-batch", ("missed-calls",))
    report = one.window(samples(100, 32, shared=0.5), call)
    assert (report.verdict, report.flags) == ("grouped-batches", ("missed-calls",))
    words_are_sound(report.diagnosis)


def test_buffers_that_are_written_between_windows_are_flagged_and_their_history_restarts(monitored):
    one = monitored(norm(momentum=0.02))
    assert one.window(samples(150, 64)).flags == ()
    assert one.window(samples(40, 64, seed=1)).flags == ()
    with torch.no_grad():
        one.layer.running_mean += 2
    report = one.window(samples(40, 64, seed=2))
    assert (report.verdict, report.flags) == ("lagging", ("written-outside",))
    assert report.evidence["lag_error"] == pytest.approx(2 * 0.98**40, rel=0.1)
    assert report.evidence["warmup_error"] == 0
    words_are_sound(report.diagnosis)


def test_a_layer_whose_calls_could_not_be_looked_at_is_not_said_not_to_have_been_called():
    calls = {"calls": NEVER_CALLED | {"skipped": 5}}
    explanation = diagnosed(calls, SYMPTOMS["unused"]).explanation
    assert explanation.startswith("No call of it was counted in this window. 5 calls could not be looked at")


def test_a_reset_between_windows_is_a_fresh_start(monitored):
    one = monitored(norm(momentum=0.02))
    one.window(samples(150, 64, offset=2.0))
    one.layer.reset_running_stats()
    report = one.window(samples(40, 64, offset=2.0, seed=1))
    assert (report.verdict, report.flags) == ("warming-up", ("written-outside",))
    assert report.evidence["initial_weight"] == pytest.approx(0.98**40)
    assert report.evidence["lag_error"] == 0


def test_recalibration_between_windows_is_flagged_and_repairs(monitored):
    one = monitored(pretrained(3.0, momentum=0.001))
    report = one.window(samples(40, 64))
    assert report.verdict == "lagging"
    assert "recalibrate(model, loader)" in report.remedy
    with one.tracker.paused():
        update_bn(samples(200, 64, seed=1), one.model)
    report = one.window(samples(40, 64, seed=2))
    assert (report.verdict, report.flags) == ("healthy", ("written-outside",))
    assert report.evidence["eval_error"] < 0.1
    assert one.window(samples(40, 64, seed=3)).flags == ()


@pytest.mark.parametrize("num_dead", [1, 5, WIDTH])
def test_dead_channels_are_flagged_beside_the_verdict(monitored, num_dead):
    data = samples(40, 64)
    for x in data:
        x[:, :num_dead] = 0
    one = monitored(norm(momentum=0.5))
    one.window(data)
    report = one.window(data)
    assert (report.verdict, report.flags) == ("healthy", ("dead-channels",))
    assert report.evidence["dead_channels"] == num_dead
    assert f"{num_dead} of {WIDTH} channels" in report.explanation
    words_are_sound(report.diagnosis)


# Remedies that are applied


def test_the_momentum_recommended_to_a_noisy_layer_makes_it_healthy(monitored):
    report = monitored(norm(64, momentum=0.5)).window(samples(128, 16, 64))
    assert report.verdict == "noisy"
    recommended = report.evidence["recommended_momentum"]
    assert report.evidence["recommended_error"] == pytest.approx(0.05, rel=0.01)
    cured = monitored(norm(64, momentum=recommended)).window(samples(200, 16, 64, seed=1))
    assert cured.verdict == "healthy"
    assert cured.evidence["noise_error"] == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize(("positions", "batch_size", "momentum"), [((), 16, 0.5), ((2, 2), 8, 0.9)])
def test_the_batch_size_recommended_to_a_noisy_layer_makes_it_healthy(monitored, positions, batch_size, momentum):
    def make():
        return monitored((nn.BatchNorm2d if positions else nn.BatchNorm1d)(64, momentum=momentum))

    report = make().window(samples(128, batch_size, 64, positions=positions))
    assert report.verdict == "noisy"
    recommended = report.evidence["recommended_batch_size"]
    cured = make().window(samples(40, int(recommended), 64, seed=1, positions=positions))
    assert cured.verdict == "healthy"
    assert cured.evidence["noise_error"] == pytest.approx(0.05, rel=0.1)


def test_the_momentum_recommended_under_checkpointing_is_to_be_set_as_it_is(monitored):
    layer = norm(64, momentum=0.5)
    one = monitored(layer)
    one.window(samples(10, 16, 64), checkpointed(layer, False))
    report = one.window(samples(128, 16, 64, seed=1), checkpointed(layer, False))
    assert (report.verdict, report.flags) == ("noisy", ("double-update",))
    assert report.evidence["effective_momentum"] == 0.75
    assert len(re.findall("`momentum=", report.remedy)) == 1
    layer.momentum = report.evidence["recommended_momentum"]
    report = one.window(samples(200, 16, 64, seed=2), checkpointed(layer, False))
    assert (report.verdict, report.flags) == ("healthy", ("double-update",))
    assert report.evidence["noise_error"] == pytest.approx(0.05, rel=0.1)


def test_training_on_ends_the_warming_up(monitored):
    one = monitored(norm(momentum=0.02))
    report = one.window(samples(40, 64, offset=2.0))
    assert report.verdict == "warming-up"
    assert report.evidence["warmup_error"] == pytest.approx(2 * 0.98**40, rel=0.2)
    half = int(report.evidence["batches_to_go"] / 2)
    still = one.window(samples(half, 64, offset=2.0, seed=1))
    assert still.verdict == "warming-up"
    rest = int(still.evidence["batches_to_go"])
    assert rest + half == pytest.approx(report.evidence["batches_to_go"], rel=0.05)
    report = one.window(samples(rest, 64, offset=2.0, seed=2))
    assert report.verdict == "healthy"
    assert report.evidence["warmup_error"] == pytest.approx(0.05, rel=0.1)


def test_the_momentum_recommended_to_a_layer_that_warms_up_would_not_have_been_too_small(monitored):
    report = monitored(norm(momentum=0.001)).window(samples(100, 64, offset=2.0))
    assert report.verdict == "warming-up"
    layer = norm(momentum=report.evidence["recommended_momentum"])
    cured = monitored(layer).window(samples(100, 64, offset=2.0, seed=1))
    assert cured.verdict == "healthy"
    assert cured.evidence["warmup_error"] == pytest.approx(0.05, rel=0.1)
    assert cured.evidence["noise_error"] == pytest.approx(report.evidence["recommended_error"], rel=0.1)
    cumulative = monitored(norm(momentum=None)).window(samples(100, 64, offset=2.0, seed=1))
    assert cumulative.verdict == "healthy"
    assert cumulative.evidence["warmup_error"] == 0


@pytest.mark.parametrize("momentum", [0.01, None])
def test_the_momentum_recommended_to_a_layer_that_lags_for_another_past_makes_it_follow(monitored, momentum):
    one = monitored(pretrained(1.0, momentum=momentum))
    report = one.window(samples(60, 64))
    assert report.verdict == "lagging"
    one.layer.momentum = report.evidence["recommended_momentum"]
    report = one.window(samples(60, 64, seed=1))
    assert report.verdict == "healthy"


def test_the_momentum_recommended_behind_a_drift_has_the_predicted_error(monitored):
    """The truth at the end is known here: the mean of the last batch, a variance of 1."""
    width, num_batches, drift = 128, 100, 0.01
    report = monitored(pretrained(0.0, width=width, momentum=0.01)).window(samples(num_batches, 64, width, drift=drift))
    assert report.verdict == "lagging"
    evidence = report.evidence
    momenta = np.geomspace(0.01, 1, 100_001)
    jitter = math.sqrt(1.5 / 64)
    best = momenta[squared_error(momenta, drift, jitter).argmin()]
    assert evidence["recommended_momentum"] == pytest.approx(best, rel=0.05)
    cured = monitored(norm(width, momentum=evidence["recommended_momentum"])).window(
        samples(num_batches, 64, width, seed=1, drift=drift)
    )
    truth = torch.full((width,), drift * (num_batches - 1), dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    error = divergence.act_rmse(*truth, cured.running_mean, cured.running_var, 1e-5).square().mean().sqrt().item()
    assert error == pytest.approx(evidence["recommended_error"], rel=0.2)
    assert cured.verdict in ("healthy", "drifting")


def test_no_error_is_predicted_where_there_is_no_noise(monitored):
    report = monitored(norm(momentum=0.01)).window(samples(1, 64, offset=1.0) * 64)
    assert report.verdict == "warming-up"
    assert report.evidence["recommended_error"] == 0
    assert "predicted error 0)" in report.remedy


def test_shuffling_is_the_remedy_of_ordered_and_of_grouped_batches(monitored):
    generator = torch.Generator().manual_seed(1)
    for sick, options in (
        ("ordered-batches", {"classes": (0.0, 2.0, -1.0, 1.0)}),
        ("grouped-batches", {"shared": 0.5}),
    ):
        data = samples(100, 64, **options)
        assert monitored(norm()).window(data).verdict == sick
        everything = torch.cat(data)
        shuffled = everything[torch.randperm(len(everything), generator=generator)].split(64)
        assert monitored(norm()).window(shuffled).verdict == "healthy"


# Bad input


def test_batch_norms_own_error_comes_through_unchanged(monitored):
    def error_of(call) -> BaseException:
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            call(torch.randn(1, WIDTH))
        return caught.value

    plain = error_of(norm())
    one = monitored(norm())
    one.window(samples(10, 32))
    one.tracker.reset()
    for call in (one.model, one.layer):
        error = error_of(call)
        assert (type(error), error.args) == (type(plain), plain.args)
    report = one.tracker.report()["0"]
    assert report.num_batches == 0
    json.dumps(report.to_dict(), allow_nan=False)


def changing(layer: nn.BatchNorm1d, momenta: Iterable[float | None]) -> Callable[[Tensor], Tensor]:
    """Calls of a layer with one momentum after another."""
    left = iter(momenta)

    def call(x):
        layer.momentum = next(left)
        return layer(x)

    return call


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, WIDTH, 6, 6, generator=generator) for size in sizes]


ONE = [torch.zeros(2, WIDTH)]
ODD: dict[str, tuple[Callable[[], nn.Module], list[Tensor], set[str]]] = {
    "no batch": (norm, [], {"unused"}),
    "one batch": (norm, samples(1, 8), {"insufficient-data"}),
    "two batches": (norm, samples(2, 8), {"insufficient-data"}),
    "one batch of two zeros": (norm, ONE, {"insufficient-data"}),
    "three batches of momentum 1": (lambda: norm(momentum=1.0), samples(3, 8), {"insufficient-data"}),
    "constant": (norm, [torch.full((8, WIDTH), 3.0)] * 60, {"warming-up", "healthy"}),
    "constant, later": (lambda: norm(momentum=0.5), [torch.full((8, WIDTH), 3.0)] * 60, {"healthy"}),
    "zeros": (lambda: norm(momentum=0.5), [torch.zeros(8, WIDTH)] * 60, {"healthy"}),
    "the same batch again and again": (lambda: norm(momentum=0.5), samples(1, 64) * 60, {"healthy"}),
    "one dead channel": (norm, [x * (torch.arange(WIDTH) > 0) for x in samples(80, 64)], {"healthy"}),
    "one channel": (lambda: norm(1), samples(60, 64, 1), {"healthy"}),
    "one channel, two batches": (lambda: norm(1), samples(2, 64, 1), {"insufficient-data"}),
    "one channel of images": (lambda: nn.BatchNorm2d(1), samples(60, 4, 1, positions=(6, 6)), {"healthy"}),
    "one dead channel alone": (lambda: norm(1, momentum=0.5), [torch.zeros(8, 1)] * 60, {"healthy"}),
    "momentum 0": (lambda: norm(momentum=0.0), samples(60, 64), {"stale"}),
    "momentum 1": (lambda: norm(momentum=1.0), samples(60, 256), {"healthy"}),
    "momentum 1, small batches": (lambda: norm(momentum=1.0), samples(60, 16), {"noisy"}),
    "momentum None": (lambda: norm(momentum=None), samples(60, 64), {"healthy"}),
    "momentum None, two batches": (lambda: norm(momentum=None), samples(2, 64), {"insufficient-data"}),
    "one image among many": (lambda: nn.BatchNorm2d(WIDTH), images(*[16] * 50, 1, *[16] * 9), {"healthy"}),
    "one image at the end": (lambda: nn.BatchNorm2d(WIDTH), images(*[16] * 59, 1), {"healthy"}),
    "single images": (lambda: nn.BatchNorm2d(WIDTH), images(*[1] * 100), {"healthy"}),
    "sizes of all kinds": (lambda: nn.BatchNorm2d(WIDTH), images(*range(1, 61)), {"healthy"}),
    "volumes": (lambda: nn.BatchNorm3d(WIDTH), samples(60, 2, positions=(3, 4, 5)), {"healthy"}),
    "bfloat16": (lambda: norm(dtype=torch.bfloat16), [x.bfloat16() for x in samples(100, 64)], {"healthy"}),
    "float16": (lambda: norm(dtype=torch.float16), [x.half() for x in samples(100, 64)], {"healthy"}),
    "float64": (lambda: norm(dtype=torch.float64), [x.double() for x in samples(100, 64)], {"healthy"}),
    "large mean": (lambda: norm(momentum=0.2), samples(100, 64, offset=1e4), {"healthy"}),
    "large values": (lambda: norm(momentum=0.2), [1e15 * x for x in samples(150, 64)], {"healthy"}),
    "small values": (lambda: norm(momentum=0.2), [1e-4 * x for x in samples(100, 64)], {"healthy"}),
    "not affine": (lambda: norm(affine=False), samples(100, 64), {"healthy"}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_input_gives_a_sensible_report(monitored, case):
    make, batches, verdicts = ODD[case]
    one = monitored(make())
    report = one.window(batches)
    again = one.window(batches)
    assert report.verdict in verdicts, report.evidence
    for part in (report, again):
        words_are_sound(part.diagnosis)
        json.dumps(one.tracker.report().to_dict(), allow_nan=False)
        json.dumps(part.to_dict(), allow_nan=False)
        assert part.num_batches == len(batches)
        assert all(math.isfinite(value) for value in part.evidence.values())
        if batches:
            for field in ("population_mean", "population_var", "now_mean", "now_var", "z_mean", "z_var", "eval_error"):
                assert getattr(part, field).isfinite().all(), field
            assert (part.now_var >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reports_of_all_precisions_agree(monitored, dtype):
    data = [x.to(dtype) for x in samples(100, 64, offset=0.5)]
    report = monitored(norm(dtype=dtype)).window(data)
    exact = monitored(norm(dtype=torch.float64)).window([x.double() for x in data])
    assert report.verdict == exact.verdict == "healthy"
    x = torch.cat([x.double() for x in data])
    np.testing.assert_allclose(report.population_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report.population_var, x.var(0), rtol=1e-5)
    for name in ("noise_error", "jitter", "now_error", "grouping_ratio", "ordering_ratio"):
        assert report.evidence[name] == pytest.approx(exact.evidence[name], rel=1e-3), name


MOMENTA = {
    "a step": [0.1] * 30 + [0.01] * 30,
    "a decay": [0.5 * 0.95**t for t in range(60)],
    "every second 0": [0.1, 0.0] * 30,
    "1 in between": [0.1] * 30 + [1.0] + [0.1] * 29,
    "None in between": [0.1] * 30 + [None] * 10 + [0.1] * 20,
    "up": [0.001] * 30 + [0.3] * 30,
}


@pytest.mark.parametrize("case", MOMENTA)
def test_momentum_that_changes_in_the_window_is_followed(monitored, case):
    layer = norm(200)
    report = monitored(layer).window(samples(60, 64, 200), changing(layer, MOMENTA[case]))
    momenta = [1 / (t + 1) if m is None else m for t, m in enumerate(MOMENTA[case])]
    weights = np.array(momenta) * np.append(np.cumprod(1 - np.array(momenta)[::-1])[::-1][1:], 1)
    assert report.evidence["initial_weight"] == pytest.approx(np.prod(1 - np.array(momenta)), abs=1e-12)
    assert report.evidence["noise_error"] == pytest.approx(math.sqrt(1.5 / 64 * (weights**2).sum()), rel=0.05)
    assert report.evidence["batches"] == sum(m != 0 for m in momenta)
    assert report.flags == (("not-updating",) if 0.0 in MOMENTA[case] else ())
    for z in (report.z_mean, report.z_var):
        assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    words_are_sound(report.diagnosis)
    json.dumps(report.to_dict(), allow_nan=False)


def test_momentum_1_can_lag(monitored):
    data = samples(100, 1000)
    data[-1] += 1  # the last batch is all that is in the buffers
    report = monitored(norm(momentum=1.0)).window(data)
    assert report.verdict == "lagging"
    words_are_sound(report.diagnosis)


@pytest.mark.parametrize("verdict", ["warming-up", "lagging", "noisy"])
@pytest.mark.parametrize("momentum", [0.0, 1e-6, 1.0])
def test_no_momentum_is_too_odd_for_advice(verdict, momentum):
    diagnosis = diagnosed({"momentum": momentum, "effective_momentum": momentum}, SYMPTOMS[verdict])
    assert diagnosis.verdict == verdict
    assert all(math.isfinite(value) for value in diagnosis.evidence.values())
    words_are_sound(diagnosis)


def test_a_momentum_that_is_next_to_nothing_warms_up(monitored):
    report = monitored(norm(momentum=1e-17)).window(samples(20, 16, offset=3.0))
    assert report.verdict == "warming-up"


@pytest.mark.parametrize(
    "make",
    [lambda: norm(momentum=0.0), lambda: frozen(norm()), lambda: norm(track_running_stats=False)],
    ids=["stale", "frozen", "no-running-stats"],
)
def test_what_could_not_be_told_is_absent_from_evidence(monitored, make):
    evidence = monitored(make()).window(samples(40, 16)).evidence
    assert not {"warmup_error", "lag_error", "drift_error", "drift_per_batch"} & evidence.keys()


def test_the_effective_momentum_is_that_of_both_updates_in_the_first_window_too(monitored):
    layer = norm()
    report = monitored(layer).window(samples(40, 16), checkpointed(layer, False))
    assert "acts as 0.1." not in report.explanation


def test_double_updates_of_a_cumulative_average_need_no_remedy(monitored):
    layer = norm(momentum=None)
    words_are_sound(monitored(layer).window(samples(40, 16), checkpointed(layer, False)).diagnosis)


def test_tiny_batches_are_explained_without_weights(monitored):
    layer = norm()
    words_are_sound(monitored(layer).window(samples(40, 3), checkpointed(layer, False)).diagnosis)


def test_a_layer_that_received_a_single_value_has_an_explanation_in_words(monitored):
    words_are_sound(monitored(frozen(norm())).window(samples(1, 1)).diagnosis)


def test_a_cumulative_average_at_its_beginning_is_not_said_to_stay_noisy(monitored):
    report = monitored(norm(momentum=None)).window(samples(10, 6))
    assert report.verdict == "noisy"
    assert "however long" not in report.explanation
    assert "momentum=" not in report.remedy
    assert "recommended_momentum" not in report.evidence
    assert report.remedy.startswith("Train on, or use a batch size of")
    words_are_sound(report.diagnosis)


def test_a_lag_of_half_a_deviation_behind_a_fast_drift_needs_attention(monitored):
    report = monitored(norm(momentum=0.1)).window(samples(400, 256, drift=0.05))
    assert report.evidence["eval_error"] > 0.4  # 0.05 * 0.9 / 0.1 deviations of what a batch receives
    assert report.needs_attention


def test_constants_that_move_are_not_said_to_be_followed(monitored):
    report = monitored(norm(momentum=0.5)).window([torch.full((8, WIDTH), float(t)) for t in range(60)])
    assert report.evidence["eval_error"] > 100
    assert report.needs_attention


def test_repeated_batches_can_be_ordered(monitored):
    one, other = samples(1, 64)[0], samples(1, 64, seed=1, offset=2.0)[0]
    report = monitored(norm(momentum=0.1)).window([*[one] * 32, *[other] * 32, *[one] * 32])
    assert report.verdict == "ordered-batches"


def test_a_reset_within_a_window_is_not_said_to_be_calls_that_updated_nothing(monitored):
    one = monitored(norm())
    one.window(samples(40, 16))
    one.tracker.reset()
    for x in samples(40, 16, seed=1):
        one.layer(x)
    one.layer.reset_running_stats()
    report = one.closed()
    assert report.flags == ("written-outside",)
    assert "-1 times" not in report.explanation


def test_a_reset_at_the_end_of_a_window_is_a_fresh_start(monitored):
    one = monitored(norm(momentum=0.01))
    for x in samples(300, 64, offset=3.0):
        one.layer(x)
    one.layer.reset_running_stats()
    one.tracker.reset()
    for x in samples(40, 64, offset=3.0, seed=1):
        one.layer(x)
    assert one.closed().verdict == "warming-up"


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
