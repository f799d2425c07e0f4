"""The script that names what is wrong with trainings: that it says so where a name is missing or wrong."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.examples.scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import pathologies

sys.path.remove(str(EXAMPLES))

GROUPED, MISFIT, GUARDED = (
    next(case for case in pathologies.CASES if words in case.cause)
    for words in ("with group=", "examined", "guard=True")
)


def test_every_verdict_and_flag_of_one_process_has_a_cause() -> None:
    assert pathologies.without_cause(pathologies.CASES) == []


def test_what_has_no_cause_any_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = [case for case in pathologies.CASES if case not in (MISFIT, GUARDED)]
    assert pathologies.without_cause(fewer) == ["misfit", "guarded"]
    monkeypatch.setattr(pathologies, "CASES", fewer)
    monkeypatch.setattr(sys, "argv", ["pathologies.py"])
    with pytest.raises(SystemExit, match=r"misfit, guarded"):
        pathologies.main()


def test_a_cause_has_one_row() -> None:
    assert len({case.title for case in pathologies.CASES}) == len(pathologies.CASES)


def test_a_cause_is_named_with_its_group_and_not_otherwise() -> None:
    report = pathologies.run(GROUPED.training, 3)[0][-1]["norm1"]
    assert GROUPED.is_right(report)
    assert not replace(GROUPED, names="day").is_right(report)
    assert not replace(GROUPED, expected="grouped-batches, guarded").is_right(report)
    assert not GROUPED.is_mended(report)
    assert not GROUPED.is_mended(None)
    assert replace(GROUPED, mended=("gone",)).is_mended(None)


def test_what_needs_attention_is_not_mended() -> None:
    report = pathologies.run(GUARDED.training, 3)[0][-1]["norm1"]
    assert report.verdict in GUARDED.mended
    assert GUARDED.is_right(report)
    assert not GUARDED.is_mended(report)
