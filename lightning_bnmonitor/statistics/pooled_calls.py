"""Calls of one layer pooled as they come, in memory that does not grow with their number."""

from __future__ import annotations

import torch
from torch import Tensor


class PooledCalls:
    r"""Mean of batch means and of unbiased batch variances, and how far batches differ from these and from each other.

    Calls are merged one by one: with weight g (n for the mean, n - 1 for the variance) of a batch with value x, and G
    of those before, :math:`\bar x \mathrel{+}= (x - \bar x)\, g / (G + g)` and
    :math:`M \mathrel{+}= (x - \bar x)^2\, G g / (G + g)` (Chan, Golub and LeVeque, 1979); of neighbours with the
    weights g and h, :math:`(x - x')^2\, g h / (g + h)` is added up besides, which tells the scatter of calls also where
    they come sorted. Nothing waits for the device.
    """

    def __init__(self) -> None:
        self.num_batches = 0
        self.num_samples = 0
        """Values per channel."""
        self.batch_size = 0
        """Samples of all batches."""
        self.value: Tensor | None = None
        """Mean of the means, weighted by n, and of the variances, by n - 1, ``(2, C)`` float64; None before a call."""
        self.m2: Tensor | None = None
        """The weighted sum of their squared deviations from it, ``(2, C)``."""
        self.between_neighbours: Tensor | None = None
        """That of the squared differences of neighbouring calls, ``(2, C)``."""
        self._last: tuple[int, Tensor] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, num_samples: int, batch_size: int, mean: Tensor, var: Tensor) -> None:
        """Add a batch. One of another width than the first is left out.

        Args:
            num_samples: Values per channel, at least 1.
            batch_size: Samples.
            mean: Their mean, ``(C,)``.
            var: Their biased variance, ``(C,)``.
        """
        if mean.device.type == "mps":  # which has no float64
            mean, var = mean.cpu(), var.cpu()
        batch = torch.stack([mean.double(), var.double().clamp_min(0) * (num_samples / max(num_samples - 1, 1))])
        if self.value is None or self.m2 is None or self.between_neighbours is None:
            self.value, self.m2, self.between_neighbours = (torch.zeros_like(batch) for _ in range(3))
        elif self.value.shape != batch.shape:
            return
        step = batch - self.value
        weights = (self.num_samples, num_samples), (self.num_samples - self.num_batches, num_samples - 1)
        for row, (before, added) in enumerate(weights):
            if added:
                share = added / (before + added)
                self.value[row].add_(step[row], alpha=share)
                self.m2[row].addcmul_(step[row], step[row], value=before * share)
        if self._last is not None:
            before, last = self._last
            apart = batch - last
            for row, (one, other) in enumerate([(before, num_samples), (before - 1, num_samples - 1)]):
                if one and other:
                    self.between_neighbours[row].addcmul_(apart[row], apart[row], value=one * other / (one + other))
        self._last = num_samples, batch
        self.num_batches += 1
        self.num_samples += num_samples
        self.batch_size += batch_size
