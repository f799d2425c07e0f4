"""The windows of all devices: where layers lie in them, and how what waits is merged, saved and restored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_bnmonitor.capture.layer_hook import STASH_LIMIT
from lightning_bnmonitor.statistics.blocks import Blocks, concatenated, empty_blocks, selected
from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.constant_ends import ConstantEnds
from lightning_bnmonitor.statistics.joined_windows import ENOUGH, KeptWindow
from lightning_bnmonitor.statistics.probe import InputProbe
from lightning_bnmonitor.statistics.window import Window, commit
from lightning_bnmonitor.tracking.batch_groups import BatchGroups
from lightning_bnmonitor.tracking.buffers import device_of
from lightning_bnmonitor.tracking.call_sites import CallSites
from lightning_bnmonitor.tracking.paddings import Paddings
from lightning_bnmonitor.tracking.screening import not_finite, noted, without
from lightning_bnmonitor.tracking.tracked_layer import TrackedLayer

_BUFFER_ROWS = 6  # per channel: the running statistics when the window began, when the last one ended, and since
_CHANNEL_BYTES = 8 * (Window.CHANNEL_ROWS + _BUFFER_ROWS)
_LAYER_BYTES = 850


class Windows:
    """The flat channel space of each device, and which layers have channels there: from their first merge on.

    Args:
        has_masks: Whether masks tell which values count.
    """

    def __init__(self, has_masks: bool = False) -> None:
        self.by_device: dict[torch.device, Window] = {}
        self.call_sites = CallSites()
        self.groups = BatchGroups()
        self.probe = InputProbe()
        self.paddings = Paddings() if has_masks else None  # where a mask tells what counts,
        self.ends = ConstantEnds()  # and where none does
        self.layers: list[TrackedLayer] = []  # in the order of their first call; the model may have lost them since

    def merge(self, layers: Iterable[TrackedLayer], is_guarded: bool = False) -> None:
        """Merge what waits of these layers into the windows, all layers of a window at once, and all in one step.

        An interrupt comes before all of it or after: no call is lost, and none counts twice.

        Args:
            layers: Those of the model.
            is_guarded: Whether calls that are not finite are left out, as what they have updated is put back.
        """
        stashed = {layer: layer.hook.stash[:] for layer in layers if layer.hook.stash}  # other threads may add to it
        self._place_called([layer for layer in stashed if layer.window is None])
        bad = not_finite(stashed) if is_guarded else {}
        waiting = {
            layer: without(layer, calls, bad[layer]) if layer in bad else layer.waiting(calls)
            for layer, calls in stashed.items()
        }
        writes = noted(bad)
        for window in self.by_device.values():
            batches = {
                layer.index: calls.batches
                for layer, calls in waiting.items()
                if layer.window is window and calls.batches is not None
            }
            if batches:
                writes += window.merged(batches)
        writes += self.call_sites.merged(waiting)
        writes += self.groups.merged(waiting)
        for layer, calls in waiting.items():
            writes += layer.taken(calls)
        commit(writes)
        self._drop_earlier([layer for layer in waiting if layer.earlier])

    def reset(self) -> None:
        """Empty the windows. Layers keep their places."""
        for window in self.by_device.values():
            window.reset()
        self.call_sites.reset()
        self.groups.reset()
        self.probe.reset()
        self.ends.reset()
        if self.paddings is not None:
            self.paddings.reset()

    def in_order(self, layers: Collection[TrackedLayer]) -> list[TrackedLayer]:
        """These layers in the order of their first call, then those that were never called."""
        wanted = set(layers)
        return [
            *(layer for layer in self.layers if layer in wanted),
            *(layer for layer in layers if layer.window is None),
        ]

    def blocks(self, layers: Sequence[TrackedLayer]) -> Blocks:
        """The blocks of layers, in their order, on the CPU. Valid until the next merge."""
        uncalled = [layer for layer in layers if layer.window is None]
        parts = [window.blocks() for window in self.by_device.values()]
        if uncalled or not parts:
            parts.append(empty_blocks(np.array([layer.module.num_features for layer in uncalled], dtype=np.int64)))
        blocks, starts, total = concatenated(parts), {}, 0
        for window in self.by_device.values():
            starts[window] = total
            total += len(window.widths)
        position = {layer: total + index for index, layer in enumerate(uncalled)}
        for layer in layers:
            if layer.window is not None:
                position[layer] = starts[layer.window] + layer.index
        order = np.array([position[layer] for layer in layers], dtype=np.int64)
        is_whole = np.array_equal(order, np.arange(len(blocks.widths)))
        return blocks if is_whole else selected(blocks, order)

    def state(self, layers: Collection[TrackedLayer]) -> dict[str, Any]:
        """What :meth:`restore` needs of these layers: CPU tensors for those that have a place, and primitives."""
        channels = {device: window.channel_state() for device, window in self.by_device.items()}
        parts, states = [torch.empty(Window.CHANNEL_ROWS + _BUFFER_ROWS, 0, dtype=torch.float64, device="cpu")], []
        present = set(layers)
        for layer in (layer for layer in self.layers if layer in present):
            assert layer.window is not None
            width = layer.window.widths[layer.index]
            own = channels[layer.window.device][:, layer.window.channels(layer.index)]
            parts.append(torch.cat([own, layer.buffer_state(width)]))
            state = {**layer.window.layer_state(layer.index), **layer.state()}
            earlier = [window.num_batches for window in layer.earlier]
            states.append({"name": layer.name, "width": width, "earlier": earlier, **state})
        not_called = [
            {
                "name": layer.name,
                "width": layer.module.num_features,
                "buffers": layer.buffer_state(layer.module.num_features),
                **layer.state(),
            }
            for layer in layers
            if layer.window is None
        ]
        kept = [window.packed() for layer in self.layers if layer in present for window in layer.earlier]
        return {
            "channels": torch.cat(parts, dim=-1),
            "layers": states,
            "not_called": not_called,
            "earlier": torch.from_numpy(np.concatenate([np.zeros(0), *kept])),
            "call_sites": self.call_sites.state(layers),
            "groups": self.groups.state(layers),
            "probe": self.probe.state(),
            "paddings": None if self.paddings is None else self.paddings.state(layers),
        }

    def restore(self, state: Mapping[str, Any], layers: Mapping[str, TrackedLayer]) -> tuple[set[str], list[str]]:
        """Give layers (by name) that have no place those that were saved, and what lay there.

        Returns:
            Names that the state knows; names that were left out, as there is no such layer or it has another width.
        """
        fitting: dict[torch.device, list[tuple[TrackedLayer, int]]] = {}
        start, left_out, restored, kept = 0, [], [], state["earlier"].cpu().numpy()
        for saved in state["layers"]:
            name, width = saved["name"], saved["width"]
            own = state["channels"][:, start : start + width]
            start += width
            earlier, kept = _unpacked(kept, saved["earlier"], width)
            if name in layers and layers[name].module.num_features in (0, width):  # 0: lazy, and not called yet
                layer = layers[name]
                fitting.setdefault(device_of(layer.module), []).append((layer, width))
                restored.append((layer, own, saved, earlier))
            else:
                left_out.append(name)
        for device, here in fitting.items():
            self._place(device, here)
        for layer, own, saved, earlier in restored:
            assert layer.window is not None
            layer.window.restore(layer.index, own[:-_BUFFER_ROWS], saved)
            layer.restore(saved, own[-_BUFFER_ROWS:])
            layer.earlier = earlier
        self.make_room()
        placed = {layer.name: layer for layer, *_ in restored}
        self.call_sites.restore(state["call_sites"], placed)
        if "groups" in state:  # those of 0.5.0 have neither these
            self.groups.restore(state["groups"], placed)
        self.probe.restore(state["probe"], device_of(restored[0][0].module) if restored else torch.device("cpu"))
        if self.paddings is not None and state.get("paddings") is not None:  # nor these
            self.paddings.restore(state["paddings"], placed)
        known = {layer.name for layer, *_ in restored}
        for saved in state["not_called"]:
            name, width = saved["name"], saved["width"]
            if name in layers and layers[name].module.num_features == width:
                layers[name].restore(saved, saved["buffers"])
                known.add(name)
            elif width:  # not a lazy layer, of which there was nothing to keep
                left_out.append(name)
        return known, left_out

    def _place_called(self, layers: Sequence[TrackedLayer]) -> None:
        by_device: dict[torch.device, list[tuple[TrackedLayer, int]]] = {}
        for layer in sorted(layers, key=lambda layer: layer.hook.first_call):
            mean, *_ = layer.hook.stash[0]
            by_device.setdefault(mean.device, []).append((layer, mean.numel()))
        for device, called in by_device.items():
            self._place(device, called)

    def _place(self, device: torch.device, layers: Sequence[tuple[TrackedLayer, int]]) -> None:
        home = torch.device("cpu") if device.type == "mps" else device
        window = self.by_device.setdefault(home, Window(home))
        places = zip(layers, window.add_layers([width for _, width in layers]), strict=True)
        writes = [
            partial(vars(layer).update, window=window, index=index, width=width) for (layer, width), index in places
        ]
        commit([*writes, partial(self.layers.extend, [layer for layer, _ in layers])])
        self.make_room()

    def make_room(self) -> None:
        """Let as many calls of each layer wait as there is room for beside the windows, the earlier ones included."""
        kept = sum(window.nbytes for layer in self.layers for window in layer.earlier)
        kept += sum(edges.nbytes for layer in self.layers for edges in (layer.edges, layer.end_edges) if edges)
        room = _calls_that_may_wait(
            len(self.layers), sum(layer.width for layer in self.layers), self.probe.max_bytes, kept
        )
        for layer in self.layers:
            layer.hook.make_room(room)

    def _drop_earlier(self, layers: Iterable[TrackedLayer]) -> None:
        """Keep no earlier windows of those layers whose present one has become long enough to be judged by itself."""
        if over := [layer for layer in layers if layer.counts.updating >= ENOUGH]:
            for layer in over:
                layer.earlier = ()
            self.make_room()


def layout_of(layers: Sequence[TrackedLayer]) -> ChannelLayout:
    """The channels of layers side by side."""
    return ChannelLayout(np.array([layer.width or layer.module.num_features for layer in layers], dtype=np.int64))


def _unpacked(kept: FloatArray, num_batches: Sequence[int], width: int) -> tuple[list[KeptWindow], FloatArray]:
    """A layer's earlier windows, of so many batches each, from what was packed; and what follows there."""
    sizes = [KeptWindow.packed_size(num, width) for num in num_batches]
    *parts, rest = np.split(kept, np.cumsum(sizes))
    return [KeptWindow.unpacked(part, num, width) for part, num in zip(parts, num_batches, strict=True)], rest


def _calls_that_may_wait(num_layers: int, num_channels: int, probe: int, kept: int) -> int:
    """So many of each layer that they and the windows take at most 1 KiB a channel + 64 KiB, but not few.

    ``probe`` are the bytes of what is kept of the model's inputs, ``kept`` those of earlier windows. As these are
    rarely kept for long, few calls suffice then.
    """
    taken = _LAYER_BYTES * num_layers + probe + kept
    room = (1024 - _CHANNEL_BYTES) * num_channels + 64 * 1024 - taken
    return min(max(room // (8 * max(num_channels, 1)), ENOUGH if kept else STASH_LIMIT // 2), STASH_LIMIT)
