r"""How far the batches of a group are from all batches: a source, a domain, an augmentation that a batch is of alone.

Training normalises each batch by itself; ``eval()`` normalises all alike. Of a group g with mean :math:`\mu_g` and
variance :math:`\sigma_g^2` of its values in the window (:math:`\sigma_g^2` over all of them, that between its batches
included), and :math:`\mu, \sigma^2` of all,

.. math:: \text{shift}_g = \operatorname{RMS}_c\, \text{act\_rmse}(\mu_g, \sigma_g^2;\, \mu, \sigma^2)

is the RMS error of the normalised activation that perfect running statistics make on that group in ``eval()``.

**Noise.** With :math:`G_g` the sum of the weights of its batches (n for means, n - 1 for variances), M the weighted
squares of these about their group's mean, and s the variance of all plus ``eps``,

.. math:: V = \frac{\sum_g M_g}{\sum_g (T_g - 1)}, \qquad
    \text{noise}_g^2 = \varphi_g \Bigl(1 - \frac{N_g}{N}\Bigr) \operatorname{mean}_c
    \Bigl(\frac{V_\mu}{G_g\, s} + \frac{V_\sigma}{4\, G_g\, s^2}\Bigr),

as g is a part of all. V has the motion of the weights within the window in it: where groups come in random order, that
is what it adds to the difference. :math:`\varphi_g` is for batches that come in runs, and a group that is not mixed
with the others has no noise that could be told: see :mod:`~lightning_bnmonitor.statistics.group_order`.

*Checked by simulation* (10 to 200 batches of 8 or 32 values, 2 to 8 groups, skewed values that resemble each other in a
batch, weights that move up to a standard deviation along four kinds of paths): the median of noise over what is
realised is 1.0 in random order and in turn, 1.1 where a group becomes gradually more frequent, 1.9 (too large) in runs
of four. A shift beyond three times its noise and 0.1 where there is none: in at most 0.4 % of groups. In 60 small
trainings of three networks, from their first epoch, with names that were drawn apart from the data: in 1 of 600 layers
and windows. (With half the contrast in one of two or three groups: in 142 of 150 first layers that could be judged.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lightning_bnmonitor.statistics.channel_layout import ChannelLayout, FloatArray
from lightning_bnmonitor.statistics.divergence import act_rmse
from lightning_bnmonitor.statistics.group_moments import SeenGroups
from lightning_bnmonitor.statistics.scores import VAR

_MIN_DOF = 4


class GroupShifts(NamedTuple):
    """How far groups are from all, of each layer, ``(G, L)`` each."""

    shift: FloatArray
    """NaN where a layer received nothing of a group, or nothing else."""
    noise: FloatArray
    """What chance makes of it; NaN where that cannot be told."""


def group_shifts(
    seen: SeenGroups, population: FloatArray, num_samples: FloatArray, eps: FloatArray, layout: ChannelLayout
) -> GroupShifts:
    """How far groups are from all batches of the window.

    Args:
        seen: What was seen of groups.
        population: Mean and unbiased variance of all values, ``(2, C)``.
        num_samples: Values per channel, ``(L,)``.
        eps: Of each layer, ``(L,)``.
        layout: Which channels are whose.
    """
    moments, channel_eps = seen.moments, layout.spread(eps)
    with np.errstate(all="ignore"):
        own, of_all, spread = map(torch.from_numpy, (moments.population(layout), population, channel_eps))
        errors = [act_rmse(mean, var, of_all[0], of_all[1], spread).numpy() for mean, var in own]
        rest = 1 - moments.num_samples / num_samples
        is_part = (moments.num_samples > 0) & (rest > 1e-9)
        shift = np.where(is_part, np.sqrt(layout.mean(np.square(errors))), np.nan)
        dof = np.maximum(moments.num_batches - 1, 0).sum(axis=0)
        scaled = population[VAR] + channel_eps
        scale = moments.m2.sum(axis=0) / layout.spread(dof) / np.stack([scaled, 4 * scaled**2])
        variance = (layout.mean(scale) / moments.weight).sum(axis=1)
        noise = np.sqrt(seen.order.inflation[:, None] * rest * variance)
    is_known = is_part & (dof >= _MIN_DOF) & seen.order.is_mixed[:, None]
    return GroupShifts(shift, np.where(is_known, noise, np.nan))
