"""What is imported and when: either of Lightning's packages will do, and what only some need is imported when used."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PACKAGES = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning"}  # and the one that is missing


def child(package: str, folder: str) -> None:
    """In a process of its own: a fit where only one of Lightning's packages can be imported."""
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


def run(*arguments: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_it_is_the_same_with_either_package_of_lightning_where_the_other_is_missing(tmp_path):
    found = []
    for package in PACKAGES:
        run("-m", __name__, package, str(tmp_path / package))
        found.append(json.loads((tmp_path / package / "found.json").read_text()))
        assert list((tmp_path / package).rglob("events.out.*"))
    assert found[0] == found[1]
    (layer,) = found[0]["report"]["layers"].values()
    assert (layer["num_batches"], layer["num_samples"]) == (10, 80)
    assert "recalibrated on 10 batches" in found[0]["recalibration"]


def test_of_two_packages_it_takes_the_one_that_is_imported_already():
    for package in PACKAGES:
        is_of_it = f"{package}.Callback in lightning_bnmonitor.BatchNormMonitor.__mro__"
        run("-c", f"import {package}, lightning_bnmonitor; assert {is_of_it}")


def test_what_draws_and_prints_is_not_needed_for_the_import():
    missing = "matplotlib", "tabulate", "tqdm", "tqdm.auto"  # Lightning has imported some of them by then
    blocked = f"sys.modules.update(dict.fromkeys({missing}))"
    run("-c", f"import sys, lightning.pytorch; {blocked}; import lightning_bnmonitor")


if __name__ == "__main__":
    child(*sys.argv[1:])
