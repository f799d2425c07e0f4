"""Which layers of a model are recalibrated, and why the others are left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import NamedTuple

from lightning_bnmonitor.compat import BatchNorm, is_lazy
from lightning_bnmonitor.diagnosis.evidence import WARNING
from lightning_bnmonitor.report.report import Report

FROZEN, STALE, NO_STATS, UNUSED = "frozen", "stale", "no running statistics", "unused"
_MAX_LAYERS_WARNED_OF = 5


class Selection(NamedTuple):
    """Layers by name: those to recalibrate, and all others."""

    layers: Mapping[str, BatchNorm]
    """Whose running statistics are replaced."""
    left_alone: Mapping[str, str]
    """Why the others are left alone: the words of the verdicts."""
    aside: Mapping[str, BatchNorm]
    """Those of the others whose running statistics are looked at in the same pass: what is frozen or stale."""
    unchanging: Mapping[str, str]
    """Of all, what is frozen or stale, and which."""


def select(found: Mapping[str, BatchNorm], in_eval: Collection[BatchNorm], frozen: bool) -> Selection:
    """Which of the layers that were found are recalibrated.

    Args:
        found: Layers by name.
        in_eval: Those that are in eval mode in training.
        frozen: Whether to recalibrate what is frozen or stale, too.
    """
    reasons = {name: _why_left_alone(layer, layer in in_eval) for name, layer in found.items()}
    unchanging = {name: why for name, why in reasons.items() if why in (FROZEN, STALE)}
    aside = {} if frozen else {name: found[name] for name in unchanging}
    left_alone = {name: why for name, why in reasons.items() if name in aside or why == NO_STATS}
    return Selection(
        {name: layer for name, layer in found.items() if name not in left_alone}, left_alone, aside, unchanging
    )


def check_initialised(layers: Mapping[str, BatchNorm]) -> None:
    """Raise ValueError, with the name, if a lazy layer has not been called yet."""
    for name, layer in layers.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise ValueError(f"Layer {name!r} has not been initialised. Call the model once before.")


def misfits_in(report: Report) -> dict[str, float]:
    """``eval_error`` of the layers whose running statistics are off by more than 0.1, and than chance, the worst first.

    Chance is what the error of these data's own statistics explains: twice as much is allowed for. Infinite where
    running statistics are not finite. Layers whose class has another ``forward`` are not judged.
    """
    misfits = {}
    for layer in report.values():
        error, chance = layer.evidence.get("eval_error", 0.0), layer.evidence.get("now_error", 0.0)
        if layer.num_samples and error > math.hypot(WARNING, 2 * chance) and layer.verdict != "own-forward":
            misfits[layer.name] = error
    return dict(sorted(misfits.items(), key=lambda misfit: -misfit[1]))


def warn_of_misfits(who: str, misfits: Mapping[str, float], left_alone: Mapping[str, str], remedy: str) -> None:
    """Warn, once, of layers that were left alone though their running statistics do not fit.

    Args:
        who: What has left them alone.
        misfits: As of :func:`misfits_in`.
        left_alone: Why each layer was left alone.
        remedy: The call that includes them, as code.
    """
    if not misfits:
        return
    listed = ", ".join(
        f"{name} ({left_alone[name]}, eval_error {error:.2g})"
        for name, error in list(misfits.items())[:_MAX_LAYERS_WARNED_OF]
    )
    if len(misfits) > _MAX_LAYERS_WARNED_OF:
        listed += f" and {len(misfits) - _MAX_LAYERS_WARNED_OF} more"
    then = ""
    if any(left_alone[name] == FROZEN for name in misfits):
        then = " What follows a frozen layer has learned with its statistics as they are: train on afterwards."
    warnings.warn(
        f"{who} has left layers alone whose running statistics do not fit these data: {listed}. `{remedy}` includes "
        f"layers that are frozen (in eval mode in training) or stale (they update nothing).{then}",
        stacklevel=3,
    )


def _why_left_alone(layer: BatchNorm, in_eval: bool) -> str:
    """Why a layer is left alone if it is not asked for; empty if there is no reason."""
    if layer.running_mean is None or layer.running_var is None:
        return NO_STATS
    if in_eval:
        return FROZEN
    return STALE if not layer.track_running_stats or layer.momentum == 0 else ""
