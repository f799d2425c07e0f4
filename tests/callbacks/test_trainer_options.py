"""The monitor under the Trainer's options: loops, loaders, several monitors, LightningCLI, precisions."""

import pytest
import pytorch_lightning
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor
from tests.callbacks.compared_fits import (
    BATCH_SIZE,
    Net,
    OtherWindows,
    Ran,
    Steps,
    Windows,
    fit,
    hooks_of,
    network,
    samples,
    train_data,
    val_data,
)
from tests.callbacks.expected_warnings import EXPECTED_WARNINGS
from tests.callbacks.lightning_versions import takes_callbacks_of_the_other

pytestmark = EXPECTED_WARNINGS


# ---------------------------------------------------------------------------------------------------- options and loops

OPTIONS = {
    "limit_val_batches=0": ({"limit_val_batches": 0}, 10),
    "limit_val_batches=1": ({"limit_val_batches": 1, "num_sanity_val_steps": -1}, 10),
    "both limits by share": ({"limit_train_batches": 0.8, "limit_val_batches": 0.5}, 8),
    "overfit_batches by share": ({"overfit_batches": 0.9}, 9),
    "val_check_interval, accumulated, grad mode in validation": (
        {"val_check_interval": 0.3, "accumulate_grad_batches": 4, "inference_mode": False},
        10,
    ),
    "what should change nothing": (
        {
            **{"gradient_clip_val": 0.1, "detect_anomaly": True, "deterministic": True, "benchmark": False},
            **{"profiler": "simple", "reload_dataloaders_every_n_epochs": 1, "sync_batchnorm": True},
        },
        10,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_trainer(tmp_path, option):
    options, batches = OPTIONS[option]
    fit(tmp_path, **options).check(batches, 2 * batches).check_healthy()


def test_a_barebones_trainer(tmp_path):
    options = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"))
    ran = fit(tmp_path, barebones=True, **options, num_sanity_val_steps=None, max_epochs=2)
    ran.check(10, 20).check_healthy()


class TwoInputs(Steps, LightningModule):
    """Each layer belongs to one of two loaders, either of which may have nothing in a batch."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: network() for name in ("one", "two")})

    def training_step(self, batch, batch_idx):
        losses = [
            nn.functional.mse_loss(self.heads[name](x_y[0]), x_y[1]) for name, x_y in batch.items() if x_y is not None
        ]
        return sum(losses)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.heads["one"](batch[0]).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "one", "two"), [("min_size", 4, 4), ("max_size_cycle", 10, 10), ("max_size", 10, 4)])
def test_several_loaders(tmp_path, mode, one, two):
    def data():
        return CombinedLoader({"one": train_data(), "two": train_data(num=4 * BATCH_SIZE, offset=-3.0, seed=4)}, mode)

    ran = fit(tmp_path, TwoInputs, data=data, val=lambda: [val_data(), val_data(7)], num_sanity_val_steps=1)
    ran.check(max(one, two), 2 * max(one, two))
    assert {name: layer.num_batches for name, layer in ran.reports[-1].items()} == {
        **dict.fromkeys(("heads.one.a", "heads.one.b"), one),
        **dict.fromkeys(("heads.two.a", "heads.two.b"), two),
    }
    assert {flag for flags in ran.flags().values() for flag in flags} <= {"domain-shift"}  # as the data are different


@pytest.mark.parametrize("window", [{}, {"every_n_train_batches": 4}])
def test_two_fits_with_another_trainer_and_evaluation_in_between(tmp_path, window):
    monitor = BatchNormMonitor(**window)
    ran = fit(tmp_path, monitor=monitor, twin=False)
    report = monitor.report()
    told = report.to_dict()
    for evaluate in (ran.trainer.validate, ran.trainer.test, ran.trainer.predict):
        evaluate(ran.model, val_data())
    assert monitor.report() is report
    assert report.to_dict() == told
    again = fit(tmp_path, lambda: ran.model, monitor=monitor, twin=False)
    ends = (4, 8, 12, 16, 20) if window else (10, 20)
    again.check(*ends)
    assert hooks_of(ran.model) == 0


@pytest.mark.parametrize(
    "namespace", ["lightning", pytest.param("pytorch_lightning", marks=takes_callbacks_of_the_other)]
)
def test_two_monitors_in_one_trainer(tmp_path, namespace):
    class OtherNet(Steps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

    other_package = namespace == "pytorch_lightning"
    second = BatchNormMonitor(every_n_train_batches=5, include="net.b", log_key_prefix="norm", capture="pass")
    also = (OtherWindows if other_package else Windows)(second)
    options = {"trainer_class": pytorch_lightning.Trainer} if other_package else {}
    ran = fit(
        tmp_path,
        OtherNet if other_package else Net,
        lambda: [second, also],
        other_package=other_package,
        twin=False,
        **options,
    )
    ran.check(10, 20).check_healthy()
    Ran(ran.trainer, ran.model, second, ran.recorder, also).check(5, 10, 15, 20, without=["net.a"])
    for prefix, layers in (("bn", 2), ("norm", 1)):
        assert f"{prefix}/eval_error_max" in ran.trainer.callback_metrics
        assert float(ran.trainer.callback_metrics[f"{prefix}/unhealthy_layers"]) <= layers
    assert hooks_of(ran.model) == 0


class Data(LightningDataModule):
    def train_dataloader(self):
        return train_data()

    def val_dataloader(self):
        return val_data()


def nothing_is_padded(batch):
    """A mask, for a file."""


@pytest.mark.slow
def test_lightning_cli_reads_the_monitor_from_a_file(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: 3
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_bnmonitor.BatchNormMonitor
      init_args:
        every_n_train_batches: 5
        exclude: [net.a]
        mask: tests.callbacks.test_trainer_options.nothing_is_padded
        per_layer: true
        capture: pass
        on_unhealthy: ignore
    - class_path: lightning_bnmonitor.BatchNormMonitor
      init_args:
        include: net.a
        per_layer: auto
        log_key_prefix: other
"""
    )
    cli = LightningCLI(Net, Data, args=["fit", "--config", str(config)])
    first, second = (callback for callback in cli.trainer.callbacks if isinstance(callback, BatchNormMonitor))
    assert {name: layer.num_batches for name, layer in first.report().items()} == {"net.b": 5}
    assert {name: layer.num_batches for name, layer in second.report().items()} == {"net.a": 10}
    assert first.report()["net.b"].evidence["calls_pass"] == 5
    assert first.report()["net.b"].evidence["padding_share"] == 0
    assert hooks_of(cli.model) == 0
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    assert "on_unhealthy: ignore" in saved.read_text()


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true", "16-mixed"])
def test_precisions(tmp_path, precision):
    def data():
        x, y = samples().tensors
        return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True)

    ran = fit(tmp_path, data=data, precision=precision).check(10, 20)
    assert set(ran.flags().values()) == {("domain-shift",)}  # as the data are different
    assert set(ran.verdicts().values()) == {"healthy"}
