"""What an attribution may find, case by case, and that its table says no more and no less."""

import itertools
import math
import re
from fractions import Fraction

import pytest

from lightning_bnmonitor import Attribution
from lightning_bnmonitor.repair.eval_gap import Contribution, Part
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


CHAIN = {
    False: [["- normalising by the batch", "- dropout, other modules in training mode"]],
    True: [
        ["- other statistics of the evaluation data"],
        ["- the evaluation data otherwise"],
        ["- normalising by the batch", "- dropout, other modules in training mode"],
    ],
}
OWN = "eval mode with these data's own statistics"


def losses_by_row(found):
    states = {"eval mode as it is": found.eval_loss, "exact statistics": found.exact_loss}
    if found.has_evaluation:
        states["statistics of the evaluation data"] = found.own_loss
        states["training data, exact statistics"] = found.exact_train_loss
    return states | {"training mode": found.train_loss}


def assert_printed(found):
    sentence, rows = table(found)
    layers = [*found.contributions, *([found.rest] if found.rest else [])]
    states, steps = losses_by_row(found), CHAIN[found.has_evaluation]
    expected = []
    for state, between in zip(states, [[f"- {part.name}" for part in layers], *steps, []], strict=True):
        expected += [state, *between]
    besides = {"eval mode with dropout on": found.dropout_loss}
    if not found.has_evaluation:
        besides[OWN] = found.own_loss
    assert list(rows) == [*expected, *besides]
    for row, value in (states | besides).items():
        assert is_rounded(rows[row]["loss"], value, 4)
        assert set(rows[row].values()) == {rows[row]["loss"], ""}
    shares = [part.reduction / found.gap for part in layers]
    for part, share in zip(layers, shares, strict=True):
        row = rows[f"- {part.name}"]
        assert is_rounded(row["explains"], part.reduction, 4)
        assert is_rounded(row["stderr"], part.stderr, 2)
        assert float(row["eval_error"]) == pytest.approx(part.eval_error, abs=5.1e-5)
        if math.isfinite(found.gap) and all(-0.005 <= other < 1.005 for other in shares):
            assert float(Fraction(row["of the gap"].rstrip("%")) / 100) == pytest.approx(share, abs=0.0051)
        else:
            assert row["of the gap"] == ""
    for name, part in zip(itertools.chain(*steps), found.remaining, strict=True):
        assert is_rounded(rows[name]["explains"], part.reduction, 4)
        assert is_rounded(rows[name]["stderr"], part.stderr, 2)
        assert rows[name]["of the gap"] == ""
    assert not re.search(r"-\d+%|[1-9]\d\d%", sentence.replace("100%", ""))
    return sentence


def attribution(stderr=0.01, **fields):
    """A result with these fields. What remains is between the losses, with one standard error for all of it."""
    defaults = {
        **{"eval_loss": 2.5, "exact_loss": 1.5, "batch_loss": 1.25, "train_loss": 1.125, "gap": 1.0, "gap_stderr": 0.1},
        "contributions": (Contribution("a.norm", 0.9, 0.75, 0.05), Contribution("b.norm", 0.5, 0.2475, 0.01)),
        "rest": Contribution("7 other layers", 0.1, 0.0025, 0.001),
        "has_evaluation": False,
        "repair": "lightning_bnmonitor.recalibrate(model, loader)",
    }
    known = defaults | fields
    known = {
        **{
            "dropout_loss": known["eval_loss"],
            "own_loss": known["exact_loss"],
            "exact_train_loss": known["exact_loss"],
        },
        **known,
    }
    levels = [known[name] for name in ("exact_train_loss", "batch_loss", "train_loss")]
    if known["has_evaluation"]:
        levels = [known["exact_loss"], known["own_loss"], *levels]
    names = [row.removeprefix("- ") for row in itertools.chain(*CHAIN[known["has_evaluation"]])]
    between = [above - below for above, below in itertools.pairwise(levels)]
    remaining = [Part(name, value, stderr) for name, value in zip(names, between, strict=True)]
    return Attribution(**known, remaining=tuple(remaining))


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
    "better than in training": attribution(batch_loss=1.62, train_loss=1.75),
    "opposite": attribution(
        eval_loss=1.6,
        batch_loss=1.48,
        train_loss=1.42,
        gap=0.1,
        gap_stderr=0.01,
        contributions=(Contribution("a.norm", 0.9, 0.4, 0.05), Contribution("b.norm", 0.5, -0.3, 0.01)),
        rest=None,
    ),
    "by the batch": attribution(eval_loss=1.5, gap=0.001, gap_stderr=0.01, batch_loss=0.5, train_loss=0.6, **NOTHING),
    "modules": attribution(eval_loss=1.6, gap=0.1, gap_stderr=0.01, batch_loss=1.4, train_loss=0.5, rest=None),
    "dropout": attribution(dropout_loss=1.75),
    "other statistics": attribution(
        has_evaluation=True, eval_loss=1.6, gap=0.1, gap_stderr=0.01, own_loss=0.7, exact_train_loss=0.65, rest=None
    ),
    "other data": attribution(has_evaluation=True, exact_train_loss=0.25, batch_loss=0.2, train_loss=0.15),
    "maybe chance": attribution(stderr=0.3, eval_loss=1.5, gap=0.001, gap_stderr=0.01, **NOTHING),
}
