"""A report in words: one sentence on the model, and each cause explained once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lightning_bnmonitor.diagnosis.diagnosis import Diagnosis
from lightning_bnmonitor.report.averaged_rows import one_of_each
from lightning_bnmonitor.report.layer_report import LayerReport

_CAUSES = 3  # that a printed report explains, and as many that need no attention
_NAMES = 5  # of layers of one cause that are listed


class Paragraph(NamedTuple):
    """Layers of which the same is to be said."""

    names: Sequence[str]
    """Of the layers, the worst first."""
    cause: str
    """Verdict and flags."""
    text: str
    """Explanation and remedy, with the numbers of the worst; code stands between backticks."""

    def listed(self, escape: Callable[[str], str] = str) -> str:
        """The names, at most five of them."""
        listed = ", ".join(escape(name) for name in self.names[:_NAMES])
        more = len(self.names) - _NAMES
        return f"{listed} and {more} more" if more > 0 else listed


def headline(layers: Sequence[LayerReport], rank: int | None) -> str:
    """One sentence on the model; two if there is more.

    Args:
        layers: In the order of the model.
        rank: The rank that they are of alone; None if of all there are.
    """
    if not layers:
        return "No BatchNorm layer was monitored."
    alone = "" if rank is None else f" (rank {rank} alone)"
    shifted = [layer.name for layer in layers if "domain-shift" in layer.flags]
    more = f" Validation differs from training in {len(shifted)} of them, first in {shifted[0]}." if shifted else ""
    layers = one_of_each(layers)
    unhealthy = [layer for layer in layers if layer.needs_attention]
    unknown = [layer for layer in layers if not layer.diagnosis.is_judged]
    causes, reasons = (
        _counted(layer.diagnosis.cause for layer in unhealthy),
        _counted(layer.verdict for layer in unknown),
    )
    if unhealthy:
        told = f"{len(unhealthy)} of {_count(layers)} need{'s' * (len(unhealthy) == 1)} attention{alone}: {causes}."
        return told + (f" {len(unknown)} could not be judged: {reasons}." if unknown else "") + more
    if len(unknown) == len(layers):
        return f"{_count(layers)} could not be judged{alone}: {reasons}.{more}"
    if unknown:
        judged = f"{len(layers) - len(unknown)} of {_count(layers)} could be judged{alone}"
        return f"{judged}, and none of these needs attention; the others are {reasons}.{more}"
    return f"None of {_count(layers)} needs attention{alone}.{more}"


def paragraphs(layers: Iterable[LayerReport]) -> list[Paragraph]:
    """What is to be said of layers: of the first three causes that need attention, then of three that do not.

    Of layers that could not be judged it is said why.

    Args:
        layers: The worst first.
    """
    causes: dict[tuple[str, ...], list[LayerReport]] = {}
    notes: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in layers:
        key = (layer.verdict, *layer.flags)
        if layer.needs_attention:
            causes.setdefault(key, []).append(layer)
        elif layer.flags or not layer.diagnosis.is_judged:
            notes.setdefault(key[layer.diagnosis.is_judged :], []).append(layer)
    explained = [_of(its, key, lambda each: f"{each.explanation} {each.remedy}") for key, its in causes.items()]
    noted = [_of(its, key, lambda each: each.notes) for key, its in notes.items()]
    return explained[:_CAUSES] + noted[:_CAUSES]


def _of(layers: Sequence[LayerReport], words: Sequence[str], text: Callable[[Diagnosis], str]) -> Paragraph:
    """What is said of these layers: of the worst, but of data that differ where they first do."""
    ordered = sorted(layers, key=lambda layer: layer.diagnosis.evidence.get("val_shifted_before", 0.0) > 0)
    return Paragraph([each.name for each in ordered], ", ".join(words), text(ordered[0].diagnosis).strip())


def _count(layers: Sequence[LayerReport]) -> str:
    return f"{len(layers)} BatchNorm layer{'s' * (len(layers) > 1)}"


def _counted(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())
