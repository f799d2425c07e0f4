"""Whether layers' weights and biases are those that a window ended with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_bnmonitor.compat import BatchNorm, is_lazy


class AffineWeights:
    """Copies of layers' weights and biases, one tensor for each device and dtype, which stay where they are.

    Those that are not plain tensors of a layer's channels (sharded ones, say) are left out.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[BatchNorm]) -> None:
        self._owners: dict[tuple[torch.device, torch.dtype], list[tuple[BatchNorm, str]]] = {}
        for layer in layers:
            for name, values in _plain(layer):
                self._owners.setdefault((values.device, values.dtype), []).append((layer, name))
        self._copies = {key: torch.cat(_values(owners)) for key, owners in self._owners.items()}

    @property
    def is_known(self) -> bool:
        """Whether there are any."""
        return bool(self._copies)

    @torch.no_grad()
    def changed(self) -> set[BatchNorm]:
        """Layers whose weight or bias is not what it was. Of those that have moved elsewhere nothing is known."""
        changed: set[BatchNorm] = set()
        for key, owners in self._owners.items():
            now = [(owner, dict(_plain(owner[0])).get(owner[1])) for owner in owners]
            if any(values is None or (values.device, values.dtype) != key for _, values in now):
                continue
            before, after = self._copies[key], torch.cat(_values(owners))
            differs = (before != after) & ~(before.isnan() & after.isnan())
            parts = torch.split(differs.cpu(), [layer.num_features for layer, _ in owners])
            changed.update(layer for (layer, _), part in zip(owners, parts, strict=True) if part.any())
        return changed


def _plain(layer: BatchNorm) -> Iterator[tuple[str, Tensor]]:
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        is_plain = type(values) in (Tensor, nn.Parameter) and not is_lazy(values) and not values.is_meta
        if is_plain and values.numel() == layer.num_features and _has_memory(values):
            yield name, values


def _has_memory(values: Tensor) -> bool:
    """Whether a tensor's values are there: FSDP frees those of a parameter between uses, and to read them crashes."""
    needed = (values.storage_offset() + values.numel()) * values.element_size()
    return values.untyped_storage().nbytes() >= needed


def _values(owners: Iterable[tuple[BatchNorm, str]]) -> list[Tensor]:
    return [getattr(layer, name).detach().reshape(-1) for layer, name in owners]
