"""The benchmark of what logging costs, with small numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "logging_cost.py"
LAYERS, WINDOWS, BATCHES = 12, 2, 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_the_benchmark_of_logging_measures_disk_memory_and_time() -> None:
    numbers = {"--layers": LAYERS, "--windows": WINDOWS, "--batches": BATCHES, "--steps": 1}
    command = [sys.executable, str(SCRIPT), *(str(word) for pair in numbers.items() for word in pair)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=one_thread)
    assert "Traceback" not in done.stderr, done.stderr
    storage, timing = tables(done.stdout)

    unmonitored, default, always, resnet = storage
    assert [int(row["layers"]) for row in storage] == [LAYERS] * 3 + [20]
    assert int(unmonitored["images"]) == 0
    assert 1 <= int(default["images"]) <= WINDOWS
    assert all(int(row["images"]) == WINDOWS for row in (always, resnet))
    assert all(float(row["events, MB"]) > float(row["images, MB"]) > 0 for row in (default, always, resnet))
    assert all(float(row["resident, MB"]) > float(row["growth, MB"]) for row in storage)

    kinds = ["the first", "median", "the longest of the others"]
    assert [(int(row["layers"]), row["window's end"]) for row in timing] == [
        (layers, kind) for layers in (20, LAYERS) for kind in kinds
    ]
    for row in timing:
        parts = [float(row[f"{part}, ms"]) for part in ("scalars", "report", "heatmap", "rest")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(float(row["sum, ms"]), abs=1)
        assert float(row["% of an epoch"]) > 0
    assert "1562.5 steps" in done.stdout

    verdicts = [line.split(":")[0] for line in done.stdout.splitlines()[-3:]]
    assert set(verdicts) <= {"Met", "MISSED"}
    assert done.returncode == ("MISSED" in verdicts)
    assert verdicts[0] == "Met"  # the size of the event files


def tables(output: str) -> list[list[dict[str, str]]]:
    """The rows of each Markdown table, by column."""
    found: list[list[dict[str, str]]] = []
    header: list[str] | None = None
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
            found.append([])
        elif not line.startswith("|-"):
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found
