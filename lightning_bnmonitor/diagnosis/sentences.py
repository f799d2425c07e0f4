"""Sentences with a layer's numbers in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

RECALIBRATE_CALL = "`lightning_bnmonitor.recalibrate(model, loader)`"
"""A diagnosis adds ``frozen=True`` for a layer that updates nothing in training, which is left alone without."""
RECALIBRATE = f"recompute its running statistics ({RECALIBRATE_CALL})"
"""What repairs running statistics, in the middle of a sentence."""
OF_COPIES = (
    "If it is a copy with averaged weights, average or copy the buffers with the weights "
    "(`AveragedModel(model, use_buffers=True)`), or recompute them "
    "(`lightning_bnmonitor.recalibrate(averaged, loader)`)."
)
"""What to do about a copy whose running statistics nobody updates."""

Sentences = Sequence[str] | Callable[[Mapping[str, float]], Sequence[str]]
"""Sentences with the names of numbers in braces, or a function that chooses them by a layer's evidence."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """Something that can be said of a layer, and what is to be done about it."""

    name: str
    explanation: Sentences
    """What was found and what it means. A sentence that names a number which is not known is left out."""
    remedy: Sentences = ()
    """What to do; nothing if there is nothing to do."""

    def explain(self, evidence: Mapping[str, float]) -> str:
        """The explanation, with the numbers of a layer."""
        return _filled(self.explanation, evidence)

    def prescribe(self, evidence: Mapping[str, float]) -> str:
        """The remedy, with the numbers of a layer; empty if there is nothing to do."""
        return _filled(self.remedy, evidence)


def _filled(sentences: Sentences, evidence: Mapping[str, float]) -> str:
    """Sentences with the numbers in them; one that names a number which is not known is left out."""
    sentences = sentences(evidence) if callable(sentences) else sentences
    text = " ".join(filled for sentence in sentences if (filled := _with_numbers(sentence, evidence)) is not None)
    text = re.sub(r"(?<![\d.])1 (batch|call|time|channel|window)(es|s)\b", r"1 \1", text)
    return re.sub(r"(?<![\d.])1 of (\d+) channels are dead", r"1 of \1 channels is dead", text)


def _with_numbers(sentence: str, evidence: Mapping[str, float]) -> str | None:
    values = {name: evidence.get(name, math.nan) for _, name, _, _ in Formatter().parse(sentence) if name}
    if any(map(math.isnan, values.values())):
        return None
    return sentence.format_map({name: _number(value) for name, value in values.items()})


def _number(value: float) -> str:
    """Three digits, counts in full."""
    size = abs(value)
    is_count = size < 1e9 and value == int(value)
    return f"{value:.0f}" if is_count or 999.5 <= size < 1e6 else f"{value:.3g}"
