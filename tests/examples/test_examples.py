"""The examples, run as a user runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.examples.scripts import printed, without_inductor

pytestmark = pytest.mark.slow


def test_the_published_experiment_gives_every_published_digit() -> None:
    output = printed("ema_vs_exact.py")
    assert output.count("same") == 6
    assert "0.0602" in output
    assert "RMS z of the running mean 1.17, of the running variance 0.92." in output
    assert "(root): healthy." in output


def test_no_healthy_layer_is_said_to_need_attention_and_no_sick_one_is_missed() -> None:
    output = printed("false_alarms.py", "--every", 9, "--epochs", 2)
    found = re.search(
        r"(\d+) of (\d+) healthy layer-windows \(.*\) were said to need attention, (\d+) of (\d+) sick ones \(.*\) "
        r"were not\. (\d+) of (\d+) layer-windows of shuffled data were told to shuffle\.",
        output,
    )
    assert found is not None, output
    alarms, healthy, missed, sick, told, shuffled = map(int, found.groups())
    assert alarms == told == missed == 0
    assert min(healthy, sick) >= 20
    assert shuffled >= 60


def test_the_main_example_reports_repairs_and_says_how_to_look_at_it(tmp_path: Path) -> None:
    output = printed("synthetic.py", *("--logdir", tmp_path, "--epochs", 2, "--images", 512, "--seed", 3, "--repair"))
    table = output[output.index("eval_error") :].splitlines()
    names = [row.split()[0] for row in table[2:7]]
    assert names[0] == "stem.1"
    assert sorted(names) == ["body.1", "body.4", "body.7", "head.1", "stem.1"]
    assert output.rstrip().splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path}")
    events = EventAccumulator(str(tmp_path / "synthetic" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("bn.eval_error/stem.1")] == [7, 15]
    assert events.Scalars("bn.eval_error/stem.1")[-1].value > 0.5
    assert re.search(r"Running statistics cost [\d.]+ ± [\d.]+ of the\s+loss, .*stem\.1", output)
    loss, repaired = (float(re.search(f"{state} +(\\S+)", output)[1]) for state in ("as it is", "exact statistics"))
    assert repaired < loss
    *_, trained, validated = (event.value for event in events.Scalars("loss/val"))
    assert validated < trained


def test_the_main_example_compiled_sees_as_many_batches(tmp_path: Path) -> None:
    output = printed(
        "synthetic.py", "--logdir", tmp_path, "--epochs", 1, "--images", 512, "--compile", before=without_inductor
    )
    (stem,) = (line.split() for line in output.splitlines() if line.startswith("stem.1  "))
    assert stem[1] == "warming-up"
    assert stem[-2] == "8"


def test_every_pathology_is_named_and_every_remedy_helps_and_all_can_be_looked_at(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    output = printed("pathologies.py", "--seed", 5, "--logdir", tmp_path, "--figure", figure)
    assert "43 of 43 causes are named, 37 of 37 remedies help." in output
    assert Image.open(figure).width == 1146
    events = EventAccumulator(str(tmp_path / "pathologies" / "version_0")).Reload()
    assert events.Images("bn/heatmap")[-1].step == 4
    assert [event.step for event in events.Scalars("bn/unhealthy_layers")] == [1, 2, 3, 4]
