"""When windows begin and end, and when training is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_bnmonitor.arguments import check_positive_or_none
from lightning_bnmonitor.callbacks.lightning_package import Trainer


class WindowSchedule:
    """Where a Trainer's batches and epochs stand in windows.

    Args:
        every_n_epochs: Epochs in a window; None means one.
        every_n_train_batches: Training batches in a window, instead of epochs.

    Raises:
        ValueError: If one of them is not a positive integer, or both are given.
    """

    def __init__(self, every_n_epochs: int | None, every_n_train_batches: int | None) -> None:
        check_positive_or_none("every_n_epochs", every_n_epochs)
        check_positive_or_none("every_n_train_batches", every_n_train_batches)
        if every_n_epochs is not None and every_n_train_batches is not None:
            raise ValueError(
                "`every_n_epochs` and `every_n_train_batches` exclude each other, got "
                f"{every_n_epochs} and {every_n_train_batches}: leave one of them None."
            )
        self.every_n_epochs = every_n_epochs or 1
        self.every_n_train_batches = every_n_train_batches
        self.begin()

    def begin(self) -> None:
        """A ``fit`` begins."""
        self.num_batches = 0
        """Training batches in the window that is open."""
        self.is_due = True
        """Whether a window begins with the next training batch."""
        self.is_awaited = self.every_n_train_batches is None  # what is resumed within an epoch does not start one
        """Whether other ranks may have batches in a window that has not ended."""

    def epoch_begins(self) -> None:
        """An epoch begins."""
        self.is_awaited = self.every_n_train_batches is None

    def training_ends(self) -> None:
        """The last batch is over: another rank's last window may be open."""
        self.is_awaited |= self.every_n_train_batches is not None

    def window_begins(self) -> None:
        """A window begins with the batch that begins now."""
        self.num_batches, self.is_due = 0, False

    def ends_with_batch(self, trainer: Trainer) -> bool:
        """Count a batch. Whether the window ends with it."""
        self.num_batches += 1
        if self.every_n_train_batches is not None:
            return self.num_batches == self.every_n_train_batches
        return trainer.is_last_batch and self._ends_with_this_epoch(trainer)

    def ends_with_epoch(self, trainer: Trainer) -> bool:
        """Whether the window ends with the epoch that ends now.

        Not every epoch ends with a batch known to be its last: ``max_steps``, ``on_train_batch_start`` returning -1.
        """
        return self.every_n_train_batches is None and self._ends_with_this_epoch(trainer)

    def close(self, several_ranks: bool) -> tuple[bool, bool]:
        """The window ends. Whether there may be anything in it to report; whether perhaps on other ranks only."""
        is_awaited = self.is_awaited and several_ranks
        if self.num_batches == 0 and not is_awaited:
            return False, False
        self.num_batches, self.is_awaited = 0, False
        return True, is_awaited

    def state_dict(self) -> dict[str, Any]:
        """All of it, in primitives."""
        return {"num_batches": self.num_batches, "is_due": self.is_due, "is_awaited": self.is_awaited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.num_batches, self.is_due, self.is_awaited = state["num_batches"], state["is_due"], state["is_awaited"]

    def _ends_with_this_epoch(self, trainer: Trainer) -> bool:
        # Epochs are counted as ModelCheckpoint counts them, so that equal periods fall together.
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0


def is_training_over(trainer: Trainer, epoch_ended: bool) -> bool:
    """Whether no training batch of this ``fit`` will follow.

    It is over after ``max_epochs`` or ``max_steps``, or when it was told to stop; told so before ``min_epochs`` or
    ``min_steps``, it goes on until then. An epoch whose last batch has ended counts, whether or not it was validated.

    Args:
        trainer: It has ended a training batch.
        epoch_ended: Whether that was the last batch of its epoch.
    """
    num_epochs, num_steps = trainer.current_epoch + epoch_ended, trainer.global_step
    if trainer.max_steps != -1 and num_steps >= trainer.max_steps:
        return True
    if trainer.max_epochs is not None and -1 < trainer.max_epochs <= num_epochs:
        return True
    may_stop = num_epochs >= (trainer.min_epochs or 0) and num_steps >= (trainer.min_steps or 0)
    return trainer.should_stop and may_stop


def num_evaluated(trainer: Trainer) -> list[int | float]:
    """Batches of each loader of a validation or test; infinite where that is not known."""
    return trainer.num_test_batches if trainer.state.fn == "test" else trainer.num_val_batches


def is_of_sample(index: int, num_batches: float, wanted: int) -> bool:
    """Whether a batch is one of so many that are spread evenly over all: data may come sorted, by class say.

    Args:
        index: Of the batch, counted from 0.
        num_batches: All batches; if that is infinite, it is the first that are wanted.
        wanted: How many are, or all there are.
    """
    if math.isinf(num_batches):
        return index < wanted
    return index < num_batches and index * wanted // num_batches > (index - 1) * wanted // num_batches
