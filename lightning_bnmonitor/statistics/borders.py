r"""Whether the data begin anew at the border of two windows: where nothing is known of what the model is given.

Within one window a steady order of the data and a steady movement of the weights are the same curve. Over the border
of two epochs the weights go on, while sorted data begin anew. With :math:`p_{I-1}, p_I` the means of the last two
blocks of the window before (s its population variance plus ``eps``), :math:`a_1, a_2` those of the first two blocks
now, v the noise scale V of both windows together over s, and averages over channels,

.. math:: j = \overline{(a_1 - p_I)^2 / s}, \qquad c = v (1 / n_{a_1} + 1 / n_{p_I}), \qquad
    \text{near} = \max(\overline{(p_I - p_{I-1})^2 / s}, \overline{(a_2 - a_1)^2 / s}),

there is a *jump* if :math:`j > 4 c`, :math:`j - c > 0.02` and :math:`j - c > 3\,\text{near}`, and parts of the window
differ in both. How often this, with the shape of the movement (:mod:`~lightning_bnmonitor.statistics.batching`), is
right and wrong is measured by ``examples/false_alarms.py --hide-inputs``.

*Not established:* data whose order goes on over the border (a stream), and learning rates that jump there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_bnmonitor.statistics.blocks import Blocks, paired, selected
from lightning_bnmonitor.statistics.channel_layout import FloatArray
from lightning_bnmonitor.statistics.scores import MEAN

_BEYOND_CHANCE, _SHARE, _BEYOND_NEIGHBOURS = 4, 0.02, 3


class Edges(NamedTuple):
    """What a layer's window is known by at its borders: of means alone."""

    first: FloatArray
    """Means of its first two blocks, ``(2, C)``."""
    last: FloatArray
    """Those of its last two."""
    num_samples: FloatArray
    """Values per channel in the first block and in the last, ``(2,)``."""
    within: FloatArray
    """Weighted sum of squares of batch means within blocks, ``(C,)``."""
    dof: FloatArray
    """Degrees of freedom of that, ``(1,)``."""
    scaled: FloatArray
    """Population variance plus ``eps``, ``(C,)``."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(field.nbytes for field in self)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors."""
        return {name: torch.from_numpy(field) for name, field in self._asdict().items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Edges:
        """What has this :meth:`state`."""
        return cls(**{name: field.cpu().numpy() for name, field in state.items()})


def edges_of(blocks: Blocks, layer: int, scaled: FloatArray) -> Edges | None:
    """The edges of one layer's window; None if it has fewer than two blocks.

    Args:
        blocks: All layers'.
        layer: Which it is.
        scaled: Its population variance plus ``eps``, ``(C,)``.
    """
    own = paired(selected(blocks, np.array([layer])))
    num_blocks = int((own.num_batches > 0).sum())
    if num_blocks < 2:
        return None
    value, num_samples = own.value[:num_blocks, MEAN], own.num_samples[0, :num_blocks]
    dof = own.num_batches.sum() - num_blocks
    within = own.m2[:num_blocks, MEAN].sum(axis=0)
    first, last = value[:2].copy(), value[-2:].copy()
    return Edges(first, last, num_samples[[0, -1]], within, np.array([dof]), scaled)


def has_jump(before: Edges, now: Edges) -> bool:
    """Whether a layer's inputs jump at the border of these windows, as their neighbours in time do not."""
    with np.errstate(all="ignore"):
        scale = (before.within + now.within) / (before.dof + now.dof) / before.scaled
        border = (now.first[0] - before.last[1]) ** 2 / before.scaled
        earlier = (before.last[1] - before.last[0]) ** 2 / before.scaled
        later = (now.first[1] - now.first[0]) ** 2 / before.scaled
    known = np.isfinite(scale + border + earlier + later)
    if not known.any():
        return False
    chance = scale[known].mean() * (1 / now.num_samples[0] + 1 / before.num_samples[1])
    jump, near = border[known].mean(), max(earlier[known].mean(), later[known].mean())
    return bool(jump > _BEYOND_CHANCE * chance and jump - chance > max(_SHARE, _BEYOND_NEIGHBOURS * near))
