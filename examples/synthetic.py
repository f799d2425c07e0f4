"""Train a small convolutional network on synthetic images, monitored, and see which running statistics to trust.

Most layers are healthy. Two are not, by causes that are found in real code:

- ``stem.1`` has ``momentum=0.001``: its running statistics need thousands of batches to arrive, and the training is
  over before.
- ``head.1`` normalises the globally pooled features of 4 images at a time ("ghost batches"): each batch has 4 values
  per channel, and the running statistics jump with every one of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bnmonitor import BatchNormMonitor, attribute_eval_gap, recalibrate

NUM_CLASSES = 4
GHOST_BATCH = 4


class Stripes(LightningModule):
    """Classifies images of stripes by their orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=0.001), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.classifier = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes), of images (N, 3, H, W)."""
        features = self.body(self.stem(images)).mean(dim=(2, 3))
        groups = features.split(GHOST_BATCH) if self.training else (features,)
        return self.classifier(torch.cat([self.head(group) for group in groups]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return self._loss(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The same, in eval mode: with running statistics."""
        self._loss(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def _loss(self, batch: list[Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        metrics = {f"loss/{stage}": loss, f"accuracy/{stage}": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        return loss


def stripes(num_images: int, seed: int, size: int = 32) -> TensorDataset:
    """Noisy stripes of random phase and wavelength in one of four orientations, with the brightness of photographs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    angle = labels * torch.pi / NUM_CLASSES
    wavelength, phase = torch.rand(2, num_images, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    waves = torch.sin(2 * torch.pi * (along / (6 + 6 * wavelength)[:, None, None] + phase[:, None, None]))
    tint = 0.5 + 0.5 * torch.rand(num_images, 3, 1, 1, generator=generator)
    images = 0.5 + 0.25 * tint * waves[:, None] + 0.2 * torch.randn(num_images, 3, size, size, generator=generator)
    return TensorDataset(images, labels)


def cross_entropy(logits: Tensor, batch: list[Tensor]) -> Tensor:
    """The loss of each image, (N,)."""
    return nn.functional.cross_entropy(logits, batch[1], reduction="none")


def main() -> None:
    """Train, print the report, and tell how to look at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="lightning_logs", help="where TensorBoard files go (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--images",
        type=int,
        default=2048,
        help="to train on, a quarter as many beside them to validate on (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument(
        "--repair", action="store_true", help="then say what the running statistics cost, and repair them"
    )
    args = parser.parse_args()

    seed_everything(args.seed, verbose=False)
    model = Stripes()
    if args.compile:
        model.compile()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(args.logdir, name="synthetic"),
        callbacks=[BatchNormMonitor()],
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    training = DataLoader(stripes(args.images, args.seed), args.batch_size, shuffle=True, drop_last=True)
    validation = DataLoader(stripes(args.images // 4, args.seed + 1), args.batch_size)
    trainer.fit(model, training, validation)
    if args.repair:
        print(f"\n{attribute_eval_gap(model, training, cross_entropy, progress=False)}\n")
        print(recalibrate(model, training))
        trainer.validate(model, validation)
    tensorboard = "tensorboard" if shutil.which("tensorboard") else Path(sys.executable).with_name("tensorboard")
    print(f"\nLook at it:\n{tensorboard} --logdir {args.logdir}")


if __name__ == "__main__":
    main()
