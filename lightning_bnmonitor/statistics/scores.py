"""From a difference over its standard error to a statement: is a layer's difference more than chance explains?"""

from __future__ import annotations

import numpy as np

from lightning_bnmonitor.statistics.channel_layout import BoolArray, ChannelLayout, FloatArray

MEAN, VAR = 0, 1
"""Index of what concerns the running mean, and of what concerns the running variance, on an axis of two."""
_LIMIT = 9.0


def squared_score(z: FloatArray, dof: FloatArray) -> FloatArray:
    r"""The square of Student's t with ``dof`` degrees of freedom on the scale of a standard normal variable.

    .. math:: \Bigl(\frac{8\nu + 1}{8\nu + 3}\Bigr)^2 \nu \ln(1 + z^2/\nu)

    Source: D. L. Wallace, "Bounds on normal approximations to Student's and the chi-square distributions", 1959.
    """
    square: FloatArray = np.square(z)
    square /= dof
    np.log1p(square, out=square)
    square *= ((8 * dof + 1) / (8 * dof + 3)) ** 2 * dof
    return square


def f_score(ratio: FloatArray, dof: FloatArray, dof_below: FloatArray) -> FloatArray:
    r"""A ratio of variances with so many degrees of freedom, F, on the scale of a standard normal variable.

    .. math:: \frac{(1 - a_2) F^{1/3} - (1 - a_1)}{\sqrt{a_2 F^{2/3} + a_1}}, \qquad a_i = \frac{2}{9 \nu_i}

    Source: E. Paulson, "An approximate normalization of the analysis of variance distribution", 1942.
    """
    above, below, root = 2 / (9 * dof), 2 / (9 * dof_below), np.cbrt(ratio)
    score: FloatArray = ((1 - below) * root - (1 - above)) / np.sqrt(below * root**2 + above)
    return score


def exceeds_chance(layout: ChannelLayout, squares: FloatArray, limit: float | FloatArray = _LIMIT) -> BoolArray:
    """Whether a layer's squared scores are more than chance, ``(K, 2, C)`` to ``(K, 2, L)``, for K comparisons.

    For the running mean: the mean of the squared scores exceeds G = 9 (``limit``, also one a layer, ``(L,)``). For the
    running variance, whose distribution has heavy
    tails: their *median* exceeds ``max(4.1, G - 0.7 (C - 1))`` for a layer of C channels. The second limit is
    there because the median of a few channels is no average. By simulation a healthy layer of one channel then alarms
    in 0.4 % of windows (2 % with extremely skewed inputs at momentum 0.5), wider layers more rarely.
    """
    passed = layout.mean(squares) > limit
    squares = squares[:, VAR]
    count = layout.count(np.isfinite(squares))
    limits = np.maximum(4.1, limit - 0.7 * (count - 1))
    above = layout.count(squares > layout.spread(limits))
    passed[:, VAR] = 2 * above > count
    for comparison, layer in np.argwhere((2 * above == count) & (above > 0)):  # the median is halfway between two
        median = np.nanmedian(squares[comparison, layout.slices[layer]])
        passed[comparison, VAR, layer] = median > limits[comparison, layer]
    return passed
