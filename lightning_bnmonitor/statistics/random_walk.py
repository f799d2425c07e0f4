r"""How far running statistics are behind inputs that move at random, as they do with the weights of a fast training.

**Derivation.** Let a batch's mean be a random walk, with steps of variance :math:`\sigma^2`, and noise. In the
difference D of the means of neighbouring blocks, of K and K' batches, a step within a block weighs i / K, so that
:math:`\operatorname{E} D^2 = \sigma^2 (1 + q_K + q_{K'}) + V (1 / G + 1 / G')` with
:math:`q_K = (K - 1)(2 K - 1) / (6 K)`: for long blocks :math:`\tfrac23 K \sigma^2` and noise. V, from within blocks,
has of the walk :math:`u \sigma^2` a batch in it, :math:`u = \sum (K^2 - 1) / (6 \nu)`. Over all neighbours, then,

.. math:: \sigma^2 = \frac{\sum D^2 - V (1 / G + 1 / G')}{\sum 1 + q_K + q_{K'} - u (1 / K + 1 / K')},

with (2 K - 1) / 3 for each pair of equal blocks below. It is taken over the later half of the neighbours, too, and the
smaller counts: what moved early in a window, as in a first epoch, is forgotten at its end. The lag of an average with
momentum m behind the last batch is
:math:`e_t = (1 - m)(e_{t-1} - \sigma \xi_t)`, and where it is stationary

.. math:: E_\text{walk}^2 = \operatorname{E} e^2 = \sigma^2 \frac{(1 - m)^2}{m (2 - m)}.

The net movement of a window does not show this, and running statistics look right beside an average over its last
batches that reaches as far back as they do. (The optimizer's step after the last batch is not counted: over single
batches weights move more smoothly than blocks tell.)

**Chance.** In J blocks noise alone adds :math:`N = \sum V (1 / G + 1 / G')` to :math:`\sum D^2`, with a standard error
of :math:`N \sqrt{3 / (J - 1)}` if all channels vary alike, and less otherwise: up to three of them count as none.
The standard error of a walk's own squares is at most :math:`1.5 / \sqrt{J - 1}` of them. (Neighbouring differences of
noise are correlated by -1/2, those of a walk by 1/4.)

**At most.** What moves more steadily than a walk goes farther in many batches by the same steps, up to a straight line:
with d batches between the middles of neighbouring blocks then :math:`D = \delta d`, of which V has its part, too. By
the differences of the later half, behind the statistics after the optimizer's last step, which counts here,

.. math:: E_\text{most}^2 = \max\Bigl(\frac{\sigma^2}{m (2 - m)}, \frac{\delta^2}{m^2}\Bigr).

(What moves even less steadily than a walk is noise from batch to batch.)

*Checked by simulation:* within 20 % of the lag that random walks made, at momenta from 0.05 to 0.5; at most 1.1 times
the bound for walks, straight lines, and fractional Brownian motion between them, at momenta from 0.5 to 0.9.
*Not established:* inputs that return to where they were, which running statistics are less far behind; averages that
reach back farther than the window; a single jump in the last batches, by which an average may be farther behind.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_bnmonitor.statistics.blocks import Blocks
from lightning_bnmonitor.statistics.channel_layout import BoolArray, ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.contrasts import Densities, Sums, first_of_later
from lightning_bnmonitor.statistics.noise import NoiseModel

WALK_SPREAD = 1.5
"""Relative standard error of the square of a walk's error, times the root of J - 1: where all channels move alike."""
_STANDARD_ERRORS = 3  # that count as chance


class Lag(NamedTuple):
    """How far running statistics are behind inputs that move, as RMS errors of the normalised activation."""

    walk: FloatArray
    """At random, ``(L,)``: chance taken off; 0 if it may be chance."""
    most: FloatArray
    """As at random, or along a line, whichever is more, ``(L,)``: the last step counts."""
    step: FloatArray
    """RMS step of a walk, by the differences of the later half, ``(L,)``."""


def lag_of_running(
    blocks: Blocks,
    densities: Densities,
    sums: Sums,
    noise: NoiseModel,
    momentum: FloatArray,
    unit: FloatArray,
    layout: ChannelLayout,
) -> Lag:
    """How far running statistics are behind inputs that move: see the top of this file.

    Args:
        blocks: The window's.
        densities: Theirs.
        sums: Theirs.
        noise: The window's noise model.
        momentum: The weight of the last batch in the running statistics, ``(L,)``.
        unit: What a difference of means, and of variances, counts in, ``(2, C)``.
        layout: Which channels are whose.

    Returns:
        NaN with a single block.
    """
    is_pair = blocks.num_batches[:, 1:] > 0
    is_late = is_pair & (np.arange(is_pair.shape[1]) >= first_of_later(densities)[:, None])
    in_noise = _of_neighbours(1 / densities.weights)
    extents = _extents(blocks.num_batches, densities.dof)

    def beyond_chance(steps: FloatArray, of: BoolArray) -> tuple[FloatArray, FloatArray]:
        by_chance = noise.error(np.where(of, in_noise, 0).sum(axis=-1), unit) ** 2
        return layout.mean(steps / unit**2).sum(axis=0) - by_chance, by_chance

    excess, by_chance = beyond_chance(sums.steps, is_pair)
    is_chance = excess <= _STANDARD_ERRORS * np.sqrt(3 / is_pair.sum(axis=1)) * by_chance
    late_excess, _ = beyond_chance(sums.late_steps, is_late)
    of_all, of_late = (
        excess / np.where(is_pair, extents, 0).sum(axis=2),
        late_excess / np.where(is_late, extents, 0).sum(axis=2),
    )
    behind_end = np.stack([1 / (momentum * (2 - momentum)), 1 / momentum**2])
    walk = np.where(is_chance, 0, np.maximum(np.minimum(of_all, of_late)[0], 0)) * behind_end[0]
    most = (of_late * behind_end).max(axis=0)
    step = np.sqrt(np.maximum(of_late[0], 0))
    return Lag((1 - momentum) * np.sqrt(walk), np.sqrt(np.maximum(most, 0)), step)


def _extents(batches: FloatArray, dof: FloatArray) -> FloatArray:
    """The squared difference of neighbouring blocks in units of a walk's and of a line's squared step, ``(2, L, 15)``.

    Less what the movement within blocks makes of it that counts as noise.
    """
    of_walk = 0.5 + (batches - 1) * (2 * batches - 1) / (6 * batches)
    of_line = (batches[:, 1:] + batches[:, :-1]) ** 2 / 4
    within = np.where(batches > 0, batches**2 - 1, 0)
    in_scale = np.stack([within.sum(axis=1) / 6, (batches * within).sum(axis=1) / 12]) / dof
    as_noise = in_scale[..., None] * _of_neighbours(1 / batches)
    extents: FloatArray = np.stack([_of_neighbours(of_walk), of_line]) - as_noise
    return extents


def _of_neighbours(values: FloatArray) -> FloatArray:
    """Sum over neighbouring blocks of the value of both, ``(*, L, 16)`` to ``(*, L, 15)``."""
    total: FloatArray = values[..., 1:] + values[..., :-1]
    return total
