"""What is imported and when: either of Lightning's packages will do, and what only some need is imported when used."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]
PACKAGES = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning"}  # and the one that is missing


def child(package: str, folder: str) -> None:
    """In a process of its own, which imports one of Lightning's packages: the checks, each in a copy of it."""
    importlib.import_module(package)
    assert PACKAGES[package] not in sys.modules
    assert "lightning_bnmonitor" not in sys.modules
    in_a_copy(fit, package, folder)
    in_a_copy(choose, package)
    in_a_copy(do_without)


def in_a_copy(function: Callable[..., None], *args: str) -> None:
    """Call it in a copy of this process, and print its name unless it fails."""
    copy = os.fork()
    if copy:
        os.waitpid(copy, 0)
        return
    try:
        function(*args)
        print(function.__name__)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def choose(package: str) -> None:
    """Lightning's other package is there, too."""
    import lightning_bnmonitor

    callback = importlib.import_module(package).Callback
    assert callback in lightning_bnmonitor.BatchNormMonitor.__mro__


def do_without() -> None:
    """Nothing of what draws and prints can be imported. Lightning has imported some of it by now."""
    sys.modules.update(dict.fromkeys(("matplotlib", "tabulate", "tqdm", "tqdm.auto")))  # type: ignore[arg-type]
    package = importlib.import_module("lightning_bnmonitor")
    assert all(getattr(package, name) is not None for name in package.__all__)


def fit(package: str, folder: str) -> None:
    """A fit where only this one of Lightning's packages can be imported."""
    sys.modules[PACKAGES[package]] = None  # type: ignore[assignment]
    lightning: Any = importlib.import_module(package)
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from lightning_bnmonitor import BatchNormMonitor, PreciseBatchNorm

    class Net(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

        def forward(self, batch):
            return self.net(batch)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    loader = DataLoader(torch.randn(80, 4), batch_size=8)
    monitor, precise = BatchNormMonitor(), PreciseBatchNorm(num_batches=10)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[monitor, precise],
        logger=lightning.loggers.TensorBoardLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), loader, loader)
    found = {"report": monitor.report().to_dict(), "recalibration": str(precise.recalibration)}
    (Path(folder) / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Of each package, the folder of its fit and what its process said."""
    found = {}
    for package in PACKAGES:
        folder = tmp_path_factory.mktemp(package)
        command = [sys.executable, "-m", __name__, package, str(folder)]
        root = Path(__file__).parents[2]
        found[package] = folder, subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    return found


def test_it_is_the_same_with_either_package_of_lightning_where_the_other_is_missing(done):
    found = []
    for folder, process in done.values():
        assert "fit" in process.stdout.split(), process.stderr
        assert list(folder.rglob("events.out.*"))
        found.append(json.loads((folder / "found.json").read_text()))
    assert found[0] == found[1]
    (layer,) = found[0]["report"]["layers"].values()
    assert (layer["num_batches"], layer["num_samples"]) == (10, 80)
    assert "recalibrated on 10 batches" in found[0]["recalibration"]


def test_of_two_packages_it_takes_the_one_that_is_imported_already(done):
    for _, process in done.values():
        assert "choose" in process.stdout.split(), process.stderr


def test_what_draws_and_prints_is_not_needed_for_the_import(done):
    for _, process in done.values():
        assert "do_without" in process.stdout.split(), process.stderr


if __name__ == "__main__":
    child(*sys.argv[1:])
