"""What an attribution may find, case by case, and that its table says no more and no less."""

import itertools
import math
import re
from fractions import Fraction

import pytest

from lightning_bnmonitor import Attribution
from lightning_bnmonitor.repair.attribution import Contribution
from tests.repair.spoiled_models import INF, NAN


def table(found):
    """The sentence, and the rows by their first cell, as dicts by the columns' names."""
    sentence, text = str(found).split("\n\n")
    header, rule, *lines = text.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    columns = [header[start:end].strip() for start, end in spans]
    rows = [[line[start:end].strip() for start, end in spans] for line in lines]
    assert "".join(header[end:start] for (_, end), (start, _) in itertools.pairwise(spans)).strip() == ""
    assert len({row[0] for row in rows}) == len(rows)
    return sentence, {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def is_rounded(text, value, digits):
    if not math.isfinite(value):
        return text == str(value)
    return float(text) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=0)


def assert_printed(found):
    sentence, rows = table(found)
    parts = [*found.contributions, *([found.rest] if found.rest else [])]
    expected = ["eval mode as it is", *(f"- {part.name}" for part in parts), "eval mode with exact statistics"]
    expected += ["- normalising by the batch", "- other modules in training mode", "training mode"]
    assert list(rows) == expected
    for row, value in zip(
        ("eval mode as it is", "eval mode with exact statistics", "training mode"),
        (found.eval_loss, found.exact_loss, found.train_loss),
        strict=True,
    ):
        assert is_rounded(rows[row]["loss"], value, 4)
        assert set(rows[row].values()) == {rows[row]["loss"], ""}
    for part in parts:
        row = rows[f"- {part.name}"]
        assert is_rounded(row["explains"], part.reduction, 4)
        assert is_rounded(row["stderr"], part.stderr, 2)
        assert float(row["eval_error"]) == pytest.approx(part.eval_error, abs=5.1e-5)
        if math.isfinite(found.gap):
            share = Fraction(row["of the gap"].rstrip("%")) / 100
            assert float(share) == pytest.approx(part.reduction / found.gap, abs=0.0051)
        else:
            assert row["of the gap"] == ""
    for row, value in zip(
        ("- normalising by the batch", "- other modules in training mode"),
        (found.exact_loss - found.batch_loss, found.batch_loss - found.train_loss),
        strict=True,
    ):
        assert is_rounded(rows[row]["explains"], value, 4)
    return sentence


def attribution(**fields):
    defaults = {
        **{"eval_loss": 2.5, "exact_loss": 1.5, "batch_loss": 1.25, "train_loss": 1.125, "gap": 1.0, "gap_stderr": 0.1},
        "contributions": (Contribution("a.norm", 0.9, 0.75, 0.05), Contribution("b.norm", 0.5, 0.2475, 0.01)),
        "rest": Contribution("7 other layers", 0.1, 0.0025, 0.001),
    }
    return Attribution(**(defaults | fields))


NOTHING = {"contributions": (), "rest": None}


CASES = {
    "usual": attribution(),
    "nothing": attribution(eval_loss=1.5, gap=0.001, gap_stderr=0.01, **NOTHING),
    "worse": attribution(eval_loss=1.3, gap=-0.2, gap_stderr=0.01, **NOTHING),
    "negative": attribution(eval_loss=-2.5, exact_loss=-3.5, batch_loss=-3.6, train_loss=-3.7),
    "infinite": attribution(
        eval_loss=NAN, gap=INF, gap_stderr=NAN, contributions=(Contribution("x", INF, INF, NAN),), rest=None
    ),
    "two infinite": attribution(
        eval_loss=INF,
        gap=INF,
        gap_stderr=NAN,
        contributions=(Contribution("x", INF, NAN, NAN), Contribution("y", INF, INF, NAN)),
    ),
    "neither is finite": attribution(eval_loss=NAN, exact_loss=INF, gap=NAN, gap_stderr=NAN, **NOTHING),
    "only as it is": attribution(exact_loss=NAN, gap=-INF, gap_stderr=NAN, **NOTHING),
    "training is not finite": attribution(train_loss=NAN, batch_loss=INF),
    "nothing is": attribution(
        eval_loss=NAN, exact_loss=NAN, batch_loss=NAN, train_loss=NAN, gap=NAN, gap_stderr=NAN, **NOTHING
    ),
    "better than in training": attribution(train_loss=1.75),
}
