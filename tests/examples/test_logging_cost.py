"""The benchmark of what logging costs, with small numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.scripts import run, with_copies

pytestmark = pytest.mark.slow
LAYERS, WINDOWS, BATCHES = 12, 2, 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_the_benchmark_of_logging_measures_disk_memory_and_time() -> None:
    numbers = {"--layers": LAYERS, "--windows": WINDOWS, "--batches": BATCHES, "--steps": 1}
    done = run("logging_cost.py", *(word for pair in numbers.items() for word in pair), before=with_copies)
    assert "Traceback" not in done.errors, done.errors
    storage, timing = tables(done.output)

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
        parts = [float(row[f"{part}, ms"]) for part in ("scalars", "report", "heatmap", "events", "rest")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(float(row["sum, ms"]), abs=1)
        assert float(row["% of an epoch"]) > 0
    assert "1562.5 steps" in done.output

    verdicts = [line.split(":")[0] for line in done.output.splitlines()[-3:]]
    assert set(verdicts) <= {"Met", "MISSED"}
    assert done.code == ("MISSED" in verdicts)
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
