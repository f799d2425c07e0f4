"""The window as blocks of consecutive batches: what is kept of what layers receive, and its one fused update.

All layers' channels lie side by side in a flat channel space, a layer being a slice of it, and all layers whose calls
so far agree in number are updated together: the cost of an update grows with channels, not with layers or with steps.

A batch enters as (n, mean, unbiased variance) per channel. Consecutive batches that updated the running statistics are
merged into at most 16 blocks of equal length (the last may be shorter); when a 17th would begin, neighbours are merged
in pairs. Batches that updated no running statistics (frozen layers, ``momentum=0``, layers without buffers) count in
the population alone and are merged into one further block beside them.

**Weights.** With momentum m (0 if the call updated nothing), a batch of n values multiplies what stood before by
q = 1 - m: the decay A and the sum of decays S become qA and qS + 1, and of every block the sum of weights W becomes qW
and the sum of squared weights over n (over n - 1) becomes q^2 Q. The batch itself enters with W = m and Q = m^2 / n.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, compress, groupby
from operator import itemgetter, setitem
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.statistics.blocks import MAX_BLOCKS, Blocks, PooledBatches, block_size
from lightning_bnmonitor.statistics.channel_layout import FloatArray
from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.side_by_side import joined, on_device, rows_of, to_unbiased_variances

_BESIDE = MAX_BLOCKS  # the row of batches that updated no running statistics
_ROWS = MAX_BLOCKS + 1
_PORTION = 8192  # channels that are merged at once on the CPU
_VALUE, _M2 = range(2)  # what a row keeps per channel, for the running mean and for the running variance
# What a row sums per layer: K, n, W, Q of both buffers, samples.
_NUM_BATCHES, _NUM_SAMPLES, _WEIGHT, _NOISE_OF_MEAN, _NOISE_OF_VAR, _BATCH_SIZE = range(6)
_NOISE = slice(_NOISE_OF_MEAN, _NOISE_OF_VAR + 1)
_DECAY, _ROUNDING = range(2)  # what a layer keeps besides: A and S
_FRESH = (1.0, 0.0)  # of a window that begins


class Batches(NamedTuple):
    """What consecutive calls of a layer contribute, field by field: one entry for each call."""

    num_samples: tuple[int, ...]
    """Values per channel, n."""
    mean: tuple[Tensor, ...]
    """Batch means, ``(C,)`` each."""
    spread: tuple[Tensor, ...]
    """Biased batch variances, ``(C,)`` each; where ``eps`` is given, (var + eps)^-1/2 instead."""
    eps: tuple[float | None, ...]
    """The layer's ``eps`` where ``spread`` is an inverse standard deviation."""
    momentum: tuple[float, ...]
    """Weight of the batch in the running statistics right after the call; 0 if it updated none."""
    batch_size: tuple[int, ...]
    """Samples (``x.shape[0]``), each of which has ``num_samples / batch_size`` positions."""


Write = partial[Any]
"""A write that waits for :func:`commit`: a function written in C, and what it is called with."""


def commit(writes: Iterable[Write]) -> None:
    """Make all these writes in one step: an interrupt comes before them or after, and never in between.

    Python looks for signals between its own instructions only, and here are none: ``deque``, ``map`` and what they call
    are written in C.
    """
    deque(map(partial.__call__, writes), maxlen=0)


class _LayerBatches(NamedTuple):
    """Batches of one layer that go into the same kind of row."""

    layer: int
    batches: Batches
    lead: tuple[int, ...]
    """The number that each batch has in the window, less its number among these."""


class _Weights(NamedTuple):
    """What the merge of a group's channels needs per layer, ``(rows, layers)``.

    There is a row for each batch, or one if these are all alike.
    """

    of_parts: FloatArray
    """n and n - K in turn, old rows first; of the batches one for all if they are alike."""
    of_unions: FloatArray
    """The same of each of the new rows."""
    bessel: FloatArray
    """n / (n - 1)."""
    eps: FloatArray
    """NaN where the spread is a variance."""
    lead: FloatArray
    """Those of :class:`_LayerBatches`."""


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
        self._sums: FloatArray = np.zeros((0, _ROWS, 6))
        self._decays: FloatArray = np.zeros((0, 2))

    def add_layers(self, widths: Sequence[int]) -> range:
        """Append layers of so many channels to the flat channel space. Returns their indices."""
        added, first = sum(widths), len(self.widths)
        vars(self).update(  # in one step, as in `commit`
            widths=[*self.widths, *widths],
            _starts=[*self._starts[:-1], *accumulate(widths, initial=self._starts[-1])],
            _channels=torch.cat([self._channels, self._channels.new_zeros(*self.CHANNEL_SHAPE, added)], dim=-1),
            _first_bad=torch.cat([self._first_bad, self._first_bad.new_full((added,), torch.inf)]),
            _sums=np.concatenate([self._sums, np.zeros((len(widths), _ROWS, 6))]),
            _decays=np.concatenate([self._decays, np.tile(_FRESH, (len(widths), 1))]),
        )
        return range(first, first + len(widths))

    def channels(self, layer: int) -> slice:
        """Where a layer lies in the flat channel space."""
        return slice(self._starts[layer], self._starts[layer + 1])

    def first_bad(self, layer: int) -> Tensor:
        """The first call of a layer that was not finite, by channel: a view, to be written to; inf if none was."""
        return self._first_bad[self.channels(layer)]

    def reset(self) -> None:
        """Forget all batches, keep the layers."""
        self._channels = torch.zeros_like(self._channels)
        self._first_bad = torch.full_like(self._first_bad, torch.inf)
        self._sums[:] = 0
        self._decays[:] = _FRESH

    @torch.no_grad()
    def merged(self, batches: Mapping[int, Batches]) -> list[Write]:
        """What is to be written to add consecutive batches of layers, all with equal histories in one fused merge.

        A batch with a non-finite mean or variance in a channel makes the population of that channel NaN until the next
        :meth:`reset`, and that of no other. Nothing changes before the writes are committed.

        Args:
            batches: For each layer's index, what its calls contributed, in the order of time.
        """
        sums, decays = self._sums.copy(), self._decays.copy()
        writes: list[Write] = []
        in_blocks, beside = self._grouped(batches)
        for (before, added), group in in_blocks.items():
            size, old_size = block_size(before + added), block_size(before)
            old_blocks = -(-before // old_size)
            first = before // size if size == old_size else 0  # blocks before it stay as they are
            blocks = np.arange(first, old_blocks) * old_size // size, np.arange(before, before + added) // size
            union = np.concatenate(blocks) - first
            rows = slice(first, old_blocks), slice(first, first + int(union[-1]) + 1)
            for part in self._portions(group):
                weights, members = _merge_sums(part, *rows, union, sums, decays)
                writes += self._merge_channels(part, *rows, weights, members)
        for added, group in beside.items():
            rows = slice(_BESIDE, _ROWS), slice(_BESIDE, _ROWS)
            weights, members = _merge_sums(group, *rows, np.zeros(1 + added, dtype=int), sums, decays)
            writes += self._merge_channels(group, *rows, weights, members)
        state = vars(self)
        return [*writes, partial(setitem, state, "_sums", sums), partial(setitem, state, "_decays", decays)]

    def blocks(self) -> Blocks:
        """All that the window holds, block by block. On the CPU, valid until the next update."""
        sums, beside = self._sums[:, :MAX_BLOCKS].copy(), self._sums[:, _BESIDE].copy()
        channels = self._channels.cpu().numpy()
        return Blocks(
            widths=np.array(self.widths, dtype=np.int64),
            num_batches=sums[..., _NUM_BATCHES],
            num_samples=sums[..., _NUM_SAMPLES],
            batch_size=sums[..., _BATCH_SIZE],
            weight=sums[..., _WEIGHT],
            noise=np.stack([sums[..., _NOISE_OF_MEAN], sums[..., _NOISE_OF_VAR]]),
            value=channels[_VALUE, :MAX_BLOCKS],
            m2=channels[_M2, :MAX_BLOCKS],
            decay=self._decays[:, _DECAY].copy(),
            rounding=self._decays[:, _ROUNDING].copy(),
            first_bad=self._first_bad.cpu().numpy(),
            beside=PooledBatches(
                num_batches=beside[:, _NUM_BATCHES],
                num_samples=beside[:, _NUM_SAMPLES],
                batch_size=beside[:, _BATCH_SIZE],
                value=channels[_VALUE, _BESIDE],
                m2=channels[_M2, _BESIDE],
            ),
        )

    def channel_state(self) -> Tensor:
        """A CPU copy of what is kept per channel, ``(CHANNEL_ROWS, channels)``: see :meth:`restore`."""
        return torch.cat([self._channels.flatten(0, 2), self._first_bad[None]]).cpu()

    def layer_state(self, layer: int) -> dict[str, list[Any]]:
        """What is kept per layer, in primitives: see :meth:`restore`."""
        return {"scalars": self._sums[layer].tolist(), "momenta": self._decays[layer].tolist()}

    def forget_weights(self, layer: int) -> None:
        """The running statistics have just been written: no batch so far is in them."""
        self._sums[layer, :, [_WEIGHT, _NOISE_OF_MEAN, _NOISE_OF_VAR]] = 0
        self._decays[layer] = _FRESH

    def restore(self, layer: int, channels: Tensor, state: Mapping[str, Any]) -> None:
        """Give a layer the state that another window had for it: its channels' part and its own."""
        own = self.channels(layer)
        self._channels[..., own] = channels[:-1].view(*self.CHANNEL_SHAPE, -1).to(self.device)
        self._first_bad[own] = channels[-1].to(self.device)
        self._sums[layer] = state["scalars"]
        self._decays[layer] = state["momenta"]

    def _grouped(
        self, batches: Mapping[int, Batches]
    ) -> tuple[dict[tuple[int, int], list[_LayerBatches]], dict[int, list[_LayerBatches]]]:
        """Layers that can be merged together: by batches in their blocks and new ones; those that go beside, by number.

        A layer whose calls updated running statistics only in part is in both.
        """
        in_blocks: dict[tuple[int, int], list[_LayerBatches]] = defaultdict(list)
        beside: dict[int, list[_LayerBatches]] = defaultdict(list)
        counts = self._sums[..., _NUM_BATCHES]
        history, counted = [np.add.reduce(counts[:, :n], axis=1).tolist() for n in (MAX_BLOCKS, _ROWS)]
        for layer in sorted(batches):
            its, before = batches[layer], int(counted[layer])
            num_calls = len(its.momentum)
            if all(its.momentum):
                if num_calls:
                    in_blocks[int(history[layer]), num_calls].append(
                        _LayerBatches(layer, its, (before + 1,) * num_calls)
                    )
                continue
            for is_updating in (True, False):
                chosen = [bool(momentum) is is_updating for momentum in its.momentum]
                if num := sum(chosen):
                    group = in_blocks[int(history[layer]), num] if is_updating else beside[num]
                    numbers = compress(range(before + 1, before + 1 + num_calls), chosen)
                    lead = tuple(number - index for index, number in enumerate(numbers))
                    group.append(
                        _LayerBatches(layer, Batches._make(tuple(compress(field, chosen)) for field in its), lead)
                    )
        return in_blocks, beside

    def _merge_channels(
        self, group: list[_LayerBatches], old: slice, new: slice, weights: _Weights, members: FloatArray
    ) -> list[Write]:
        """Merge the ``old`` rows and the batches of a group of layers into the ``new`` rows: returns what writes them.

        ``weights`` and ``members`` are those of :func:`_merge_sums`. All layers have the same number of batches.
        """
        columns, layer_of = self._columns_of([its.layer for its in group])
        num_parts, num_added, width = members.shape[1], len(group[0].lead), len(layer_of)
        num_old = num_parts - num_added
        expanded = on_device(np.concatenate(weights), self.device).index_select(1, layer_of)
        of_parts, of_unions, bessel, eps, lead = expanded.split_with_sizes([len(rows) for rows in weights])

        rows = self._channels[:, old]
        rows = rows[..., columns] if isinstance(columns, slice) else rows.index_select(3, columns)
        parts = rows.new_empty(num_parts, 2, width)
        parts[:num_old] = rows[_VALUE]
        fields = [its.batches for its in group]
        waiting = chain.from_iterable(zip(*(f.mean for f in fields), *(f.spread for f in fields), strict=True))
        parts[num_old:] = joined(tuple(waiting), self.device).view(num_added, 2, width)
        mean, var = parts[num_old:].unbind(1)
        to_unbiased_variances(var, eps, bessel, ~np.isnan(weights.eps))

        _, value, m2 = merge_moments(
            of_parts.reshape(-1, 2 * width),
            parts.view(num_parts, 2 * width),
            rows[_M2].reshape(num_old, 2 * width),
            on_device(members, self.device),
            of_unions.reshape(-1, 2 * width),
        )
        merged = torch.stack([value, m2]).view(2, -1, 2, width)
        bad = self._first_not_finite(merged, mean, var, lead)
        if old.stop > new.stop:  # rows that the coarser blocks no longer need
            freed = merged.new_zeros(2, old.stop - new.stop, 2, width)
            merged, new = torch.cat([merged, freed], dim=1), slice(new.start, old.stop)
        target = self._channels[:, new]
        if isinstance(columns, slice):
            writes = [partial(Tensor.copy_, target[..., columns], merged)]
        else:
            writes = [partial(Tensor.index_copy_, target, 3, columns, merged)]
        if bad is not None:
            everywhere = torch.full_like(self._first_bad, math.inf)
            everywhere[columns] = bad
            writes.append(partial(torch.minimum, self._first_bad, everywhere, out=self._first_bad))
        return writes

    def _first_not_finite(self, merged: Tensor, mean: Tensor, var: Tensor, lead: Tensor) -> Tensor | None:
        """The number that the first batch with a value that is not finite has in the window, per channel; or inf.

        None if it is known that all are finite. On the CPU one sum tells that, in the usual case; elsewhere to ask
        would mean to wait for the device.
        """
        if self.device.type == "cpu":
            with np.errstate(invalid="ignore"):  # of Inf and -Inf
                if np.isfinite(merged.numpy().sum()):
                    return None
        nothing = (mean + var).mul_(0)  # or NaN
        index = torch.arange(len(mean), dtype=torch.float64, device=self.device)[:, None]
        return torch.where(nothing == 0, torch.inf, index).add_(lead).amin(dim=0)

    def _portions(self, group: list[_LayerBatches]) -> list[list[_LayerBatches]]:
        """A group of layers, in parts of so few channels that what a merge computes stays in the caches."""
        last_columns = np.cumsum([self.widths[its.layer] for its in group]) - 1
        portion_of = last_columns // _PORTION if self.device.type == "cpu" else np.zeros_like(last_columns)
        return [[its for its, _ in part] for _, part in groupby(zip(group, portion_of, strict=True), itemgetter(1))]

    def _columns_of(self, layers: list[int]) -> tuple[slice | Tensor, Tensor]:
        """The flat columns of some layers, in their order, and for each of these which of the layers it is of."""
        widths = np.array([self.widths[layer] for layer in layers])
        layer_of = np.repeat(np.arange(len(layers)), widths)
        if len(layers) == layers[-1] - layers[0] + 1:
            own = slice(self._starts[layers[0]], self._starts[layers[-1] + 1])
            return own, on_device(layer_of, self.device)
        shifts = np.array([self._starts[layer] for layer in layers]) - (np.cumsum(widths) - widths)
        columns = np.arange(len(layer_of)) + shifts[layer_of]
        return on_device(columns, self.device), on_device(layer_of, self.device)


def _merge_sums(
    group: list[_LayerBatches],
    old: slice,
    new: slice,
    union: NDArray[np.int64],
    sums: FloatArray,
    decays: FloatArray,
) -> tuple[_Weights, FloatArray]:
    """Merge what is kept per layer, in place: the ``old`` rows and the batches of a group into the ``new`` rows.

    ``union`` tells for every part, old rows first, which of the new rows it belongs to. Returns what the merge of the
    channels needs: weights, and of 0 and 1 which part is in which row, ``(rows, P)``.
    """
    members = (np.arange(new.stop - new.start)[:, None] == union).astype(float)
    layers = slice(None) if len(group) == len(sums) else [its.layer for its in group]
    num_old, num_added, num_layers = old.stop - old.start, len(group[0].lead), len(group)
    count = rows_of([its.batches.num_samples for its in group])
    momentum = np.empty((num_added, num_layers))
    momentum[:] = rows_of([its.batches.momentum for its in group])
    since = np.ones((num_added + 1, num_layers))  # what remains at the end of what stood before each batch
    np.cumprod((1 - momentum)[::-1], axis=0, out=since[-2::-1])
    remains, after = since[0], since[1:]
    weight, dof = momentum * after, np.maximum(count - 1, 1)

    sums[layers, : old.stop, _WEIGHT] *= remains[:, None]
    sums[layers, : old.stop, _NOISE] *= np.square(remains)[:, None, None]
    parts = np.empty((num_old + num_added, num_layers, 6))
    parts[:num_old] = sums[layers, old].transpose(1, 0, 2)
    batch = parts[num_old:]
    batch[..., _NUM_BATCHES], batch[..., _NUM_SAMPLES], batch[..., _WEIGHT] = 1, count, weight
    batch[..., _BATCH_SIZE] = rows_of([its.batches.batch_size for its in group])
    batch[..., _NOISE_OF_MEAN], batch[..., _NOISE_OF_VAR] = weight**2 / count, weight**2 / dof

    merged = (members @ parts.reshape(len(parts), -1)).reshape(-1, num_layers, 6)
    sums[layers, old] = 0
    sums[layers, new] = merged.transpose(1, 0, 2)
    decays[layers, _DECAY] *= remains
    decays[layers, _ROUNDING] = decays[layers, _ROUNDING] * remains + (after * (momentum > 0)).sum(axis=0)
    weights = _Weights(
        of_parts=_both_weights(parts[: num_old + len(count)]),
        of_unions=_both_weights(merged),
        bessel=count / dof,
        eps=rows_of([its.batches.eps for its in group]),
        lead=rows_of([its.lead for its in group]),
    )
    return weights, members


def _both_weights(parts: FloatArray) -> FloatArray:
    """Of what is kept of parts of some layers, ``(P, L, 6)``: n and n - K in turn, ``(2 * P, L)``."""
    weights = np.empty((len(parts), 2, parts.shape[1]))
    weights[:] = parts[:, None, :, _NUM_SAMPLES]
    weights[:, 1] -= parts[..., _NUM_BATCHES]
    return weights.reshape(-1, parts.shape[1])
