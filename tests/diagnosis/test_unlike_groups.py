"""Groups of batches that differ: when they make a verdict, and how they are named."""

from __future__ import annotations

import math

import pytest

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.groups import GroupShift, evidence_of, sentence_on
from tests.diagnosis.symptoms import ABOVE, BELOW, SYMPTOMS, beside, diagnosed

NAN = math.nan


def group(name: str = "a", shift: float = 0.5, noise: float = 0.01) -> GroupShift:
    return GroupShift(name, 20, 320, shift, noise)


@pytest.mark.parametrize(
    ("threshold", "noise", "at"),
    [(0.1, 0.0, "grouped-batches"), (3 * 0.05, 0.05, "healthy")],
)
def test_groups_make_the_verdict_from_a_tenth_and_three_times_their_noise_on(threshold, noise, at):
    given = {"groups": 2.0, "group_noise": noise}
    assert diagnosed({"group_shift": beside(threshold, BELOW)}, given).verdict == "healthy"
    assert diagnosed({"group_shift": threshold}, given).verdict == at
    assert diagnosed({"group_shift": beside(threshold, ABOVE)}, given).verdict == "grouped-batches"


def test_without_noise_they_make_none():
    assert diagnosed({"groups": 2.0, "group_shift": 5.0}).verdict == "healthy"


@pytest.mark.parametrize("verdict", ["frozen", "stale", "insufficient-data", "tiny-batch", "ordered-batches"])
def test_what_comes_before_them_stays(verdict):
    found = diagnosed(SYMPTOMS[verdict], {"groups": 2.0, "group_shift": 0.5, "group_noise": 0.01})
    assert found.verdict == verdict


def test_they_come_before_what_running_statistics_alone_show():
    for verdict in ("warming-up", "lagging", "noisy", "drifting"):
        found = diagnosed(SYMPTOMS[verdict], {"groups": 2.0, "group_shift": 0.5, "group_noise": 0.01})
        assert found.verdict == "grouped-batches"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], {}),
        ([group(shift=NAN, noise=NAN)], {}),
        ([group("a", 0.2), group("b", 0.5)], {"groups": 2, "group_shift": 0.5, "group_noise": 0.01}),
        # The certain one before the larger one, and one that is told from weights before one that is not.
        ([group("a", 0.5, 0.3), group("b", 0.2)], {"groups": 2, "group_shift": 0.2, "group_noise": 0.01}),
        ([group("a", 0.5, NAN), group("b", 0.02)], {"groups": 2, "group_shift": 0.02, "group_noise": 0.01}),
        ([group("a", 0.5, NAN), group("b", 0.2, NAN)], {"groups": 2, "group_shift": 0.5}),
    ],
)
def test_the_evidence_is_of_the_group_that_certainly_differs_most(groups, expected):
    assert evidence_of(groups) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], ""),
        ([group(shift=0.09)], ""),
        ([group(shift=0.3, noise=0.1)], ""),
        ([group("b", 0.8, 0.02)], "By group: 'b' is 0.8 off all batches (chance explains 0.02)."),
        (
            [group("a", 0.2), group("b", 0.8, 0.02), group("c", 0.05)],
            "By group: 'b' is 0.8 off all batches (chance explains 0.02), 'a' 0.2 (0.01).",
        ),
        (
            [group(name, 0.5) for name in "abcdef"],
            "By group: 'a' is 0.5 off all batches (chance explains 0.01), 'b' 0.5 (0.01), 'c' 0.5 (0.01), "
            "'d' 0.5 (0.01) and 2 more.",
        ),
    ],
)
def test_the_groups_that_differ_are_named_the_farthest_first(groups, expected):
    assert sentence_on(groups) == expected


def test_groups_that_may_differ_by_the_weights_are_said_to_do_so():
    alone = sentence_on([group("b", 0.8, NAN)])
    assert alone.startswith("By group: 'b' is 0.8 off all batches; but these batches were few, or came at other times")
    both = sentence_on([group("a"), group("b", 0.8, NAN)])
    assert "(chance explains 0.01). Also: 'b' is 0.8 off all batches; but" in both


@pytest.mark.parametrize(
    ("verdict", "is_said"), [("grouped-batches", True), ("ordered-batches", True), ("noisy", False)]
)
def test_they_are_named_where_that_explains_the_verdict(verdict, is_said):
    found = diagnosed(SYMPTOMS[verdict], {"groups": 2.0, "group_shift": 0.5})
    named = Diagnosis(found.verdict, found.flags, True, found.evidence, (group("b{x}"),))
    assert ("'b{x}' is 0.5 off" in named.explanation) is is_said


def test_the_remedy_is_to_mix_them():
    found = diagnosed({"groups": 3.0, "group_shift": 0.5, "group_noise": 0.01})
    assert "Each batch is of one of 3 groups, and these differ" in found.explanation
    assert "0.5 on the group that differs most" in found.explanation
    assert "`DataLoader(ConcatDataset(datasets), batch_size, shuffle=True)`" in found.remedy
    assert "recalibrate(model, loader)" in found.remedy
    assert found.needs_attention
    assert found.cause == "grouped-batches"
