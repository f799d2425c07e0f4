"""The training of ``synthetic.py`` by LightningCLI, unmonitored: it leaves a config and a checkpoint.

python synthetic_cli.py fit --model synthetic.Stripes --data synthetic_cli.StripesData
"""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from synthetic import stripes
from torch.utils.data import DataLoader


class StripesData(LightningDataModule):
    """Images to train on, and a quarter as many to validate on."""

    def __init__(self, images: int = 2048, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        """Shuffled, without a small last batch."""
        return DataLoader(
            stripes(self.hparams.images, self.hparams.seed), self.hparams.batch_size, shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader:
        """Other images."""
        return DataLoader(stripes(self.hparams.images // 4, self.hparams.seed + 1), self.hparams.batch_size)


if __name__ == "__main__":
    LightningCLI(trainer_defaults={"max_epochs": 8, "accelerator": "cpu"}, seed_everything_default=0)
