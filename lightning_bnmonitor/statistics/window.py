"""The window as blocks of consecutive batches: the whole state of the monitor, and its one fused update.

All layers' channels lie side by side in a flat channel space, a layer being a slice of it, and all layers whose calls
so far agree in number are updated together: the cost of an update grows with channels, not with layers or with steps.

A batch enters as (n, mean, unbiased variance) per channel. Consecutive batches that updated the running statistics are
merged into at most 16 blocks of equal length (the last may be shorter); when a 17th would begin, neighbours are merged
in pairs. Batches that updated no running statistics (frozen layers, ``momentum=0``, layers without buffers) count in
the population alone and are merged into one further block beside them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.segments import QV, A, B, Calls, FloatArray, K, N, Q, S, Table, W, merge_scalars

MAX_BLOCKS = 16
_ASIDE = MAX_BLOCKS  # the row of batches that updated no buffer
_ROWS = MAX_BLOCKS + 1
_FRESH = (1.0, 0.0)  # A and S of a window that begins
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


class Batches(NamedTuple):
    """Consecutive batches of a layer, field by field as in :class:`Batch`."""

    num_samples: tuple[int, ...]
    mean: tuple[Tensor, ...]
    spread: tuple[Tensor, ...]
    eps: tuple[float | None, ...]
    momentum: tuple[float, ...]
    batch_size: tuple[int, ...]


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
    def update(self, batches: Mapping[int, Sequence[Batch] | Batches]) -> None:
        """Add consecutive batches of any layers, in one fused update for all layers with equal histories.

        A batch with a non-finite mean or variance in a channel makes the population of that channel NaN until the next
        :meth:`reset`, and that of no other. An interrupt while this computes changes nothing; the writes at its end,
        which take microseconds, are not safe from one.

        Args:
            batches: For each layer's index, what its calls contributed, in the order of time.
        """
        profiled: dict[tuple[int, int], list[Calls]] = defaultdict(list)
        aside: dict[int, list[Calls]] = defaultdict(list)
        counts = self._scalars[..., K]
        history, counted = [np.add.reduce(counts[:, :n], axis=1).tolist() for n in (MAX_BLOCKS, _ROWS)]
        for layer in sorted(batches):
            its, before = batches[layer], int(counted[layer])
            fields = its if isinstance(its, Batches) else _by_field(its)
            if fields is None:
                continue
            num_calls = len(fields.momentum)
            if all(fields.momentum):
                profiled[int(history[layer]), num_calls].append(Calls(layer, fields, (before + 1,) * num_calls))
                continue
            for is_updating in (True, False):
                chosen = [bool(momentum) is is_updating for momentum in fields.momentum]
                if num := sum(chosen):
                    group = profiled[int(history[layer]), num] if is_updating else aside[num]
                    numbers = compress(range(before + 1, before + 1 + num_calls), chosen)
                    lead = tuple(number - index for index, number in enumerate(numbers))
                    group.append(Calls(layer, Batches._make(tuple(compress(field, chosen)) for field in fields), lead))
        scalars, momenta = self._scalars.copy(), self._momenta.copy()
        writes: list[Callable[[], None]] = []
        for (before, added), group in profiled.items():
            size, old_size = block_size(before + added), block_size(before)
            old_blocks = -(-before // old_size)
            first = before // size if size == old_size else 0  # blocks before it stay as they are
            blocks = np.arange(first, old_blocks) * old_size // size, np.arange(before, before + added) // size
            union = np.concatenate(blocks) - first
            rows = slice(first, old_blocks), slice(first, first + int(union[-1]) + 1)
            table, members = merge_scalars(group, *rows, union, scalars, momenta)
            writes.append(self._merge(group, *rows, table, members))
        for added, group in aside.items():
            rows = slice(_ASIDE, _ROWS), slice(_ASIDE, _ROWS)
            table, members = merge_scalars(group, *rows, np.zeros(1 + added, dtype=int), scalars, momenta)
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
            num_batches=scalars[..., K],
            num_samples=scalars[..., N],
            batch_size=scalars[..., B],
            weight=scalars[..., W],
            noise=np.stack([scalars[..., Q], scalars[..., QV]]),
            value=channels[_VALUE, :MAX_BLOCKS],
            m2=channels[_M2, :MAX_BLOCKS],
            decay=self._momenta[:, A].copy(),
            rounding=self._momenta[:, S].copy(),
            first_bad=self._first_bad.cpu().numpy(),
            aside_batches=aside[:, K].copy(),
            aside_samples=aside[:, N].copy(),
            aside_size=aside[:, B].copy(),
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
        self._scalars[layer, :, [W, Q, QV]] = 0
        self._momenta[layer] = _FRESH

    def restore(self, layer: int, channels: Tensor, state: Mapping[str, Any]) -> None:
        """Give a layer the state that another window had for it: its channels' part and its own."""
        own = self.channels(layer)
        self._channels[..., own] = channels[:-1].view(*self.CHANNEL_SHAPE, -1).to(self.device)
        self._first_bad[own] = channels[-1].to(self.device)
        self._scalars[layer] = state["scalars"]
        self._momenta[layer] = state["momenta"]

    def _merge(
        self, group: list[Calls], old: slice, new: slice, table: Table, members: FloatArray
    ) -> Callable[[], None]:
        """Merge the ``old`` rows and the batches of a group of layers into the ``new`` rows: returns what writes them.

        ``table`` and ``members`` are those of :func:`merge_scalars`. All layers of the group have the same number of
        batches.
        """
        columns, layer_of = self._columns_of([calls.layer for calls in group])
        num_parts, num_added, width = members.shape[1], len(group[0].lead), len(layer_of)
        num_old = num_parts - num_added

        expanded = self._to_device(np.concatenate(table)).index_select(1, layer_of)
        weight, total, bessel, eps, lead = expanded.split_with_sizes([len(rows) for rows in table])
        fields = [calls.fields for calls in group]
        stashed = chain.from_iterable(zip(*(f.mean for f in fields), *(f.spread for f in fields), strict=True))
        rows = self._channels[:, old] if columns is None else self._channels[:, old].index_select(3, columns)
        parts = rows.new_empty(num_parts, 2, width)
        parts[:num_old] = rows[_VALUE]
        parts[num_old:] = self._side_by_side(tuple(stashed)).view(num_added, 2, width)
        mean, var = parts[num_old:].unbind(1)
        is_variance = np.isnan(table.eps)
        if not is_variance.all():
            if is_variance.any():
                var.copy_(torch.where(torch.isnan(eps), var, var.pow(-2).sub_(eps)))
            else:
                var.pow_(-2).sub_(eps)
        var.clamp_min_(0).mul_(bessel)

        old_m2 = rows[_M2].reshape(num_old, 2 * width)
        _, value, m2 = merge_moments(
            weight.reshape(-1, 2 * width),
            parts.view(num_parts, 2 * width),
            old_m2,
            self._to_device(members),
            total.reshape(-1, 2 * width),
        )
        merged = torch.stack([value, m2]).view(2, -1, 2, width)

        # On the CPU one sum tells that all are finite, in the usual case; elsewhere to ask would mean to wait.
        if self.device.type == "cpu" and np.isfinite(merged.numpy().sum()):
            first_bad = self._first_bad.new_full((width,), math.inf)
        else:
            nothing = (mean + var).mul_(0)  # or NaN
            index = torch.arange(num_added, dtype=torch.float64, device=self.device)[:, None]
            first_bad = torch.where(nothing == 0, torch.inf, index).add_(lead).amin(dim=0)
        if old.stop > new.stop:  # rows that the coarser blocks no longer need
            freed = merged.new_zeros(2, old.stop - new.stop, 2, width)
            merged, new = torch.cat([merged, freed], dim=1), slice(new.start, old.stop)

        def write() -> None:
            if columns is None:
                self._channels[:, new] = merged
                torch.minimum(self._first_bad, first_bad, out=self._first_bad)
            else:
                first = torch.minimum(self._first_bad[columns], first_bad)
                self._channels[:, new].index_copy_(3, columns, merged)
                self._first_bad.index_copy_(0, columns, first)

        return write

    def _side_by_side(self, tensors: tuple[Tensor, ...]) -> Tensor:
        try:
            return torch.cat(tensors).to(self.device)
        except RuntimeError:  # they are on several devices, as the model has been moved meanwhile
            return torch.cat([tensor.to(self.device) for tensor in tensors])

    def _columns_of(self, layers: list[int]) -> tuple[Tensor | None, Tensor]:
        """The flat columns of some layers (None: all of them), and for each of these which of the layers it is of."""
        widths = np.array([self.widths[layer] for layer in layers])
        layer_of = np.repeat(np.arange(len(layers)), widths)
        if len(layers) == len(self.widths):
            return None, self._to_device(layer_of)
        shifts = np.array([self._starts[layer] for layer in layers]) - (np.cumsum(widths) - widths)
        return self._to_device(np.arange(len(layer_of)) + shifts[layer_of]), self._to_device(layer_of)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _by_field(batches: Iterable[Batch]) -> Batches | None:
    """Batches field by field, None if there are none."""
    columns = list(zip(*batches, strict=True))
    return Batches(*columns) if columns else None
