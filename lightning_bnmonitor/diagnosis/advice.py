r"""The numbers of a remedy: which momentum, which batch size, how many batches more.

A running average with momentum m of values that drift by :math:`\delta` a batch, whose sampling noise has the variance
:math:`V_b` a batch, has the squared error

.. math:: \delta^2 \Bigl(\frac{1 - m}{m}\Bigr)^2 + V_b \frac{m}{2 - m},

which is smallest where :math:`m^3 = r (1 - m)(2 - m)^2` with :math:`r = \delta^2 / V_b`: about :math:`(4 r)^{1/3}`. Of
values that move at random, by :math:`\sigma` a batch, the first term is :math:`\sigma^2 (1 - m)^2 / (m (2 - m))`, and
:math:`m^2 = (1 - m) \sigma^2 / V_b`.
Of noise alone, the first term is 0 and a smaller momentum is always better; of what the running statistics began with,
:math:`(1 - m)^T` is left after T batches. What is recommended has to do in as many batches as there were: the memory is
that of the window, longer where that is too noisy, and never so long that much is left of the initial values after all
batches so far. If its error is still worth a warning, nothing is recommended. With u updates a call, m is the effective
momentum of all of them and the module's is :math:`1 - (1 - m)^{1/u}`.
"""

from __future__ import annotations

import math

from lightning_bnmonitor.diagnosis.circumstances import Circumstances
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.rules import is_noisy_by_calls, is_outrun

_TARGET = WARNING / 2  # what a remedy aims at
_TOLERABLE = 0.8 * WARNING  # what is as good as that, if it costs less
_MIN_BATCHES, _LARGEST_GROWTH = 8, 16  # in a window of larger batches, and by how many times they are larger
_REMAINDER = 0.05  # weight that may be left in the buffers of what was before the window


def advice(verdict: str, layer: Circumstances, evidence: Evidence) -> dict[str, float]:
    """What the remedy of a verdict states in numbers, as a part of the evidence.

    Args:
        verdict: The verdict's name.
        layer: How the layer was called.
        evidence: Its numbers so far.
    """
    numbers: dict[str, float] = {"dimensions": layer.dimensions} if verdict == "tiny-batch" else {}
    if layer.updates_twice and layer.momentum is not None:
        # So that all updates of a call together weigh what was asked for.
        numbers["compensated_momentum"] = 1 - max(1 - layer.momentum, 0.0) ** (1 / layer.updates_per_call)
    if verdict not in ("warming-up", "lagging", "noisy") or (verdict == "noisy" and is_noisy_by_calls(evidence)):
        return numbers
    momentum = min(max(evidence["effective_momentum"], 0.0), 1.0)
    if verdict == "warming-up" and 0 < momentum < 1:
        excess = max(evidence.get("warmup_error", 0.0) / _TARGET, 1.0)
        numbers["batches_to_go"] = math.ceil(math.log(excess) / -math.log1p(-momentum))
    if verdict == "noisy":
        numbers |= _batch_size(evidence)
    if "jitter" in evidence and not (verdict == "noisy" and layer.momentum is None):
        best, error = _best_momentum(verdict, layer, evidence, momentum)
        if (best < momentum) == (verdict == "noisy") and error <= WARNING:
            numbers["recommended_momentum"] = 1 - (1 - best) ** (1 / max(layer.assumed_updates, 1))
            numbers["recommended_error"] = error
    return numbers


def _best_momentum(verdict: str, layer: Circumstances, evidence: Evidence, momentum: float) -> tuple[float, float]:
    """The momentum of the smallest error after as many batches as there were, and that error."""
    batches, jitter, drift = evidence["batches"], evidence["jitter"], evidence.get("drift_per_batch", 0.0)
    walk = 0.0
    if verdict == "lagging" and is_outrun(evidence):
        drift, walk = 0.0, evidence["walk_error"] * math.sqrt(momentum * (2 - momentum)) / (1 - momentum)
    elif verdict == "lagging" and layer.momentum is not None and momentum < 1:
        # The buffers may lag for what moved in windows before: this one's trend does not show it.
        drift = max(drift, (evidence.get("lag_error") or evidence.get("least_error", 0.0)) * momentum / (1 - momentum))
    in_all = max((layer.num_tracked or 0) / max(layer.assumed_updates, 1), batches)
    if "one_pass" in evidence:  # of a training that is over: the next is as long, and its first half is to be forgotten
        in_all = layer.num_tracked or batches
        batches = max(in_all / 2, 1)
    remainder = _TARGET / max(evidence.get("initial_distance", 0.0), _TARGET / _REMAINDER)
    # The shortest memory that is needed is that of the window: nobody knows how far the inputs moved before.
    lower = 1 - _REMAINDER ** (1 / batches)
    if verdict == "warming-up":
        lower = max(lower, 1 - (evidence["initial_weight"] * _TARGET / evidence["warmup_error"]) ** (1 / batches))
    # If that is too noisy, the longest that is possible: nothing may be left of the initial values.
    lower = max(min(lower, _momentum_of_noise(_TOLERABLE, jitter)), 1 - remainder ** (1 / in_all))
    if verdict == "noisy":
        variance = momentum / (2 - momentum) * (_TARGET / evidence["noise_error"]) ** 2
        lower = max(lower, 2 * variance / (1 + variance))
    if verdict == "warming-up" and _expected_error(lower, drift, walk, jitter) <= _TARGET:
        return lower, _expected_error(lower, drift, walk, jitter)
    best = max(_optimal_momentum(drift, walk, jitter), lower)
    return best, _expected_error(best, drift, walk, jitter)


def _batch_size(evidence: Evidence) -> dict[str, float]:
    """The batch size with which noise would be tolerable; nothing if the data do not give it, or if it is already."""
    size, noise = evidence["batch_size"], evidence["noise_error"]
    if noise <= _TOLERABLE:
        return {}
    window = size * (evidence["batches"] - evidence.get("batches_before", 0.0))
    possible = math.floor(min(window / _MIN_BATCHES, _LARGEST_GROWTH * size))
    if possible < size * (noise / _TOLERABLE) ** 2:
        return {}
    return {"recommended_batch_size": min(math.ceil(size * (noise / _TARGET) ** 2), possible)}


def _momentum_of_noise(error: float, jitter: float) -> float:
    """Momentum with which noise is so large; 1 if no momentum makes it that."""
    variance = (error / jitter) ** 2 if jitter > error else 1.0
    return 2 * variance / (1 + variance)


def _expected_error(momentum: float, drift: float, walk: float, jitter: float) -> float:
    """Error of a running average of values that drift, move at random and are noisy by so much a batch."""
    memory = momentum * (2 - momentum)
    lag = math.hypot(drift / momentum, walk / math.sqrt(memory)) * (1 - momentum)
    return math.hypot(lag, jitter * momentum / math.sqrt(memory))


def _optimal_momentum(drift: float, walk: float, jitter: float) -> float:
    """Momentum with the smallest :func:`_expected_error`, by bisection."""
    if not (drift or walk) or not jitter:
        return float(not jitter)
    drifting, walking = (drift / jitter) ** 2, (walk / jitter) ** 2
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        is_too_small = middle**3 < (1 - middle) * (drifting * (2 - middle) ** 2 + walking * middle)
        low, high = (middle, high) if is_too_small else (low, middle)
    return (low + high) / 2
