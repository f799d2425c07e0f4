"""What people's projects have in them: models, data modules, functions. Commands import it by its name."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MODEL, DATA = (f"{__name__}:{name}" for name in ("Net", "Data"))
SHIFT = 3.0  # of the inputs: what running statistics have to learn
FEATURES = 4


def inputs(seed: int, rows: int = 96) -> Tensor:
    return SHIFT + 2 * torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))


def loader(seed: int = 0, batch_size: int = 16, rows: int = 96, **options) -> DataLoader:
    x = inputs(seed, rows)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size, **options)


class Net(LightningModule):
    def __init__(self, width: int = 8, momentum: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.BatchNorm1d(FEATURES, momentum=momentum)
        self.body = nn.Linear(FEATURES, width)
        self.second = nn.BatchNorm1d(width, momentum=momentum)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.second(self.body(self.first(x))).relu())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 16, shuffle: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(0, self.hparams.batch_size, shuffle=self.hparams.shuffle)

    def val_dataloader(self):
        return loader(1, self.hparams.batch_size)


class OtherValidation(Data):
    """Validation data are prepared in another way."""

    def val_dataloader(self):
        x = inputs(1)
        return DataLoader(TensorDataset(x + 9, x.sum(1, keepdim=True)), self.hparams.batch_size)


class SplitByChance(Data):
    """What it trains on is drawn anew each time, unless the seed is the same."""

    drawn: ClassVar[list[Tensor]] = []

    def setup(self, stage):
        self.rows = torch.randperm(96)[:64]
        self.drawn.append(self.rows)

    def train_dataloader(self):
        x = inputs(0)[self.rows]
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), self.hparams.batch_size)


class NoData(Data):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.empty(0, FEATURES), torch.empty(0, 1)), 16)


class FailingData(Data):
    def setup(self, stage):
        raise OSError("the disk is gone")


class NormalisedOnDevice(Data):
    """Shifts the data back, in training otherwise than in validation."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x - SHIFT if self.trainer.training else x + 100), y


class SeveralLoaders(Data):
    def train_dataloader(self):
        return {"a": loader(0), "b": loader(5)}

    def val_dataloader(self):
        return [loader(1), loader(2)]


class NamedBatches(Net):
    """`model(batch)` is not how to run it, and arguments have other names."""

    def training_step(self, batch, number):
        assert number >= 0
        return {"loss": super().training_step([batch["a"][0], batch["a"][1]], number), "more": 1}

    def validation_step(self, batch, number, which=0):
        super().validation_step(batch, number)


class WithHead(Net):
    """One of its arguments is a module."""

    def __init__(self, head: nn.Module, width: int = 8) -> None:
        super().__init__(width)
        self.save_hyperparameters()
        self.head = head


class Manual(Net):
    """`training_step` steps itself: by itself it must not be run."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("run without its Trainer")


class NeedsOptimizers(Net):
    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        return super().training_step(batch, batch_idx)


class MovesWeights(Net):
    """As those that keep an average of themselves."""

    def training_step(self, batch, batch_idx):
        self.body.weight.data.mul_(0.5)
        return super().training_step(batch, batch_idx)


class OldNames(Net):
    """Its checkpoints had another name for a layer, which it still loads."""

    def on_load_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        for name in [name for name in weights if name.startswith("old.")]:
            weights[f"first.{name.removeprefix('old.')}"] = weights.pop(name)


class LoadsSome(Net):
    """Its checkpoints lack what is loaded from elsewhere."""

    strict_loading = False


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.eval()
        self.second.eval()


class Shared(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.first


class BuiltInSetup(LightningModule):
    def setup(self, stage):
        self.net = Net(width=self.trainer.datamodule.hparams.batch_size // 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class Wrapped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class NoNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Identity()


class NeedsArguments(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hparams.clear()


class OneDict(LightningModule):
    """Its hyperparameters come in one argument."""

    def __init__(self, hparams: dict) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = Net(hparams["width"])

    def training_step(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.net.configure_optimizers()


class WithLoaders(Net):
    def train_dataloader(self):
        return loader(0)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def wide_net() -> Net:
    return Net(width=16)


def no_model() -> int:
    return 3


def training_loader() -> DataLoader:
    return loader(0)


def squared_error(output: Tensor, batch: list[Tensor]) -> Tensor:
    return (output - batch[1]).square().mean(1)


def run_on_inputs(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0])


NOT_CALLABLE = 3
