"""The layers that are called several times in a training step: the contrasts of their calls, merged with the window.

Steps that an optimizer divides, as that of a GAN, are as many as their parts: the calls of each have the same weights.

Nothing is kept of a layer before a step with two of its calls has ended; from then on 192 bytes a channel. Layers whose
calls have come in the same steps are merged together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from operator import setitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.statistics.call_contrasts import ROWS, SAVED, CallContrasts, Progress, with_steps
from lightning_bnmonitor.statistics.side_by_side import joined, on_device, rows_of, to_unbiased_variances
from lightning_bnmonitor.statistics.window import Batches, Write
from lightning_bnmonitor.tracking.call_counts import WaitingCalls
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer


class _Site(NamedTuple):
    """Where the contrasts of a layer lie, and what has been seen of it."""

    device: torch.device
    channels: slice
    progress: Progress


class CallSites:
    """The contrasts of all layers that are called several times in a step, flat over the channels of each device."""

    def __init__(self) -> None:
        self._rows: dict[torch.device, Tensor] = {}
        self._sites: dict[TrackedLayer, _Site] = {}

    @property
    def layers(self) -> Collection[TrackedLayer]:
        """Those that are called several times in a step."""
        return self._sites.keys()

    def merged(self, waiting: Mapping[TrackedLayer, WaitingCalls]) -> list[Write]:
        """What is to be written to add calls that wait, to layers that are called several times in a step."""
        rows, sites = dict(self._rows), dict(self._sites)
        _place(
            [layer for layer, calls in waiting.items() if layer not in sites and _is_called_again(layer, calls.parts)],
            rows,
            sites,
        )
        groups: dict[tuple[torch.device, Progress, tuple[int, ...]], list[TrackedLayer]] = defaultdict(list)
        for layer, site in sites.items():
            steps = waiting[layer].parts if layer in waiting else ()
            if steps or (site.progress.open_calls and site.progress.open_step < layer.gate.parts):
                groups[site.device, site.progress, steps].append(layer)
        writes: list[Write] = []
        for (device, progress, steps), layers in groups.items():
            columns = _columns([sites[layer].channels for layer in layers], rows[device])
            old = rows[device] if columns is None else rows[device].index_select(3, columns)
            batches = [calls.batches for layer in layers if (calls := waiting.get(layer)) and calls.batches]
            values = values_of(batches, device) if batches else old.new_empty(0, *old.shape[2:])
            new, progress = with_steps(old, progress, values, steps, layers[0].gate.parts)
            if columns is None:
                writes.append(partial(Tensor.copy_, rows[device], new))
            else:
                writes.append(partial(Tensor.index_copy_, rows[device], 3, columns, new))
            sites.update((layer, sites[layer]._replace(progress=progress)) for layer in layers)
        if writes:
            writes += [partial(setitem, vars(self), "_rows", rows), partial(setitem, vars(self), "_sites", sites)]
        return writes

    def reset(self) -> None:
        """Forget all steps, keep the layers."""
        self._rows = {device: torch.zeros_like(rows) for device, rows in self._rows.items()}
        self._sites = {layer: site._replace(progress=site.progress.restarted()) for layer, site in self._sites.items()}

    def contrasts(self, layers: Sequence[TrackedLayer]) -> CallContrasts | None:
        """What was seen of these layers, on the CPU; None if none of them is called several times in a step."""
        here = [index for index, layer in enumerate(layers) if layer in self._sites]
        if not here:
            return None
        rows = {device: rows[:_OPEN_ROW].cpu().numpy() for device, rows in self._rows.items()}
        sites = [self._sites[layers[index]] for index in here]
        mean, m2 = np.concatenate([rows[site.device][..., site.channels] for site in sites], axis=-1)
        return CallContrasts(here, [site.progress for site in sites], mean, m2)

    def state(self, layers: Collection[TrackedLayer]) -> dict[str, Any]:
        """What :meth:`restore` needs of these layers. A step in progress is not a part of it."""
        parts, states = [torch.empty(SAVED, 0, dtype=torch.float64, device="cpu")], []
        channels = {device: rows[:_OPEN_ROW].flatten(0, 2).cpu() for device, rows in self._rows.items()}
        present = set(layers)
        for layer, site in self._sites.items():
            if layer in present:
                parts.append(channels[site.device][:, site.channels])
                progress = site.progress
                states.append(
                    {
                        "name": layer.name,
                        "width": layer.width,
                        "num_steps": list(progress.num_steps),
                        "steps": progress.steps,
                        "calls": progress.calls,
                    }
                )
        return {"channels": torch.cat(parts, dim=-1), "layers": states}

    def restore(self, state: Mapping[str, Any], layers: Mapping[str, TrackedLayer]) -> None:
        """Give layers (by name) what was saved of them. They have their places in the window."""
        start, rows, sites = 0, dict(self._rows), dict(self._sites)
        restored = []
        for saved in state["layers"]:
            own = state["channels"][:, start : start + saved["width"]]
            start += saved["width"]
            layer = layers.get(saved["name"])
            if layer is not None and layer.width == saved["width"]:
                restored.append((layer, own, saved))
        _place([layer for layer, *_ in restored], rows, sites)
        for layer, own, saved in restored:
            site = sites[layer]
            rows[site.device][:_OPEN_ROW, ..., site.channels] = own.view(-1, *ROWS[1:], layer.width).to(site.device)
            progress = Progress(tuple(saved["num_steps"]), saved["steps"], saved["calls"])
            sites[layer] = site._replace(progress=progress)
        self._rows, self._sites = rows, sites


_OPEN_ROW = ROWS[0] - 1


def _is_called_again(layer: TrackedLayer, steps: tuple[int, ...]) -> bool:
    """Whether a step has two of these calls. A loop that does not tell of its steps has one that goes on for ever."""
    before, ended = layer.counts.last_part, layer.gate.steps
    if steps[:1] != (before,) and len(set(steps)) == len(steps):
        return False
    return ended > 0 and any(step == after for step, after in pairwise((before, *steps)))


def _place(layers: Sequence[TrackedLayer], rows: dict[torch.device, Tensor], sites: dict[TrackedLayer, _Site]) -> None:
    """Append layers to the channels of their devices. What they were called before, in the same step, is not known."""
    added: dict[torch.device, int] = defaultdict(int)
    for layer in layers:
        assert layer.window is not None
        device = layer.window.device
        start = added[device] + (rows[device].shape[-1] if device in rows else 0)
        added[device] += layer.width
        channels = slice(start, start + layer.width)
        sites[layer] = _Site(device, channels, Progress(lost_step=layer.counts.last_part))
    for device, width in added.items():
        fresh = torch.zeros(*ROWS, width, dtype=torch.float64, device=device)
        rows[device] = torch.cat([rows[device], fresh], dim=-1) if device in rows else fresh


def _columns(channels: Sequence[slice], rows: Tensor) -> Tensor | None:
    """The columns of some layers; None if these are all, in order."""
    columns = np.concatenate([np.arange(own.start, own.stop) for own in channels])
    if len(columns) == rows.shape[-1] and (np.diff(columns) == 1).all():
        return None
    return on_device(columns, rows.device)


def values_of(batches: Sequence[Batches], device: torch.device) -> Tensor:
    """Means and unbiased variances of the calls of layers, side by side, ``(N, 2, C)`` float64."""
    widths = [its.mean[0].numel() for its in batches]
    layer_of = on_device(np.repeat(np.arange(len(widths)), widths), device)
    count, eps = rows_of([its.num_samples for its in batches]), rows_of([its.eps for its in batches])
    own = on_device(np.concatenate([count / np.maximum(count - 1, 1), eps]), device).index_select(1, layer_of)
    waiting = chain.from_iterable(zip(*(its.mean for its in batches), *(its.spread for its in batches), strict=True))
    values = joined(tuple(waiting), device).double().view(-1, 2, sum(widths))
    to_unbiased_variances(values[:, 1], own[len(count) :], own[: len(count)], ~np.isnan(eps))
    return values
