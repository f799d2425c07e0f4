"""Where a mask tells padding from values that count: what is kept of each layer, and what follows from it.

This is beside the windows, as padding is known of some layers and some calls only. 48 bytes a channel, and up to 8
calls that wait to be merged, 32 bytes a channel each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from operator import delitem, setitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bnmonitor.capture.masked_calls import MaskedMoments
from lightning_bnmonitor.diagnosis.evidence import of_padding
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.padding import ROWS, SCALARS, PaddedSums, padding_of, pooled, with_batches
from lightning_bnmonitor.statistics.side_by_side import on_device
from lightning_bnmonitor.statistics.window import commit
from lightning_bnmonitor.tracking import collectives
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer

_WAITING = 8


class KnownPadding(NamedTuple):
    """What is known of padding in a window."""

    sums: Mapping[TrackedLayer, PaddedSums] = {}
    """Of layers whose masks told of it."""
    ends: float | None = None
    """Share of the model's inputs that looks like padding, if there are no masks."""


class LayerPadding(NamedTuple):
    """What padding does to one layer."""

    evidence: Mapping[str, float]
    """A part of the layer's evidence."""
    unpadded: Tensor | None = None
    """Mean and unbiased variance of the values that count, ``(2, C)``; None if no mask told of them."""


class Paddings:
    """What is kept of all layers in a window."""

    def __init__(self) -> None:
        self._sums: dict[TrackedLayer, PaddedSums] = {}
        self._waiting: dict[TrackedLayer, list[MaskedMoments]] = {}

    def add(self, layer: TrackedLayer, moments: MaskedMoments) -> None:
        """Add a call of a layer. It has told which of its values count."""
        with layer.gate.lock:
            waiting = self._waiting.setdefault(layer, [])
            waiting.append(moments)
            if len(waiting) >= _WAITING:
                self._merge(layer)

    def reset(self) -> None:
        """Forget all."""
        self._sums, self._waiting = {}, {}

    def sums(self) -> Mapping[TrackedLayer, PaddedSums]:
        """What is kept of each layer that has had a mask, on the CPU."""
        for layer in [*self._waiting]:
            self._merge(layer)
        return {layer: PaddedSums(*(part.cpu() for part in sums)) for layer, sums in self._sums.items()}

    def gathered(self, layers: Sequence[TrackedLayer]) -> Mapping[TrackedLayer, PaddedSums]:
        """The same of all ranks together, on rank 0, in a collective that all call with the same layers in order."""
        own, widths = self.sums(), [layer.width or layer.module.num_features for layer in layers]
        nothing = [PaddedSums.empty(width, torch.device("cpu")) for width in widths]
        packed = [own.get(layer, empty).packed() for layer, empty in zip(layers, nothing, strict=True)]
        sizes = [SCALARS + ROWS * width for width in widths]
        ranks = [torch.split(message, sizes) for message in collectives.gather(torch.cat(packed))]
        together = (pooled([PaddedSums.unpacked(part) for part in parts]) for parts in zip(*ranks, strict=True))
        return {layer: sums for layer, sums in zip(layers, together, strict=False) if sums.is_any}

    def state(self, layers: Collection[TrackedLayer]) -> dict[str, Any]:
        """What :meth:`restore` needs of these layers: one CPU tensor, and their names."""
        present = set(layers)
        kept = {layer: sums.packed() for layer, sums in self.sums().items() if layer in present}
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        return {
            "layers": [{"name": layer.name, "size": len(packed)} for layer, packed in kept.items()],
            "sums": torch.cat([nothing, *kept.values()]),
        }

    def restore(self, state: Mapping[str, Any], layers: Mapping[str, TrackedLayer]) -> None:
        """Go on from a :meth:`state` with those of its layers that there are, by name, which have their widths."""
        parts = torch.split(state["sums"], [saved["size"] for saved in state["layers"]]) if state["layers"] else ()
        for saved, packed in zip(state["layers"], parts, strict=True):
            layer = layers.get(saved["name"])
            if layer is not None and layer.window is not None and len(packed) == SCALARS + ROWS * layer.width:
                self._sums[layer] = PaddedSums.unpacked(packed.to(layer.window.device))

    def _merge(self, layer: TrackedLayer) -> None:
        """Merge what waits of a layer, in one step."""
        waiting = self._waiting[layer][:]
        if not waiting:
            return
        totals, *parts = zip(*waiting, strict=True)
        before = self._sums.get(layer) or PaddedSums.empty(layer.module.num_features, _home_of(parts[0][0].device))
        device = before.scalars.device  # the model may have been moved meanwhile
        count, kept, every = (torch.stack([its.to(device).double() for its in part]) for part in parts)
        total = on_device(np.array(totals, dtype=float), device)
        if layer.gate.is_guarded:  # what a guard undoes is in no statistics
            is_good = (kept + every).isfinite().all(dim=2).all(dim=1)
            count, total = count * is_good, total * is_good
            kept, every = (torch.where(is_good[:, None, None], part, 0) for part in (kept, every))
        sums = with_batches(before, total, count, kept, every)
        commit([partial(setitem, self._sums, layer, sums), partial(delitem, self._waiting[layer], slice(len(waiting)))])


def of_layers(
    known: KnownPadding,
    layers: Sequence[TrackedLayer],
    population: FloatArray,
    layout: ChannelLayout,
    eps: FloatArray,
) -> list[LayerPadding]:
    """What padding does to each of these layers.

    Args:
        known: What is known of it, of all ranks if that is what the population is of.
        layers: Those that are asked for.
        population: Mean and unbiased variance of all that they received, ``(2, C)``.
        layout: Which channels are whose.
        eps: Of each layer, ``(L,)``.
    """
    sums, ends = known
    found = [
        LayerPadding({} if ends is None or not isinstance(layer.module, nn.BatchNorm1d) else {"constant_ends": ends})
        for layer in layers
    ]
    fitting = [
        index for index, layer in enumerate(layers) if layer in sums and sums[layer].width == layout.widths[index]
    ]
    if not fitting:
        return found
    own, columns = ChannelLayout(layout.widths[fitting]), layout.columns(np.array(fitting))
    scalars = torch.stack([sums[layers[index]].scalars for index in fitting], dim=1).numpy()
    channels = torch.cat([sums[layers[index]].channels for index in fitting], dim=1).numpy()
    padding = padding_of(scalars, channels, population[:, columns], own, eps[fitting])
    for index, evidence, channels_of in zip(fitting, of_padding(padding), own.slices, strict=True):
        found[index] = LayerPadding(evidence, torch.from_numpy(padding.unpadded[:, channels_of].copy()))
    return found


def _home_of(device: torch.device) -> torch.device:
    """Where what comes from there is kept: on the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
