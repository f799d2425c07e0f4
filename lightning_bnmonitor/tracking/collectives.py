"""What ranks tell each other at the end of a window: their moments to rank 0, and its findings to all.

Two collectives, whose size grows with channels: neither batches nor blocks of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_bnmonitor.compat import device_for_objects
from lightning_bnmonitor.statistics.analysis import ROUNDING, Profile, gates
from lightning_bnmonitor.statistics.moments import merge_moments
from lightning_bnmonitor.statistics.segments import FloatArray, Segments, student_score

_MEAN, _VAR = 0, 1


class Share(NamedTuple):
    """What one rank has seen in a window, or several have together; flat over the layers' channels."""

    num_samples: FloatArray
    """Values per channel in all calls, ``(L,)``."""
    dof: FloatArray
    """Degrees of freedom of ``within``, ``(L,)``."""
    weight: FloatArray
    """Of the calls that updated the running statistics, the sum of n (mean) and of n - 1 (variance), ``(2, L)``."""
    mean: FloatArray
    """Mean of all values, ``(C,)``; 0 if there are none."""
    squares: FloatArray
    """Sum of squared deviations from it, ``(C,)``."""
    value: FloatArray
    """Mean of batch means and variances of the calls that updated the running statistics, ``(2, C)``; 0 if none."""
    within: FloatArray
    """Weighted sum of squares of these within blocks of consecutive batches, ``(2, C)``."""
    first_bad: FloatArray
    """The first call with a value that is not finite, ``(C,)``; inf if none."""

    @classmethod
    def empty(cls, layers: Segments) -> Share:
        """That of a rank that has seen nothing of these layers."""
        return cls(*(np.zeros(shape) for shape in cls._shapes(layers)))._replace(
            first_bad=np.full(layers.num_channels, np.inf)
        )

    @classmethod
    def of(cls, profile: Profile, num_ranks: NDArray[np.int64]) -> Share:
        """What one rank's window holds.

        Of layers whose moments were taken over several ranks (SyncBatchNorm), ``(L,)``, each of these has the same in
        its window: its share is its own part of them.
        """
        layers, count = profile.layers, profile.layers.spread(profile.num_samples)
        part = layers.spread(1 / num_ranks)
        samples = np.where(profile.num_batches > 0, profile.samples_per_batch * profile.num_batches, 0)
        weight = np.stack([samples, samples - profile.num_batches])
        mean, var = profile.population
        return cls(
            num_samples=profile.num_samples / num_ranks,
            dof=profile.dof / num_ranks,
            weight=weight / num_ranks,
            mean=np.where(count > 0, mean, 0),
            squares=np.where(count > 1, var * (count - 1), 0) * part,
            value=np.where(layers.spread(weight) > 0, profile.reference, 0),
            within=np.where(layers.spread(profile.dof) > 0, profile.noise_scale * layers.spread(profile.dof), 0) * part,
            first_bad=profile.first_bad,
        )

    def put(self, layer: int, channels: slice, other: Share, its_layer: int, its_channels: slice) -> None:
        """Take the place of one layer from another share."""
        for mine, its in zip(self[:3], other[:3], strict=True):
            mine[..., layer] = its[..., its_layer]
        for mine, its in zip(self[3:], other[3:], strict=True):
            mine[..., channels] = its[..., its_channels]

    def packed(self) -> Tensor:
        """All of it as one tensor."""
        return torch.from_numpy(np.concatenate([part.ravel() for part in self]))

    @classmethod
    def unpacked(cls, packed: Tensor, layers: Segments) -> Share:
        """The share of these layers that was :meth:`packed`."""
        shapes = cls._shapes(layers)
        parts = np.split(packed.numpy(), np.cumsum([np.prod(shape) for shape in shapes])[:-1])
        return cls(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    @staticmethod
    def _shapes(layers: Segments) -> list[tuple[int, ...]]:
        of_layers, of_channels = (len(layers.widths),), (layers.num_channels,)
        return [of_layers, of_layers, (2, *of_layers), *[of_channels] * 2, *[(2, *of_channels)] * 2, of_channels]

    def population(self, layers: Segments) -> FloatArray:
        """Mean and unbiased variance of all values, ``(2, C)``; NaN where there are none, or just one."""
        count = layers.spread(self.num_samples)
        with np.errstate(invalid="ignore", divide="ignore"):
            population = np.where(count > [[0], [1]], [self.mean, self.squares / (count - 1)], np.nan)
        return np.where(np.isfinite(self.mean + self.squares), population, np.nan)


def together(shares: Sequence[Share], layers: Segments) -> Share:
    """What several ranks have seen, as if one had."""
    num_samples, dof, weight, mean, squares, value, within, first_bad = map(np.stack, zip(*shares, strict=True))
    members = torch.ones(1, len(shares), dtype=torch.float64)

    def merged(count: FloatArray, centre: FloatArray, spread: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights, means, m2 = (torch.from_numpy(part.reshape(len(shares), -1)) for part in (count, centre, spread))
        _, means, m2 = merge_moments(weights, means, m2, members)
        return means.numpy().reshape(centre.shape[1:]), m2.numpy().reshape(centre.shape[1:])

    mean, squares = merged(layers.spread(num_samples), mean, squares)
    value, _ = merged(layers.spread(weight), value, np.zeros_like(value))
    bad = np.fmin.reduce(first_bad)
    return Share(num_samples.sum(0), dof.sum(0), weight.sum(0), mean, squares, value, within.sum(0), bad)


def difference(one: Share, everyone: Share, layers: Segments, eps: FloatArray) -> FloatArray:
    """RMS error of the normalised activation that one rank's data make against all ranks', chance taken off.

    Args:
        one: What that rank has seen.
        everyone: What all have.
        layers: Which channels are whose.
        eps: Of each layer, ``(L,)``.

    Returns:
        ``(L,)``; 0 where it may be chance, or where no running statistics were updated.
    """
    with np.errstate(all="ignore"):
        scaled = everyone.population(layers)[_VAR] + layers.spread(eps)
        apart, variance = one.value - everyone.value, 1 / one.weight - 1 / everyone.weight
        floor = layers.spread(everyone.weight) * np.square(ROUNDING * everyone.value)
        noise_scale = np.maximum(everyone.within / layers.spread(everyone.dof), floor)
        expected = noise_scale * layers.spread(variance)
        z = np.where(apart == 0, 0, np.clip(apart / np.sqrt(expected), -1e100, 1e100))
        counted = gates(layers, student_score(z, layers.spread(everyone.dof))[None])[0]
        comparable = (variance > 0) & (one.weight > 0) & (everyone.dof > 0)
        excess = layers.mean((apart**2 - expected) / np.stack([scaled, 4 * scaled**2]))
        error: FloatArray = np.sqrt(np.where(counted & comparable, np.maximum(excess, 0), 0).sum(axis=0))
    return error


def rank() -> int:
    """Number of this process in the default process group; 0 if there is none."""
    return dist.get_rank() if num_ranks() > 1 else 0


def num_ranks() -> int:
    """Size of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def group() -> dist.ProcessGroup:
    """Our own process group of all ranks, on the CPU: what others communicate cannot be taken for ours, or ours for it.

    So a rank that is done with its batches can wait here while the others still communicate for theirs. For the first
    time, all ranks have to call this in the same order as they create other groups.
    """
    world = dist.group.WORLD
    assert world is not None
    if _Own.world is None or _Own.world() is not world:
        _Own.group = dist.new_group(backend="gloo") if dist.is_gloo_available() else world
        _Own.world = weakref.ref(world)
    return _Own.group


def gather(values: Tensor) -> list[Tensor]:
    """CPU tensors of one size of all ranks, on rank 0; an empty list on the others."""
    values = values.to(_device())
    received = [torch.empty_like(values) for _ in range(num_ranks())] if rank() == 0 else None
    dist.gather(values, received, dst=0, group=group())
    return [part.cpu() for part in received or ()]


def broadcast(values: Tensor) -> Tensor:
    """Rank 0's ``values``, a CPU tensor of one size on all ranks."""
    values = values.to(_device())
    dist.broadcast(values, src=0, group=group())
    return values.cpu()


def all_succeeded(success: bool) -> bool:
    """Whether all ranks say so; each has to call this."""
    said = gather(torch.tensor([success], dtype=torch.uint8, device="cpu"))
    return bool(broadcast(torch.stack(said).amin(dim=0) if said else torch.zeros(1, dtype=torch.uint8, device="cpu")))


def _device() -> torch.device:
    """Where our process group takes tensors from."""
    return device_for_objects(group())


class _Own:
    """Our process group, and the default one that it was made beside."""

    world: ClassVar[weakref.ref[dist.ProcessGroup] | None] = None
    group: ClassVar[dist.ProcessGroup]
