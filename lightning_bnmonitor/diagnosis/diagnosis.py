"""What the numbers of a layer mean: one verdict, flags beside it, an explanation and a remedy.

The verdicts and their thresholds are those of :data:`VERDICTS`, in the order in which they are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bnmonitor.diagnosis.wording import explain, prescribe
from lightning_bnmonitor.statistics import divergence
from lightning_bnmonitor.statistics.analysis import Profile
from lightning_bnmonitor.statistics.segments import BoolArray, FloatArray, Segments

WARNING = 0.1
"""The error of the normalised activation in ``eval()`` from which on it is worth a warning."""
ALERT = 0.25
"""From which on it is an alert: for a mean, 10 % of the signs before a ReLU flip."""
METRICS = ("eval_error", "act_rmse", "mean_shift", "log_var_ratio")
"""The distances of running statistics that are summarised in one number for each layer."""
VERDICTS = (
    *("non-finite", "unused", "no-running-stats", "stale", "frozen", "insufficient-data", "tiny-batch"),
    *("ordered-batches", "grouped-batches", "warming-up", "lagging", "noisy", "drifting", "healthy"),
)
FLAGS = (
    *(
        "dead-channels",
        "domain-shift",
        "double-update",
        "interrupted-batch",
        "missed-calls",
        "not-updating",
        "rank-0-only",
    ),
    "written-outside",
)
EVIDENCE = (
    *("calls_saved", "calls_traced", "calls_pass", "calls_skipped", "calls_not_updating", "num_features"),
    *("momentum", "effective_momentum", "updates_per_call", "assumed_updates_per_call", *METRICS),
    *("noise_error", "now_error", "warmup_error", "lag_error", "drift_error", "initial_weight"),
    *("z_mean", "z_var", "max_score", "batches", "samples_per_batch", "batch_size", "degrees_of_freedom"),
    *("drift_per_batch", "jitter", "severity", "ordering_ratio", "ordering_limit", "ordering_share", "trend_share"),
    *("grouping_ratio", "grouping_limit", "grouping_share", "dead_channels", "non_finite_channels"),
    *("non_finite_running_stats", "first_bad_batch", "first_bad_channel", "ranks", "rank_error"),
    *("recommended_momentum", "recommended_error", "recommended_batch_size", "compensated_momentum", "batches_to_go"),
    *("val_shift", "val_noise", "val_batches"),
)
"""Names of all numbers that a verdict may rest on."""
_SICK = {"non-finite", "tiny-batch", "ordered-batches", "grouped-batches", "warming-up", "lagging", "noisy"}
_SICK_IF_WRONG = {"stale", "frozen"}  # as their running statistics are meant to stay as they are
_MIN_BATCHES, _MIN_DOF = 8, 4
_TINY = 4  # values per channel in a batch
_WITHOUT_BATCHES = (  # what is known of a layer that no batch updated
    *("batches", "dead_channels", "non_finite_channels", "non_finite_running_stats"),
    *("first_bad_batch", "first_bad_channel"),
)
_SHARE = 0.02  # of a channel's variance, that the order or the making of batches must explain to count
_TARGET = WARNING / 2  # what a remedy aims at
_REMAINDER = 0.05  # weight that may be left in the buffers of what was before the window


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter with one layer in one window."""

    verdict: str
    """One of :data:`VERDICTS`."""
    flags: tuple[str, ...]
    """What else is to be said, in the order of the alphabet."""
    needs_attention: bool
    """Whether something should be done."""
    evidence: Mapping[str, float]
    """The numbers it rests on: see :attr:`lightning_bnmonitor.LayerReport.evidence`."""

    @property
    def explanation(self) -> str:
        """What was found and what it means, with this layer's numbers, all of which are in :attr:`evidence`."""
        return explain(self.verdict, self.flags, self.evidence)

    @property
    def remedy(self) -> str:
        """What to do about it; empty if there is nothing to do."""
        verdict = self.verdict if self.needs_attention or self.verdict not in _SICK_IF_WRONG else "healthy"
        return prescribe(verdict, self.flags, self.evidence)


class Circumstances(NamedTuple):
    """How a layer was called in a window, beside the numbers."""

    num_features: int
    """Channels."""
    momentum: float | None
    """The module's."""
    effective_momentum: float | None
    """That of the last call, all its updates together; None if no call updated the buffers."""
    has_running_stats: bool
    """Whether the module has buffers."""
    calls: Mapping[str, int]
    """Counted calls by path, and those that were skipped."""
    training_calls: int
    """Counted calls in the layer's training mode."""
    updates_per_call: float
    """Updates of the buffers for each call that was to update them; NaN if not known."""
    assumed_updates: int
    """What the weights of the batches rest on."""
    checkpointed: bool
    """Whether activation checkpointing (or what looks like it) was seen."""
    written_outside: bool
    """Whether the buffers changed between the last window and this one."""
    interrupted: bool
    """Whether the window was resumed from a state saved in the middle of a training step."""

    @property
    def was_called(self) -> bool:
        """Whether a call was counted."""
        return any(count for path, count in self.calls.items() if path != "skipped")

    @property
    def weights_known(self) -> bool:
        """Whether the buffers were updated as assumed."""
        return math.isnan(self.updates_per_call) or self.updates_per_call == self.assumed_updates

    @property
    def updates_twice(self) -> bool:
        """Whether each call updates the buffers two or more times, as it is recomputed."""
        return self.checkpointed and self.updates_per_call > 1 and float(self.updates_per_call).is_integer()


def distances(
    population: Tensor, now: Tensor, running: Tensor, eps: Tensor, layers: Segments, comparable: BoolArray
) -> dict[str, FloatArray]:
    """:data:`METRICS` of all layers at once, ``(L,)`` each: the RMS over channels (``log_var_ratio``: mean magnitude).

    Args:
        population: Mean and unbiased variance, ``(2, C)``.
        now: The same at the end of the window, ``(2, C)``.
        running: Running statistics, ``(2, C)``.
        eps: Of each channel's layer, ``(C,)``.
        layers: Which channels are whose.
        comparable: Whether a layer was called and has running statistics, ``(L,)``.

    Returns:
        NaN where nothing can be compared; an infinite ``eval_error`` where running statistics are not finite.
    """
    mean, var = population
    exact = divergence.act_rmse(mean, var, running[0], running[1], eps)
    error = divergence.act_rmse(now[0], now[1], running[0], running[1], eps).numpy()
    shift = divergence.mean_shift(mean, var, running[0], eps).numpy()
    ratio = divergence.log_var_ratio(var, running[1], eps).numpy()
    broken = (layers.count(~torch.isfinite(running).all(dim=0).numpy()) > 0) & comparable
    with np.errstate(all="ignore"):
        return {
            "eval_error": np.where(broken, np.inf, np.sqrt(layers.mean(error**2))),
            "act_rmse": np.sqrt(layers.mean(exact.numpy() ** 2)),
            "mean_shift": np.sqrt(layers.mean(shift**2)),
            "log_var_ratio": layers.mean(abs(ratio)),
        }


def observations(
    profile: Profile, population: Tensor, running: Tensor, has_running_stats: BoolArray, eps: Tensor
) -> Iterator[dict[str, float]]:
    """What a window's numbers say of each layer: a part of its evidence. Shapes as in :func:`distances`."""
    layers = profile.layers
    with np.errstate(all="ignore"):
        bad_running = ~torch.isfinite(running).all(dim=0).numpy() & (layers.spread(has_running_stats) > 0)
        bad_input = np.isfinite(profile.first_bad)
        columns = {
            "batches": profile.num_batches,
            "samples_per_batch": profile.samples_per_batch,
            "batch_size": profile.batch_size,
            "degrees_of_freedom": profile.dof,
            "initial_weight": profile.initial_weight,
            "noise_error": profile.noise_error,
            "now_error": profile.now_error,
            "warmup_error": profile.warmup_error,
            "lag_error": profile.lag_error,
            "drift_error": profile.drift_error,
            "z_mean": np.sqrt(layers.mean(profile.z[0] ** 2)),
            "z_var": np.sqrt(layers.mean(profile.z[1] ** 2)),
            "max_score": profile.max_score,
            "drift_per_batch": profile.slope,
            "jitter": profile.jitter,
            "ordering_ratio": profile.ordering_ratio,
            "ordering_limit": profile.ordering_limit,
            "ordering_share": profile.ordering_share,
            "trend_share": profile.trend_share,
            "grouping_ratio": profile.grouping_ratio,
            "grouping_limit": profile.grouping_limit,
            "grouping_share": profile.grouping_share,
            "dead_channels": layers.count(divergence.is_dead(population[1], eps).numpy()),
            "non_finite_channels": layers.count(bad_input | bad_running),
            "non_finite_running_stats": layers.count(bad_running),
        }
        first, channel = layers.first(profile.first_bad)
    table = np.array(list(columns.values()))
    where = zip(np.isfinite(table).all(axis=0).tolist(), first.tolist(), channel.tolist(), strict=True)
    for values, (is_complete, batch, bad_channel) in zip(table.T.tolist(), where, strict=True):
        known = dict(zip(columns, values, strict=True))
        if not is_complete:
            known = {name: value for name, value in known.items() if math.isfinite(value)}
        if batch < math.inf:
            known |= {"first_bad_batch": batch, "first_bad_channel": bad_channel}
        if not known["batches"]:
            known = {name: value for name, value in known.items() if name in _WITHOUT_BATCHES}
        yield known


def diagnose(layer: Circumstances, observed: Mapping[str, float], metrics: Mapping[str, float]) -> Diagnosis:
    """The verdict on one layer.

    Args:
        layer: How it was called.
        observed: What :func:`observations` says of it; for a layer that was never called, what is known of that.
        metrics: Its :data:`METRICS`.
    """
    effective, updates = layer.effective_momentum, layer.updates_per_call
    if layer.momentum is not None and layer.updates_twice and not layer.weights_known:
        effective = 1 - (1 - layer.momentum) ** updates
    evidence = {name: value for name, value in metrics.items() if value == value}
    evidence |= observed
    evidence |= {f"calls_{path}": float(count) for path, count in layer.calls.items()}
    evidence["num_features"] = float(layer.num_features)
    if layer.momentum is not None:
        evidence["momentum"] = layer.momentum
    if effective is not None:
        evidence["effective_momentum"] = effective
    if updates >= 0:
        evidence["updates_per_call"] = updates
    if "ranks" in evidence and not layer.was_called:  # on rank 0: what it has is against what the others received
        evidence["rank_error"] = evidence.get("eval_error", 0.0)
    unmoved = layer.training_calls - evidence.get("batches", 0.0)
    if 0 <= updates < 1:
        unmoved += evidence.get("batches", 0.0) * (1 - updates)
    if unmoved and layer.has_running_stats:
        evidence["calls_not_updating"] = unmoved
    if not layer.weights_known:
        evidence["assumed_updates_per_call"] = float(layer.assumed_updates)
    if math.isfinite(metrics["eval_error"]) and evidence.get("jitter"):
        evidence["severity"] = (metrics["eval_error"] / evidence["jitter"]) ** 2
    verdict = _verdict(layer, evidence)
    flags = tuple(_flags(layer, evidence))
    evidence |= _recommendation(verdict, flags, layer, evidence)
    wrong = verdict in _SICK_IF_WRONG and metrics["eval_error"] > WARNING
    return Diagnosis(verdict, flags, verdict in _SICK or wrong or "rank-0-only" in flags, evidence)


def _verdict(layer: Circumstances, evidence: Mapping[str, float]) -> str:
    """The first of :data:`VERDICTS` that holds (statistics.md, part 4)."""
    e = evidence
    if e.get("non_finite_channels"):
        return "non-finite"
    if not layer.was_called:
        return "unused"
    if not layer.has_running_stats:
        return "no-running-stats"
    if not e["batches"] or layer.updates_per_call == 0:
        return "stale" if layer.training_calls else "frozen"
    if e["batches"] < _MIN_BATCHES or e["degrees_of_freedom"] < _MIN_DOF:
        return "insufficient-data"
    if e["samples_per_batch"] <= _TINY:
        return "tiny-batch"
    # Of batches that repeat each other exactly there is no ratio, and in one block no order.
    limit = e.get("ordering_limit", math.inf)
    is_ordered = e.get("ordering_ratio", math.inf) > limit and e.get("ordering_share", 0.0) > _SHARE
    if is_ordered and e["trend_share"] < 0.5:
        return "ordered-batches"
    if e.get("grouping_ratio", 0) > e["grouping_limit"] and e["grouping_share"] > _SHARE:
        return "grouped-batches"
    if not layer.weights_known:
        return "insufficient-data"
    noise = e.get("noise_error", 0.0)
    warmup, lag = e.get("warmup_error", 0.0), e.get("lag_error", 0.0)
    # Large ones are overestimated, as both are linear in the buffers: the error itself has to be worth a warning, too.
    if max(warmup, lag) > max(WARNING, noise) and e.get("eval_error", math.inf) > WARNING:
        return "warming-up" if warmup > lag else "lagging"
    if noise > WARNING:
        return "noisy"
    if e.get("drift_error", 0.0) > WARNING:
        chance = math.hypot(noise, e.get("now_error", 0.0))
        return "drifting" if e.get("eval_error", 0.0) <= math.hypot(WARNING, chance) else "lagging"
    return "healthy"


def _flags(layer: Circumstances, evidence: Mapping[str, float]) -> Iterator[str]:
    updates = layer.updates_per_call
    if evidence.get("dead_channels"):
        yield "dead-channels"
    if layer.updates_twice:
        yield "double-update"
    if layer.interrupted:
        yield "interrupted-batch"
    if updates > 1 and not layer.weights_known and not layer.updates_twice:
        yield "missed-calls"
    if "calls_not_updating" in evidence:
        yield "not-updating"
    if evidence.get("rank_error", 0.0) > WARNING:
        yield "rank-0-only"
    if layer.written_outside or updates < 0:
        yield "written-outside"


def _recommendation(
    verdict: str, flags: tuple[str, ...], layer: Circumstances, evidence: Mapping[str, float]
) -> dict[str, float]:
    """What a remedy states, in numbers."""
    advice: dict[str, float] = {}
    updates = max(layer.assumed_updates, 1)
    if "double-update" in flags and layer.momentum is not None:
        # So that all updates of a call together weigh what was asked for.
        advice["compensated_momentum"] = 1 - max(1 - layer.momentum, 0.0) ** (1 / layer.updates_per_call)
    if verdict not in ("warming-up", "lagging", "noisy"):
        return advice
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
            advice["batches_to_go"] = math.ceil(math.log(excess) / -math.log1p(-momentum))
    elif verdict == "noisy":
        excess = evidence["noise_error"] / _TARGET
        advice["recommended_batch_size"] = math.ceil(evidence["batch_size"] * excess**2)
        variance = momentum / (2 - momentum) / excess**2  # of the running average over that of a batch
        lower = 2 * variance / (1 + variance)
    best = lower
    if verdict != "warming-up" or _expected_error(lower, drift, jitter) > _TARGET:
        best = max(_optimal_momentum(drift, jitter), lower)
    if (best < momentum) == (verdict == "noisy") and not (verdict == "noisy" and layer.momentum is None):
        advice["recommended_momentum"] = 1 - (1 - best) ** (1 / updates)
        advice["recommended_error"] = _expected_error(best, drift, jitter)
    return advice


def _expected_error(momentum: float, drift: float, jitter: float) -> float:
    """Error of a running average of values that drift by so much a batch, and are noisy by so much."""
    return math.hypot(drift * (1 - momentum) / momentum, jitter * math.sqrt(momentum / (2 - momentum)))


def _optimal_momentum(drift: float, jitter: float) -> float:
    r"""Momentum with the smallest :func:`_expected_error`.

    Its square is :math:`\delta^2 ((1-m)/m)^2 + V m/(2-m)`, with :math:`\delta` the drift per batch and V the
    variance of a batch. Its derivative is 0 at :math:`m^3 = r (1-m) (2-m)^2` with :math:`r = \delta^2/V`.
    """
    if not drift or not jitter:
        return float(not jitter)
    ratio = (drift / jitter) ** 2
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**3 < ratio * (1 - middle) * (2 - middle) ** 2 else (low, middle)
    return (low + high) / 2
