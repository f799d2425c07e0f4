"""What is said of the groups that batches are of: how far each is from all, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_bnmonitor.diagnosis.evidence import WARNING
from lightning_bnmonitor.diagnosis.rules import beyond_chance

_NAMED = 4  # groups that are named in a sentence


class GroupShift(NamedTuple):
    """The batches of one group, as one layer received them."""

    name: str
    """Of the group."""
    num_batches: int
    """Calls of the layer in them, over all ranks."""
    num_samples: int
    """Values per channel in them."""
    shift: float
    """``group_shift``: RMS error of the normalised activation that the statistics of all batches make on its; NaN if
    there are no others."""
    noise: float
    """What chance makes of it; NaN if that cannot be told: with few batches, or as its batches came at other times than
    the others', so that weights which have moved meanwhile may be the reason."""

    @property
    def net(self) -> float:
        """The shift with its noise taken off; 0 up to three times that, or if that is not known."""
        return 0.0 if math.isnan(self.shift + self.noise) else beyond_chance(self.shift, self.noise)

    @property
    def is_in_order(self) -> bool:
        """Whether nothing tells it from weights that move."""
        return math.isnan(self.noise)


def evidence_of(groups: Sequence[GroupShift]) -> dict[str, float]:
    """A layer's evidence from its groups: of the group that certainly differs most, or else of the largest shift."""
    known = [group for group in groups if not math.isnan(group.shift)]
    if not known:
        return {}
    worst = max(known, key=lambda group: (not group.is_in_order, group.net, group.shift))
    evidence = {"groups": float(len(groups)), "group_shift": worst.shift}
    return evidence | ({} if worst.is_in_order else {"group_noise": worst.noise})


def sentence_on(groups: Sequence[GroupShift]) -> str:
    """Which groups differ, the farthest first; empty if none does by what is worth a warning."""
    certain = _listed([group for group in groups if group.net >= WARNING])
    unknown = _listed([group for group in groups if group.is_in_order and group.shift >= WARNING])
    sentences = [f"By group: {certain}."] if certain else []
    if unknown:
        sentences.append(
            f"{'Also' if certain else 'By group'}: {unknown}; but these batches were few, or came at other times than "
            "the others: weights that have moved meanwhile may be a part of that."
        )
    return " ".join(sentences)


def _listed(groups: Sequence[GroupShift]) -> str:
    """``'b' is 0.8 off all batches (chance explains 0.02), 'a' 0.2 (0.01)``; empty without groups."""
    ordered = sorted(groups, key=lambda group: -group.shift)
    parts = []
    for index, group in enumerate(ordered[:_NAMED]):
        chance = "" if group.is_in_order else f" ({'' if index else 'chance explains '}{group.noise:.2g})"
        parts.append(
            f"{group.name!r}{'' if index else ' is'} {group.shift:.3g}{'' if index else ' off all batches'}{chance}"
        )
    more = len(groups) - _NAMED
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
