"""Which group a training batch is of, as the user's function says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning_bnmonitor.tracking.batch_groups import group_name

GroupFunction = Callable[[Any, int], Any]


class BatchGroup:
    """Asks a function for the name of each batch's group, as long as it gives names.

    Args:
        function: Called with a training batch and its index; None: no batch has a group.

    Raises:
        TypeError: If ``function`` is neither callable nor None.
    """

    def __init__(self, function: GroupFunction | None) -> None:
        if function is not None and not callable(function):
            raise TypeError(
                "`group` must be a function of a training batch and its index that returns a name, or None, got "
                f"{function!r}."
            )
        self._function = function
        self._has_failed = False

    def name_of(self, batch: Any, batch_idx: int) -> str | None:
        """The name of a batch's group; None if it has none. From the first error on, of which it warns, none has."""
        if self._function is None or self._has_failed:
            return None
        try:
            group = self._function(batch, batch_idx)
            return None if group is None else group_name(group)
        except Exception as error:  # no reason not to train
            self._has_failed = True
            warnings.warn(
                f"`group` of BatchNormMonitor has failed with batch {batch_idx}, and is not asked again: {error!r} "
                "Training goes on; statistics by group end here.",
                stacklevel=2,
            )
            return None
