"""The benchmark on a GPU: that it measures what it says, and that all of it runs where there is none."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.scripts import EXAMPLES, printed, run

sys.path.insert(0, str(EXAMPLES))
import overhead_cuda

sys.path.remove(str(EXAMPLES))

NONE, AGAIN, EMPTY, OURS, NAIVE = (
    overhead_cuda.NONE,
    overhead_cuda.AGAIN,
    overhead_cuda.EMPTY,
    overhead_cuda.OURS,
    overhead_cuda.NAIVE,
)


def result(**changed: Any) -> dict[str, Any]:
    """Numbers as they are measured, made up."""
    return {
        "layers": 40,
        "channels": 1000,
        "seconds": {NONE: [0.010] * 6, AGAIN: [0.010] * 6, EMPTY: [0.008] * 6, OURS: [0.012] * 6, NAIVE: [0.02] * 6},
        "shares": [0.004, 0.005],
        "peak_bytes": {NONE: 5_000_000, AGAIN: 5_000_000, OURS: 6_000_000},
        "waits": {NONE: 1.0, OURS: 1.0},
        "activity": {
            NONE: {"kernels": 500.0, "copies": 1.0, "Launch": 450.0, "Synchronize": 0.1},
            OURS: {"kernels": 502.0, "copies": 1.25, "Launch": 451.5, "Synchronize": 0.1},
        },
        "calls": {"saved": 2000, "traced": 0, "pass": 3, "skipped": 0},
        "is_reproducible": True,
        "is_bit_identical": True,
        **changed,
    }


def rows_of(results: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in overhead_cuda.table(results).splitlines()
    ]
    return {line[0]: line[1:] for line in lines}


def test_the_table_shows_ratios_and_what_is_beyond_no_monitor() -> None:
    compiled = result(seconds={NONE: [0.01], AGAIN: [0.01], OURS: [0.01]}, is_bit_identical=False)
    chance = result(is_bit_identical=False, is_reproducible=False)
    rows = rows_of({"a": result(), "b": compiled, "c": chance})
    assert rows["a step without monitor, ms"] == ["10.000"] * 3
    assert rows["ours"][:2] == ["1.2000 (1.2000-1.2000)", "1.0000 (1.0000-1.0000)"]
    assert rows["ours, to empty hook"][:2] == ["1.5000 (1.5000-1.5000)", "-"]
    assert rows[NAIVE][:2] == ["2.0000 (2.0000-2.0000)", "-"]
    assert rows["**direct share of ours**"][0] == "0.50 %"
    assert rows["kernels without monitor, a step"][0] == "500"
    assert [rows[f"{what} of ours, a step"][0] for what in ("kernels", "copies", "launches", "waits")] == [
        *("2.00", "0.25", "1.50", "0.00")
    ]
    assert (rows["memory of ours, MB"][0], rows["memory of ours, bytes a channel"][0]) == ("1.00", "1000")
    assert rows["calls of ours by path"][0] == "2000 saved, 3 pass"
    assert rows["trained the same, to the bit"] == ["yes", "no", "not without monitor either"]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"layers": 39}, ["kernels"]),
        ({"waits": {NONE: 1.0, OURS: 1.02}}, ["known waits"]),
        ({"activity": {NONE: {}, OURS: {"Synchronize": 0.5}}}, ["Synchronize"]),
    ],
)
def test_targets_are_those_of_a_step(changed: dict[str, Any], missed: list[str]) -> None:
    verdicts = overhead_cuda.verdicts_on({"any": result(**changed)}, is_on_device=True)
    assert [line for is_met, line in verdicts if not is_met] == [
        line for _, line in verdicts if line.startswith(tuple(f"MISSED: {what} a step" for what in missed or ["-"]))
    ]
    assert len(verdicts) == 3


def test_ratios_have_their_targets_by_name() -> None:
    of_time, of_share = overhead_cuda.verdicts_on({"ResNet-50": result(), "other": result()}, is_on_device=False)
    assert of_time[0] is False
    assert of_time[1].startswith("MISSED: ratio to no monitor, ResNet-50: 1.200")
    assert of_share == (True, "Met: direct share, ResNet-50: 0.50 (0.50-0.50) %, target at most 1 %.")
    assert {network.name for network in overhead_cuda.networks("cpu", False)} > set(overhead_cuda.MAX_RATIO)


def test_the_first_round_is_left_out_and_a_round_has_every_training() -> None:
    calls: list[str] = []

    def seconds_of(training: float, steps: int) -> float:
        calls.append(str(training))
        return training * steps * (100 if len(calls) <= 2 else 1)

    seconds = overhead_cuda.rounds_of({"slow": 3.0, "fast": 1.0}, 5, 8, seconds_of)
    assert seconds == {"slow": [3.0] * 8, "fast": [1.0] * 8}
    assert all(set(pair) == {"3.0", "1.0"} for pair in zip(calls[0::2], calls[1::2], strict=True))


def test_ours_ends_a_round_with_an_update() -> None:
    network = overhead_cuda.networks("cpu", quick=True)[0]
    ours, none = (overhead_cuda.Training(network, variant) for variant in (OURS, NONE))
    for training in (ours, none):
        assert overhead_cuda.seconds_of(training, 3) > 0
    layers = ours.monitor.kept._recorder.layers
    assert [(layer.num_calls, len(layer.hook.stash)) for layer in layers] == [(3, 0)] * len(layers)
    ours.monitor.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++)")
def test_it_runs_on_the_cpu_and_writes_all_numbers(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("overhead_cuda.py", "--device", "cpu", "--quick", "--rounds", 1, "--json", path)
    assert "Traceback" not in done.output + done.errors
    numbers = json.loads(path.read_text())
    assert list(numbers["overhead"]) == [network.name for network in overhead_cuda.networks("cpu", quick=True)]
    assert not numbers["failed"]
    assert all(each["is_bit_identical"] for each in numbers["overhead"].values())
    assert numbers["overhead"]["ResNet-50"]["calls"]["saved"] > 0
    assert done.code == ("MISSED" in done.output)


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_left_out(tmp_path: Path) -> None:
    output = printed("overhead_cuda.py", "--device", "cpu", "--quick", "--budget", -1, "--json", tmp_path / "gpu.json")
    assert output.count("left out") == 4
