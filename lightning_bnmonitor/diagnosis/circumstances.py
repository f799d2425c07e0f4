"""How a layer was called in a window, beside the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class BadBatch(NamedTuple):
    """A batch with a value that is not finite."""

    number: float
    """Which call in its window, counted from 1."""
    channel: float
    """The first channel with such a value, counted from 0."""
    windows_ago: float
    """How many windows before the present one; 0: in this one."""


def bad_batch(evidence: Mapping[str, float]) -> BadBatch | None:
    """The first bad batch that a layer's evidence knows of, if what it has left is still there."""
    if "first_bad_batch" not in evidence or not evidence.get("non_finite_running_stats"):
        return None
    ago = evidence.get("bad_windows_ago", 0.0)
    return BadBatch(evidence["first_bad_batch"], evidence["first_bad_channel"], ago)


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
    updates_of_repeated: float
    """The same for the calls that activation checkpointing makes again, if only some are; NaN if not known."""
    assumed_updates: float
    """What the weights of the batches rest on: updates of a call, on average."""
    checkpointed: bool
    """Whether activation checkpointing (or what looks like it) was seen."""
    written_outside: bool
    """Whether the buffers changed between the last window and this one."""
    has_frozen_weights: bool
    """Whether it has weights, and none of them trains or changes otherwise."""
    own_forward: bool
    """Whether its output was made without a BatchNorm kernel."""
    interrupted: bool
    """Whether the window was resumed from a state saved in the middle of a training step."""
    num_tracked: int | None = None
    """``num_batches_tracked``: updates of the buffers so far; None if the module has no such counter."""
    call_shift_before: float = math.nan
    """``call_shift`` of the window before; NaN if it had none."""
    bad_before: BadBatch | None = None
    """The first bad batch of an earlier window, if it has left running statistics that are not finite."""
    calls_per_model_call: float = math.nan
    """Calls for each of the outermost module around it, if it is called several times a step; NaN if not known."""
    calls_in_eval_mode: int = 0
    """Calls with gradients while the whole model was in eval mode."""
    steps_in_eval_mode: int = 0
    """Steps of its optimizers meanwhile."""
    left_out: int = 0
    """Calls that the guard has undone, as a value in them was not finite."""
    dimensions: int = 2
    """Of what it receives, besides samples and channels: 2 for images."""
    has_initial_stats: bool = False
    """Whether the module's buffers are the initial zeros and ones."""
    normalises_in_parts: bool = False
    """Whether a ``forward`` of its own may update the running statistics several times a call."""
    updates_nothing: bool = False
    """Whether it is known, as it is set up, that no call in training updates its running statistics."""

    @property
    def was_called(self) -> bool:
        """Whether a call was counted."""
        return any(count for path, count in self.calls.items() if path != "skipped")

    @property
    def weights_known(self) -> bool:
        """Whether the buffers were updated as assumed, so that the weight of each batch in them is known."""
        return math.isnan(self.updates_per_call) or math.isclose(self.updates_per_call, self.assumed_updates)

    @property
    def updates_twice(self) -> bool:
        """Whether calls update the buffers two or more times, as they are recomputed, or normalise in parts."""
        may_repeat = self.checkpointed or self.normalises_in_parts
        return may_repeat and self.updates_of_repeated > 1 and float(self.updates_of_repeated).is_integer()
