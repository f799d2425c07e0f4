"""How far BatchNorm's running statistics are from a reference, channel by channel.

Every function takes and returns ``(C,)`` tensors of one floating dtype, one value per channel, and uses

    s = var + eps          what training divides by (squared)
    q = running_var + eps  what ``eval()`` divides by (squared)
    u = (var - running_var) / q

so that equal statistics give exactly 0 (if s is not 0), and small differences lose no digits. Variances below 0
(rounding) count as 0.
A channel in which any argument is not finite is NaN in the result, so that an aggregate can leave it out and count it.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEAD_VARIANCE = 1e-3
"""A channel is dead when its variance is at most this fraction of ``eps``: BatchNorm's output then is its bias."""


def mean_shift(mean: Tensor, var: Tensor, running_mean: Tensor, eps: float | Tensor) -> Tensor:
    r"""Signed distance of the running mean from the mean, in population standard deviations.

    .. math:: d = (\mu_\text{running} - \mu) / \sqrt{\sigma^2 + \epsilon}

    Args:
        mean: Population mean, ``(C,)``.
        var: Population variance, ``(C,)``.
        running_mean: Running mean, ``(C,)``.
        eps: The layer's ``eps``, a number or ``(C,)``.

    Returns:
        ``(C,)``, in population standard deviations; positive where the running mean is too large.

    Example::

        >>> mean_shift(torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([1.0]), eps=0.0)
        tensor([0.5000])
    """
    shift = (running_mean - mean) / torch.sqrt(var.clamp_min(0) + eps)
    return _finite_only(shift, mean, var, running_mean)


def log_var_ratio(var: Tensor, running_var: Tensor, eps: float | Tensor) -> Tensor:
    r"""Signed log ratio of the running variance to the variance.

    .. math:: \ln\frac{\sigma^2_\text{running} + \epsilon}{\sigma^2 + \epsilon}

    Args:
        var: Population variance, ``(C,)``.
        running_var: Running variance, ``(C,)``.
        eps: The layer's ``eps``, a number or ``(C,)``.

    Returns:
        ``(C,)``, dimensionless; positive where the running variance is too large, NaN in dead channels.

    Example::

        >>> log_var_ratio(torch.tensor([1.0]), torch.tensor([2.718281828]), eps=0.0)
        tensor([1.])
    """
    return _finite_only(-_log_ratio(var, running_var, eps), var, running_var, alive=~is_dead(var, eps))


def act_rmse(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float | Tensor) -> Tensor:
    r"""RMS error of the normalised activation in ``eval()``, exact for any distribution of the inputs.

    .. math::
        \sqrt{\operatorname{E}(\hat x_\text{eval} - \hat x_\text{true})^2} =
        \sqrt{(\alpha - 1)^2\,\sigma^2/s + (\mu_\text{running} - \mu)^2 / q},
        \qquad \alpha - 1 = \frac{u}{\sqrt{s/q} + 1}

    About 0.1 is worth a warning, 0.25 (10 % of the signs before a ReLU flip) an alert.

    Args:
        mean: Population mean, ``(C,)``.
        var: Population variance, ``(C,)``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running variance, ``(C,)``.
        eps: The layer's ``eps``, a number or ``(C,)``.

    Returns:
        ``(C,)``, in units of the normalised activation (whose standard deviation is 1).

    Example::

        >>> one = torch.ones(1)
        >>> act_rmse(0 * one, one, 0.1 * one, one, eps=0.0)
        tensor([0.1000])
    """
    u, s, q = _ratio(var, running_var, eps)
    gain_error = u / (torch.sqrt(s / q) + 1)
    share = torch.where(var > 0, var / s, torch.zeros_like(var))
    error = torch.sqrt(gain_error.square() * share + (running_mean - mean).square() / q)
    return _finite_only(error, mean, var, running_mean, running_var)


def kl(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float | Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of the running from the exact normal distribution.

    .. math::
        \operatorname{KL}\bigl(N(\mu, s) \,\|\, N(\mu_\text{running}, q)\bigr)
        = \tfrac12\bigl[u - \ln(1 + u) + (\mu_\text{running} - \mu)^2 / q\bigr]

    It equals the divergence of the law of the normalised activation in ``eval()`` from N(0, 1) for normal inputs.

    Args:
        mean: Population mean, ``(C,)``.
        var: Population variance, ``(C,)``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running variance, ``(C,)``.
        eps: The layer's ``eps``, a number or ``(C,)``.

    Returns:
        ``(C,)``, in nats, never negative; NaN in dead channels.

    Example::

        >>> one = torch.ones(1)
        >>> kl(0 * one, one, one, one, eps=0.0)
        tensor([0.5000])
    """
    u, _, q = _ratio(var, running_var, eps)
    r = u / (2 + u)
    y = r.square()
    # ln(1+u) = 2 artanh(r): its series, with u - 2r = ru taken out, keeps every digit where u and ln(1+u) are close.
    tail = torch.zeros_like(y)
    for power in (15, 13, 11, 9, 7, 5, 3):  # to the last digit of float64 at |u| = 0.2
        tail = 2 / power + y * tail
    series = r * (u - y * tail)
    excess = torch.where(u.abs() < 0.2, series, u - _log_ratio(var, running_var, eps))
    divergence = 0.5 * (excess + (running_mean - mean).square() / q)
    return _finite_only(divergence, mean, var, running_mean, running_var, alive=~is_dead(var, eps))


def is_dead(var: Tensor, eps: float | Tensor) -> Tensor:
    """Where a channel is dead: its variance is at most a thousandth of ``eps``, ``(C,)`` bool.

    There ``act_rmse`` is still right, but ratios of variances say nothing: ``log_var_ratio`` and ``kl`` are NaN.
    """
    return var <= DEAD_VARIANCE * eps


def _log_ratio(var: Tensor, running_var: Tensor, eps: float | Tensor) -> Tensor:
    """ln(s / q), by ``log1p`` where the two are close and by the quotient where ``1 + u`` would lose digits."""
    u, s, q = _ratio(var, running_var, eps)
    return torch.where(u.abs() < 0.5, torch.log1p(u), torch.log(s / q))


def _ratio(var: Tensor, running_var: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s and q: see the top of this file."""
    var, running_var = var.clamp_min(0), running_var.clamp_min(0)
    s, q = var + eps, running_var + eps
    return (var - running_var) / q, s, q


def _finite_only(result: Tensor, *inputs: Tensor, alive: Tensor | None = None) -> Tensor:
    keep = torch.isfinite(torch.stack(inputs)).all(dim=0)
    if alive is not None:
        keep = keep & alive
    return torch.where(keep, result, torch.full_like(result, torch.nan))
