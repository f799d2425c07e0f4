"""The example that takes longest, in a file of its own: tests are spread over processes by file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PATHOLOGIES = Path(__file__).parents[2] / "examples" / "pathologies.py"


def test_every_pathology_is_named_and_every_remedy_helps_and_all_can_be_looked_at(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(PATHOLOGIES), "--seed", "5", "--logdir", str(tmp_path), "--figure", str(figure)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, env=one_thread)
    output = done.stdout
    assert "22 of 22 causes are named, 19 of 19 remedies help." in output
    assert Image.open(figure).width == 800
    events = EventAccumulator(str(tmp_path / "pathologies" / "version_0")).Reload()
    assert events.Images("bn/heatmap")[-1].step == 4
    assert [event.step for event in events.Scalars("bn/unhealthy_layers")] == [1, 2, 3, 4]
