"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=one_thread).stdout


def test_the_published_experiment_gives_every_published_digit() -> None:
    output = run("ema_vs_exact.py")
    assert output.count("same") == 6
    assert "0.0602" in output
    assert "RMS z of the running mean 1.17, of the running variance 0.92." in output
    assert "(root): healthy." in output


def test_no_healthy_layer_is_said_to_need_attention_and_no_sick_one_is_missed() -> None:
    summary = run("false_alarms.py", "--seeds", "1", "--epochs", "2").splitlines()[-1]
    found = re.fullmatch(
        r"(\d+) of (\d+) healthy layer-windows \(.*\) were said to need attention, (\d+) of (\d+) sick ones \(.*\)\.",
        summary,
    )
    assert found is not None, summary
    alarms, healthy, recognised, sick = map(int, found.groups())
    assert alarms == 0
    assert healthy >= 100
    assert recognised == sick >= 20


@pytest.mark.parametrize("compiled", [False, True])
def test_the_main_example_ends_with_a_report_and_how_to_look_at_it(tmp_path: Path, compiled: bool) -> None:
    if compiled and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler (g++)")
    output = run(
        "synthetic.py",
        *("--logdir", str(tmp_path), "--epochs", "2", "--batch-size", "256", "--seed", "3"),
        "--compile" if compiled else "--repair",
    )
    table = output[output.index("eval_error") :].splitlines()
    names = [row.split()[0] for row in table[2:7]]
    assert names[0] == "stem.1"
    assert sorted(names) == ["body.1", "body.4", "body.7", "head.1", "stem.1"]
    assert output.rstrip().splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path}")
    events = EventAccumulator(str(tmp_path / "synthetic" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("bn.eval_error/stem.1")] == [7, 15]
    assert events.Scalars("bn.eval_error/stem.1")[-1].value > 0.5
    if not compiled:
        assert re.search(r"Running statistics cost .* of the loss, \d+% of that by", output)
        loss, repaired = (float(re.search(f"{state} +(\\S+)", output)[1]) for state in ("as it is", "exact statistics"))
        assert repaired < loss
        *_, trained, validated = (event.value for event in events.Scalars("loss/val"))
        assert validated < trained
