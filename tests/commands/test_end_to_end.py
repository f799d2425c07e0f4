"""From a checkpoint that is bad in eval() to one that is good, with the commands of the examples' page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_bnmonitor import recalibrate
from tests.commands.checkpoints import bnmonitor, differences, read
from tests.examples.scripts import EXAMPLES
from tests.processes import run_script

pytestmark = pytest.mark.slow
CLASSES = ("--model", "synthetic.Stripes", "--data", "synthetic_cli.StripesData")


def lightning(folder: Path, *arguments: object) -> str:
    """What the training's own command prints."""
    to_folder = ("--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false")
    done = run_script(EXAMPLES / "synthetic_cli.py", *arguments, *to_folder)
    assert done.code == 0, done.errors
    return done.output


def accuracy(folder: Path, config: Path, checkpoint: Path) -> float:
    output = lightning(folder, "validate", "--config", config, "--ckpt_path", checkpoint)
    return float(re.search(r"accuracy/val\W+([\d.]+)", output)[1])


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Config and checkpoint of a training that is good, and bad in validation."""
    folder = tmp_path_factory.mktemp("training")
    data = ("--data.images", 512, "--data.batch_size", 32)
    lightning(folder, "fit", *CLASSES, *data, "--trainer.max_epochs", 6)
    (checkpoint,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    return folder / "lightning_logs" / "version_0" / "config.yaml", checkpoint


@pytest.fixture(autouse=True)
def in_the_folder_of_the_script(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("by_import", [False, True])
def test_check_attribute_and_repair(capsys, tmp_path, training, by_import):
    config, checkpoint = training
    repaired = tmp_path / "repaired.ckpt"
    given = CLASSES if by_import else ("--config", config)
    subject = (*given, "--ckpt_path", checkpoint)

    status, output, errors = bnmonitor(capsys, "check", *subject, "--fail-on", "unhealthy")
    assert (status, errors) == (1, "")
    assert re.search(r"^stem\.1 +warming-up +0\.9", output, re.M)

    status, output, errors = bnmonitor(capsys, "attribute", *subject)
    assert (status, errors) == (0, "")
    assert re.match(r"Running statistics cost [\d.]+ ± [\d.]+ of the loss, \d+% of that by stem\.1\.", output)

    status, output, errors = bnmonitor(capsys, "repair", *subject, "--output", repaired)
    assert (status, errors) == (0, "")
    changed = {
        path.removeprefix("/state_dict/").rpartition(".")[0] for path in differences(read(checkpoint), read(repaired))
    }
    assert changed == {"stem.1", "body.1", "body.4", "body.7", "head.1"}

    status, _, errors = bnmonitor(capsys, "check", *given, "--ckpt_path", repaired, "--fail-on", "unhealthy")
    assert (status, errors) == (0, "")


def test_what_is_repaired_validates_and_goes_on_training(capsys, tmp_path, training):
    config, checkpoint = training
    repaired = tmp_path / "repaired.ckpt"
    assert accuracy(tmp_path, config, checkpoint) < 0.6
    subject = ("--config", config, "--ckpt_path", checkpoint)
    assert bnmonitor(capsys, "repair", *subject, "--output", repaired)[0] == 0
    assert accuracy(tmp_path, config, repaired) == 1.0

    lightning(tmp_path, "fit", "--config", config, "--ckpt_path", repaired, "--trainer.max_epochs", 7)
    (resumed,) = tmp_path.glob("lightning_logs/*/checkpoints/epoch=6-step=112.ckpt")
    before, after = (read(path) for path in (repaired, resumed))
    assert (before["global_step"], after["global_step"]) == (96, 112)
    moved = after["state_dict"]["stem.1.running_mean"] - before["state_dict"]["stem.1.running_mean"]
    assert 0 < moved.abs().max() < 0.01  # by its momentum of 0.001, from the exact ones


def test_it_is_what_recalibrate_does(capsys, tmp_path, training):
    config, checkpoint = training
    subject = ("--config", config, "--ckpt_path", checkpoint)
    assert bnmonitor(capsys, "repair", *subject, "--output", tmp_path / "repaired.ckpt", "--num-batches", "all")[0] == 0
    sys.path.insert(0, str(EXAMPLES))
    from synthetic import Stripes
    from synthetic_cli import StripesData

    model = Stripes()
    model.load_state_dict(read(checkpoint)["state_dict"])
    recalibrate(model, StripesData(512, 32).train_dataloader())
    torch.testing.assert_close(
        dict(model.state_dict()), dict(read(tmp_path / "repaired.ckpt")["state_dict"]), rtol=0.02, atol=0.02
    )
