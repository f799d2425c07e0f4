"""``recalibrate`` beside its peers: what the example prints, and that it measures what it says."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bnmonitor import recalibrate
from tests.examples.scripts import EXAMPLES, printed

pytestmark = pytest.mark.slow
SCRIPT = EXAMPLES / "against_peers.py"
Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("against_peers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """What is printed: the tables by their titles, rows by their first cells, columns by their headers."""
    *blocks, summary = printed(SCRIPT.name, "--seed", 5).strip().split("\n\n")
    assert summary == "recalibrate is the most exact, up to rounding, in 11 of 11 cases."
    found: dict[str, Table] = {}
    for block in blocks:
        (title, *headers), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        found[title] = {name: dict(zip(headers, cells, strict=True)) for name, *cells in rows}
    return found


def test_no_peer_is_more_exact_in_any_case_by_any_error(tables: dict[str, Table]) -> None:
    errors = {title: table for title, table in tables.items() if "rror" in title}
    assert len(errors) == 3
    for table in errors.values():
        assert len(table) == 11
        for name, row in table.items():
            ours, rounding = float(row["recalibrate"]), float(row["rounding alone"])
            peers = [float(row[peer]) for peer in ("fvcore", "update_bn") if row[peer] != "AssertionError"]
            best = min(error for error in peers if not math.isnan(error))
            assert ours <= 1.05 * rounding + 1e-7, name
            assert ours <= best + rounding + 1e-7, name


def test_peers_are_as_exact_where_they_should_be_and_not_where_they_should_not(tables: dict[str, Table]) -> None:
    table = tables["RMS error of the normalised activation in eval()"]
    for name in ("equal batches", "unequal batches (64, ..., 64, 8)", "batches apart by 1 std", "a frozen layer"):
        assert float(table[name]["fvcore"]) < 1e-6
    assert float(table["dropout, only BatchNorm in training mode"]["fvcore"]) < 1e-6
    for peer in ("fvcore", "update_bn"):
        assert float(table["dropout, the model in training mode"][peer]) > 0.1
    for name in ("batches apart by 1 std", "a layer called twice", "a frozen layer"):
        assert float(table[name]["update_bn"]) > 0.1
    assert table["a layer called twice"]["fvcore"] == "AssertionError"
    assert not float(table["mean/std 1e4"]["fvcore"]) < 0.1  # NaN, too


def test_one_pass_does_for_all(tables: dict[str, Table]) -> None:
    assert tables["Forward passes"] == {"for 120 batches": {"recalibrate": "120", "fvcore": "120", "update_bn": "120"}}


@pytest.mark.parametrize("title", ["After success", "After an exception in batch 3"])
def test_only_recalibrate_leaves_all_as_it_was(tables: dict[str, Table], title: str) -> None:
    table = tables[title]
    ours = {what: row["recalibrate"] for what, row in table.items()}
    assert ours.pop("the next epoch of training") == "runs"
    assert len(ours) == 10
    if title == "After success":
        assert ours.pop("running statistics") == "changed"
    assert set(ours.values()) == {"as before"}
    for peer in ("fvcore", "update_bn"):
        assert table["num_batches_tracked"][peer].startswith("changed: 20 to ")
        assert all(table[f"random state: {of}"][peer] == "changed" for of in ("torch", "NumPy", "Python"))


def test_what_peers_leave_behind_after_an_exception(tables: dict[str, Table]) -> None:
    table = tables["After an exception in batch 3"]
    assert table["momentum"] == {
        "recalibrate": "as before",
        "fvcore": "changed: 0.1 to 1.0",
        "update_bn": "changed: 0.1 to None",
    }
    assert table["running statistics"]["fvcore"] == table["running statistics"]["update_bn"] == "changed"
    assert table["the next epoch of training"]["fvcore"] == "AssertionError"


@pytest.mark.parametrize("batches_apart", [0.0, 3.0])
def test_the_errors_are_those_that_numpy_finds_by_hand(example: ModuleType, batches_apart: float) -> None:
    torch.manual_seed(3)
    sizes = [7, 64, 2]
    batches = example.plain(sizes, mean=5.0, apart=batches_apart)
    pooled = np.concatenate([x.double().numpy() for x in batches]).transpose(1, 0, 2, 3).reshape(3, -1)
    model = nn.BatchNorm2d(3)
    recalibrate(model, batches)
    np.testing.assert_allclose(model.running_mean.numpy(), pooled.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(model.running_var.numpy(), pooled.var(axis=1, ddof=1), rtol=1e-6)
    case = example.Case("by hand", lambda: nn.BatchNorm2d(3), lambda: batches)
    row = example.compare(case)
    assert max(row.errors["recalibrate"]) < 1e-6
    # The mean of three means and of three variances, whatever the sizes, is what update_bn writes.
    parts = [x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for x in batches]
    mean = np.mean([part.mean(axis=1) for part in parts], axis=0)
    var = np.mean([part.var(axis=1, ddof=1) for part in parts], axis=0)
    true_mean, true_var = pooled.mean(axis=1), pooled.var(axis=1, ddof=1)
    std = np.sqrt(true_var + model.eps)
    assert row.errors["update_bn"].mean == pytest.approx(abs((mean - true_mean) / std).max(), rel=1e-3)
    assert row.errors["update_bn"].var == pytest.approx(abs((var - true_var) / std**2).max(), rel=1e-2)
    # E[(a z + b)^2] of standardised z, with a and b as the running statistics stretch and shift it
    stretch, shift = std / np.sqrt(var + model.eps) - 1, (true_mean - mean) / np.sqrt(var + model.eps)
    assert row.errors["update_bn"].eval == pytest.approx(np.sqrt(stretch**2 + shift**2).max(), rel=1e-2)


def test_what_is_wrong_or_left_behind_would_be_noticed(example: ModuleType) -> None:
    row = example.compare(example.CASES[0])
    assert example.is_most_exact(row)
    for wrong in ("AssertionError", example.Errors(math.nan, 0.0, 0.0), example.Errors(0.0, 0.0, 0.01)):
        assert not example.is_most_exact(row._replace(errors=row.errors | {"recalibrate": wrong}))
    told = example.state_after(recalibrate, fails=True)
    assert example.keeps_its_word(told, fails=True)
    for what in told:
        assert not example.keeps_its_word(told | {what: "changed"}, fails=True)
    assert not example.keeps_its_word(example.state_after(example.METHODS["update_bn"], fails=False), fails=False)


def test_truth_is_found_on_a_copy(example: ModuleType) -> None:
    model, batches = example.frozen_network(), example.plain()
    before = copy.deepcopy(model.state_dict())
    values = example.received(model, batches)
    assert {name: x.shape for name, x in values.items()} == {"1": (16, 12 * 64 * 36), "4": (16, 12 * 64 * 16)}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert (model.training, model[1].training) == (True, False)
