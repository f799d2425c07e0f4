"""Whether layers' weights and biases are those that a window ended with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.compat import PARAMETERS, BatchNorm, is_lazy


class AffineWeights:
    """Copies of layers' weights and biases, one tensor for each device and dtype, which stay where they are.

    Those that are not plain tensors of a layer's channels (sharded or computed ones, say) are left out.

    Args:
        layers: The layers.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[BatchNorm]) -> None:
        self._owners: dict[tuple[torch.device, torch.dtype], list[tuple[BatchNorm, str]]] = {}
        present: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for layer in layers:
            for name, values in _plain(layer):
                key = values.device, values.dtype
                self._owners.setdefault(key, []).append((layer, name))
                present.setdefault(key, []).append(values)
        self._copies = {key: _joined(values) for key, values in present.items()}

    @property
    def is_known(self) -> bool:
        """Whether there are any."""
        return bool(self._copies)

    def changed(self) -> set[BatchNorm]:
        """Layers whose weight or bias is not what it was. Of those that have moved elsewhere nothing is known."""
        return self.compared()[0]

    @torch.no_grad()
    def compared(self) -> tuple[set[BatchNorm], set[BatchNorm]]:
        """Layers whose weight or bias is not what it was, and those of which all that is known is."""
        changed, same = set[BatchNorm](), set[BatchNorm]()
        for key, owners in self._owners.items():
            layers = dict.fromkeys(layer for layer, _ in owners)
            plain = {(layer, name): values for layer in layers for name, values in _plain(layer)}
            now = [plain[owner] for owner in owners if owner in plain]
            if len(now) < len(owners) or any((values.device, values.dtype) != key for values in now):
                continue
            before, after = self._copies[key], _joined(now)
            if before.shape != after.shape:  # it may be given others
                continue
            differs = (before != after) & ~(before.isnan() & after.isnan())
            starts = [0, *itertools.accumulate(layer.num_features for layer, _ in owners)][:-1]
            has_changed = np.logical_or.reduceat(differs.cpu().numpy(), starts)
            for (layer, _), is_other in zip(owners, has_changed, strict=True):
                (changed if is_other else same).add(layer)
        return changed, same - changed


def has_frozen_weights(layer: BatchNorm) -> bool:
    """Whether a layer has weights, and none of them trains."""
    parameters = [parameter for parameter in vars(layer)[PARAMETERS].values() if parameter is not None]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _plain(layer: BatchNorm) -> Iterator[tuple[str, Tensor]]:
    attributes = vars(layer)
    parameters = attributes[PARAMETERS]
    for name in ("weight", "bias"):
        if f"{name}_orig" in parameters:  # pruning computes it anew with each call
            continue
        # Not by `getattr`: a parametrization computes what is looked up, with random numbers perhaps.
        values: Any = parameters.get(name, attributes.get(name))
        is_plain = type(values) in (Tensor, nn.Parameter) and not is_lazy(values) and not values.is_meta
        if is_plain and values.numel() == layer.num_features and _has_memory(values):
            yield name, values


def _has_memory(values: Tensor) -> bool:
    """Whether a tensor's values are there: FSDP frees those of a parameter between uses, and to read them crashes."""
    needed = (values.storage_offset() + values.numel()) * values.element_size()
    return values.untyped_storage().nbytes() >= needed


def _joined(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([each if each.ndim == 1 else each.reshape(-1) for each in values])
