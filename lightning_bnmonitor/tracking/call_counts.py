"""How a layer has been called in a window, and the calls of it that wait to be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lightning_bnmonitor.capture.batch_moments import PATHS, Path
from lightning_bnmonitor.statistics.window import Batches


class CallCounts(NamedTuple):
    """How a layer has been called in a window: of the calls that have been merged."""

    paths: Mapping[Path, int]
    """Calls by the way in which their moments were obtained."""
    training: int = 0
    """Calls in the layer's training mode."""
    updating: int = 0
    """Calls that were to update the running statistics."""
    repeated: int = 0
    """Of these, calls that activation checkpointing makes again."""
    momentum: float | None = None
    """The effective one of the last of these, also of an earlier window."""
    last_num_samples: int = 0
    """Values per channel in the last of these in this window; 0 before the first."""
    last_part: int = -1
    """Parts of training steps that had ended before the last call (``Gate.parts``)."""
    num_ranks: int = 1
    """Over how many ranks SyncBatchNorm takes the moments."""
    left_out: int = 0
    """Calls that a guard has undone, as their moments were not finite: none of the above counts them."""
    serial: bool = False
    """Whether moments came from a kernel that sums value by value."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.paths.values())

    def updates_of_repeated(self, updates: float, recomputed: int) -> float:
        """Updates by a call that is made again, if all calls make so many on average and the others make one each.

        Which are is known by what autograd saves. Where that does not tell, and some calls but not all were made again
        in a backward pass, it is as many as were ``recomputed``.
        """
        repeated = self.repeated or (recomputed if recomputed < self.updating else 0)
        if not repeated:
            return updates
        of_repeated = 1 + (updates - 1) * self.updating / repeated
        return round(of_repeated) if math.isclose(of_repeated, round(of_repeated), rel_tol=1e-9) else of_repeated

    def restarted(self) -> CallCounts:
        """Counts of a window that begins."""
        return self._replace(
            paths=dict.fromkeys(PATHS, 0), training=0, updating=0, repeated=0, last_num_samples=0, left_out=0
        )


class WaitingCalls(NamedTuple):
    """Calls of a layer that wait to be merged, and how it has been called when they are."""

    batches: Batches | None
    """What they contribute; None if nothing."""
    counts: CallCounts
    """How the layer has been called, they included."""
    skipped: int
    """Those that contribute nothing, as they are of another width."""
    num_calls: int
    """All of them."""
    parts: tuple[int, ...] = ()
    """Parts of training steps that had ended before each of those that contribute."""
    groups: tuple[int, ...] = ()
    """The number of the group that each of these is of, 0 if of none; empty if there are no groups."""


def effective_momentum(momentum: float, updates: float) -> float:
    """The momentum of so many updates together."""
    return momentum if updates == 1 else 1 - (1 - momentum) ** updates
