"""The window as blocks of consecutive batches: the whole state of the monitor, and its one fused update.

All layers' channels lie side by side in a flat channel space, a layer being a slice of it, and all layers whose calls
so far agree in number are updated together: the cost of an update grows with channels, not with layers or with steps.

A batch enters as (n, mean, unbiased variance) per channel. Consecutive batches that updated the running statistics are
merged into at most 16 blocks of equal length (the last may be shorter); when a 17th would begin, neighbours are merged
in pairs. Batches that updated no running statistics (frozen layers, ``momentum=0``, layers without buffers) count in
the population alone and are merged into one further block beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.moments import merge_moments
from lightning_bnmonitor.segments import FloatArray

MAX_BLOCKS = 16
_ASIDE = MAX_BLOCKS  # the row of batches that updated no buffer
_ROWS = MAX_BLOCKS + 1
_K, _N, _W, _Q, _QV, _B = range(6)  # what a block sums per layer
_A, _S = range(2)  # what a layer keeps of its momenta
_FRESH = (1.0, 0.0)  # A and S of a window that begins
_MAX_CACHED_GROUPS = 64
_VALUE, _M2 = range(2)  # what a block keeps per channel, for the mean buffer and for the variance buffer


class Batch(NamedTuple):
    """What one call of a layer contributes."""

    num_samples: int
    """Values per channel, n."""
    mean: Tensor
    """Batch mean, ``(C,)``."""
    spread: Tensor
    """Biased batch variance, ``(C,)``; if ``eps`` is given, the inverse standard deviation (var + eps)^-1/2 instead."""
    eps: float | None
    """The layer's ``eps`` where ``spread`` is an inverse standard deviation."""
    momentum: float
    """Weight of this batch in the running statistics right after the call; 0 if it updated none."""
    batch_size: int
    """Samples (``x.shape[0]``), each of which has ``num_samples / batch_size`` positions."""


class Blocks(NamedTuple):
    """The blocks of all layers in the order of time, on the host in float64.

    There are 16 for every layer; those that a window is too short for come last and are 0 throughout. What is kept per
    channel is flat over all layers' channels, for the means at index 0 of the axis of 2, for the variances at index 1.
    """

    widths: NDArray[np.int64]
    """Channels of each layer, ``(layers,)``."""
    num_batches: FloatArray
    """K: batches in each block, ``(layers, 16)``."""
    num_samples: FloatArray
    """n: values per channel, ``(layers, 16)``."""
    batch_size: FloatArray
    """Samples, ``(layers, 16)``: the sum over the batches."""
    weight: FloatArray
    """W: the sum of the weights that the batches have in the running statistics now, ``(layers, 16)``."""
    noise: FloatArray
    """Q: the sum of squared weights over n (mean) and over n - 1 (variance) of each batch, ``(2, layers, 16)``."""
    value: FloatArray
    """Mean of the batch means, weighted by n, and of the unbiased batch variances, by n - 1, ``(16, 2, channels)``."""
    m2: FloatArray
    """The weighted sum of their squared deviations from it, ``(16, 2, channels)``."""
    decay: FloatArray
    """A: the weight that the buffers at the window's start still have in those of now, ``(layers,)``."""
    rounding: FloatArray
    """S: the sum of the decays that each update's float32 rounding has undergone since, ``(layers,)``."""
    first_bad: FloatArray
    """The first call in the window with a value that is not finite, counted from 1, ``(channels,)``; inf if none."""
    aside_batches: FloatArray
    """Batches that updated no running statistics, ``(layers,)``; they are in none of the above but ``first_bad``."""
    aside_samples: FloatArray
    """Their values per channel, ``(layers,)``."""
    aside_size: FloatArray
    """Their samples, ``(layers,)``: the sum over the batches."""
    aside_value: FloatArray
    """Of them, what ``value`` is of a block, ``(2, channels)``."""
    aside_m2: FloatArray
    """Of them, what ``m2`` is of a block, ``(2, channels)``."""


_Calls = tuple[int, list[tuple[int, Batch]]]  # a layer's index, and its batches with their number in the window


def block_size(num_batches: int) -> int:
    """Batches in a full block of a window of ``num_batches``: the smallest power of 2 that makes 16 blocks suffice."""
    size = 1
    while num_batches > size * MAX_BLOCKS:
        size *= 2
    return size


def paired(blocks: Blocks) -> Blocks:
    """Blocks of single batches merged in pairs, so that there is a variance within."""
    single = (blocks.num_batches.max(axis=1, initial=0) == 1).nonzero()[0]
    if not len(single):
        return blocks
    ends = np.cumsum(blocks.widths)
    weights = np.stack([blocks.num_samples, blocks.num_samples - blocks.num_batches]).transpose(1, 2, 0)  # (L, 16, 2)
    one, other = weights[single, 0::2, :, None], weights[single, 1::2, :, None]
    share = np.divide(other, one + other, out=np.zeros_like(one), where=other > 0)
    everything = len(single) == len(ends)
    value, m2 = (np.zeros_like(part) if everything else part.copy() for part in (blocks.value, blocks.m2))
    for layer, of_other, weight in zip(single, share, share * one, strict=True):
        own = slice(ends[layer] - blocks.widths[layer], ends[layer])
        first, merged = blocks.value[0::2, :, own], value[: MAX_BLOCKS // 2, :, own]
        step = blocks.value[1::2, :, own] - first
        np.multiply(step, of_other, out=merged)
        merged += first
        np.multiply(np.square(step, out=step), weight, out=m2[: MAX_BLOCKS // 2, :, own])
        value[MAX_BLOCKS // 2 :, :, own] = m2[MAX_BLOCKS // 2 :, :, own] = 0

    def halved(scalars: FloatArray) -> FloatArray:
        scalars = scalars.copy()
        scalars[..., single, : MAX_BLOCKS // 2] = scalars[..., single, 0::2] + scalars[..., single, 1::2]
        scalars[..., single, MAX_BLOCKS // 2 :] = 0
        return scalars

    return blocks._replace(
        num_batches=halved(blocks.num_batches),
        num_samples=halved(blocks.num_samples),
        batch_size=halved(blocks.batch_size),
        weight=halved(blocks.weight),
        noise=halved(blocks.noise),
        value=value,
        m2=m2,
    )


class Window:
    """Blocks of all layers on one device.

    Args:
        device: Where channels are accumulated, in float64.
    """

    CHANNEL_SHAPE: ClassVar[tuple[int, ...]] = (2, _ROWS, 2)  # value and M2; of each row; of mean and variance
    CHANNEL_ROWS: ClassVar[int] = 2 * _ROWS * 2 + 1  # all of these, and the first call that was not finite

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.widths: list[int] = []
        self._starts = [0]
        self._channels = torch.zeros(*self.CHANNEL_SHAPE, 0, dtype=torch.float64, device=device)
        self._first_bad = torch.zeros(0, dtype=torch.float64, device=device)
        self._scalars: FloatArray = np.zeros((0, _ROWS, 6))
        self._momenta: FloatArray = np.zeros((0, 2))
        self._columns: dict[tuple[int, ...], tuple[Tensor | None, Tensor]] = {}

    def add_layers(self, widths: Sequence[int]) -> range:
        """Append layers of so many channels to the flat channel space. Returns their indices."""
        first = len(self.widths)
        for width in widths:
            self.widths.append(width)
            self._starts.append(self._starts[-1] + width)
        self._channels = torch.cat([self._channels, self._channels.new_zeros(*self.CHANNEL_SHAPE, sum(widths))], dim=-1)
        self._first_bad = torch.cat([self._first_bad, self._first_bad.new_full((sum(widths),), torch.inf)])
        self._scalars = np.concatenate([self._scalars, np.zeros((len(widths), _ROWS, 6))])
        self._momenta = np.concatenate([self._momenta, np.tile(_FRESH, (len(widths), 1))])
        self._columns.clear()
        return range(first, len(self.widths))

    def channels(self, layer: int) -> slice:
        """Where a layer lies in the flat channel space."""
        return slice(self._starts[layer], self._starts[layer + 1])

    def reset(self) -> None:
        """Forget all batches, keep the layers."""
        self._channels = torch.zeros_like(self._channels)
        self._first_bad = torch.full_like(self._first_bad, torch.inf)
        self._scalars[:] = 0
        self._momenta[:] = _FRESH

    @torch.no_grad()
    def update(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        """Add consecutive batches of any layers, in one fused update for all layers with equal histories.

        A batch with a non-finite mean or variance in a channel makes the population of that channel NaN until the next
        :meth:`reset`, and that of no other. An interrupt while this computes changes nothing.

        Args:
            batches: For each layer's index, what its calls contributed, in the order of time.
        """
        profiled: dict[tuple[int, int], list[_Calls]] = defaultdict(list)
        aside: dict[int, list[_Calls]] = defaultdict(list)
        history, counted = self._scalars[:, :MAX_BLOCKS, _K].sum(axis=1), self._scalars[..., _K].sum(axis=1)
        for layer in sorted(batches):
            calls = list(enumerate(batches[layer], start=int(counted[layer]) + 1))
            updating = [call for call in calls if call[1].momentum]
            if updating:
                profiled[int(history[layer]), len(updating)].append((layer, updating))
            if len(updating) < len(calls):
                other = [call for call in calls if not call[1].momentum]
                aside[len(other)].append((layer, other))
        scalars, momenta = self._scalars.copy(), self._momenta.copy()
        writes: list[Callable[[], None]] = []
        for (before, added), group in profiled.items():
            size, old_size = block_size(before + added), block_size(before)
            old_blocks = -(-before // old_size)
            first = before // size if size == old_size else 0  # blocks before it stay as they are
            union = [block * old_size // size - first for block in range(first, old_blocks)]
            union += [batch // size - first for batch in range(before, before + added)]
            rows = slice(first, old_blocks), slice(first, first + union[-1] + 1)
            table, members = _merge_scalars(group, *rows, union, scalars, momenta)
            writes.append(self._merge(group, *rows, table, members))
        for added, group in aside.items():
            rows = slice(_ASIDE, _ROWS), slice(_ASIDE, _ROWS)
            table, members = _merge_scalars(group, *rows, [0] * (1 + added), scalars, momenta)
            writes.append(self._merge(group, *rows, table, members))
        for write in writes:
            write()
        self._scalars, self._momenta = scalars, momenta

    def blocks(self) -> Blocks:
        """All that the window holds, block by block. On the CPU, valid until the next update."""
        scalars, aside = self._scalars[:, :MAX_BLOCKS].copy(), self._scalars[:, _ASIDE]
        channels = self._channels.cpu().numpy()
        return Blocks(
            widths=np.array(self.widths, dtype=np.int64),
            num_batches=scalars[..., _K],
            num_samples=scalars[..., _N],
            batch_size=scalars[..., _B],
            weight=scalars[..., _W],
            noise=np.stack([scalars[..., _Q], scalars[..., _QV]]),
            value=channels[_VALUE, :MAX_BLOCKS],
            m2=channels[_M2, :MAX_BLOCKS],
            decay=self._momenta[:, _A].copy(),
            rounding=self._momenta[:, _S].copy(),
            first_bad=self._first_bad.cpu().numpy(),
            aside_batches=aside[:, _K].copy(),
            aside_samples=aside[:, _N].copy(),
            aside_size=aside[:, _B].copy(),
            aside_value=channels[_VALUE, _ASIDE],
            aside_m2=channels[_M2, _ASIDE],
        )

    def channel_state(self) -> Tensor:
        """A CPU copy of what is kept per channel, ``(CHANNEL_ROWS, channels)``: see :meth:`restore`."""
        return torch.cat([self._channels.flatten(0, 2), self._first_bad[None]]).cpu()

    def layer_state(self, layer: int) -> dict[str, list[Any]]:
        """What is kept per layer, in primitives: see :meth:`restore`."""
        return {"scalars": self._scalars[layer].tolist(), "momenta": self._momenta[layer].tolist()}

    def forget_weights(self, layer: int) -> None:
        """The running statistics have just been written: no batch so far is in them."""
        self._scalars[layer, :, [_W, _Q, _QV]] = 0
        self._momenta[layer] = _FRESH

    def restore(self, layer: int, channels: Tensor, state: Mapping[str, Any]) -> None:
        """Give a layer the state that another window had for it: its channels' part and its own."""
        own = self.channels(layer)
        self._channels[..., own] = channels[:-1].view(*self.CHANNEL_SHAPE, -1).to(self.device)
        self._first_bad[own] = channels[-1].to(self.device)
        self._scalars[layer] = state["scalars"]
        self._momenta[layer] = state["momenta"]

    def _merge(
        self, group: list[_Calls], old: slice, new: slice, table: FloatArray, members: FloatArray
    ) -> Callable[[], None]:
        """Merge the ``old`` rows and the batches of a group of layers into the ``new`` rows: returns what writes them.

        ``table`` and ``members`` are those of :func:`_merge_scalars`. All layers of the group have the same number of
        batches.
        """
        columns, layer_of = self._columns_of(tuple(layer for layer, _ in group))
        num_parts, num_added, width = members.shape[1], len(group[0][1]), len(layer_of)

        expanded = self._to_device(table).index_select(1, layer_of)
        weight, bessel, eps, number = torch.split(expanded, [2 * num_parts, num_added, num_added, num_added])
        stashed = [
            tensor if tensor.device == self.device else tensor.to(self.device)
            for t in range(num_added)
            for field in ("mean", "spread")
            for _, batches in group
            for tensor in (getattr(batches[t][1], field),)
        ]
        added = torch.cat(stashed).to(torch.float64).view(num_added, 2, width)
        mean, spread = added.unbind(1)
        var = torch.where(torch.isnan(eps), spread, spread.pow(-2) - eps).clamp_min(0) * bessel

        nothing = (mean + var) * 0  # or NaN
        first_bad = torch.where(nothing == 0, torch.inf, number).amin(dim=0)

        rows = self._channels[:, old] if columns is None else self._channels[:, old].index_select(3, columns)
        value = torch.cat([rows[_VALUE], torch.stack([mean, var], dim=1)])
        m2 = torch.cat([rows[_M2], torch.zeros_like(added)])
        flat = (num_parts, 2 * width)
        _, value, m2 = merge_moments(weight.view(flat), value.view(flat), m2.view(flat), self._to_device(members))
        merged = torch.stack([value, m2]).view(2, -1, 2, width)
        if old.stop > new.stop:  # rows that the coarser blocks no longer need
            freed = merged.new_zeros(2, old.stop - new.stop, 2, width)
            merged, new = torch.cat([merged, freed], dim=1), slice(new.start, old.stop)

        def write() -> None:
            if columns is None:
                self._channels[:, new] = merged
                self._first_bad = torch.minimum(self._first_bad, first_bad)
            else:
                self._channels[:, new].index_copy_(3, columns, merged)
                self._first_bad[columns] = torch.minimum(self._first_bad[columns], first_bad)

        return write

    def _columns_of(self, layers: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        """The flat columns of some layers (None: all of them), and for each of these which of the layers it is of."""
        if layers not in self._columns:
            if len(self._columns) >= _MAX_CACHED_GROUPS:  # layers skipped at random: every update has groups of its own
                self._columns.clear()
            columns = None
            if len(layers) < len(self.widths):
                spans = [self.channels(layer) for layer in layers]
                columns = self._to_device(np.concatenate([np.arange(span.start, span.stop) for span in spans]))
            widths = [self.widths[layer] for layer in layers]
            layer_of = self._to_device(np.repeat(np.arange(len(layers)), widths))
            self._columns[layers] = columns, layer_of
        return self._columns[layers]

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _merge_scalars(
    group: list[_Calls], old: slice, new: slice, union: list[int], scalars: FloatArray, momenta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Merge what is kept per layer, in place: the ``old`` rows and the batches of a group into the ``new`` rows.

    ``union`` tells for every part, old rows first, which of the new rows it belongs to. Returns what the merge of the
    channels needs: a table ``(2P + 3k, layers)`` of the weights n and n - K of each part, then n / (n - 1), eps and the
    number in the window of each of the k batches; and of 0 and 1 which part is in which row, ``(rows, P)``.
    """
    members = np.zeros((new.stop - new.start, len(union)))
    members[union, range(len(union))] = 1
    layers = [layer for layer, _ in group]
    added = [
        [(b.num_samples, b.momentum, np.nan if b.eps is None else b.eps, b.batch_size, number) for number, b in calls]
        for _, calls in group
    ]
    count, momentum, eps, batch_size, number = np.array(added, dtype=float).transpose(2, 1, 0)  # (k, layers) each
    since = np.cumprod(1 - momentum[::-1], axis=0)[::-1]  # what remains at the end of what stood before each batch
    remains, after = since[0], np.concatenate([since[1:], np.ones_like(since[:1])])
    weight, dof = momentum * after, np.maximum(count - 1, 1)

    parts = np.empty((members.shape[1], len(layers), 6))
    decay = np.ones((len(layers), 1, 6))
    decay[..., _W], decay[..., _Q], decay[..., _QV] = remains[:, None], remains[:, None] ** 2, remains[:, None] ** 2
    scalars[layers, : old.stop] *= decay
    parts[: old.stop - old.start] = scalars[layers, old].transpose(1, 0, 2)
    batch = parts[old.stop - old.start :]
    batch[..., _K], batch[..., _N], batch[..., _W], batch[..., _B] = 1, count, weight, batch_size
    batch[..., _Q], batch[..., _QV] = weight**2 / count, weight**2 / dof

    scalars[layers, old] = 0
    scalars[layers, new] = np.tensordot(members, parts, 1).transpose(1, 0, 2)
    momenta[layers, _A] *= remains
    momenta[layers, _S] = momenta[layers, _S] * remains + (after * (momentum > 0)).sum(axis=0)
    weights = np.stack([parts[..., _N], parts[..., _N] - parts[..., _K]], axis=1)
    return np.concatenate([weights.reshape(-1, len(layers)), count / dof, eps, number]), members
