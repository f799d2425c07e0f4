"""Verdicts by hand: at every threshold, in every order of precedence, and who needs attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.verdicts import VERDICTS
from tests.diagnosis.symptoms import ABOVE, BELOW, CALLED, INF, NAN, NEVER_CALLED, OBSERVED, SYMPTOMS, beside, diagnosed


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
    assert set(pairwise(VERDICTS)) - set(COMPATIBLE) == {("stale", "frozen")}


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


IMAGES = {"batch_size": 4.0, "samples_per_batch": 400.0}
ONE_IMAGE = {"batch_size": 1.0, "samples_per_batch": 400.0, "independent_values": 50.0}
OFF = math.hypot(math.hypot(0.05, 0.06), 0.1)  # a warning beyond chance, of the running statistics and of now
WALK = 0.1 * math.sqrt(1 + 3 * 1.5 / math.sqrt(12))  # a warning, and three standard errors by 12 pairs of 13 blocks
THRESHOLDS = [
    # what decides, the threshold, the verdict below it, at it, and above it, and what else holds
    ("non_finite_channels", 0.0, None, "healthy", "non-finite", {}),
    ("batches", 8.0, "insufficient-data", "healthy", "healthy", {}),
    ("degrees_of_freedom", 4.0, "insufficient-data", "healthy", "healthy", {}),
    ("samples_per_batch", 4.0, "tiny-batch", "tiny-batch", "healthy", {}),
    (
        "independent_values",
        10.0,
        "tiny-batch",
        "tiny-batch",
        "healthy",
        {"batch_size": 4.0, "samples_per_batch": 400.0},
    ),
    ("batch_size", 4.0, "tiny-batch", "tiny-batch", "healthy", {**IMAGES, "independent_values": 2.0}),
    ("samples_per_batch", 8.0, "healthy", "tiny-batch", "tiny-batch", {"batch_size": 4.0, "independent_values": 2.0}),
    ("batch_jitter", math.sqrt(1.5 / 8), "healthy", "tiny-batch", "tiny-batch", ONE_IMAGE),
    ("batch_size", 2.0, "tiny-batch", "healthy", "healthy", {**ONE_IMAGE, "batch_jitter": 0.9}),
    ("ordering_ratio", 2.5, "healthy", "healthy", "ordered-batches", {"ordering_share": 0.3}),
    ("ordering_share", 0.02, "healthy", "healthy", "ordered-batches", {"ordering_ratio": 3.0}),
    ("smooth_share", 0.6, "ordered-batches", "healthy", "healthy", {"ordering_ratio": 3.0, "ordering_share": 0.3}),
    ("grouping_ratio", 1.6, "healthy", "healthy", "grouped-batches", {"grouping_share": 0.1}),
    ("grouping_share", 0.02, "healthy", "healthy", "grouped-batches", {"grouping_ratio": 2.0}),
    ("warmup_error", 0.1, "healthy", "healthy", "warming-up", {"eval_error": 0.12}),
    ("warmup_error", 0.3, "noisy", "noisy", "warming-up", {"noise_error": 0.3, "eval_error": 0.3}),
    ("warmup_error", 0.3, "lagging", "lagging", "warming-up", {"lag_error": 0.3, "eval_error": 0.3}),
    ("eval_error", 0.1, "healthy", "healthy", "warming-up", {"warmup_error": 0.3}),
    ("eval_error", 0.1, "noisy", "noisy", "warming-up", {"warmup_error": 0.3, "noise_error": 0.2}),
    ("lag_error", 0.1, "healthy", "healthy", "lagging", {"eval_error": 0.12}),
    ("eval_error", OFF, "healthy", "healthy", "lagging", {"lag_error": 0.07}),
    ("eval_error", OFF, "healthy", "healthy", "warming-up", {"warmup_error": 0.07}),
    ("eval_error", OFF, "healthy", "healthy", "noisy", {"noise_error": 0.06, "now_error": 0.05}),
    ("eval_error", 0.12, "healthy", "healthy", "healthy", {"noise_error": 0.08, "now_error": 0.07}),
    ("lag_error", 0.3, "noisy", "noisy", "lagging", {"noise_error": 0.3, "eval_error": 0.3}),
    ("eval_error", 0.1, "healthy", "healthy", "lagging", {"lag_error": 0.3}),
    ("eval_error", 0.1, "drifting", "drifting", "lagging", {"lag_error": 0.3, "drift_error": 0.3}),
    ("noise_error", 0.1, "healthy", "healthy", "noisy", {}),
    ("drift_error", 0.1, "healthy", "healthy", "drifting", {}),
    ("eval_error", math.hypot(0.1, math.hypot(0.05, 0.06)), "drifting", "drifting", "lagging", {"drift_error": 0.3}),
    ("walk_error", WALK, "drifting", "drifting", "lagging", {"drift_error": 0.3}),
    ("drift_error", 0.1, "healthy", "healthy", "lagging", {"walk_error": 0.3}),
    ("noise_error", 0.1, "lagging", "lagging", "noisy", {"drift_error": 0.3, "walk_error": 0.3}),
    ("degrees_of_freedom", 98.0, "lagging", "lagging", "drifting", {"drift_error": 0.3, "walk_error": 0.3}),
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
    untold = (
        "ordering_ratio",
        "grouping_ratio",
        "noise_error",
        "warmup_error",
        "lag_error",
        "drift_error",
        "walk_error",
    )
    assert diagnosed(dict.fromkeys(untold)).verdict == "healthy"
    without_shares = ("ordering_ratio", "ordering_share", "smooth_share", "grouping_ratio", "grouping_share")
    assert diagnosed(dict.fromkeys(without_shares)).verdict == "healthy"


OF_WEIGHTS = ("warming-up", "misfit", "lagging", "noisy", "drifting", "healthy")


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


def is_off(numbers: dict) -> bool:
    """Whether the error is by a warning, and by as much again, more than chance."""
    chance = numbers["noise_error"] ** 2 + numbers["now_error"] ** 2
    return numbers["eval_error"] ** 2 > chance + max(0.1**2, chance)


def is_walking(numbers: dict) -> bool:
    """Whether a random movement leaves an average behind, by a warning and three standard errors."""
    pairs = numbers["batches"] - numbers["degrees_of_freedom"] - 1
    return pairs >= 1 and numbers["walk_error"] > 0.1 * math.sqrt(1 + 4.5 / math.sqrt(pairs))


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
            o["ordering_ratio"] > o["ordering_limit"] and o["ordering_share"] > 0.02 and o["smooth_share"] < 0.6
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
            ((o["eval_error"] > 0.1 and o["warmup_error"] > 0.1) or is_off(o))
            and (o["warmup_error"] > o["noise_error"] or (is_off(o) and o["warmup_error"] == o["noise_error"]))
            and o["warmup_error"] > o["lag_error"]
        ),
    ),
    (
        "lagging",
        lambda c, o: (
            ((o["eval_error"] > 0.1 and o["lag_error"] > 0.1) or is_off(o))
            and (o["lag_error"] > o["noise_error"] or (is_off(o) and o["lag_error"] == o["noise_error"]))
            and o["lag_error"] >= o["warmup_error"]
        ),
    ),
    ("noisy", lambda c, o: o["noise_error"] > 0.1 or (is_off(o) and o["noise_error"] > 0.05)),
    (
        "lagging",
        lambda c, o: (
            o["drift_error"] > 0.1
            and (o["eval_error"] > math.hypot(0.1, o["noise_error"], o.get("now_error", 0.0)) or is_walking(o))
        ),
    ),
    ("drifting", lambda c, o: o["drift_error"] > 0.1),
    ("healthy", lambda c, o: True),
]
ERRORS = st.sampled_from([0.0, 0.05, 0.1, beside(0.1, ABOVE), 0.2, 0.3])


def rarely(usual, *others):
    return st.sampled_from([usual] * 6 + [*others])


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=300)
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
            "smooth_share": st.sampled_from([0.2, 0.6, 0.9]),
            "grouping_ratio": rarely(1.0, 1.6, 2.0),
            "grouping_share": rarely(0.3, 0.02, 0.0),
            **dict.fromkeys(("warmup_error", "lag_error", "noise_error", "drift_error", "walk_error"), ERRORS),
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
        ("misfit", True),
        ("lagging", True),
        ("noisy", True),
        ("drifting", False),
        ("healthy", False),
    ],
)
@pytest.mark.parametrize("error", [0.0, 5.0, INF, NAN])
def test_who_needs_attention_whatever_the_eval_error_is(verdict, attention, error):
    diagnosis = diagnosed({"eval_error": error}, SYMPTOMS[verdict])
    if verdict in ("warming-up", "misfit", "lagging") and error == 0:
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
    assert (diagnosis.remedy == "") == (
        verdict in ("healthy", "averaged", "unused", "own-forward")
    )  # some of the others may want to know, too
