r"""The numbers of a remedy: which momentum, which batch size, how many batches more.

A running average with momentum m of values that drift by :math:`\delta` a batch, whose sampling noise has the variance
:math:`V_b` a batch, has the squared error

.. math:: \delta^2 \Bigl(\frac{1 - m}{m}\Bigr)^2 + V_b \frac{m}{2 - m},

which is smallest where :math:`m^3 = r (1 - m)(2 - m)^2` with :math:`r = \delta^2 / V_b`: about :math:`(4 r)^{1/3}`.
Of noise alone, the first term is 0 and a smaller momentum is always better; of what the window began with,
:math:`(1 - m)^T` is left after T batches. With u updates a call, m is the effective momentum of all of them and the
module's is :math:`1 - (1 - m)^{1/u}`.
"""

from __future__ import annotations

import math

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence

_TARGET = WARNING / 2  # what a remedy aims at
_REMAINDER = 0.05  # weight that may be left in the buffers of what was before the window


def advice(verdict: str, layer: Circumstances, evidence: Evidence) -> dict[str, float]:
    """What the remedy of a verdict states in numbers, as a part of the evidence.

    Args:
        verdict: The verdict's name.
        layer: How the layer was called.
        evidence: Its numbers so far.
    """
    numbers: dict[str, float] = {}
    if layer.updates_twice and layer.momentum is not None:
        # So that all updates of a call together weigh what was asked for.
        numbers["compensated_momentum"] = 1 - max(1 - layer.momentum, 0.0) ** (1 / layer.updates_per_call)
    if verdict not in ("warming-up", "lagging", "noisy"):
        return numbers
    batches, jitter, drift = evidence["batches"], evidence["jitter"], evidence["drift_per_batch"]
    momentum = min(max(evidence["effective_momentum"], 0.0), 1.0)
    lower = 1 - _REMAINDER ** (1 / batches)  # a window then replaces what was there before it
    if verdict == "lagging" and layer.momentum is not None and momentum < 1:
        # The buffers may lag for what moved in windows before: this one's trend does not show it.
        drift = max(drift, evidence["lag_error"] * momentum / (1 - momentum))
    elif verdict == "warming-up":
        excess = evidence["warmup_error"] / _TARGET
        lower = max(lower, 1 - (evidence["initial_weight"] / excess) ** (1 / batches))
        if 0 < momentum < 1:
            numbers["batches_to_go"] = math.ceil(math.log(excess) / -math.log1p(-momentum))
    elif verdict == "noisy":
        excess = evidence["noise_error"] / _TARGET
        numbers["recommended_batch_size"] = math.ceil(evidence["batch_size"] * excess**2)
        variance = momentum / (2 - momentum) / excess**2  # of the running average over that of a batch
        lower = 2 * variance / (1 + variance)
    best = lower
    if verdict != "warming-up" or _expected_error(lower, drift, jitter) > _TARGET:
        best = max(_optimal_momentum(drift, jitter), lower)
    if (best < momentum) == (verdict == "noisy") and not (verdict == "noisy" and layer.momentum is None):
        numbers["recommended_momentum"] = 1 - (1 - best) ** (1 / max(layer.assumed_updates, 1))
        numbers["recommended_error"] = _expected_error(best, drift, jitter)
    return numbers


def _expected_error(momentum: float, drift: float, jitter: float) -> float:
    """Error of a running average of values that drift by so much a batch, and are noisy by so much."""
    return math.hypot(drift * (1 - momentum) / momentum, jitter * math.sqrt(momentum / (2 - momentum)))


def _optimal_momentum(drift: float, jitter: float) -> float:
    """Momentum with the smallest :func:`_expected_error`, by bisection."""
    if not drift or not jitter:
        return float(not jitter)
    ratio = (drift / jitter) ** 2
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**3 < ratio * (1 - middle) * (2 - middle) ** 2 else (low, middle)
    return (low + high) / 2
