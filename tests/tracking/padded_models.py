"""Small models of padded sequences, and what of their inputs counts, kept value by value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.statistics.two_pass import two_pass

Batch = tuple[Tensor, Tensor]
"""Sequences ``(B, 4, T)``, padded with zeros, and their lengths."""


def network() -> nn.Sequential:
    """Layers of full, of half and of a quarter of the length, and one of pooled inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Conv1d(5, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 3, 3, stride=2, padding=1), nn.BatchNorm1d(3), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(3),
    )  # fmt: skip


def lengths_to_mask(batch: Batch) -> Tensor:
    x, lengths = batch
    return torch.arange(x.shape[-1], device=x.device) < lengths[:, None]


def batches(num: int, seed: int = 0, offset: float = 1.0, size: int = 6, longest: int = 64) -> list[Batch]:
    """Sequences of very different lengths, padded to the longest of their batch (and to a multiple of 4)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        lengths = 8 + (torch.rand(size, generator=generator) ** 3 * (longest - 8)).long()
        x = torch.randn(size, 4, int(-(-lengths.max() // 4) * 4), generator=generator) + offset
        made.append((torch.where(lengths_to_mask((x, lengths))[:, None], x, 0), lengths))
    return made


class Records:
    """What BatchNorm layers receive, and which of it counts by where each position looks."""

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, list[np.ndarray]] = {}
        self.kept: dict[str, list[np.ndarray]] = {}
        self.mask: Tensor | None = None
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(lambda _, args, __, name=name: self._record(name, *args))

    def _record(self, name: str, x: Tensor) -> None:
        if self.mask is None:
            return
        values = x.detach().double()
        every = values.movedim(1, -1).reshape(-1, x.shape[1]).numpy()
        if x.ndim == 2:
            mask = self.mask.any(1)
        else:
            stride = self.mask.shape[1] // x.shape[2]
            mask = self.mask[:, stride // 2 :: stride]
        self.values.setdefault(name, []).append(every)
        self.kept.setdefault(name, []).append(every[mask.reshape(-1).numpy()])

    def unpadded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return two_pass(np.concatenate(self.kept[name]))

    def share(self, name: str) -> float:
        return 1 - sum(map(len, self.kept[name])) / sum(map(len, self.values[name]))


def assert_unpadded(layer, records: Records, name: str, bound: float = 1e-6) -> None:
    mean, var = records.unpadded(name)
    assert np.abs(layer.unpadded[0].numpy() - mean).max() <= bound * np.sqrt(var).max()
    np.testing.assert_allclose(layer.unpadded[1].numpy(), var, rtol=bound)
    assert abs(layer.evidence["padding_share"] - records.share(name)) < 1e-12
