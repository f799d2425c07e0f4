"""What is compared with no monitor at all: hooks on every BatchNorm layer that do nothing, or what others would do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bnmonitor import BatchNormTracker

NONE, AGAIN, EMPTY, OURS, GUARDED = "no monitor", "no monitor, again", "empty hook", "ours", "ours, guard=True"


class Hooks:
    """A variant: a forward hook on every BatchNorm layer, and what it keeps."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.kept: list[Any] = [self.begin(layer) for layer in layers]
        self.handles = [
            layer.register_forward_hook(self.hook_of(index)) for index, layer in enumerate(layers) if self.is_hooked
        ]

    is_hooked = True

    def begin(self, layer: _BatchNorm) -> Any:
        """What is kept of a layer before its first call."""
        return None

    def hook_of(self, index: int) -> Callable[..., None]:
        """The hook of a layer."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.take(index, args[0].detach())

        return hook

    def take(self, index: int, x: Tensor) -> None:
        """Take what a layer received."""

    def end_round(self) -> None:
        """Outside what is timed."""

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


class Unhooked(Hooks):
    """Nothing at all."""

    is_hooked = False


class Empty(Hooks):
    """A hook that does nothing."""

    def hook_of(self, index: int) -> Callable[..., None]:
        """One that does not even look."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            pass

        return hook


class Naive(Hooks):
    """Mean and variance of the last batch."""

    def take(self, index: int, x: Tensor) -> None:
        """Two reductions."""
        dims = [dim for dim in range(x.ndim) if dim != 1]
        self.kept[index] = (x.mean(dims), x.var(dims))


class Welford(Hooks):
    """Count, mean and sum of squared deviations in float64, merged batch by batch."""

    def begin(self, layer: _BatchNorm) -> Any:
        """Zeros."""
        return [torch.zeros((), dtype=torch.float64), *torch.zeros(2, layer.num_features, dtype=torch.float64)]

    def take(self, index: int, x: Tensor) -> None:
        """Chan's merge."""
        x = x.double()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        count, before, m2 = self.kept[index]
        added = x.numel() // x.shape[1]
        delta, total = mean - before, count + added
        self.kept[index] = [
            total,
            before + delta * (added / total),
            m2 + var * added + delta.square() * (count * added / total),
        ]


class Stack(Hooks):
    """All inputs, as the published experiment kept them."""

    def begin(self, layer: _BatchNorm) -> Any:
        """No input."""
        return []

    def take(self, index: int, x: Tensor) -> None:
        """Keep it, as a copy: an inplace activation may overwrite it."""
        self.kept[index].append(x.clone())

    def end_round(self) -> None:
        """Or the memory would not last."""
        for inputs in self.kept:
            inputs.clear()


class Ours:
    """The tracker."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.kept = BatchNormTracker(model, **options).attach()

    def end_round(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Remove the hooks."""
        self.kept.detach()


VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    NONE: Unhooked,
    AGAIN: Unhooked,
    EMPTY: Empty,
    OURS: Ours,
    GUARDED: partial(Ours, guard=True),
    "naive mean and var": Naive,
    "Welford in float64": Welford,
    "stack all inputs": Stack,
}
