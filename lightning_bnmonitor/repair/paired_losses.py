"""Losses of the same batches, pass after pass, of a model that stays as it was: they can be compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bnmonitor.repair.passes import Forward, generators_as_before, run, training_only

Loss = Callable[[Any, Any], Tensor]
Difference = tuple[float, float]
"""A mean difference of losses, infinite if only one of them is not finite, and its standard error."""


class PairedLosses:
    """Passes of the same batches through a model. Each gives one loss per batch, or one per sample.

    Args:
        model: The root module.
        batches: What to pass through it, again and again.
        loss: Called with the model's output and the batch.
        forward: Called with the model and a batch, to run it.
        progress: Whether to show a progress bar.
        argument: What the batches are called in errors.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], loss: Loss, forward: Forward, progress: bool, argument: str
    ) -> None:
        if isinstance(batches, Iterator):
            with training_only(model, ()):  # random states are as before
                batches = list(batches)
        self.model = model
        self.batches = batches
        self.loss = loss
        self.forward = forward
        self.progress = progress
        self.argument = argument
        self.output: Any = None
        self.num_losses: int | None = None
        self.rounding = 0.0  # of a loss, relative to it: need not average out

    @torch.no_grad()
    def losses(self, label: str, in_training: Iterable[nn.Module] = ()) -> Tensor:
        """Losses with these modules in training mode, in float64."""
        collected: list[Tensor] = []
        with training_only(self.model, in_training), generators_as_before(self.batches):
            run(self.model, self.measured(label, collected), self.run_model)
        return self.joined(collected)

    def joined(self, collected: list[Tensor]) -> Tensor:
        """The losses of all batches of a pass, as many as in the others."""
        losses = torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *collected])
        if len(losses) < 2:
            raise ValueError(
                f"`{self.argument}` must give two batches or more, or `loss` one value for each sample: "
                f"{len(collected)} batches gave {len(losses)} losses, and a difference of which one cannot tell "
                "whether it is chance."
            )
        if len(losses) != (self.num_losses or len(losses)):
            raise ValueError(
                f"`{self.argument}` gave {self.num_losses} losses when it was iterated first, and {len(losses)} later: "
                "it must give the same batches each time."
            )
        self.num_losses = len(losses)
        return losses

    def measured(self, label: str, collected: list[Tensor]) -> Iterator[Any]:
        """The batches, with a progress bar. When the next is asked for, the model has been run on this one."""
        from tqdm.auto import tqdm

        total = length_hint(self.batches) or None
        once = iter(self.batches)  # tqdm would make two iterators, and a loader start its workers twice
        with tqdm(once, label, total, leave=False, disable=not self.progress) as bar:
            for index, batch in enumerate(bar):
                yield batch
                collected.append(self._loss_of(index, batch))

    def run_model(self, model: nn.Module, batch: Any) -> None:
        """Run the model, and keep the output for the loss."""
        self.output = self.forward(model, batch)

    def _loss_of(self, index: int, batch: Any) -> Tensor:
        """The loss of one batch, of one value or of as many as samples."""
        output, self.output = self.output, None
        try:
            value = torch.as_tensor(self.loss(output, batch))
        except Exception as error:
            raise RuntimeError(
                f"`loss` cannot be computed for batch {index}: {error!r}. Nothing was changed."
            ) from error
        if value.ndim > 1:
            raise ValueError(f"`loss` must return a scalar or one value for each sample, got {tuple(value.shape)}.")
        if value.is_floating_point():
            self.rounding = max(self.rounding, torch.finfo(value.dtype).eps)
        return value.detach().reshape(-1).to("cpu", torch.float64)

    def difference(self, one: Tensor, other: Tensor) -> Difference:
        """How much larger the first losses are than the second, in pairs; the rounding of losses is in its error."""
        if not _both_finite(one, other):
            return _infinite_difference(one, other)
        difference = one - other
        by_chance = float(difference.std()) / math.sqrt(len(difference))
        return float(difference.mean()), math.hypot(by_chance, self.rounding * float(other.abs().mean()))


def difference_of_samples(one: Tensor, other: Tensor) -> Difference:
    """How much larger the losses of some batches are than those of others."""
    if not _both_finite(one, other):
        return _infinite_difference(one, other)
    errors = [float(losses.std()) / math.sqrt(len(losses)) for losses in (one, other)]
    return float(one.mean() - other.mean()), math.hypot(*errors)


def _both_finite(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isfinite(one).all() and torch.isfinite(other).all())


def _infinite_difference(one: Tensor, other: Tensor) -> Difference:
    if bool(torch.isfinite(other).all()):
        return math.inf, math.nan
    return (-math.inf if bool(torch.isfinite(one).all()) else math.nan), math.nan
