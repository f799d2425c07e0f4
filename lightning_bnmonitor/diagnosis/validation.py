"""What a validation adds to the diagnoses of a window: flags, by how far running statistics are from what came in it.

``val_error`` is a direct measurement: whatever the reason, what is evaluated is not normalised by that much. A number
counts beyond three times its noise floor, and chance is taken off: :func:`net_error`. Beyond 0.1, the first of these is
said:

1. ``never-updated``: the running statistics are the initial zeros and ones.
2. ``other-weights``: running statistics or affine weights are not those that the window ended with (unless with the
   same weights they fit training as well as those did, or we have written them and validation differs from training),
   or the layer was not called in training. Needs attention beyond 0.15.
3. ``domain-shift``: validation differs from training by more than 0.1, and by more than three times what the running
   statistics of this layer and those before it are themselves off training (an error in one of them reaches all later
   layers, enlarged up to three times; of inputs that move at random, so does what an average is behind them). Needs
   attention if ``val_error`` is beyond 0.2, too. Behind a layer that
   training normalises by few samples, by groups, by parts of an order, or call by call, that is said to be the reason.
   With other weights than training ended with, nothing is said of it: training does not tell.
4. Else it is the running statistics: the verdict speaks. Where neither it nor an earlier layer does, and ``val_error``
   is beyond 0.2: ``errors-add-up`` if that is no more than three times what they are off by themselves, all together,
   else ``unexplained-error``.

Where no layer was called in training (``validate`` or ``test`` alone), nothing tells 2 from 3: ``unexplained-error``
beyond 0.15.

A layer without running statistics has none of these, but ``evaluated-by-batch`` if the batches of validation differ
from each other by 0.2 more than those of training can: eval() normalises each by itself.

Whatever these are, ``updated-in-validation``: validation has changed them, as it ran in training mode. And the first
layer that received what is not finite there has ``non-finite-validation``, unless training has spoilt it or one before
it: nothing else is known then of the channels that did.

In small trainings whose loss is harmed by less than 5 %, none of 358 alarms; of 72 with a strong shift all do, of 72
with statistics that were never updated all do, of 45 with averaged weights that are harmed 41.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.diagnosis.evidence import WARNING, Evidence
from lightning_bnmonitor.diagnosis.flags import FLAGS
from lightning_bnmonitor.diagnosis.rules import (
    OF_OTHER_WEIGHTS,
    SERIOUS,
    excess_scatter,
    net_error,
    net_shift,
    was_called,
)

_REACH = 3.0  # times what running statistics are off by themselves, that later layers may differ from training


class Standing(IntEnum):
    """What the running statistics of a layer are, as an evaluation begins."""

    ABSENT = 0
    """There are none, or they have no part in it."""
    TRAINED = 1
    """Those that training has left, with the weights that it has left."""
    OTHER = 2
    """They, or the layer's own weight and bias, are others."""
    INITIAL = 3
    """Zeros and ones that no batch has updated."""
    REPAIRED = 4
    """Exact ones of training data, which we have written ourselves since."""
    REWRITTEN = 5
    """Others, with the weights that training has left."""


class Validated(NamedTuple):
    """A layer that a validation may have called."""

    diagnosis: Diagnosis
    """Of the window before."""
    evidence: Evidence
    """The numbers of validation; empty if it was not called there."""
    standing: Standing
    """Its running statistics as the validation began."""
    misfit: float = 0.0
    """Their error on what the layer receives in training; NaN if there is nothing to compare."""
    is_updated: bool = False
    """Whether validation has changed them."""


def diagnose_validation(layers: Iterable[Validated]) -> list[Diagnosis]:
    """Diagnoses of a window with what a validation after it adds: its numbers, flags, and what needs attention.

    Args:
        layers: In the order of the model.
    """
    in_order, described = list(layers), list[Diagnosis]()
    is_alone = not any(was_called(layer.diagnosis.evidence) or _was_trained(layer) for layer in in_order)
    wrong, called, shifted, is_explained = 0.0, 0, 0, False  # of this layer and those before it
    spoiled, is_finite = 0, True  # of those before it
    for layer in in_order:
        known = {**layer.diagnosis.evidence, **layer.evidence}
        if layer.evidence and is_alone:
            known["val_alone"] = 1.0
        begins, is_finite = is_finite, is_finite and not _has_non_finite(known)
        wrong = math.hypot(wrong, _own_fault(layer, known))
        is_explained |= layer.diagnosis.needs_attention
        flag = _flag(layer, known, wrong, is_explained) if layer.evidence else None
        if layer.evidence:
            known["val_layers_before"] = float(called)
            called += 1
        if flag == "errors-add-up":
            known["added_error"] = wrong
        if flag == "domain-shift":
            known |= {"val_shifted_before": float(shifted), "val_spoiled_before": float(spoiled)}
            shifted += 1
        spoiled += _is_normalised_otherwise(layer.diagnosis)
        added = [*([flag] if flag else []), *(["updated-in-validation"] if layer.is_updated else [])]
        if begins and not is_finite and not known.get("non_finite_channels"):
            added.append("non-finite-validation")
        flags = {*layer.diagnosis.flags, *added}
        needs_attention = layer.diagnosis.needs_attention or any(FLAGS[name].attention(known) for name in added)
        is_explained |= needs_attention
        if _is_harmless(layer, known):
            needs_attention = False
        sorted_flags = tuple(name for name in FLAGS if name in flags)
        described.append(
            replace(layer.diagnosis, evidence=known, flags=sorted_flags, needs_attention=needs_attention),
        )
    return described


def _flag(layer: Validated, evidence: Evidence, wrong: float, is_explained: bool) -> str | None:
    """What is to be said of a layer that was called in validation."""
    verdict, error = layer.diagnosis.verdict, net_error(evidence)
    is_off = error > WARNING
    if verdict == "no-running-stats":
        return "evaluated-by-batch" if excess_scatter(evidence) > SERIOUS else None
    if verdict == "trained-in-eval" or evidence.get("non_finite_running_stats") or layer.standing == Standing.ABSENT:
        return None  # the verdict says it, or there is nothing to be off
    if is_off and layer.standing == Standing.INITIAL and verdict not in ("stale", "frozen"):
        return "never-updated"
    is_unused = verdict == "unused" and not evidence.get("calls_skipped")
    is_other = layer.standing == Standing.OTHER
    is_other |= layer.standing == Standing.REWRITTEN and _is_spoiled_since(layer, evidence)
    is_other |= _is_of_other_data(layer, evidence)
    if evidence.get("val_alone") and layer.standing in (Standing.TRAINED, Standing.REWRITTEN):
        return "unexplained-error" if error > OF_OTHER_WEIGHTS else None
    if is_off and (is_other or is_unused):
        return "other-weights"
    if layer.standing == Standing.OTHER:
        return None  # repaired since; what training received with its own weights says nothing of it
    # Exact statistics of training: what they are off is the data.
    shift = error if layer.standing == Standing.REPAIRED else net_shift(evidence)
    if shift > max(WARNING, _REACH * wrong):
        return "domain-shift"
    if error <= SERIOUS or is_explained:
        return None
    return "errors-add-up" if error <= _REACH * wrong else "unexplained-error"


def _has_non_finite(evidence: Evidence) -> bool:
    """Whether a layer received, or will give in eval(), what is not finite."""
    return bool(evidence.get("val_non_finite") or evidence.get("non_finite_channels"))


def _own_fault(layer: Validated, evidence: Evidence) -> float:
    """How far the running statistics that validation used are off training, chance taken off."""
    is_other = layer.standing in (Standing.OTHER, Standing.INITIAL) or _is_of_other_data(layer, evidence)
    if layer.standing == Standing.REPAIRED and not is_other:
        return 0.0
    if is_other or math.isnan(layer.misfit):
        return net_error(evidence)
    if layer.standing == Standing.REWRITTEN:
        return _beyond_noise(layer.misfit, evidence)
    return max(_beyond_noise(evidence.get("eval_error", 0.0), evidence), evidence.get("walk_error", 0.0))


def _is_spoiled_since(layer: Validated, evidence: Evidence) -> bool:
    """Whether what was written since fits training badly, and worse than what training had left."""
    before, after = (_beyond_noise(error, evidence) for error in (evidence.get("eval_error", 0.0), layer.misfit))
    return after > WARNING and after > math.hypot(before, WARNING)


def _is_of_other_data(layer: Validated, evidence: Evidence) -> bool:
    """Whether what we have written is of other data than training's: validation has these, and it fits neither."""
    is_off = layer.standing == Standing.REPAIRED and net_error(evidence) > WARNING
    return is_off and net_shift(evidence) <= WARNING and _beyond_noise(layer.misfit, evidence) > WARNING


def _beyond_noise(error: float, evidence: Evidence) -> float:
    """An error of running statistics on what training receives, chance taken off."""
    chance = math.hypot(evidence.get("now_error", 0.0), evidence.get("noise_error", 0.0))
    return math.sqrt(max(error**2 - chance**2, 0.0))


def _was_trained(layer: Validated) -> bool:
    """Whether it was called in training, though not looked at, or trained in eval mode."""
    return layer.diagnosis.verdict == "trained-in-eval" or bool(layer.diagnosis.evidence.get("calls_skipped"))


def _is_normalised_otherwise(diagnosis: Diagnosis) -> bool:
    """Whether training normalises by what evaluation does not have, which changes what later layers receive."""
    differ = "calls-differ" in diagnosis.flags and FLAGS["calls-differ"].attention(diagnosis.evidence)
    return differ or diagnosis.verdict in ("tiny-batch", "ordered-batches", "grouped-batches")


def _is_harmless(layer: Validated, evidence: Evidence) -> bool:
    """Whether what was trained in eval mode is evaluated right, with statistics that were learnt before."""
    is_meant = layer.diagnosis.verdict == "trained-in-eval" and layer.standing != Standing.INITIAL
    return is_meant and "val_error" in evidence and net_error(evidence) <= WARNING
