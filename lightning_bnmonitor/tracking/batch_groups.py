"""The groups that batches are of, as sources or domains: their calls, merged with the window.

Nothing is kept before a group is told of; from then on 32 bytes a channel and group, of nine groups at most. Layers
whose calls have come alike are merged together.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.group_moments import MAX_LETTERS, ROWS, GroupMoments, SeenGroups, with_batches
from lightning_bnmonitor.statistics.group_order import MAX_GROUPS, OTHER, GroupLog
from lightning_bnmonitor.statistics.side_by_side import on_device, rows_of
from lightning_bnmonitor.statistics.window import Write
from lightning_bnmonitor.tracking.call_counts import WaitingCalls
from lightning_bnmonitor.tracking.call_sites import values_of
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer

_NUM_BATCHES, _NUM_SAMPLES = range(2)


def group_name(group: object) -> str:
    """The name of a group as it is told of: a string, a number, or anything that is one when it is printed.

    A tensor or an array of one number is that number. A long name is shortened in the middle.

    Raises:
        TypeError: If it is a list, a tuple, a dictionary, a set, a tensor of several numbers, or one whose number the
            training would have to wait for.
    """
    if isinstance(group, list | tuple | dict | set) or (isinstance(group, np.ndarray | Tensor) and group.ndim):
        raise TypeError(
            f"A batch is of one group: its name must be a string or a number, got {_shown(group)}. If all samples of a "
            "batch are of one group, return that of the first: `names[0]`."
        )
    if isinstance(group, Tensor) and group.device.type != "cpu":
        raise TypeError(
            f"The name of a group is a tensor on {group.device}: training would wait for it at every step. Put it into "
            "the batch as a string, or return `.item()` of it if you accept to wait."
        )
    if isinstance(group, np.ndarray | Tensor):
        group = group.item()
    name = str(group).encode(errors="replace").decode()  # of a path, it may have what no file nor console takes
    half = MAX_LETTERS // 2
    return name if len(name) <= MAX_LETTERS else f"{name[: half - 1]}…{name[-half:]}"


class BatchGroups:
    """What is kept of groups of all layers, flat over the channels of each device."""

    def __init__(self) -> None:
        self.log = GroupLog()
        self._rows: dict[torch.device, Tensor] = {}
        self._counts: dict[TrackedLayer, FloatArray] = {}  # T and N of each group, (G, 2)
        self._has_warned = False  # of too many groups

    def number(self, name: str) -> int:
        """The number that the calls of a batch of this group are kept with. Warns once of a ninth group."""
        number = self.log.number(name)
        if self.log.names[number - 1] == OTHER != name and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"There are more than {MAX_GROUPS} groups of batches: {name!r} and all that follow are counted "
                f'together as "{OTHER}". Name fewer groups, such as sources or domains.',
                stacklevel=5,
            )
        return number

    def merged(self, waiting: Mapping[TrackedLayer, WaitingCalls]) -> list[Write]:
        """What is to be written to add calls that wait. Layers have their places in the window."""
        alike: dict[tuple[torch.device, tuple[int, ...]], list[TrackedLayer]] = defaultdict(list)
        for layer, calls in waiting.items():
            if calls.batches is not None and any(calls.groups):
                assert layer.window is not None
                alike[layer.window.device, calls.groups].append(layer)
        rows, counts = dict(self._rows), dict(self._counts)
        num_groups, writes = len(self.log.names), list[Write]()
        for (device, groups), layers in alike.items():
            rows[device] = _with_room(rows.get(device), num_groups, layers[0])
            writes.append(_merge(rows[device], counts, layers, groups, waiting))
        if writes:
            writes += [partial(setitem, vars(self), "_rows", rows), partial(setitem, vars(self), "_counts", counts)]
        return writes

    def reset(self) -> None:
        """Forget all groups."""
        self.log, self._rows, self._counts = GroupLog(), {}, {}

    def seen(self, layers: Sequence[TrackedLayer], layout: ChannelLayout) -> SeenGroups | None:
        """What was seen of these layers in this window, on the CPU; None if no group was told of.

        Of moments that SyncBatchNorm has taken over several ranks, this one's part.
        """
        num_groups = len(self.log.names)
        if not num_groups:
            return None
        counts = np.zeros((num_groups, len(layers), 2))
        channels = np.zeros((ROWS, num_groups, 2, layout.num_channels))
        rows = {device: of_device.cpu().numpy() for device, of_device in self._rows.items()}
        for index, (layer, own) in enumerate(zip(layers, layout.slices, strict=True)):
            if layer in self._counts and layer.window is not None:
                known, part = self._counts[layer], 1 / layer.counts.num_ranks
                counts[: len(known), index] = known * part
                here = rows[layer.window.device][..., layer.window.channels(layer.index)]
                channels[:, : here.shape[1], :, own] = here * np.array([1, part])[:, None, None, None]
        moments = GroupMoments(counts[..., _NUM_BATCHES], counts[..., _NUM_SAMPLES], *channels)
        return SeenGroups(tuple(self.log.names), self.log.order, moments)

    def state(self, layers: Collection[TrackedLayer]) -> dict[str, Any]:
        """What :meth:`restore` needs of these layers: a CPU tensor and primitives."""
        num_groups, present = len(self.log.names), set(layers)
        parts, states = [torch.empty(ROWS * num_groups * 2, 0, dtype=torch.float64, device="cpu")], []
        rows = {device: of_device.cpu() for device, of_device in self._rows.items()}
        for layer, counts in self._counts.items():
            if layer in present and layer.window is not None:
                here = rows[layer.window.device][..., layer.window.channels(layer.index)]
                own = here.new_zeros(ROWS, num_groups, 2, layer.width)
                own[:, : here.shape[1]] = here
                parts.append(own.flatten(0, 2))
                states.append({"name": layer.name, "width": layer.width, "counts": counts.tolist()})
        return {"log": self.log.state(), "channels": torch.cat(parts, dim=-1), "layers": states}

    def restore(self, state: Mapping[str, Any], layers: Mapping[str, TrackedLayer]) -> None:
        """Give layers (by name) what was saved of them. They have their places in the window."""
        self.reset()
        self.log.restore(state["log"])
        start, num_groups = 0, len(self.log.names)
        for saved in state["layers"]:
            own = state["channels"][:, start : start + saved["width"]]
            start += saved["width"]
            layer = layers.get(saved["name"])
            if layer is not None and layer.window is not None and layer.width == saved["width"]:
                device = layer.window.device
                rows = self._rows[device] = _with_room(self._rows.get(device), num_groups, layer)
                here = own.reshape(ROWS, num_groups, 2, -1).to(device)
                rows[..., layer.window.channels(layer.index)] = here
                self._counts[layer] = np.array(saved["counts"], dtype=float).reshape(-1, 2)


def _shown(group: object) -> str:
    if isinstance(group, np.ndarray | Tensor):
        return f"{type(group).__name__} of shape {tuple(group.shape)}"
    return f"a {type(group).__name__}"


def _with_room(rows: Tensor | None, num_groups: int, layer: TrackedLayer) -> Tensor:
    """Rows for so many groups and all channels of a layer's window, ``(2, G, 2, C)``."""
    assert layer.window is not None
    shape = ROWS, num_groups, 2, sum(layer.window.widths)
    if rows is not None and rows.shape == shape:
        return rows
    wider = torch.zeros(shape, dtype=torch.float64, device=layer.window.device)
    if rows is not None:
        wider[:, : rows.shape[1], :, : rows.shape[3]] = rows
    return wider


def _merge(
    rows: Tensor,
    counts: dict[TrackedLayer, FloatArray],
    layers: Sequence[TrackedLayer],
    groups: tuple[int, ...],
    waiting: Mapping[TrackedLayer, WaitingCalls],
) -> Write:
    """Count the calls of layers, and return what writes them into the rows of their device."""
    num_groups, widths = rows.shape[1], np.array([layer.width for layer in layers])
    batches = [calls.batches for layer in layers if (calls := waiting[layer]).batches is not None]
    sizes = rows_of([its.num_samples for its in batches])  # (N, L), or (1, L)
    before = np.zeros((num_groups, len(layers), 2))
    for index, layer in enumerate(layers):
        if layer in counts:
            before[: len(counts[layer]), index] = counts[layer]
    members = np.equal.outer(np.arange(1, num_groups + 1), groups).astype(float)
    added = np.stack([np.broadcast_to(members.sum(axis=1)[:, None], before.shape[:2])] * 2, axis=-1)
    added[..., _NUM_SAMPLES] = members @ np.broadcast_to(sizes, (len(groups), len(layers)))
    for index, layer in enumerate(layers):
        counts[layer] = before[:, index] + added[:, index]

    layer_of = on_device(np.repeat(np.arange(len(layers)), widths), rows.device)
    weights = np.concatenate([_both(before[..., _NUM_SAMPLES], before[..., _NUM_BATCHES]), _both(sizes, 1)])
    spread = on_device(weights, rows.device).index_select(1, layer_of).view(-1, 2, len(layer_of))
    columns = np.concatenate([np.arange(own.start, own.stop) for own in map(_channels, layers)])
    is_whole = len(columns) == rows.shape[3] and bool((np.diff(columns) == 1).all())
    where = None if is_whole else on_device(columns, rows.device)
    old = rows if where is None else rows.index_select(3, where)
    new = with_batches(old, spread[:num_groups], values_of(batches, rows.device), spread[num_groups:], groups)
    if where is None:
        return partial(Tensor.copy_, rows, new)
    return partial(Tensor.index_copy_, rows, 3, where, new)


def _channels(layer: TrackedLayer) -> slice:
    assert layer.window is not None
    return layer.window.channels(layer.index)


def _both(num_samples: FloatArray, num_batches: FloatArray | int) -> FloatArray:
    """Sums of n and of n - 1 in turn, ``(2 * P, L)``."""
    both = np.stack([num_samples, num_samples - num_batches], axis=1)
    return both.reshape(-1, num_samples.shape[-1])
