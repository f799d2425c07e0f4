"""Trainer runs with DistributedDataParallel in two gloo processes, started for real, as torchrun starts them."""

import datetime
import os
import pickle
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, UnhealthyBatchNormError
from tests.processes import CONTEXT

pytestmark = pytest.mark.slow
BATCHES = 40  # of each rank in an epoch
WORLD_SIZE = 2


class Net(LightningModule):
    """A layer with running statistics of what it will receive; the weights never move."""

    def __init__(self, spoilt: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spoilt = spoilt
        self.norm, self.out = nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 1)
        for _ in range(100):
            self.norm(torch.randn(16, 8))
        self.norm.momentum = 0.1
        self.received: list[torch.Tensor] = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        # A spoilt rank gets sorted data in the second epoch.
        is_second = self.trainer.training and self.current_epoch == 1
        is_spoilt = is_second and self.global_rank == self.spoilt and self.trainer.global_step % BATCHES // 10 % 2
        return [batch[0] + 3 * is_spoilt]

    def training_step(self, batch, batch_idx):
        (x,) = batch
        self.received.append(x)
        return self.out(self.norm(x)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.out(self.norm(batch[0] + 100)).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Alone(Net):
    """Steps without any communication, as an uneven number of batches needs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_start(self):
        self.trainer.model.require_backward_grad_sync = False
        # Lightning has rank 0 broadcast before each batch whether there is a signal to stop.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx).backward()  # `manual_backward` would wait for the other ranks


class Shards(IterableDataset):
    """So many batches for each rank."""

    def __init__(self, num_batches: tuple[int, ...]) -> None:
        self.num_batches = num_batches

    def __iter__(self):
        rank = int(os.environ["RANK"])
        generator = torch.Generator().manual_seed(rank)
        for _ in range(self.num_batches[rank]):
            yield (torch.randn(16, 8, generator=generator),)


class Look(Callback):
    """Keeps every report, and what was received in its window."""

    def __init__(self, monitor):
        self.monitor = monitor
        self.reports = []

    def look(self, pl_module):
        report = self.monitor.report()
        if report.rank is not None:
            return
        last, received = self.reports[-1] if self.reports else (None, None)
        if last is not None and report["norm"].numbers is last["norm"].numbers:
            self.reports[-1] = report, received  # that window's, after validation
        else:
            self.reports.append((report, pl_module.received))
            pl_module.received = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.look(pl_module)


class StoppedError(Exception):
    pass


class SaveAndStop(Callback):
    """Ends a run as a crash does, ten batches into the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == BATCHES + 10:
            trainer.save_checkpoint(self.path)
            raise StoppedError


def random_data():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(WORLD_SIZE * BATCHES * 16 - 7, 8)), batch_size=16)


SCENARIOS = {
    # What it validates with is far from what it is trained with.
    "healthy": lambda: (Net(), random_data(), {"on_unhealthy": "raise", "validation_batches": 0}, {}),
    "healthy, own buffers": lambda: (
        *(Net(), random_data(), {"on_unhealthy": "raise", "validation_batches": 0}),
        {"broadcast_buffers": False},
    ),
    "spoilt rank 0": lambda: (
        *(Net(0), random_data(), {"on_unhealthy": "raise", "validation_batches": 0}),
        {"broadcast_buffers": False},
    ),
    "spoilt rank 1": lambda: (
        *(Net(1), random_data(), {"on_unhealthy": "raise", "validation_batches": 0}),
        {"broadcast_buffers": False},
    ),
    "windows by batches": lambda: (Net(), random_data(), {"every_n_train_batches": 15}, {}),
    "two epochs": lambda: (Net(), random_data(), {"every_n_epochs": 2}, {}),
    "no batches on rank 1": lambda: (
        *(Alone(), DataLoader(Shards((20, 0)), batch_size=None), {}),
        {"broadcast_buffers": False, "validate": False},
    ),
    "no batches on rank 0": lambda: (
        *(Alone(), DataLoader(Shards((0, 20)), batch_size=None), {}),
        {"broadcast_buffers": False, "validate": False},
    ),
    "fewer batches on rank 1": lambda: (
        *(Alone(), DataLoader(Shards((25, 18)), batch_size=None), {}),
        {"broadcast_buffers": False, "validate": False},
    ),
    "fewer batches on rank 0, by batches": lambda: (
        *(Alone(), DataLoader(Shards((18, 21)), batch_size=None), {"every_n_train_batches": 9}),
        {"broadcast_buffers": False, "validate": False, "max_epochs": 1},
    ),
}


def outcome(scenario, folder, callbacks=(), ckpt_path=None):
    model, data, monitor_options, options = SCENARIOS[scenario]()
    monitor = BatchNormMonitor(**monitor_options)
    look = Look(monitor)
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=DDPStrategy(
            broadcast_buffers=options.get("broadcast_buffers", True), timeout=datetime.timedelta(seconds=30)
        ),
        max_epochs=options.get("max_epochs", 3),
        callbacks=[monitor, look, *callbacks],
        logger=CSVLogger(folder, name=scenario.replace(" ", "_")),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=2 if options.get("validate", True) else 0,
    )
    end = "finished"
    try:
        trainer.fit(model, data, random_data() if options.get("validate", True) else None, ckpt_path=ckpt_path)
    except StoppedError:
        end = "stopped"
    except UnhealthyBatchNormError as error:
        end = "raised" if error.report is monitor.report() else "raised another report"
    reports = [report for report, _ in look.reports]
    if end == "raised":
        reports.append(monitor.report())
    return {
        "end": (end, trainer.current_epoch),
        "reports": reports,
        "received": [received for _, received in look.reports],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("bn/")},
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
    }


def run_rank(rank, folder, port):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": WORLD_SIZE,
        "LOCAL_WORLD_SIZE": WORLD_SIZE,
    }
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (place | address).items()})
    results = {scenario: outcome(scenario, folder) for scenario in SCENARIOS}
    path = Path(folder, "saved.ckpt")
    results["stopped"] = outcome("healthy", folder, [SaveAndStop(path)])
    results["resumed"] = outcome("healthy", folder, ckpt_path=path)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=run_rank, args=(rank, str(folder), port)) for rank in range(WORLD_SIZE)]
    for process in started:
        process.start()
    give_up = time.monotonic() + 240
    for process in started:
        process.join(timeout=max(give_up - time.monotonic(), 0))
    hangs = [process.is_alive() for process in started]
    for process in started:
        process.kill()
    assert not any(hangs)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("scenario", [*SCENARIOS, "resumed"])
def test_all_ranks_have_the_same_reports_and_metrics(ranks, scenario):
    first, second = (result[scenario] for result in ranks)
    assert [report.to_dict() for report in first["reports"]] == [report.to_dict() for report in second["reports"]]
    assert first["metrics"] == second["metrics"] != {}
    assert first["end"] == second["end"]
    assert first["hooks"] == second["hooks"] == 0


WINDOWS = {
    "healthy": [40, 40, 40],
    "healthy, own buffers": [40, 40, 40],
    "windows by batches": [15] * 8,
    "two epochs": [80, 40],
    "no batches on rank 1": [20] * 3,
    "no batches on rank 0": [0] * 3,
    "fewer batches on rank 1": [25] * 3,
    "fewer batches on rank 0, by batches": [9, 9, 0],
}


@pytest.mark.parametrize("scenario", WINDOWS)
def test_every_window_has_the_data_of_all_ranks(ranks, scenario):
    results = [result[scenario] for result in ranks]
    assert results[0]["end"][0] == "finished"
    reports = results[0]["reports"]
    assert [report["norm"].num_batches for report in reports] == WINDOWS[scenario]
    for number, report in enumerate(reports):
        received = torch.cat([x for result in results for x in result["received"][number]]).double().numpy()
        layer = report["norm"]
        assert layer.num_samples == len(received)
        deviation = received.std(axis=0)
        assert (np.abs(layer.population_mean.numpy() - received.mean(axis=0)) < 1e-6 * deviation).all()
        np.testing.assert_allclose(layer.population_var.numpy(), received.var(axis=0, ddof=1), rtol=1e-5)


def test_after_a_resume_the_window_has_what_rank_0_saved_and_what_all_ranks_see_from_then_on(ranks):
    assert [result["stopped"]["end"] for result in ranks] == [("stopped", 1)] * 2
    second, third = ranks[0]["resumed"]["reports"]
    assert [report["norm"].num_batches for report in (second, third)] == [BATCHES, BATCHES]
    assert second["norm"].num_samples == (BATCHES + 30) * 16  # rank 1 saw ten batches before, which are not known
    assert third["norm"].num_samples == ranks[0]["healthy"]["reports"][2]["norm"].num_samples
    assert (
        second["norm"].evidence["initial_weight"]
        == ranks[0]["healthy"]["reports"][1]["norm"].evidence["initial_weight"]
    )


def test_all_ranks_raise_where_the_first_has_a_layer_that_needs_attention(ranks):
    for result in ranks:
        assert result["spoilt rank 0"]["end"] == ("raised", 1)
        assert result["spoilt rank 0"]["reports"][-1]["norm"].verdict == "ordered-batches"


def test_all_ranks_raise_where_the_first_has_other_data_than_the_others(ranks):
    for result in ranks:
        assert result["spoilt rank 1"]["end"] == ("raised", 1)
        layer = result["spoilt rank 1"]["reports"][-1]["norm"]
        assert (layer.verdict, layer.flags) == ("healthy", ("half-frozen", "rank-0-only"))  # the learning rate is zero


@pytest.mark.parametrize("scenario", ["healthy", "healthy, own buffers"])
def test_no_rank_raises_where_all_layers_are_healthy(ranks, scenario):
    assert [result[scenario]["end"] for result in ranks] == [("finished", 3)] * 2
